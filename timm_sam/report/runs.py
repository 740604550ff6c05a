"""One run's folder: what was asked for, what came out, and whether it may be averaged."""
import argparse
import csv
import functools
import glob
import io
import math
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..cli.errors import OptionError, one_line
from ..cli.parser import read_yaml, yaml_value
from ..cli.tasks import EVALUATORS
from ..perturbation import VARIANTS
from ..runs import files, timing
from ..runs.sameness import data_dir_of
from ..selection import SELECTIONS
from ..training.options import build_train_parser
from ..training.schedule import planned_epochs

FINISHED, DIVERGED, RUNNING, STOPPED, MIXED, UNREADABLE, UNSCORED, DUPLICATE = (
    "finished", "diverged", "running", "stopped", "mixed", "unreadable", "unscored", "duplicate")
COLUMN = "eval_{}"  # of summary.csv, by the name of a metric

# What the report itself computes or sorts with; all other options are only compared.
_TYPED = ("task", "model", "dataset", "data_dir", "opt", "seed", "val_interval", "holdout", "sam_variant", "sam_params",
          "sam_rho")
_MOST_BYTES = {files.ARGS: 1 << 20, files.SUMMARY: 1 << 26, timing.FILE: 1 << 26}  # far more than any run writes
_MOST_VALUES = 10_000  # of args.yaml, which may repeat a part of itself so often that no memory holds it


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        path: The folder.
        status: ``finished``: every epoch is there and may be averaged; any other: see ``reason``.
        reason: Why it is not finished.
        args: All options, with train.py's defaults where ``args.yaml`` has none.
        rows: Of ``summary.csv``, one per evaluated epoch.
        epochs: Epochs in all, cool-down and the like included.
        seconds: Training time of all epochs, extrapolated over epochs that were not timed; None if none was.
        ranks: Processes that trained together; None if unknown.
        device: Their device; None if unknown.
    """

    path: str
    status: str
    reason: str = ""
    args: dict[str, Any] = field(default_factory=dict)
    rows: tuple[dict[str, float], ...] = ()
    epochs: int = 0
    seconds: float | None = None
    ranks: int | None = None
    device: str | None = None

    @property
    def complete(self) -> bool:
        """Whether the last epoch was reached, with whatever result."""
        return bool(self.rows) and self.rows[-1]["epoch"] >= self.epochs - 1

    @property
    def metric(self) -> str:
        """What ranks models of its task: ``top1``, or ``map`` where images have several classes."""
        return EVALUATORS[self.args["task"]].default_metric

    def accuracy(self, epoch: str = "last") -> float:
        """Its metric on the validation images in percent: of the last epoch, or with ``"best"`` the highest of any."""
        column = COLUMN.format(self.metric)
        return self.rows[-1][column] if epoch == "last" else max(row[column] for row in self.rows)


class _Unusable(Exception):
    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def find_runs(paths: Sequence[str]) -> list[str]:
    """Folders of runs: the given ones and those below them, those that a link there leads to as well.

    A folder that cannot be listed is named, too: what nobody can read may be a run.

    Raises:
        OptionError: A path is no folder, or none holds a run.
    """
    found: dict[str, str] = {}
    for path in paths:
        if not os.path.isdir(path):
            raise OptionError(f"{path} is not a folder: give folders of runs, or folders that hold them")
        below = _runs_below(path)
        if not below:
            raise OptionError(f"{path} holds no run: no {files.ARGS} and no {files.SUMMARY} in it or below it")
        for folder in below:
            found.setdefault(os.path.realpath(folder), folder)
    return list(found.values())


def _runs_below(path: str) -> list[str]:
    """As of :func:`find_runs`; links stand last, so that a run counts by its own name where it is found by both."""
    found: list[str] = []
    links: list[str] = []
    for folder, subfolders, names in os.walk(path, onerror=lambda error: found.append(str(error.filename))):
        subfolders.sort()
        if files.ARGS in names or files.SUMMARY in names:
            found.append(folder)
        # behind a link only a run itself is looked for: it may lead to all images of a data set, or back up
        links += [link for name in subfolders if os.path.islink(link := os.path.join(folder, name)) and any(
            os.path.lexists(os.path.join(link, file)) for file in (files.ARGS, files.SUMMARY))]
    return [*found, *links]


def read_run(folder: str, running_minutes: float = 60) -> Run:
    """Reads one run; an odd one takes nothing else down.

    Args:
        folder: With ``args.yaml`` and ``summary.csv``.
        running_minutes: A run whose files are not older than this, and which has epochs to go, is still running.

    Returns:
        The run; what is wrong with it is its ``status`` and ``reason``, nothing is raised.
    """
    run = Run(folder, FINISHED)
    try:
        return _read(run, running_minutes)
    except _Unusable as e:
        return replace(run, status=e.status, reason=str(e))
    except Exception as e:  # whatever files of unknown origin hold
        return replace(run, status=UNREADABLE, reason=f"{type(e).__name__}: {one_line(e, 150)}")


def _read(run: Run, running_minutes: float) -> Run:
    folder = run.path
    try:
        args = _read_args(os.path.join(folder, files.ARGS))
        run = replace(run, args=args, epochs=_planned_epochs(args))
        run = replace(run, rows=tuple(_read_summary(os.path.join(folder, files.SUMMARY))))
        run = _timed(run)
        _check_single(run)
    except _Unusable as e:
        return replace(run, status=e.status, reason=str(e))
    last = run.rows[-1] if run.rows else {}
    for column in ("train_loss", "eval_loss"):
        if not math.isfinite(last.get(column, 0.0)):
            return replace(run, status=DIVERGED,
                           reason=f"{column} is {last[column]} in epoch {last['epoch']:g} of 0..{run.epochs - 1}")
    if not run.complete:
        done = f"evaluated up to epoch {last['epoch']:g}" if last else "no epoch evaluated"
        age = (time.time() - _last_write(folder)) / 60
        status = RUNNING if age <= running_minutes else STOPPED
        return replace(run, status=status,
                       reason=f"{done} of 0..{run.epochs - 1}; last written {max(0, round(age))} minutes ago")
    column = COLUMN.format(run.metric)
    if not all(column in row and math.isfinite(row[column]) for row in run.rows):
        return replace(run, status=UNSCORED, reason=f"summary.csv has no {column}: trained without validation")
    return run


@functools.cache
def default_args() -> dict[str, Any]:
    """The options of train.py with their defaults."""
    return {key: value for key, value in vars(build_train_parser().parse_args([])).items() if key != "config"}


def _check_file(path: str) -> None:
    """Raises for what would be waited for, or fills the memory.

    Raises:
        FileNotFoundError: There is none.
        _Unusable: It is a pipe, a device or a folder, or too large.
    """
    found, name = os.stat(path), os.path.basename(path)
    if not stat.S_ISREG(found.st_mode):
        raise _Unusable(UNREADABLE, f"{name} is no regular file")
    if found.st_size > _MOST_BYTES[name]:
        raise _Unusable(UNREADABLE, f"{name} has {found.st_size:,} bytes: more than {_MOST_BYTES[name]:,} is no run's")


def _count(value: Any, left: int, depth: int = 0) -> int:
    """How many values ``left`` are when those of a nested one are taken away.

    Raises:
        _Unusable: There are too many, or they are nested without end.
    """
    left -= 1
    if left < 0 or depth > 20:
        raise _Unusable(UNREADABLE, "args.yaml holds more values, or more deeply nested ones, than options have")
    for item in [*value.keys(), *value.values()] if isinstance(value, dict) else (
            value if isinstance(value, (list, tuple, set)) else ()):
        left = _count(item, left, depth + 1)
    return left


@functools.cache
def _flags_of_training() -> dict[str, argparse.Action]:
    return {action.dest: action for action in build_train_parser()._actions}


def _read_args(path: str) -> dict[str, Any]:
    try:
        _check_file(path)
        given = read_yaml(path)
    except FileNotFoundError:
        raise _Unusable(UNREADABLE, "no args.yaml") from None
    except _Unusable:
        raise
    except Exception as e:  # YAML makes dates, numbers and more of its text, and fails in as many ways
        raise _Unusable(UNREADABLE, f"args.yaml cannot be read: {one_line(e, 150)}") from None
    _count(given, _MOST_VALUES)
    if not isinstance(given, dict) or "model" not in given:
        raise _Unusable(UNREADABLE, "args.yaml holds no options of a training (torn?)")
    args = {**default_args(), **{str(key): value for key, value in given.items()}}
    args["data_dir"] = data_dir_of(args)
    for name in _TYPED:
        try:
            args[name] = yaml_value("args.yaml", _flags_of_training()[name], args[name])
        except OptionError as e:
            raise _Unusable(UNREADABLE, one_line(e, 150)) from None
    missing = [name for name in ("model", "opt", "seed", "val_interval") if args[name] is None]
    if missing:
        raise _Unusable(UNREADABLE, f"args.yaml names no {', '.join(missing)}")
    if args["sam_variant"] is not None:
        known = args["sam_variant"] in VARIANTS and args["sam_params"] in SELECTIONS
        if not known or not isinstance(args["sam_rho"], (int, float)):
            raise _Unusable(UNREADABLE, "args.yaml names no variant, selection and radius that there is: " + ", ".join(
                str(args[name]) for name in ("sam_variant", "sam_params", "sam_rho")))
    return args


def _planned_epochs(args: dict[str, Any]) -> int:
    """Epochs in all, by timm's own rules for warm-up, cool-down and cycles."""
    try:
        return planned_epochs(argparse.Namespace(**args))
    except Exception as e:  # of options of any type and size
        raise _Unusable(UNREADABLE, f"args.yaml gives no schedule: {one_line(e, 150)}") from None


