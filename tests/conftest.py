"""Fixtures of the tests of the scripts: a small image folder, and train.py run in process."""
import os
import random
import shlex
from collections import Counter, OrderedDict
from zlib import crc32

os.environ.setdefault('OMP_NUM_THREADS', '1')  # also for the processes that tests start

import numpy as np
import pytest
import timm
import torch
from support.images import write_image_folder
from support.running import in_process, quiet_about_timm
from timm.models._hub import save_for_hf
from torch.optim.optimizer import register_optimizer_step_pre_hook

from timm_sam import SAM

torch.set_num_threads(1)


def pytest_configure(config):
    """Shows one GPU to the tests for it, and none to all others: they, and what they start, are the same everywhere."""
    if config.option.markexpr == 'gpu':
        os.environ.setdefault('CUDA_VISIBLE_DEVICES', '0')
    else:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


# ---- the quick tier

# fixtures of tests that train, evaluate, start processes, or report on many runs
LARGE = {'image_folder', 'labelled', 'mixed', 'teacher', 'fitted', 'checkpoints', 'scenario', 'four_images', 'small',
         'grid', 'finished'}
CASES = 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as `full` what `make test-fast` leaves out: whole runs, and of each test all cases but one.

    Which case stays is drawn by its name, the same every time. Other tests that take seconds carry the mark
    themselves.
    """
    cases = Counter()
    for item in sorted(items, key=lambda item: crc32(item.nodeid.encode())):
        test = item.nodeid.split('[')[0]
        if item.get_closest_marker('full') is None and not LARGE & set(item.fixturenames):
            cases[test] += 1
            if cases[test] <= CASES:
                continue
        item.add_marker(pytest.mark.full)


# ---- fixtures

@pytest.fixture(scope='session', autouse=True)
def unsynced():
    """Tests don't wait for the disk: no machine loses power under them, and a tenth of a short run is waiting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', os.fstat)  # a file that is closed is an error as before
        yield


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='session')
def base(image_folder):
    """The start of a command line that trains for one epoch of 5 updates; what follows it overrides it."""
    return (f'--device cpu --data-dir {image_folder} --num-classes 4 --model test_resnet --img-size 32 -b 8 -j 0 '
            '--epochs 1 --warmup-epochs 0 --lr 0.05 --log-interval 1 --output out --experiment run')


@pytest.fixture(scope='session')
def run_in(base):
    """Runs train.py in process: ``run_in(folder, '--epochs 2')``."""
    from timm_sam import train

    def run(cwd, command=''):
        with quiet_about_timm():
            return in_process(train.main, shlex.split(f'{base} {command}'), cwd)
    return run


@pytest.fixture
def run_train(run_in, tmp_path):
    """Runs train.py in process and in ``tmp_path``: ``run_train('--epochs 2')``."""
    return lambda command='': run_in(tmp_path, command)


@pytest.fixture
def updates(monkeypatch):
    """One entry per update of the base optimizer: (perturbed batches that went into it, learning rate)."""
    seen, perturbed = [], []
    backward = SAM.backward

    def spy(self, *args, **kwargs):
        perturbed.extend([1] * self.perturbs)
        return backward(self, *args, **kwargs)

    def note(optimizer, args, kwargs):
        seen.append((len(perturbed), optimizer.param_groups[0]['lr']))
        perturbed.clear()

    monkeypatch.setattr(SAM, 'backward', spy)
    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


@pytest.fixture
def script(monkeypatch):
    """Changes what an epoch does: ``script(stop=2)`` interrupts epoch 2, ``top1=[..]`` sets validation results by
    epoch, ``seeded=True`` makes the random draws of an epoch a function of its number."""
    from timm_sam import train

    real_train, real_evaluate = train.train_one_epoch, train.evaluate

    def change(stop=None, top1=None, loss=None, seeded=False):
        epochs = []

        def train_one_epoch(run, epoch, *place):
            epochs.append(epoch)
            if epoch == stop:
                raise KeyboardInterrupt
            if seeded:
                torch.manual_seed(epoch)
                random.seed(epoch)
                np.random.seed(epoch)
            return real_train(run, epoch, *place)

        def evaluate(run, model, suffix=''):
            if top1 is None and loss is None:
                return real_evaluate(run, model, suffix)
            values = (loss or [1.0] * 99)[epochs[-1]], (top1 or [50.0] * 99)[epochs[-1]]
            return OrderedDict(zip(('loss', 'top1', 'top5'), (*values, 100.0)))

        monkeypatch.setattr(train, 'train_one_epoch', train_one_epoch)
        monkeypatch.setattr(train, 'evaluate', evaluate)
        return epochs
    return change


@pytest.fixture(scope='session')
def fitted(tmp_path_factory):
    """A model with mistakes, its checkpoint and its data, for validate.py."""
    from support.validating import fit
    return fit(tmp_path_factory.mktemp('fitted'))


@pytest.fixture(scope='session')
def teacher(tmp_path_factory):
    """The folder of a teacher with random weights: none can be downloaded here."""
    folder = tmp_path_factory.mktemp('teacher')
    torch.manual_seed(1)
    model = timm.create_model('test_resnet', num_classes=4)
    with torch.no_grad():
        model.fc.weight.mul_(20)  # a fresh one is indifferent between classes, and teaches nothing
    save_for_hf(model, folder)
    return folder
