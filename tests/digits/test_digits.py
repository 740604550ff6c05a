"""scikit-learn's digits as an image folder."""
import hashlib
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.running import working_directory

from timm_sam.digits import __main__ as digits
from timm_sam.digits.shifts import SHIFTS

pytestmark = pytest.mark.full


@pytest.fixture(scope='module', autouse=True)
def sklearn_datasets():
    return pytest.importorskip('sklearn.datasets')  # takes seconds


@pytest.fixture(scope='module')
def scans(sklearn_datasets):
    return sklearn_datasets.load_digits()


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits') / 'full'
    return folder, digits.export(str(folder))


@pytest.fixture(scope='module')
def tune(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits') / 'tune'
    return folder, digits.export(str(folder), size=8, tune=True)


def images(folder, split):
    return sorted(Path(folder, split).rglob('*.png'))


def indices(folder, split):
    return {int(path.stem) for path in images(folder, split)}


def contents(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob('*') if path.is_file()}


def test_every_scan_is_in_one_split(full, scans):
    folder, counts = full
    assert counts == {'train': 1437, 'validation': 360}
    assert {split: len(images(folder, split)) for split in counts} == counts
    train, validation = indices(folder, 'train'), indices(folder, 'validation')
    assert train.isdisjoint(validation) and train | validation == set(range(len(scans.target)))


def test_layout_is_one_folder_per_split_and_digit_and_nothing_else(full):
    folder, _ = full
    assert sorted(path.name for path in folder.iterdir()) == ['shifted', 'train', 'validation']
    assert {path.name for path in (folder / 'shifted').iterdir()} == set(SHIFTS)
    for split in [folder / 'train', folder / 'validation', *(folder / 'shifted').iterdir()]:
        assert sorted(path.name for path in split.iterdir()) == [str(digit) for digit in range(10)]
    files = [path for path in folder.rglob('*') if path.is_file()]
    assert len(files) == 1797 + len(SHIFTS) * 360 and {path.suffix for path in files} == {'.png'}
    assert folder.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in folder.parent.iterdir()) == ['full']  # nothing left aside


@pytest.mark.parametrize('which', ['full', 'tune'])
def test_splits_have_every_digit_in_the_same_proportion(request, which):
    folder, _ = request.getfixturevalue(which)
    shares = []
    for split in ('train', 'validation'):
        counts = Counter(path.parent.name for path in images(folder, split))
        shares.append(np.array([counts[str(digit)] for digit in range(10)]) / sum(counts.values()))
    assert np.abs(shares[0] - shares[1]).max() < 0.005


def test_tune_splits_the_training_part_and_never_shows_a_validation_image(full, tune):
    folder, counts = tune
    train, validation = indices(folder, 'train'), indices(folder, 'validation')
    assert counts == {'train': 1149, 'validation': 288} == {'train': len(train), 'validation': len(validation)}
    assert train.isdisjoint(validation) and train | validation == indices(full[0], 'train')
    assert (train | validation).isdisjoint(indices(full[0], 'validation'))


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_images_of_8_pixels_are_the_scans_under_their_label(tune, scans, split):
    for path in images(tune[0], split):
        i = int(path.stem)
        with Image.open(path) as image:
            assert image.mode == 'L' and image.size == (8, 8)
            np.testing.assert_array_equal(np.rint(np.asarray(image, dtype=float) * 16 / 255), scans.images[i])
        assert path.parent.name == str(scans.target[i])


def test_larger_images_are_the_scans_enlarged(full, scans):
    for split in ('train', 'validation'):
        for path in images(full[0], split)[::50]:
            i = int(path.stem)
            with Image.open(path) as image:
                assert image.mode == 'L' and image.size == (32, 32)
                back = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
            assert np.corrcoef(back.ravel(), scans.images[i].ravel())[0, 1] > 0.97
            assert path.parent.name == str(scans.target[i])


@pytest.mark.parametrize('size', [8, 20, 64])
def test_size_is_the_one_asked_for(tmp_path, size):
    digits.export(str(tmp_path / 'data'), size=size, tune=True)
    with Image.open(images(tmp_path / 'data', 'train')[0]) as image:
        assert image.size == (size, size)


def test_export_is_the_same_every_time_whatever_the_random_state(tune, tmp_path):
    np.random.seed(7)
    digits.export(str(tmp_path / 'again'), size=8, tune=True)
    assert contents(tmp_path / 'again') == contents(tune[0])


# Few and wrong labels

def test_few_images_are_of_each_digit_in_proportion_and_the_same_every_time(tmp_path, full):
    for name in ('a', 'b'):
        counts = digits.export(str(tmp_path / name), size=8, train_size=200, seed=3)
        assert counts == {'train': 200, 'validation': 360}
    digits.export(str(tmp_path / 'c'), size=8, train_size=200, seed=4)
    few, other = indices(tmp_path / 'a', 'train'), indices(tmp_path / 'c', 'train')
    assert few < indices(full[0], 'train') and few != other and contents(tmp_path / 'a') == contents(tmp_path / 'b')
    assert set(Counter(path.parent.name for path in images(tmp_path / 'a', 'train')).values()) <= {19, 20, 21}
    assert indices(tmp_path / 'a', 'validation') == indices(full[0], 'validation')


