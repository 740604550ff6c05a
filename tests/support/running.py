"""Commands in this process: what they print, what they leave, and nothing of them left behind."""
import contextlib
import csv
import io
import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from support.processes import LAUNCHER


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
def logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def in_process(main, arguments, cwd):
    """Runs a command's ``main`` in a folder, as if no launcher were there."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, working_directory(cwd), logging_as_before(), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        for name in LAUNCHER:
            patch.delenv(name, raising=False)
        try:
            code = main(arguments)
        except SystemExit as e:
            code = e.code
    return Finished(code, out.getvalue(), err.getvalue(), Path(cwd))
