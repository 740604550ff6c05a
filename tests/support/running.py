"""Commands in this process: what they print, what they leave, and nothing of them left behind."""
import contextlib
import io
import logging
import os
import warnings
from pathlib import Path

import pytest

from support.finished import Finished
from support.processes import LAUNCHER


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