@pytest.mark.parametrize('noise', [0.0, 0.25, 0.5])
def test_share_of_training_labels_is_wrong_and_validation_labels_are_true(tmp_path, scans, noise):
    folder = tmp_path / 'data'
    digits.export(str(folder), size=8, train_size=1000, label_noise=noise, seed=1)
    given = {split: {int(path.stem): int(path.parent.name) for path in images(folder, split)}
             for split in ('train', 'validation')}
    wrong = [(scans.target[i], label) for i, label in given['train'].items() if label != scans.target[i]]
    assert len(wrong) == 1000 * noise and all(label == scans.target[i] for i, label in given['validation'].items())
    if noise:  # each of the nine wrong digits is as likely as the others
        shifts = Counter((label - true) % 10 for true, label in wrong)
        assert set(shifts) == set(range(1, 10)) and max(shifts.values()) < 3 * min(shifts.values())


def test_tuning_split_may_be_small_and_noisy_too(tmp_path, tune):
    counts = digits.export(str(tmp_path / 'data'), size=8, tune=True, train_size=100, label_noise=0.4)
    assert counts == {'train': 100, 'validation': 288}
    assert indices(tmp_path / 'data', 'validation') == indices(tune[0], 'validation')
    assert indices(tmp_path / 'data', 'train') < indices(tune[0], 'train')


# The command

def test_command_writes_the_folder_and_says_what_is_in_it(tmp_path, capsys):
    folder = tmp_path / 'new' / 'data'
    assert digits.main([str(folder), '--size', '8']) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f'{folder}: 1437 images in train, 360 images in validation, ') and shown.err == ''
    assert all(shift in shown.out for shift in SHIFTS)
    assert len(images(folder, 'validation')) == 360


def test_command_takes_few_images_and_wrong_labels(tmp_path, capsys):
    argv = ['--size', '8', '--train-size', '50', '--label-noise', '0.2', '--seed', '5']
    assert digits.main([str(tmp_path / 'a'), *argv]) == 0
    assert '50 images in train' in capsys.readouterr().out
    digits.export(str(tmp_path / 'b'), size=8, train_size=50, label_noise=0.2, seed=5)
    assert contents(tmp_path / 'a') == contents(tmp_path / 'b')


def test_empty_folder_may_be_used(tmp_path):
    folder = tmp_path / 'data'
    folder.mkdir()
    with working_directory(tmp_path):
        assert digits.main(['data', '--size', '8', '--tune']) == 0
    assert len(images(folder, 'train')) == 1149


def refused(capsys, argv):
    """The message that the command refuses ``argv`` with."""
    try:
        code = digits.main(argv)
    except SystemExit as e:
        code = e.code
    shown = capsys.readouterr()
    assert code == 2 and shown.out == '' and shown.err.count('\n') == 1
    assert shown.err.startswith('python -m timm_sam.digits: error: ')
    return shown.err


def test_used_folder_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'notes.txt').write_text('mine')
    message = refused(capsys, [str(tmp_path / 'data')])
    assert str(tmp_path / 'data') in message and 'in use' in message
    assert {path.name for path in tmp_path.rglob('*')} == {'data', 'notes.txt'}
    assert (tmp_path / 'data' / 'notes.txt').read_text() == 'mine'


def test_file_in_place_of_the_folder_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / 'data').write_text('mine')
    assert 'in use' in refused(capsys, [str(tmp_path / 'data')])
    assert (tmp_path / 'data').read_text() == 'mine'


@pytest.mark.parametrize('argv, words', [
    (['--size', '7'], ['--size 7', '8']),
    (['--size', '-1'], ['--size -1', '8']),
    (['--size', 'x'], ['--size', "'x'"]),
    (['--train-size', '9'], ['--train-size 9', '10..1427']),
    (['--train-size', '1428'], ['--train-size 1428', 'one image per digit']),
    (['--train-size', '1437'], ['--train-size 1437']),
    (['--label-noise', '1'], ['--label-noise 1']),
    (['--label-noise', 'nan'], ['--label-noise nan']),
    (['--label-noise', '-0.1'], ['--label-noise']),
    (['--seed', '-1'], ['--seed -1']),
])
def test_impossible_sizes_and_shares_are_refused(tmp_path, capsys, argv, words):
    message = refused(capsys, [str(tmp_path / 'data'), *argv])
    assert [word for word in words if word not in message] == []
    assert list(tmp_path.iterdir()) == []


def test_missing_scikit_learn_is_named_with_the_way_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    message = refused(capsys, [str(tmp_path / 'data')])
    assert 'sklearn' in message and 'pip install' in message and list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    message = refused(capsys, [str(tmp_path / 'file' / 'data')])
    assert str(tmp_path / 'file') in message


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_interrupted_export_leaves_nothing(tmp_path, monkeypatch, error):
    saved = []

    def save(self, path):
        saved.append(path)
        if len(saved) == 100:
            raise error

    monkeypatch.setattr(Image.Image, 'save', save)
    # an OSError is the user's to mend: one line
    with pytest.raises(digits.OptionError if error is OSError else error):
        digits.export(str(tmp_path / 'data'))
    assert len(saved) == 100 and list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    saved = []

    def full(self, path, *args, **kwargs):
        saved.append(path)
        if len(saved) == 3:
            raise OSError(28, 'No space left on device')
        return save(self, path, *args, **kwargs)
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, 'save', full)
    assert digits.main([str(tmp_path / 'digits')]) == 2
    assert capsys.readouterr().err == (
        f'python -m timm_sam.digits: error: {tmp_path}/digits cannot be written (No space left on device): make room, '
        'or name another folder\n')
    assert list(tmp_path.iterdir()) == [] and len(saved) == 3


def test_pipe_is_not_replaced(tmp_path, capsys):
    os.mkfifo(tmp_path / 'digits')
    assert digits.main([str(tmp_path / 'digits')]) == 2
    assert 'digits is in use' in capsys.readouterr().err and (tmp_path / 'digits').is_fifo()
