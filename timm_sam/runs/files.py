"""The files of a run's folder: their names, and writing them such that none is ever half there.

The names of checkpoints are those of timm's ``CheckpointSaver``.
"""
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

ARGS = "args.yaml"  # the options as they were given
ARGS_BEFORE = "args-before-epoch-{}.yaml"  # options of a run up to where it went on with others
SUMMARY = "summary.csv"  # one row per evaluated epoch
ENDING = ".pth.tar"  # of the checkpoints
LAST = f"last{ENDING}"
BEST = f"model_best{ENDING}"
OF_EPOCH = f"checkpoint-{{}}{ENDING}"
RECOVERY = f"recovery-{{}}-{{}}{ENDING}"  # epoch, update of it
MILESTONE = f"milestone-{{}}{ENDING}"  # epochs that are done
TMP = f"tmp{ENDING}"  # becomes LAST
RECOVERY_TMP = f"recovery_tmp{ENDING}"  # becomes RECOVERY

_LINK = "link.tmp"  # becomes a second name of a checkpoint
_BEING_WRITTEN = ("tmp", "recovery_tmp")
_INSIDE_AN_EPOCH = "recovery"
_OURS = ("last", "model_best", "checkpoint-", "recovery-", "milestone-", *_BEING_WRITTEN)


def checkpoints(folder: str) -> list[str]:
    """Paths of the files in a folder that a training calls checkpoints, in no order; torn ones too."""
    return glob.glob(os.path.join(glob.escape(folder), f"*{ENDING}"))


def is_being_written(path: str) -> bool:
    """Whether the name is that of a checkpoint that gets its real name once it is whole."""
    return os.path.basename(path).startswith(_BEING_WRITTEN)


def is_unfinished(path: str) -> bool:
    """Whether the name is that of weights which no finished epoch has left: being written, or for recovery only."""
    return is_being_written(path) or os.path.basename(path).startswith(_INSIDE_AN_EPOCH)


def is_a_runs_own(path: str) -> bool:
    """Whether a training gives such a name, so that what lies there is a part of the run."""
    return os.path.basename(path).startswith(_OURS)


def write_through(file: IO[Any]) -> None:
    """Brings what was written to the disk itself: a rename that gets there first would leave an empty file."""
    file.flush()
    os.fsync(file.fileno())


def rename(source: str, target: str) -> None:
    """Gives a file that is whole its real name, in place of what had it; a power failure undoes it or does not."""
    os.replace(source, target)
    with suppress(OSError):  # not every system lets a folder be opened, and not every file system brings one to disk
        folder = os.open(os.path.dirname(target) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def replacing(path: str, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file to be written, which takes the place of ``path`` at the end, and only if all went well."""
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "w", encoding="utf-8", newline=newline) as f:
            yield f
            write_through(f)
        rename(tmp, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(tmp)
        raise


def duplicate(source: str, target: str) -> None:
    """Gives a whole file a second name in its folder, in place of what had it; a copy where there are no hard links."""
    tmp = os.path.join(os.path.dirname(target), _LINK)
    with suppress(FileNotFoundError):
        os.unlink(tmp)  # left by a process that was killed
    if os.path.exists(target) and os.path.samefile(source, target):
        return  # renaming a name of a file to another one of it would do nothing, and leave both
    try:
        os.link(source, tmp)
    except (OSError, NotImplementedError):
        try:
            shutil.copyfile(source, tmp)
            with open(tmp, "rb") as f:
                os.fsync(f.fileno())
        except OSError:
            with suppress(OSError):
                os.unlink(tmp)
            raise
    rename(tmp, target)
