"""What a pool runs: one call of a command, with a folder of its own; and whether that was done before."""
import os
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

from ..cli.errors import OptionError
from ..cli.parser import dump_args
from ..evaluation.evaluated import read_evaluations
from ..report.runs import DIVERGED, FINISHED, Run, read_run
from ..runs import files
from ..runs.checkpoints import NotWhole, read
from ..runs.sameness import changed_options, placeless
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
        sets: The data sets that a result must have to be that of this job; empty: whichever.
    """

    name: str
    kind: Hashable
    folder: str
    argv: tuple[str, ...]
    command: str = TRAIN
    keep: bool = False
    result: str = ""
    after: "Job | None" = None
    sets: tuple[str, ...] = ()

    @property
    def log(self) -> str:
        """The file of its output."""
        if self.command == TRAIN:
            return os.path.join(self.folder, "log.txt")
        # results of several analyses have one name in folders of their own
        return os.path.join(self.folder, f"{os.path.relpath(self.result, self.folder).replace(os.sep, '-')}.log")


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
    """Whether a job's folder holds all of its results already; of a run that keeps nothing it is one to diverge.

    Raises:
        OptionError: A run there that is finished, or would be gone on with, has other options than this job.
    """
    if job.command != TRAIN:
        return os.path.isfile(job.result) and not (job.sets and _lacks_sets(job))
    if not os.path.isdir(job.folder):
        return False
    run = read_run(job.folder)
    if run.complete or run.status == DIVERGED:
        _check_same(job, run, "was run")
        return not (job.keep and _lacks_its_end(run))
    if job.keep and run.args and files.checkpoints(job.folder):
        # train.py takes other epochs for a reason to go on, and no table averages a run of two minds
        _check_same(job, run, "was begun")
    return False


def _check_same(job: Job, run: Run, was: str) -> None:
    wanted = options_of(job)
    changed = changed_options(run.args, wanted)
    if changed:
        key = changed[0]
        old, value = placeless(key, run.args.get(key)), placeless(key, wanted[key])
        raise OptionError(f"{job.folder} {was} with {key} {old}, not {value}: remove it, or name another --out")


def _lacks_its_end(run: Run) -> bool:
    """Whether a run ended between the last line of its table and the checkpoint of that epoch: it diverged, or
    there was a kill, or a full disk.

    Weights that are gone altogether were removed on purpose.
    """
    try:
        epoch = float(read(os.path.join(run.path, files.LAST))["epoch"])
    except FileNotFoundError:
        # it diverged before there was one, or the first one was being written
        return not run.complete or os.path.exists(os.path.join(run.path, files.TMP))
    except (OSError, MemoryError, NotWhole, LookupError, TypeError, ValueError):
        return False  # whoever needs it says what is wrong with it
    return epoch < run.rows[-1]["epoch"]


def _lacks_sets(job: Job) -> bool:
    """Whether an evaluation is there that lacks data sets which are wanted now; what is none is for others to say."""
    try:
        found = {name for evaluated in read_evaluations([job.result]) for name in evaluated.folders}
    except OptionError:
        return False
    return not found.issuperset(job.sets)


def options_of(job: Job) -> dict[str, Any]:
    """All options of a training, as its ``args.yaml`` will have them.

    Raises:
        OptionError: train.py would refuse them.
    """
    return yaml.safe_load(dump_args(read_args(build_train_parser(), job.argv)))


def is_finished(folder: str) -> bool:
    """Whether a folder holds a run that reached its last epoch, whatever its options."""
    return os.path.isdir(folder) and read_run(folder).complete
