"""Fashion-MNIST as folders: of files of its format, made up here."""
import gzip

import pytest
from PIL import Image
from support.fashion import write_files
from support.running import in_process

from timm_sam.fashion.__main__ import CLASSES, main


@pytest.fixture
def source(tmp_path):
    return write_files(tmp_path / 'source', 60, 20)


def test_training_part_is_balanced_and_all_test_images_are_there(source, tmp_path):
    done = in_process(main, ['data', '--train-size', '30', '--source', str(source)], tmp_path)
    assert done.code == 0 and '30 images in train, 20 images in validation' in done.out, done.err
    for split, each in (('train', 3), ('validation', 2)):
        for number, name in enumerate(CLASSES):
            paths = sorted((tmp_path / 'data' / split / name).iterdir())
            assert len(paths) == each
            for path in paths:
                image = Image.open(path)
                assert image.size == (28, 28) and image.mode == 'L' and int(path.stem) % 10 == number
                assert image.getextrema() == (int(path.stem),) * 2
    other = in_process(main, ['other', '--train-size', '30', '--source', str(source), '--seed', '1'], tmp_path)
    assert other.code == 0
    names = [{path.name for path in (tmp_path / folder / 'train').rglob('*.png')} for folder in ('data', 'other')]
    assert len(names[0]) == 30 and names[0] != names[1]


@pytest.mark.parametrize('line, said', [
    (['data', '--source', 'nowhere'], 'apt-get install dataset-fashion-mnist'),
    (['data', '--train-size', '25'], '--train-size 25 is not a multiple of 10'),
    (['data', '--train-size', '70'], 'in 10..60'),
    (['data', '--seed', '-1'], '--seed -1'),
    (['source'], 'source is in use'),
    (['source/file/data'], 'cannot be written'),
    (['data', '--broken'], 'is no file of Fashion-MNIST'),
])
def test_mistake_is_one_line(source, tmp_path, line, said):
    (source / 'file').write_text('')
    if line[-1] == '--broken':
        (source / 't10k-labels-idx1-ubyte.gz').write_bytes(gzip.compress(b'\0\0\x08\x03' + bytes(20)))
        line = line[:-1]
    if '--source' not in line:
        line = [*line, '--source', 'source']
    done = in_process(main, line, tmp_path)
    assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err
    assert {path.name for path in tmp_path.iterdir()} == {'source'}
