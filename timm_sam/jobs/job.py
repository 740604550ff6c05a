"""What a pool runs: one call of a command, with a folder of its own; and whether that was done before."""
import os
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

from ..cli.errors import OptionError
from ..cli.parser import dump_args
from ..report.runs import FINISHED, read_run
from ..runs.sameness import changed_options, data_name
from ..training.options import build_train_parser, read_args

TRAIN, VALIDATE, ANALYZE = "train", "validate", "analyze"


@dataclass(frozen=True)
class Job:
    """One call of a command.

    Attributes:
        name: For people, and to name it when it fails.
        kind: Jobs of one kind take the same time.
        folder: What it writes; its output goes to a log there.
        argv: The command line behind the command's name.
        command: ``train``, ``validate`` or ``analyze``.
        keep: Training goes on from a checkpoint that an earlier start has left, and leaves its own; otherwise it
            starts anew and leaves none.
        result: The file that is there when an evaluation is done; a training says so by its folder.
        after: The job whose success this one needs.
    """

    name: str
    kind: Hashable
    folder: str
    argv: tuple[str, ...]
    command: str = TRAIN
    keep: bool = False
    result: str = ""
    after: "Job | None" = None

    @property
    def log(self) -> str:
        """The file of its output."""
        return os.path.join(self.folder, "log.txt" if self.command == TRAIN else f"{os.path.basename(self.result)}.log")


def outcome(job: Job) -> tuple[str | None, str]:
    """What became of a job that ended well: why it is none the less not done (None: it is), and its result in words."""
    if job.command != TRAIN:
        done = os.path.isfile(job.result)
        return (None, "done") if done else (f"it wrote no {job.result}, see {job.log}", "")
    run = read_run(job.folder)
    if not run.complete:
        return f"{run.status}: {run.reason}", ""
    return None, f"{run.accuracy():.1f} %" if run.status == FINISHED else f"{run.status}, {run.reason}"


def is_done(job: Job) -> bool:
    """Whether a job's folder holds all of its results already.

    Raises:
        OptionError: A finished run there has other options than this job.
    """
    if job.command != TRAIN:
        return os.path.isfile(job.result)
    if not os.path.isdir(job.folder):
        return False
    run = read_run(job.folder)
    if not run.complete:
        return False
    wanted = options_of(job)
    changed = changed_options(run.args, wanted)
    if changed:
        key = changed[0]
        old, value = run.args.get(key), wanted[key]
        if key == "data_dir":  # the same folder is called otherwise from elsewhere
            old, value = data_name(old), data_name(value)
        raise OptionError(f"{job.folder} was run with {key} {old}, not {value}: remove it, or name another --out")
    return True


def options_of(job: Job) -> dict[str, Any]:
    """All options of a training, as its ``args.yaml`` will have them.

    Raises:
        OptionError: train.py would refuse them.
    """
    return yaml.safe_load(dump_args(read_args(build_train_parser(), job.argv)))


def is_finished(folder: str) -> bool:
    """Whether a folder holds a run that reached its last epoch, whatever its options."""
    return os.path.isdir(folder) and read_run(folder).complete
