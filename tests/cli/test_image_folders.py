"""Splits, classes and files of image folders and tar files: what is read, what is passed over, what is an error."""
import gc
import logging
import pickle
import tarfile
import warnings
from pathlib import Path

import pytest
from PIL import Image
from timm.data import create_dataset

from timm_sam.cli.errors import OptionError
from timm_sam.cli.image_folders import open_files, open_named, read_class_map, split_root

ORIGIN = '--split validation'
pytestmark = pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')


@pytest.fixture
def data(tmp_path):
    """``data('train/cat/1.png', ...)`` writes small images, and gives the folder."""
    def write(*paths):
        for path in paths:
            file = tmp_path / 'data' / path
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix in ('.txt', '.md', '.heic'):
                file.write_text('no image')
            else:
                Image.new('RGB', (8, 8), (200, 30, 30)).save(file)
        return str(tmp_path / 'data')
    return write


@pytest.fixture
def left_open():
    """timm leaves it to the garbage collector to close files."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ResourceWarning)
        gc.collect()


def refused(action, *arguments, **options):
    with pytest.raises(OptionError) as caught:
        action(*arguments, **options)
    assert '\n' not in str(caught.value)
    return str(caught.value)


def shown(dataset, root):
    """Classes by number, and files with their labels."""
    names = {index: name for name, index in dataset.reader.class_to_idx.items()}
    targets = []
    for i in range(len(dataset)):
        file, target = dataset.reader[i]
        file.close()
        targets.append(int(target))
    return [names[i] for i in sorted(names)], list(zip(dataset.filenames(), targets))


# --- splits -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('there, split, found', [
    (['train', 'validation'], 'validation', 'validation'),
    (['train', 'val'], 'validation', 'val'),
    (['train', 'eval', 'valid'], 'validation', 'valid'),
    (['train', 'Val'], 'validation', 'Val'),
    (['Train', 'VALIDATION'], 'train', 'Train'),
    (['TRAINING', 'VALIDATION'], 'train', 'TRAINING'),
    (['Train', 'VALIDATION'], 'val', 'VALIDATION'),
    (['val', 'VAL'], 'val', 'val'),
    (['val', 'VAL'], 'VAL', 'VAL'),
    (['train', 'Holdout'], 'holdout', 'Holdout'),
    (['train', 'test'], 'test', 'test'),
    (['a', 'b', 'c'], 'validation', ''),  # classes
    (['train', 'validation'], 'validation[:100]', 'validation'),
])
def test_split_is_found_in_whatever_case(data, there, split, found):
    root = data(*(f'{name}/cat/1.png' for name in there))
    assert Path(split_root(root, split, ORIGIN)) == Path(root, found)


@pytest.mark.parametrize('there, split', [
    (['train', 'holdout'], 'validation'), (['Train', '.ipynb_checkpoints'], 'validation'),
    (['val', 'holdout'], 'train'),
    (['train', 'validation'], 'val2'), (['TEST', 'x'], 'validation'),
])
def test_split_that_is_not_there_among_others_is_an_error_that_lists_them(data, there, split):
    root = data(*(f'{name}/cat/1.png' for name in there))
    message = refused(split_root, root, split, f'--split {split}')
    seen = ', '.join(sorted(name for name in there if not name.startswith('.')))
    assert message == (f'--split {split}: --data-dir {root} has no such folder, but {seen}, whose images would be '
                       'mixed; name one of them')


def test_two_spellings_of_a_split_are_an_error(data):
    root = data('VAL/cat/1.png', 'Val/cat/1.png')
    assert 'has VAL and Val; name one of them, in its case' in refused(split_root, root, 'val', ORIGIN)


def test_splits_of_names_nobody_knows_are_no_classes(data):
    root = data('trn/cat/1.png', 'trn/dog/1.png', 'holdout/cat/1.png', 'holdout/dog/1.png')
    message = refused(open_files, root, 'validation', ORIGIN)
    assert message.startswith(f'{ORIGIN} of --data-dir {root}: ') and 'holdout, trn' in message
    assert shown(open_files(root, 'trn', '--split trn'), root) == (
        ['cat', 'dog'], [('cat/1.png', 0), ('dog/1.png', 1)])
    assert shown(open_files(root, '', "--split ''"), root)[0] == ['cat', 'dog']  # asked for in so many words
    nested = data('validation/animals/cat/1.png', 'validation/cars/bus/1.png')  # below a split it is timm's hierarchy
    assert shown(open_files(nested, 'validation', ORIGIN), root)[0] == ['bus', 'cat']


# --- folders ----------------------------------------------------------------------------------------------------------

def test_folder_is_read_as_timm_reads_it(data):
    root = data(*(f'val/{name}/{i}.png' for name in ('n10', 'n9', 'a') for i in (10, 9, 1)))
    mine, timms = open_files(root, 'val', '--split val'), create_dataset('', root=root, split='val')
    assert mine.reader.samples == timms.reader.samples and mine.reader.class_to_idx == timms.reader.class_to_idx
    assert shown(mine, root)[0] == ['a', 'n9', 'n10']


def test_what_is_hidden_is_no_class_and_no_image(data):
    plain = data('val/cat/1.png', 'val/dog/1.png')
    before = shown(open_files(plain, 'val', '--split val'), plain)
    data('val/.ipynb_checkpoints/1.png', 'val/cat/._1.png', 'val/cat/.thumbs/1.png', 'val/._dog/1.png')
    assert shown(open_files(plain, 'val', '--split val'), plain) == before == (
        ['cat', 'dog'], [('cat/1.png', 0), ('dog/1.png', 1)])
    # timm numbers them otherwise: or this test could not fail
    assert len(create_dataset('', root=plain, split='val').reader.class_to_idx) > 2


def test_classes_whose_names_are_one_number_have_an_order(data):
    """To timm's order 1, 01 and 001 are alike; which is first was the hash of the day."""
    root = data('val/01/1.png', 'val/1/1.png', 'val/001/1.png')
    assert shown(open_files(root, 'val', '--split val'), root)[0] == ['001', '01', '1']


