"""What a run meets around it: images that cannot be read, folders that cannot be written, odd files in its folder."""
import argparse
import os
import shutil
import struct
import sys
import time
import zlib

import pytest
import torch
from support.states import tree

from timm_sam.cli.errors import OptionError
from timm_sam.cli.rules import device_is_there
from timm_sam.training.model_checks import check_filter

SAM_ON = '--sam-variant sam --sam-rho 0.05'


def bomb(path, side=20_000):
    """A PNG file of a few hundred bytes that says it is an image of `side` x `side` pixels."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0')) +
                     chunk(b'IEND', b''))


@pytest.fixture
def broken_data(image_folder, tmp_path):
    """The images of training made something else; what their folder is called."""
    def make(change):
        shutil.copytree(image_folder, tmp_path / 'data')
        for path in (tmp_path / 'data' / 'train').rglob('*.png'):
            change(path)
        return '--data-dir data'
    return make


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.full
@pytest.mark.filterwarnings('ignore:Image size:PIL.Image.DecompressionBombWarning')
@pytest.mark.parametrize('change', [lambda path: path.write_bytes(b''), bomb, pipe], ids=['empty', 'bomb', 'pipe'])
@pytest.mark.parametrize('workers', [0, 1])
def test_images_none_of_which_can_be_read_are_one_line(run_train, broken_data, change, workers):
    done = run_train(f'{broken_data(change)} -j {workers}')
    assert done.code == 2 and 'Traceback' not in done.err
    assert '--train-split train of --data-dir data: 10 images in a row cannot be read' in done.last_line
    assert 'restore the files; nothing was kept' in done.last_line


@pytest.mark.full
def test_images_that_cannot_be_read_any_more_end_a_run_that_says_what_it_kept(run_train, broken_data, tmp_path):
    data = broken_data(lambda path: None)
    assert run_train(f'{data} --epochs 1').code == 0
    for path in (tmp_path / 'data' / 'train').rglob('*.png'):
        path.write_bytes(b'')
    done = run_train(f'{data} --epochs 2 --resume auto')
    assert done.code == 2 and 'Traceback' not in done.err
    assert 'last.pth.tar is whole, go on with --resume auto' in done.last_line
    assert (done.folder() / 'last.pth.tar').is_file()


@pytest.mark.full
def test_folder_that_takes_no_images_ends_the_run_with_one_line(run_train, monkeypatch):
    import torchvision

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torchvision.utils, 'save_image', full)
    done = run_train('--save-images')
    assert done.code == 2 and 'Traceback' not in done.err
    assert '--output' in done.last_line and 'No space left on device' in done.last_line and 'kept' in done.last_line


@pytest.mark.full
def test_results_that_cannot_be_printed_are_one_line(run_train, monkeypatch):
    from timm_sam import train

    class Full:
        def write(self, text):
            raise OSError(28, 'No space left on device')

        def flush(self):
            raise OSError(28, 'No space left on device')

    real = train.say

    def say(text):
        before, sys.stdout = sys.stdout, Full()
        try:
            real(text)
        finally:
            sys.stdout = before
    monkeypatch.setattr(train, 'say', say)
    done = run_train()
    assert done.code == 2 and 'stdout cannot be written (No space left on device)' in done.last_line
    assert 'Traceback' not in done.err and (done.folder() / 'last.pth.tar').is_file()


@pytest.mark.parametrize('name', ['args.yaml', 'summary.csv', 'timing.csv'])
def test_pipe_in_the_runs_folder_is_not_waited_for(run_train, tmp_path, name):
    (tmp_path / 'out' / 'run').mkdir(parents=True)
    os.mkfifo(tmp_path / 'out' / 'run' / name)
    before = tree(tmp_path)
    for options in ('', '--resume auto'):
        done = run_train(options)
        assert done.code == 2 and f'{name} is no regular file' in done.last_line and tree(tmp_path) == before


# The device

def test_device_that_a_module_is_to_bring_is_looked_for_once_the_module_is_there(run_train, tmp_path, monkeypatch):
    args = argparse.Namespace(device='foo:0')
    assert not any(broken for broken, _ in device_is_there(args, ['brings_foo']))
    (tmp_path / 'brings_foo.py').write_text('there = True')  # but no device
    monkeypatch.syspath_prepend(tmp_path)
    done = run_train('--device foo:0 --device-modules brings_foo')
    assert done.code == 2 and '--device foo:0 is no device of torch' in done.last_line
    assert sys.modules.pop('brings_foo').there


# The options and the model

@pytest.mark.parametrize('options, words', [
    (f'{SAM_ON} --sam-m 1', ['--sam-m 1:', 'batch normalization', 'larger']),
    (f'{SAM_ON} --sam-m 7', ['--sam-m 7, of which --batch-size 8 leaves one sample over', 'batch normalization']),
    (f'{SAM_ON} --sam-ascent-fraction 0.1', ['--sam-ascent-fraction 0.1', 'batch normalization']),
    ('-b 1', ['--batch-size 1', 'batch normalization']),
])
def test_single_samples_for_batch_normalization_are_refused_before_anything_is_written(run_train, tmp_path, options,
                                                                                     words):
    done = run_train(options)
    assert done.code == 2 and 'Traceback' not in done.err and list(tmp_path.iterdir()) == []
    assert [word for word in words if word not in done.last_line] == [], done.last_line


@pytest.mark.parametrize('options, words', [
    ('--naflex-loader', ['--naflex-loader', 'images of one size', 'NaFlex']),
    ('--tta 3 -vb 9', ['--tta 3', '16 validation inputs']),
    ('--tta 3', ['--tta 3', '8 inputs', '--validation-batch-size']),
    ('--task multilabel', ['--task multilabel', 'one class', '--dataset']),
    ('--crop-pct 1e-9', ['--crop-pct 1e-09', '0.875']),
    ('--crop-pct 1e30', ['--crop-pct 1e+30', '0.01 to 4']),
    ('--device meta', ['--device meta']),
])
def test_what_random_options_have_found_is_one_line(run_train, tmp_path, options, words):
    done = run_train(options)
    assert done.code == 2 and 'Traceback' not in done.err and list(tmp_path.iterdir()) == []
    assert [word for word in words if word not in done.last_line] == [], done.last_line


@pytest.mark.parametrize('options', [
    f'{SAM_ON} --sam-m 1 --img-size 64',  # more than a pixel is left in front of the last layers
    f'{SAM_ON} --sam-m 1 --model test_vit --model-kwargs img_size=32', f'{SAM_ON} --sam-m 4'])
@pytest.mark.full
def test_single_samples_that_can_be_trained_on_are(run_train, options):
    assert run_train(options).code == 0


def test_looking_for_single_samples_changes_nothing(image_folder):
    import argparse

    import timm

    from timm_sam.training.model_checks import check_single_samples
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4).eval()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    args = argparse.Namespace(batch_size=1, train_batch_sizes=None, sam_m=None, sam_ascent_fraction=1.0, aug_splits=0,
                              naflex_loader=False, split_bn=False, sync_bn=False, train_img_sizes=None,
                              mixup_mode='batch')
    check_single_samples(args, model, {'input_size': (3, 64, 64)})
    with pytest.raises(OptionError, match='--batch-size 1'):
        check_single_samples(args, model, {'input_size': (3, 32, 32)})
    assert not model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize('pattern, words', [
    (r'(.+)+!', ['takes more than', 'multiply']),
    (r'(a{1,9999}){99999999999}', ['is too large', 'shorter']),
    ('(' * 3000 + 'a' + ')' * 3000, ['--sam-filter', 'too large']),
])
def test_pattern_that_does_not_come_to_an_end_is_one_line(run_train, tmp_path, monkeypatch, pattern, words):
    monkeypatch.setattr('timm_sam.training.model_checks.SECONDS', 0.5)
    start = time.monotonic()
    done = run_train(f"{SAM_ON} --sam-params all --sam-filter '{pattern}'")
    assert done.code == 2 and 'Traceback' not in done.err and time.monotonic() - start < 20
    assert [word for word in words if word not in done.last_line] == [], done.last_line
    assert list(tmp_path.iterdir()) == []


def test_time_for_a_pattern_leaves_the_alarm_as_it_was():
    import signal
    before = signal.getsignal(signal.SIGALRM)
    check_filter('layer', ['layer4.0.bn2.weight'] * 100)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
