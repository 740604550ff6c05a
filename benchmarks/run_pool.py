"""Processes that import torch and timm once, and then train one run after the other."""
import collections
import contextlib
import datetime
import fcntl
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

# before torch is imported, here and in the processes to be: one thread for each of them
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # train.py is no part of the package

import torch  # noqa: E402

from timm_sam import train  # noqa: E402
from timm_sam.cli.errors import OptionError, one_line  # noqa: E402
from timm_sam.report.runs import FINISHED, read_run  # noqa: E402


class Job(Protocol):
    """What a pool runs: its folder below ``OUT/runs``, what takes the same time as others, and train.py's line."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Any: ...

    def argv(self, out: str) -> list[str]: ...


@contextlib.contextmanager
def locked(out: str) -> Iterator[None]:
    """Lets no other process work in the folder.

    Raises:
        OptionError: One does already, or the folder cannot be made.
    """
    try:
        os.makedirs(out, exist_ok=True)
        lock = os.open(os.path.join(out, ".lock"), os.O_CREAT | os.O_RDWR)
    except OSError as e:
        raise OptionError(f"--out {out} cannot be written ({e.strerror}): name another folder") from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OptionError(
                f"--out {out} is in use by another process: wait for it, or name another folder") from None
        yield
    finally:
        os.close(lock)


@dataclass
class _Worker:
    """A process that has imported everything, and trains what it is sent."""

    process: Any
    connection: Connection
    job: Job | None = None


class Pool:
    """Processes that are started once: importing torch and timm takes as long as half a run."""

    def __init__(self, processes: int) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.workers = [self._start() for _ in range(processes)]
        self.times: dict[Any, list[float]] = collections.defaultdict(list)

    def _start(self) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # else a worker's death does not end the connection
        return _Worker(process, ours)

    def close(self) -> None:
        # a torn run is not finished, and is run again
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def run(self, jobs: Sequence[Job], out: str) -> list[tuple[str, str]]:
        """Runs jobs, each in a folder that it has for itself.

        Args:
            jobs: In this order; what is left of an earlier attempt is removed.
            out: Runs are written to ``out/runs/NAME``.

        Returns:
            Names and reasons of those that failed.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM.
        """
        earlier = signal.signal(signal.SIGTERM, _interrupt)
        try:
            return self._run(jobs, out)
        finally:
            signal.signal(signal.SIGTERM, earlier)

    def _run(self, jobs: Sequence[Job], out: str) -> list[tuple[str, str]]:
        waiting = collections.deque(jobs)
        failed = []
        for done in range(1, len(jobs) + 1):
            for worker in self.workers:
                if worker.job is None and waiting:
                    worker.job = waiting.popleft()
                    folder = os.path.join(out, "runs", worker.job.name)
                    if os.path.isdir(folder):  # what an interrupted run has left
                        shutil.rmtree(folder)
                    worker.connection.send((worker.job.argv(out), folder))
            busy = {worker.connection: worker for worker in self.workers if worker.job is not None}
            worker = busy[wait(list(busy))[0]]
            job, worker.job = worker.job, None
            try:
                why, seconds = worker.connection.recv()
            except (EOFError, ConnectionError):
                worker.process.join()
                worker.connection.close()
                why, seconds = f"its process ended with code {worker.process.exitcode}", None
                self.workers[self.workers.index(worker)] = self._start()
            run = read_run(os.path.join(out, "runs", job.name))
            if why is None and not run.complete:
                why = f"{run.status}: {run.reason}"
            if why is None:
                self.times[job.kind].append(seconds)
                result = f"{run.accuracy():.1f} %" if run.status == FINISHED else f"{run.status}, {run.reason}"
                result += f", {seconds:.0f} s"
            else:
                failed.append((job.name, why))
                result = f"FAILED: {why}"
            left = self._left([*waiting, *(w.job for w in self.workers if w.job is not None)])
            print(f"[{done}/{len(jobs)}] {job.name}: {result}; {left} left", flush=True)
        return failed

    def _left(self, jobs: Sequence[Job]) -> datetime.timedelta | str:
        """Expected time for jobs, by the mean of those of their kind, or of all where there was none yet."""
        if not self.times:
            return "unknown time"
        overall = statistics.fmean(t for times in self.times.values() for t in times)
        each = [statistics.fmean(self.times[job.kind]) if job.kind in self.times else overall for job in jobs]
        return datetime.timedelta(seconds=round(sum(each) / len(self.workers)))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _work(connection: Connection) -> None:
    """The life of a worker process: trains what it is sent, answers None or why it failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one takes care of it
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # without its parent it must not go on writing into a folder that another one may have taken over
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    while True:
        argv, folder = connection.recv()
        began = time.monotonic()
        why = run_job(argv, folder)
        connection.send((why, time.monotonic() - began))


def run_job(argv: Sequence[str], folder: str) -> str | None:
    """Runs train.py in this process, with its output in ``folder/log.txt``; leaves no checkpoints.

    Args:
        argv: Its command line.
        folder: Of the run.

    Returns:
        None, or why it failed.
    """
    handlers = logging.getLogger().handlers[:]
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "log.txt"), "w", encoding="utf-8") as log, \
            contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            code: Any = train.main(argv)
            why = f"train.py returned {code}, see {log.name}" if code else None
        except SystemExit as e:
            why = f"train.py returned {e.code}, see {log.name}"
        except Exception as e:
            traceback.print_exc()
            why = f"{type(e).__name__}: {one_line(e)}"
    # train.py sets logging up once per process, and this one lives on
    logging.getLogger().handlers[:] = handlers
    gc.collect()
    # 40 MB a run, for nothing: an interrupted run starts anew
    for name in os.listdir(folder):
        if name.endswith(".pth.tar"):
            os.remove(os.path.join(folder, name))
    return why