def test_image_beside_the_class_folders_is_an_error(data):
    root = data('val/cat/1.png', 'val/dog/1.png', 'val/preview.png')
    message = refused(open_files, root, 'val', '--split val')
    assert '1 images beside its class folders (preview.png)' in message


@pytest.mark.usefixtures('left_open')
def test_all_formats_are_read_and_what_is_left_out_is_counted(data, caplog):
    formats = ['bmp', 'gif', 'jfif', 'jpeg', 'jpg', 'png', 'tif', 'tiff', 'webp', 'PNG', 'JPEG']
    images = [f'val/cat/{i:02}.{kind}' for i, kind in enumerate(formats)]
    with caplog.at_level(logging.INFO):
        root = data(*images, 'val/cat/a.txt', 'val/cat/b.txt', 'val/README.md', 'val/cat/c.heic')
        dataset = open_files(root, 'val', '--split val')
    assert [name for name, _ in shown(dataset, root)[1]] == [path.removeprefix('val/') for path in images]
    assert [dataset[i][0].size for i in range(len(dataset))] == [(8, 8)] * len(formats)
    assert f'{root}/val: 4 files left out, by their names no images: 2 .txt, 1 .heic, 1 .md' in caplog.messages
    assert [name for name, _ in shown(open_files(root, 'val', 'x', input_key='.webp; BMP'), root)[1]] == [
        'cat/00.bmp', 'cat/08.webp']
    assert '(11 files left out' not in refused(open_files, root, 'val', 'x', input_key='img')
    assert '15 files left out' in refused(open_files, root, 'val', 'x', input_key='img')


# --- tar files --------------------------------------------------------------------------------------------------------

def tar_of(folder, path):
    with tarfile.open(path, 'w') as tar:
        tar.add(folder, '.')
    return str(path)


@pytest.mark.usefixtures('left_open')
def test_tar_file_is_read_as_a_folder_is(data, tmp_path):
    root = Path(data('cat/1.webp', 'dog/1.png', 'dog/._1.png', '.hidden/1.png'))
    path = tar_of(root, tmp_path / 'x.tar')
    dataset = open_files(path, 'validation', ORIGIN)
    assert shown(dataset, path) == (['cat', 'dog'], [('./cat/1.webp', 0), ('./dog/1.png', 1)])
    assert dataset[0][0].size == (8, 8)
    (tmp_path / 'map.txt').write_text('dog\ncat\n')
    assert shown(open_files(path, 'validation', ORIGIN, class_map=str(tmp_path / 'map.txt')), path)[0] == ['dog', 'cat']
    (tmp_path / 'map.txt').write_text('dog\ncatt\n')
    message = refused(open_files, path, 'validation', ORIGIN, class_map=str(tmp_path / 'map.txt'))
    assert 'does not name 1 of 2 folders with images (cat)' in message and 'no folder (catt)' in message
    data('stray.png')
    assert 'images beside its class folders' in refused(
        open_files, tar_of(root, tmp_path / 'y.tar'), 'validation', ORIGIN)
    (tmp_path / 'z.tar').write_bytes(Path(path).read_bytes()[:700])
    assert 'z.tar has no images, or cannot be read' in refused(
        open_files, str(tmp_path / 'z.tar'), 'validation', ORIGIN)


