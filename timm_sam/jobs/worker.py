"""A process that runs one command after the other on its device, with torch and timm imported once for all."""
import contextlib
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from .. import train, validate
from ..analyze import __main__ as analyze
from ..cli.errors import one_line
from ..runs import files
from .job import ANALYZE, TRAIN, VALIDATE, Job

_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    TRAIN: train.main, VALIDATE: validate.main, ANALYZE: analyze.main}


def work(connection: Connection, environment: Mapping[str, str]) -> None:
    """The life of a worker: runs what it is sent, answers None or why it failed, and how many seconds it took.

    Args:
        connection: To the pool.
        environment: What sets it apart from others: its device, or how many threads it has. Torch looks for devices
            when it first needs one, which is after this.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one takes care of it
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the library has read the variable long ago
    parent = multiprocessing.parent_process()
    assert parent is not None
    # without its parent it must not go on writing into a folder that another one may have taken over
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        job = connection.recv()
        began = time.monotonic()
        why = run_job(job)
        connection.send((why, time.monotonic() - began))


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def run_job(job: Job) -> str | None:
    """Runs a job's command in this process, with its output in the job's log.

    Returns:
        None, or why it failed.
    """
    handlers = logging.getLogger().handlers[:]
    try:
        if job.command == TRAIN and not job.keep and os.path.isdir(job.folder):  # what an interrupted run has left
            shutil.rmtree(job.folder)
        if job.command == TRAIN and job.keep and not files.checkpoints(job.folder):
            with contextlib.suppress(FileNotFoundError):  # there is nothing to go on with, and it is not finished
                os.remove(os.path.join(job.folder, files.SUMMARY))
        os.makedirs(job.folder, exist_ok=True)
        # what an earlier start said is kept where it is gone on with
        log = open(job.log, "a" if job.keep else "w", encoding="utf-8")  # noqa: SIM115
    except OSError as e:
        return f"{job.folder} cannot be written ({e.strerror})"
    name = f"{job.command}.py" if job.command != ANALYZE else job.command
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            code: Any = _COMMANDS[job.command](job.argv)
            why = f"{name} returned {code}, see {log.name}" if code else None
        except SystemExit as e:
            why = f"{name} returned {e.code}, see {log.name}" if e.code else None
        except Exception as e:
            traceback.print_exc()
            why = f"{type(e).__name__}: {one_line(e)}"
    # the commands set logging up once per process, and this one lives on
    logging.getLogger().handlers[:] = handlers
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if job.command == TRAIN and not job.keep:
        # 40 MB a run, for nothing: an interrupted run starts anew
        for file in os.listdir(job.folder):
            if file.endswith(files.ENDING):
                os.remove(os.path.join(job.folder, file))
    return why