def _read_summary(path: str) -> list[dict[str, float]]:
    try:
        _check_file(path)
        with open(path, newline="", encoding="utf-8") as f:
            text = f.read()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise _Unusable(UNREADABLE, f"summary.csv cannot be read: {one_line(e, 150)}") from None
    if not text:
        return []
    if "\0" in text or not text.endswith("\n"):
        raise _Unusable(UNREADABLE, "summary.csv is torn: its last line does not end")
    try:
        header, *lines = [line for line in csv.reader(io.StringIO(text)) if line]
    except ValueError:
        raise _Unusable(UNREADABLE, "summary.csv is blank") from None
    except csv.Error as e:
        raise _Unusable(UNREADABLE, f"summary.csv is no table: {one_line(e, 100)}") from None
    if "epoch" not in header or "train_loss" not in header:
        raise _Unusable(UNREADABLE, "summary.csv has no columns epoch and train_loss")
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, 2):
        if len(line) != len(header) or line == header:
            raise _Unusable(
                MIXED, f"line {number} of summary.csv has other columns than the first: two runs in one file")
        try:
            row = dict(zip(header, map(float, line)))
        except ValueError as e:
            raise _Unusable(UNREADABLE, f"line {number} of summary.csv: {one_line(e, 100)}") from None
        if not math.isfinite(row["epoch"]):
            raise _Unusable(UNREADABLE, f"line {number} of summary.csv: epoch {row['epoch']:g}")
        for column in (COLUMN.format(evaluator.default_metric) for evaluator in EVALUATORS.values()):
            score = row.get(column, math.nan)
            if math.isfinite(score) and not 0 <= score <= 100:
                raise _Unusable(UNREADABLE, f"line {number} of summary.csv: {column} {score:g} is no percentage")
        if rows and not row["epoch"] > rows[-1]["epoch"]:
            raise _Unusable(MIXED, f"line {number} of summary.csv: epoch {row['epoch']:g} comes after "
                                   f"{rows[-1]['epoch']:g}: two runs in one file")
        rows.append(row)
    return rows


