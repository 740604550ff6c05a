"""Data sets by their kinds, in train.py and in validate.py: folders, tar files, streams, data sets of the Hub."""
import csv
import gc
import io
import json
import os
import shutil
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support.command_lines import NAFLEX
from support.images import COLORS, write_image_folder
from support.multilabel import write_labelled_tree
from support.validating import constant_checkpoint, result, run_validate

CLASSES = sorted(COLORS)
FORMATS = ('bmp', 'gif', 'jfif', 'jpeg', 'jpg', 'png', 'tif', 'tiff', 'webp')
pytestmark = [
    pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning'),  # timm leaves it to the garbage collector
    pytest.mark.usefixtures('left_open')]


@pytest.fixture
def left_open():
    yield
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ResourceWarning)
        gc.collect()


def tar_of(folder, path):
    with tarfile.open(path, 'w') as tar:
        tar.add(folder, '.')


def weights(done, name='run'):
    return torch.load(done.cwd / 'out' / name / 'last.pth.tar', weights_only=False)['state_dict']


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def last_top1(done, name='run'):
    with open(done.cwd / 'out' / name / 'summary.csv', newline='') as f:
        return float(list(csv.DictReader(f))[-1]['eval_top1'])


def test_hidden_files_and_other_names_of_the_splits_change_nothing(run_in, image_folder, tmp_path):
    plain = run_in(tmp_path, '--experiment plain')
    shutil.copytree(image_folder / 'train', tmp_path / 'data' / 'TRAIN')
    shutil.copytree(image_folder / 'validation', tmp_path / 'data' / 'Val')
    for split in ('TRAIN', 'Val'):
        for hidden in ('.ipynb_checkpoints/a.png', '.thumbs/blue/b.png', 'blue/._0.png'):
            path = tmp_path / 'data' / split / hidden
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image_folder / 'train' / 'red' / '0.png', path)
    other = run_in(tmp_path, '--experiment other --data-dir data')
    assert plain.code == other.code == 0, other.err[-2000:]
    assert same(weights(plain, 'plain'), weights(other, 'other'))
    assert last_top1(plain, 'plain') == last_top1(other, 'other')


@pytest.mark.filterwarnings('ignore:Error processing sample')  # timm's patches go on without it
def test_epoch_of_which_no_batch_comes_ends_the_run(run_in, tmp_path):
    folder = write_image_folder(tmp_path / 'data')
    for path in folder.glob('train/*/*.png'):
        path.write_bytes(b'no image')
    done = run_in(tmp_path, f'{NAFLEX} --data-dir data')
    assert done.code == 2 and '--train-split train: no batch came of it in epoch 0' in done.last_line
    assert not list(done.folder().glob('*.pth.tar'))


def test_one_tar_file_is_not_trained_on_and_validated(run_in, image_folder, tmp_path):
    for split in ('train', 'validation'):
        tar_of(image_folder / split, tmp_path / f'{split}.tar')
    done = run_in(tmp_path, '--data-dir train.tar')
    assert done.code == 2 and "--val-split validation: --data-dir train.tar is one file" in done.last_line
    assert not (tmp_path / 'out').exists()
    folder = run_in(tmp_path, '--experiment folder')
    tars = run_in(tmp_path, '--experiment tars --data-dir . --train-split train.tar --val-split validation.tar')
    alone = run_in(tmp_path, "--experiment alone --data-dir train.tar --val-split ''")
    assert folder.code == tars.code == alone.code == 0, tars.err[-2000:]
    assert same(weights(folder, 'folder'), weights(tars, 'tars')) and same(
        weights(folder, 'folder'), weights(alone, 'alone'))
    assert last_top1(folder, 'folder') == last_top1(tars, 'tars')


def test_class_map_with_a_byte_order_mark_is_a_class_map(run_in, tmp_path):
    plain = run_in(tmp_path, '--experiment plain')
    (tmp_path / 'map.txt').write_text('\n'.join(CLASSES), encoding='utf-8-sig')
    mapped = run_in(tmp_path, '--experiment mapped --class-map map.txt')
    assert plain.code == mapped.code == 0 and same(weights(plain, 'plain'), weights(mapped, 'mapped'))


