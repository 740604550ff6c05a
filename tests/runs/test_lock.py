"""One process at a time in a run's folder."""
import os
import signal
import socket

import pytest
from support.processes import Process, python
from torch import device

from timm_sam.cli.device import Process as Rank
from timm_sam.cli.errors import OptionError
from timm_sam.runs import lock
from timm_sam.runs.lock import FILE, Lock, Locked
from timm_sam.training.output import Output

# its file alone: importing the package takes seconds
HOLD = '''
import runpy, sys, time
lock = runpy.run_path(sys.argv[2])["Lock"](sys.argv[1])
print("has it", flush=True)
time.sleep(600)
'''


@pytest.fixture
def holder(tmp_path):
    with Process(python('-c', HOLD, tmp_path, lock.__file__), tmp_path) as process:
        process.wait_for('has it')
        yield process


def test_second_process_is_told_who_the_first_is(tmp_path, holder):
    with pytest.raises(Locked, match=f'process {holder.pid} on {socket.gethostname()}'):
        Lock(str(tmp_path))


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_death_releases_it(tmp_path, holder, number):
    holder.signal(number)
    holder.wait()
    assert (tmp_path / FILE).exists()
    mine = Lock(str(tmp_path))
    assert f'process {os.getpid()} ' in (tmp_path / FILE).read_text()
    mine.release()
    assert not (tmp_path / FILE).exists()


def test_file_that_was_left_locks_nothing(tmp_path):
    (tmp_path / FILE).write_text('process 1 on elsewhere\n')
    Lock(str(tmp_path)).release()


def test_file_that_goes_away_while_it_is_taken_is_made_anew(tmp_path, monkeypatch):
    """Its owner removes it on leaving: a lock on a file without a name would be nobody's."""
    lockf, calls = lock.fcntl.lockf, []

    def removed(fd, how):
        lockf(fd, how)
        calls.append(fd)
        if len(calls) == 1:
            (tmp_path / FILE).unlink()

    monkeypatch.setattr(lock.fcntl, 'lockf', removed)
    mine = Lock(str(tmp_path))
    assert len(calls) == 2 and f'process {os.getpid()} ' in (tmp_path / FILE).read_text()
    mine.release()


def test_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def none(fd, how):
        raise OSError(37, 'No locks available')

    monkeypatch.setattr(lock.fcntl, 'lockf', none)
    Lock(str(tmp_path)).release()
    assert 'has no locks (No locks available)' in caplog.text


def test_second_run_in_a_folder_is_an_error_that_names_the_first(tmp_path, holder):
    class Options:
        output, experiment, resume = str(tmp_path.parent), tmp_path.name, 'auto'

    with pytest.raises(OptionError, match=f'{tmp_path.name}: .* is being written by process {holder.pid} on'):
        Output(Options, Rank(device('cpu')))
    Output(Options, Rank(device('cpu'), rank=1))  # ranks but the first write nothing