def _check_single(run: Run) -> None:
    """Raises for a folder whose epochs are not all those of one training."""
    before = sorted(glob.glob(os.path.join(glob.escape(run.path), files.ARGS_BEFORE.format("*"))))
    if before:
        raise _Unusable(MIXED, f"went on with other options than before, see {os.path.basename(before[0])}")
    if run.rows and run.rows[0]["epoch"] >= run.args["val_interval"]:
        raise _Unusable(MIXED, f"begins with epoch {run.rows[0]['epoch']:g}: it went on from another run")


def _timed(run: Run) -> Run:
    """The run with its training time, as far as ``timing.csv`` tells."""
    path = os.path.join(run.path, timing.FILE)
    try:
        _check_file(path)
        with open(path, newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        seconds = [float(row["seconds"]) for row in rows]
        ranks, devices = {int(row["ranks"]) for row in rows}, {row["device"] for row in rows}
    except FileNotFoundError:
        return run
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as e:
        raise _Unusable(UNREADABLE, f"{timing.FILE} cannot be read: {one_line(e, 150)}") from None
    if len(ranks) > 1:
        raise _Unusable(MIXED, f"trained by {' and then by '.join(map(str, sorted(ranks)))} processes")
    known = [s for s in seconds if math.isfinite(s)]
    # seconds of different devices do not add up to anything that compares
    total = sum(known) / len(known) * run.epochs if known and len(devices) == 1 else None
    return replace(run, seconds=total, ranks=next(iter(ranks), None), device=" + ".join(sorted(devices)) or None)


def _last_write(folder: str) -> float:
    return max((entry.stat().st_mtime for entry in os.scandir(folder) if entry.is_file()), default=0.0)
