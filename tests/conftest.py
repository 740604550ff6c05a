"""What the tests of the scripts share: a small image folder, and train.py run in process."""
import contextlib
import csv
import io
import logging
import os
import random
import shlex
import sys
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')  # also for the processes that tests start

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models._hub import save_for_hf
from torch.optim.optimizer import register_optimizer_step_pre_hook

from timm_sam import SAM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py is a script at the top, not part of the package

torch.set_num_threads(1)

COLORS = {'blue': (60, 60, 200), 'green': (60, 200, 60), 'red': (200, 60, 60), 'yellow': (190, 190, 60)}
PER_CLASS = {'train': 10, 'validation': 4}
LAUNCHER = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')


def write_image_folder(root, classes=COLORS, splits=PER_CLASS, seed=0):
    """``root/<split>/<class>/<i>.png``: noise around the color of the class, 16 to 24 pixels a side."""
    generator = np.random.default_rng(seed)
    for split, count in splits.items():
        for name in classes:
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = generator.integers(16, 25, 2)
                pixels = generator.normal(COLORS[name], 40, (height, width, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f'{i}.png')
    return Path(root)


@dataclass
class Finished:
    """A run that is over: exit code, what it printed, and where it ran."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def last_line(self):
        return self.err.rstrip('\n').rsplit('\n', 1)[-1]

    def log(self, start):
        """The lines of the log that begin with ``start``."""
        return [line for line in self.err.splitlines() if line.startswith(start)]

    def folder(self, experiment='run'):
        return self.cwd / 'out' / experiment

    def summary(self, experiment='run'):
        with open(self.folder(experiment) / 'summary.csv', newline='') as f:
            return list(csv.DictReader(f))

    def checkpoint(self, experiment='run', name='last'):
        # our own file of a moment ago; the scripts themselves never load with weights_only=False
        return torch.load(self.folder(experiment) / f'{name}.pth.tar', weights_only=False)


@contextlib.contextmanager
def working_directory(path):
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def quiet_about_timm():
    """timm's image data sets leave it to the garbage collector to close the files they read."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'unclosed file <_io\..*\.png', ResourceWarning)
        yield


@contextlib.contextmanager
def _logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


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
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, working_directory(cwd), _logging_as_before(), \
                quiet_about_timm(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            for name in LAUNCHER:
                patch.delenv(name, raising=False)
            try:
                code = train.main(shlex.split(f'{base} {command}'))
            except SystemExit as e:
                code = e.code
        return Finished(code, out.getvalue(), err.getvalue(), Path(cwd))
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
        perturbed.append(1)
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

        def train_one_epoch(run, epoch):
            epochs.append(epoch)
            if epoch == stop:
                raise KeyboardInterrupt
            if seeded:
                torch.manual_seed(epoch)
                random.seed(epoch)
                np.random.seed(epoch)
            return real_train(run, epoch)

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
    from validating import fit
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
