"""Commands as processes of their own: one, or as many as torchrun starts; and signals to them."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from support.finished import Finished
from support.places import ROOT, TESTS

LAUNCHER = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
RANKS = 2
TIMEOUT = 420  # seconds; a machine that is busy otherwise takes several times as long


def environment(**more):
    """Ours, as if no launcher were there, and with our modules to be imported; one thread per process."""
    inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    return {**inherited, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{TESTS}{os.pathsep}{ROOT}', **more}


def python(*arguments):
    """The line of a command of one process."""
    return [sys.executable, *map(str, arguments)]


def torchrun(*arguments, ranks=RANKS, options=('--standalone',)):
    """The line of a command on ranks: a script or ``-m`` and a module, and its arguments."""
    return python('-m', 'torch.distributed.run', *options, '--nproc-per-node', ranks, *arguments)


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(('127.0.0.1', 0))
        return [s.getsockname()[1] for s in sockets]


def family(pid):
    """A process and all that it has started, directly or not: parents before their children."""
    found = [pid]
    for parent in found:
        for thread in Path(f'/proc/{parent}/task').glob('*/children'):
            try:
                found += map(int, thread.read_text().split())
            except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                continue
    return found


class Process:
    """A command that runs; as a context manager, it ends there with all that it has started.

    What it prints is read all the time, so that `wait_for` returns with the line and no full pipe stops the command.
    """

    def __init__(self, command, cwd, **more):
        self.cwd = Path(cwd)
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=cwd, env=environment(**more), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors='replace')
        self.pid = self.process.pid
        self._lines = {'out': [], 'err': []}
        self._news = threading.Condition()
        self._readers = [threading.Thread(target=self._read, args=args, daemon=True) for args in (
            ('out', self.process.stdout), ('err', self.process.stderr))]
        for reader in self._readers:
            reader.start()

    def _read(self, name, stream):
        with stream:
            for line in stream:
                with self._news:
                    self._lines[name].append(line)
                    self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @property
    def err(self):
        with self._news:
            return ''.join(self._lines['err'])

    def wait_for(self, text, timeout=TIMEOUT):
        """Returns as soon as the command has printed a line with `text`."""
        end = time.monotonic() + timeout
        seen = {'out': 0, 'err': 0}
        with self._news:
            while True:
                ended = not any(reader.is_alive() for reader in self._readers)
                for name, lines in self._lines.items():
                    if any(text in line for line in lines[seen[name]:]):
                        return
                    seen[name] = len(lines)
                left = end - time.monotonic()
                assert not ended and left > 0, f'{text!r} never came:\n{"".join(self._lines["err"])[-3000:]}'
                self._news.wait(min(left, 0.5))  # the last reader tells of its end a moment before it ends

    def rank(self, number):
        """The process of a rank of torchrun's."""
        mark = f'RANK={number}'.encode()
        return next(pid for pid in family(self.pid)[1:]
                    if mark in Path(f'/proc/{pid}/environ').read_bytes().split(b'\0'))

    def signal(self, number, pid=None):
        """Signals the command itself, or one process of it."""
        os.kill(pid or self.pid, number)

    def kill(self):
        """Ends the command and all that it has started, at once."""
        for pid in family(self.pid) if self.process.poll() is None else ():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def wait(self, timeout=TIMEOUT):
        """How it ended, when it has; a command that got stuck is killed, and is an error."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f'not over after {timeout:.0f} seconds:\n{self.err[-3000:]}') from None
        for reader in self._readers:
            reader.join(10)  # of a pipe that a process which outlived its parent may keep open
        return Finished(self.process.returncode, ''.join(self._lines['out']), self.err, self.cwd)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.kill()
        self.process.wait()


def run(command, cwd, timeout=TIMEOUT, **more):
    """Runs a command to its end; gives exit code, stdout and stderr."""
    with Process(command, cwd, **more) as process:
        return process.wait(timeout)


def run_in_turn(module, commands, cwd, ranks=RANKS):
    """Runs several commands (name -> options) in the same process or processes: starting one takes seconds.

    `module` goes through them by `support.turns`. Returns how they ended.
    """
    (Path(cwd) / 'runs.json').write_text(json.dumps([
        dict(name=name, port=port, command=command)
        for port, (name, command) in zip(free_ports(len(commands)), commands.items())]))
    line = ('-m', module, 'runs.json')
    done = run(python(*line) if ranks == 1 else torchrun(*line, ranks=ranks), cwd)
    assert done.code == 0, done.err[-3000:]
    return done


def errors(done, prog):
    """The lines in which a command says what is wrong with its options, whichever rank says it."""
    return [line for line in done.err.splitlines() if re.search(rf'{re.escape(prog)}: error\b', line)]