@pytest.mark.parametrize('lines, words', [
    (['blue', 'gren', 'red', 'yellow'], ['1 of 4 folders with images (green)', 'no folder (gren)']),
    (['blue', 'green', 'red'], ['1 of 4 folders with images (yellow)']),
    (['blue', 'green', 'red', 'white', 'yellow'], ['1 of its 5 classes have no folder (white)']),
])
def test_class_map_that_loses_images_is_refused(run_in, tmp_path, lines, words):
    (tmp_path / 'map.txt').write_text('\n'.join(lines))
    done = run_in(tmp_path, '--class-map map.txt')
    assert done.code == 2 and done.last_line.startswith('train.py: error: --train-split train of --data-dir '), done.err
    assert [word for word in words if word not in done.last_line] == [] and '--class-map map.txt' in done.last_line
    assert not (tmp_path / 'out').exists()


# --- formats ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def mixed(tmp_path_factory):
    """Images of each format in each class, and what is none."""
    root = tmp_path_factory.mktemp('mixed')
    generator = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for name, color in COLORS.items():
            (root / split / name).mkdir(parents=True)
            for i, kind in enumerate(FORMATS):
                pixels = generator.normal(color, 40, (20, 20, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{i}.{kind}')
            (root / split / name / 'notes.txt').write_text('no image')
            (root / split / name / 'photo.heic').write_text('no image')
    return root


def test_formats_are_the_same_in_train_and_validate_and_under_attack(run_in, mixed, tmp_path):
    left_out = '8 files left out, by their names no images: 4 .heic, 4 .txt'
    done = run_in(tmp_path, f'--data-dir {mixed} --epochs 2')
    assert done.code == 0, done.err[-2000:]
    for split in ('train', 'validation'):
        assert f'{mixed}/{split}: {left_out}' in done.err
    base = '--device cpu -j 0 --checkpoint out/run/last.pth.tar'
    single = run_validate(tmp_path, f'--data-dir {mixed}', base)
    assert f'{mixed}/validation: {left_out}' in single.err and '(36 images)' in single.err
    assert result(single)['top1'] == round(last_top1(done), 4)
    suites = run_validate(tmp_path, f'--eval validation={mixed}/validation --attack linf=1/255 --attack-steps 2 '
                                    '--attack-targets 1 --results-file r.json', base)
    said = f'validation: 36 images in {mixed}/validation, training (4 classes); {left_out}'
    assert result(suites) and said in suites.err
    rows = {row['measure']: row for row in json.loads((tmp_path / 'r.json').read_text())['results']}
    assert {row['images'] for row in rows.values()} == {36}
    assert rows['top1']['values'][0] == pytest.approx(result(single)['top1'], abs=1e-4)
    assert rows['clean']['values'] == rows['top1']['values']


# --- streams and data sets of the Hub ---------------------------------------------------------------------------------

def write_webdataset(image_folder, folder):
    """``folder/<split>-0000.tar``: pairs of ``0000.png`` and ``0000.cls``, in a mixed order."""
    folder.mkdir()
    for split in ('train', 'validation'):
        samples = [(path.read_bytes(), str(label).encode()) for label, name in enumerate(CLASSES)
                   for path in sorted((image_folder / split / name).iterdir())]
        order = np.random.default_rng(0).permutation(len(samples))
        with tarfile.open(folder / f'{split}-0000.tar', 'w') as tar:
            for place, i in enumerate(order):
                for ending, content in zip(('png', 'cls'), samples[i]):
                    info = tarfile.TarInfo(f'{place:04}.{ending}')
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def named(image_folder, tmp_path, monkeypatch):
    """Kind -> options of train.py, options of validate.py, for a data set whose files are here."""
    for name in ('HF_HUB_OFFLINE', 'HF_DATASETS_OFFLINE'):
        monkeypatch.setenv(name, '1')
    write_webdataset(image_folder, tmp_path / 'shards')
    os.symlink(image_folder, tmp_path / 'pictures')
    train, val = 'train-0000.tar|40', 'validation-0000.tar|16'
    cache = '--data-dir cache'
    return {
        'wds': (f'--dataset wds/ --data-dir shards --train-split "{train}" --val-split "{val}"',
                f'--dataset wds/ --data-dir shards --split "{val}"'),
        'hfds': (f'--dataset hfds/pictures {cache}', f'--dataset hfds/pictures {cache}'),
        'hfids': (f'--dataset hfids/pictures {cache} --train-num-samples 40 --val-num-samples 16',
                  f'--dataset hfids/pictures {cache} --num-samples 16'),
    }


@pytest.mark.filterwarnings('default::DeprecationWarning', 'default::FutureWarning', 'default::ResourceWarning')
@pytest.mark.parametrize('kind, package', [('wds', 'webdataset'), ('hfds', 'datasets'), ('hfids', 'datasets')])
def test_data_set_with_a_folder_of_its_own_is_trained_on_and_evaluated(run_in, named, tmp_path, kind, package):
    """The folder of --data-dir says nothing of its splits: shards and caches of both lie in it."""
    pytest.importorskip(package)
    train, evaluation = named[kind]
    done = run_in(tmp_path, f'{train} --epochs 2 --sam-variant sam --sam-rho 0.05')
    assert done.code == 0, done.err[-2000:]
    assert len(done.log('Train: 1')) == 5  # 40 images in batches of 8
    evaluated = run_validate(tmp_path, evaluation, '--device cpu -j 0 --checkpoint out/run/last.pth.tar')
    assert '(16 images)' in evaluated.err
    assert result(evaluated)['top1'] == round(last_top1(done), 4)


@pytest.mark.filterwarnings('default::DeprecationWarning', 'default::FutureWarning', 'default::ResourceWarning')
def test_data_set_of_the_hub_has_the_numbers_of_its_folder(run_in, named, tmp_path):
    pytest.importorskip('datasets')
    assert run_in(tmp_path, '--epochs 2').code == 0
    base = '--device cpu -j 0 --checkpoint out/run/last.pth.tar'
    folder = result(run_validate(tmp_path, '--data-dir pictures', base))
    assert result(run_validate(tmp_path, named['hfds'][1], base)) == folder and folder['top1'] > 25


@pytest.mark.filterwarnings('default::DeprecationWarning', 'default::FutureWarning', 'default::ResourceWarning')
@pytest.mark.parametrize('third, options, words', [
    (-1, '', ['images without a class (-1)', 'name a split with labels']),
    (3, '--valid-labels valid.txt', ['has the class 3, the model 2 outputs', '--valid-labels']),
    ('', '', ['has images without a target', 'name a split with labels']),
    (0.5, '', ['has the target ', 'which is no number of a class'])])
def test_images_of_the_hub_that_have_no_class_that_counts(named, tmp_path, third, options, words):
    """Test splits whose labels are kept secret have -1."""
    pytest.importorskip('datasets')
    (tmp_path / 'secret/test').mkdir(parents=True)
    rows = ['file_name,label']
    for i, label in enumerate((0, 1, third)):
        Image.new('RGB', (32, 32)).save(tmp_path / f'secret/test/{i}.png')
        rows.append(f'{i}.png,{label}')
    (tmp_path / 'secret/test/metadata.csv').write_text('\n'.join(rows) + '\n')
    (tmp_path / 'valid.txt').write_text('0\n1\n')
    constant_checkpoint(tmp_path / 'c.pth', [0], 4)
    done = run_validate(tmp_path, f'--dataset hfds/secret --data-dir cache --split test {options}',
                        '--device cpu -j 0 --model test_resnet --num-classes 4 --img-size 32 --checkpoint c.pth')
    assert done.code == 2 and 'Traceback' not in done.err, done.err[-2000:]
    assert all(word in done.last_line for word in words) and '--dataset hfds/secret' in done.last_line


@pytest.mark.parametrize('command', ['hfds/nowhere --data-dir cache', 'wds/ --data-dir shards',
                                     'tfds/nowhere --data-dir x',
                                     'hfids/pictures --data-dir cache --val-split nosplit'])
def test_data_set_that_is_not_there_is_one_line(run_in, named, tmp_path, command):
    for package in ('datasets', 'webdataset'):
        pytest.importorskip(package)
    done = run_in(tmp_path, f'--dataset {command}')
    assert done.code == 2 and done.last_line.startswith('train.py: error: --'), done.err[-2000:]
    assert f'--dataset {command.split()[0]}' in done.last_line and 'Traceback' not in done.err
    assert not (tmp_path / 'out').exists()


def test_unreadable_image_of_the_hub_is_an_error_of_an_evaluation(run_in, named, tmp_path):
    pytest.importorskip('datasets')
    assert run_in(tmp_path).code == 0
    broken = write_image_folder(tmp_path / 'broken') / 'validation' / 'red' / '3.png'
    broken.write_bytes(b'no image')
    done = run_validate(tmp_path, '--dataset hfds/broken --data-dir cache',
                        '--device cpu -j 0 --checkpoint out/run/last.pth.tar')
    assert done.code == 2 and 'cannot read the image' in done.last_line and 'red/3.png (no image)' in done.last_line


@pytest.mark.filterwarnings('default::DeprecationWarning', 'default::FutureWarning', 'default::ResourceWarning')
def test_stream_that_passes_over_samples_says_so(run_in, named, tmp_path):
    """webdataset goes on where an image cannot be decoded: the number of images tells."""
    pytest.importorskip('webdataset')
    assert run_in(tmp_path).code == 0
    path = tmp_path / 'shards' / 'validation-0000.tar'
    with tarfile.open(path) as tar:
        offset = next(member.offset_data for member in tar if member.name == '0003.png')
    content = bytearray(path.read_bytes())
    content[offset:offset + 8] = b'no image'
    path.write_bytes(content)
    done = run_validate(tmp_path, named['wds'][1], '--device cpu -j 0 --checkpoint out/run/last.pth.tar')
    assert result(done) and '(15 images)' in done.err and 'WARNING: --dataset wds/ gave 15 of 16 images' in done.err


@pytest.mark.filterwarnings('default::DeprecationWarning', 'default::FutureWarning', 'default::ResourceWarning')
def test_streamed_samples_have_several_labels_or_the_flags_are_named(run_in, tmp_path):
    pytest.importorskip('webdataset')
    tree = write_labelled_tree(tmp_path / 'tree')
    (tmp_path / 'shards').mkdir()
    for split in ('train', 'validation'):
        with tarfile.open(tmp_path / 'shards' / f'{split}-0000.tar', 'w') as tar:
            for i, labels in enumerate(json.loads((tree / split / 'labels.json').read_text())):
                image, labels = (tree / split / f'{i}.png').read_bytes(), json.dumps({'labels': labels}).encode()
                for ending, content in (('png', image), ('json', labels)):
                    info = tarfile.TarInfo(f'{i:04}.{ending}')
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    data = '--task multilabel --num-classes 4 --dataset wds/ --data-dir shards'
    command = (f'{data} --train-split "train-0000.tar|24" --val-split "validation-0000.tar|7" --sam-variant sam '
               f'--sam-rho 0.05')
    done = run_in(tmp_path, f'{command} --target-key labels')
    assert done.code == 0, done.err[-2000:]
    with open(tmp_path / 'out' / 'run' / 'summary.csv', newline='') as f:
        expected = float(list(csv.DictReader(f))[-1]['eval_map'])
    evaluated = run_validate(tmp_path, f'{data} --target-key labels --split "validation-0000.tar|7"',
                             '--device cpu -j 0 --checkpoint out/run/last.pth.tar')
    assert result(evaluated)['map'] == pytest.approx(expected, abs=1e-4)
    for wrong, word in (('--target-key names', "not found"), ('--target-key labels --num-classes 3', 'in [0, 3)')):
        done = run_in(tmp_path, f'{command} --experiment wrong {wrong} -j 1')
        assert done.code == 2 and word in done.last_line and 'check --' in done.last_line, done.err[-2000:]
        assert 'Traceback' not in done.err


@pytest.mark.filterwarnings('default::DeprecationWarning', 'default::FutureWarning', 'default::ResourceWarning')
@pytest.mark.parametrize('kind, package', [('wds', 'webdataset'), ('hfds', 'datasets')])
def test_class_that_the_model_has_not_is_one_line(run_in, named, tmp_path, kind, package):
    pytest.importorskip(package)
    done = run_in(tmp_path, f'{named[kind][0]} --num-classes 3')
    assert done.code == 2 and 'Traceback' not in done.err, done.err[-2000:]
    assert '--num-classes' in done.last_line and ('class 3' in done.last_line or '4 classes' in done.last_line)