@pytest.mark.usefixtures('left_open')
def test_split_is_a_tar_file_in_the_folder(data, tmp_path):
    path = tar_of(data('cat/1.png'), tmp_path / 'val.tar')
    assert split_root(str(tmp_path), 'val.tar', '--split val.tar') == path
    assert len(open_files(str(tmp_path), 'val.tar', '--split val.tar')) == 1


# --- class maps -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('content', [
    b'dog\ncat\n', b'dog\r\ncat\r\n', b'dog\ncat', b'\xef\xbb\xbfdog\ncat\n', b' dog \ncat\n\n\n'],
    ids=['unix', 'windows', 'no last line break', 'byte-order mark', 'blanks'])
def test_class_map_numbers_the_folders(data, tmp_path, content):
    root = data('val/cat/1.png', 'val/dog/1.png')
    (tmp_path / 'map.txt').write_bytes(content)
    dataset = open_files(root, 'val', '--split val', class_map=str(tmp_path / 'map.txt'))
    assert shown(dataset, root) == (['dog', 'cat'], [('cat/1.png', 1), ('dog/1.png', 0)])


@pytest.mark.parametrize('content, words', [
    ('dgo\ncat\n', ['does not name 1 of 2 folders with images (dog)', 'left out',
                    '1 of its 2 classes have no folder (dgo)']),
    ('cat\n', ['does not name 1 of 2 folders with images (dog)']),
    ('cat\ndog\nbird\n', ['1 of its 3 classes have no folder (bird)', 'a folder may be empty']),
    ('cat\n\ndog\n', ['line 2 is blank']),
    ('cat\ndog\ncat\n', ['names cat twice']),
    ('\ufeff\ufeffcat\ndog', ['does not name 1 of 2']),
    ('', ['line 1 is blank']),
])
def test_class_map_that_would_lose_images_is_an_error(data, tmp_path, content, words):
    root = data('val/cat/1.png', 'val/dog/1.png')
    (tmp_path / 'map.txt').write_text(content, encoding='utf-8')
    message = refused(open_files, root, 'val', '--split val', class_map=str(tmp_path / 'map.txt'))
    assert [word for word in words if word not in message] == [], message
    assert f'--class-map {tmp_path}/map.txt' in message


def test_empty_folder_stands_for_a_class_without_images(data, tmp_path):
    root = data('val/cat/1.png', 'val/dog/1.png')
    Path(root, 'val', 'bird').mkdir()
    (tmp_path / 'map.txt').write_text('bird\ncat\ndog\n')
    dataset = open_files(root, 'val', '--split val', class_map=str(tmp_path / 'map.txt'))
    assert shown(dataset, root)[1] == [('cat/1.png', 1), ('dog/1.png', 2)]


@pytest.mark.parametrize('content', [
    ['cat'], {}, {'cat': -1}, {'cat': 'one'}, {'cat': None}, {'cat': 1.5}], ids=str)
def test_pickled_class_map_is_looked_at(tmp_path, content):
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps(content))
    assert 'a class per line' in refused(read_class_map, str(tmp_path / 'map.pkl'))
    (tmp_path / 'map.pkl').write_bytes(pickle.dumps({'cat': 1, 'dog': 1}))
    assert read_class_map('map.pkl', str(tmp_path / 'elsewhere'), str(tmp_path)) == {'cat': 1, 'dog': 1}


def test_class_map_of_another_encoding_is_an_error(tmp_path):
    (tmp_path / 'map.txt').write_text('größe\n', encoding='utf-16')
    assert 'a class per line' in refused(read_class_map, str(tmp_path / 'map.txt'))
    assert 'there is no such file' in refused(read_class_map, 'nowhere.txt', str(tmp_path))


# --- data sets of libraries -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['wsd/x', 'imagenet', 'wds', 'hf/x', '/x'])
def test_data_set_of_an_unknown_kind_is_no_folder(data, name):
    message = refused(open_named, name, data('cat/1.png'), 'validation', ORIGIN, num_classes=2)
    assert f'--dataset {name} is of no known kind: use torch/NAME' in message


def test_hidden_folder_is_no_class_of_torchvisions_either(data):
    root = data('val/cat/1.png', 'Train/cat/1.png', 'Train/.ipynb_checkpoints/1.png')
    assert len(open_named('torch/folder', root, 'validation', ORIGIN, num_classes=2)) == 1
    message = refused(open_named, 'torch/folder', root, 'train', '--train-split train', num_classes=2)
    assert 'hidden folders for classes (.ipynb_checkpoints)' in message
