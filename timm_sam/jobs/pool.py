"""Processes that are forks of one with torch and timm imported, one per device, and share out jobs among them."""
import collections
import contextlib
import datetime
import fcntl
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..cli.errors import OptionError
from ..cli.text import say
from .job import Job, outcome
from .worker import work

_VISIBLE = "CUDA_VISIBLE_DEVICES"


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
        except BlockingIOError:
            raise OptionError(
                f"--out {out} is in use by another process: wait for it, or name another folder") from None
        except OSError as e:
            say(f"--out {out}: the file system has no locks ({e.strerror}): see to it that no second process works "
                f"there.")
        yield
    finally:
        os.close(lock)


def environments(devices: int, flag: str = "--devices") -> list[dict[str, str]]:
    """What the environment of each process has beside ours, so that no two of them share a device.

    Where there are GPUs, each process sees one of those that we see; otherwise each has one thread of the CPU.

    Args:
        devices: How many processes.
        flag: That says so.

    Raises:
        OptionError: It is less than one, or more than there are GPUs.
    """
    if devices < 1:
        raise OptionError(f"{flag} {devices} runs nothing: use 1 or more")
    there = torch.cuda.device_count()
    if not there:
        return [{"OMP_NUM_THREADS": "1"}] * devices
    if devices > there:
        raise OptionError(f"{flag} {devices}: there are {there} GPUs, one for each run at a time; use {there} or fewer")
    seen = [name for name in os.environ.get(_VISIBLE, "").split(",") if name.strip()] or list(map(str, range(there)))
    return [{_VISIBLE: name} for name in seen[:devices]]


@dataclass
class Worker:
    """A process that has imported everything, and runs what it is sent."""

    process: Any
    connection: Connection
    environment: Mapping[str, str]
    job: Job | None = None


class Pool:
    """Processes that are started once: importing torch and timm takes as long as half a small run.

    As a context manager it ends them, whatever they are doing.

    Args:
        environments: What each process has beside ours, as of :func:`environments`.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        # one process imports everything, and those that work are forks of it
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([work.__module__])
        with _environment({"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}):  # that it finds what we have found
            forkserver.ensure_running()
        self.workers = [self.start(environment) for environment in environments]
        self.times: dict[Hashable, list[float]] = collections.defaultdict(list)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception: object) -> None:
        # a torn run is not finished, and is run again
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def start(self, environment: Mapping[str, str]) -> Worker:
        """A new process that waits for jobs, with these environment variables besides ours."""
        ours, theirs = self.context.Pipe()
        # no daemon: loaders have processes of their own
        process = self.context.Process(target=work, args=(theirs, environment), daemon=False)
        process.start()
        theirs.close()  # else a worker's death does not end the connection
        return Worker(process, ours, environment)

    def run(self, jobs: Sequence[Job]) -> list[tuple[str, str]]:
        """Runs jobs, each in a folder that it has for itself, and prints a line when one is over.

        Args:
            jobs: In this order, but each behind the one that it needs; no two of the same folder and command.

        Returns:
            Names and reasons of those that failed.

        Raises:
            KeyboardInterrupt: Ctrl-C or SIGTERM.
            OptionError: Stdout cannot be written.
        """
        earlier = signal.signal(signal.SIGTERM, _interrupt)
        try:
            return self._run(jobs)
        finally:
            signal.signal(signal.SIGTERM, earlier)

    def _run(self, jobs: Sequence[Job]) -> list[tuple[str, str]]:
        waiting = list(jobs)
        open_, failed, done = set(jobs), dict[Job, str](), 0
        while open_:
            for job in [job for job in waiting if job.after in failed]:
                waiting.remove(job)
                done = self._over(job, f"needs {job.after.name}" if job.after else None, "", done, open_, failed)
            for worker in self.workers:
                ready = next((job for job in waiting if job.after not in open_), None)
                if worker.job is None and ready is not None:
                    waiting.remove(ready)
                    self.send(worker, ready)
            busy = {worker.connection: worker for worker in self.workers if worker.job is not None}
            if not busy:
                continue
            why, result, job = self._receive(busy[wait(list(busy))[0]])  # type: ignore[index]
            done = self._over(job, why, result, done, open_, failed)
        return [(job.name, why) for job, why in failed.items()]

    def send(self, worker: Worker, job: Job) -> None:
        """Gives a job to a worker, or to another one in the place of a worker that has ended."""
        try:
            worker.connection.send(job)
        except ConnectionError:  # it has ended since its last job: of memory, say
            worker = self._renewed(worker)
            worker.connection.send(job)
        worker.job = job

    def _renewed(self, worker: Worker) -> Worker:
        """Another process in the place of one that has ended."""
        worker.process.join()
        worker.connection.close()
        place = self.workers.index(worker)
        self.workers[place] = self.start(worker.environment)
        return self.workers[place]

    def _receive(self, worker: Worker) -> tuple[str | None, str, Job]:
        """What a worker says of its job: why it failed, and its result in words."""
        job, worker.job = worker.job, None
        assert job is not None
        try:
            why, seconds = worker.connection.recv()
        except (EOFError, ConnectionError):
            self._renewed(worker)
            return f"its process ended with code {worker.process.exitcode}", "", job
        if why is None:
            why, result = outcome(job)
        if why is not None:
            return why, "", job
        self.times[job.kind].append(seconds)
        return None, f"{result}, {seconds:.0f} s", job

    def _over(self, job: Job, why: str | None, result: str, done: int, open_: set[Job], failed: dict[Job, str]) -> int:
        open_.remove(job)
        if why is not None:
            failed[job] = why
            result = f"FAILED: {why}"
        total = done + 1 + len(open_)
        say(f"[{done + 1}/{total}] {job.name}: {result}; {self._left(open_)} left")
        return done + 1

    def _left(self, jobs: set[Job]) -> datetime.timedelta | str:
        """Expected time for jobs, by the mean of those of their kind, or of all where there was none yet."""
        if not self.times:
            return "unknown time"
        overall = statistics.fmean(t for times in self.times.values() for t in times)
        each = [statistics.fmean(self.times[job.kind]) if job.kind in self.times else overall for job in jobs]
        return datetime.timedelta(seconds=round(sum(each) / len(self.workers)))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """Ours with some variables set, while a process is started."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
