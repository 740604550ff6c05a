"""Checkpoint files in a run's folder: which is the newest whole one, and what is wrong with the others.

A file is whole if the checksum of every record in it is right: a flipped bit of a weight is otherwise trained on. Only
what was read and is not whole is passed over; a file that cannot be read may be all that a run has.
"""
import argparse
import logging
import os
import re
import stat
import zipfile
from typing import Any, BinaryIO

import torch
from timm.models import clean_state_dict

from ..cli.errors import host_is_full, one_line
from . import files

_logger = logging.getLogger(__name__)

_MAGIC = b"PK\x03\x04"  # of the zip files that torch writes

AVERAGED = ("state_dict_ema", "model_ema")  # entries with averaged weights, of timm and of older versions of it


class NotWhole(Exception):
    """A checkpoint that was read, and is damaged or none; the message says what is wrong with it."""


class Unreadable(Exception):
    """A file that could not be read, so that nobody knows what is in it; the message names it and says why."""


def why_unreadable(error: BaseException) -> str:
    """What is wrong with a checkpoint, in one line: unpickling a torn or foreign file raises almost anything."""
    text = str(error)
    if "weights_only" in text or "Weights only" in text:
        named = sorted(set(re.findall(r"GLOBAL ([\w.]+)", text)))
        named += sorted(set(re.findall(r"Unsupported globals: ([\w., ]*\w)", text)) - set(named))
        objects = f" ({', '.join(named)})" if named else ""
        return f"it is no checkpoint, or holds objects{objects} that could run code, which are never loaded"
    return one_line(error)


class _Clamped:
    """A file that never reads beyond its end: damaged sizes would ask for more memory than there is.

    Attributes:
        failed: What went wrong in reading, if anything has: zipfile takes some of it for damage.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.failed: OSError | MemoryError | None = None
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def read(self, n: int = -1) -> bytes:
        left = max(0, self._size - self._file.tell())
        try:
            return self._file.read(left if n is None or n < 0 else min(n, left))
        except (OSError, MemoryError) as e:
            self.failed = e
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def check_records(path: str, only_index: bool = False) -> bool:
    """Reads a checkpoint and compares every record with its checksum.

    Args:
        path: The file.
        only_index: Whether to look at the pickled structure only, not at the tensors in it.

    Returns:
        Whether it has checksums: files of torch before 1.6 have none.

    Raises:
        NotWhole: A checksum is wrong, or it is no checkpoint.
        OSError, MemoryError: It cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotWhole("it is not a regular file")
    with open(path, "rb") as f:
        clamped: Any = _Clamped(f)
        begins = clamped.read(len(_MAGIC)) == _MAGIC
        try:
            if not begins and not zipfile.is_zipfile(clamped):
                if clamped.failed is not None:
                    raise clamped.failed
                return False
            with zipfile.ZipFile(clamped) as records:
                names = [n for n in records.namelist() if not only_index or n.endswith("data.pkl")]
                if not names:
                    raise NotWhole("it has no records of torch")
                for name in names:
                    with records.open(name) as record:
                        while record.read(2 ** 20):
                            pass
        except NotWhole:
            raise
        except Exception as e:  # zipfile has many ways to say that a file is damaged
            if clamped.failed is not None:
                raise clamped.failed from e
            raise NotWhole(f"it is damaged: {one_line(e)}") from e
    return True


def read(path: str, mapped: bool = True) -> Any:
    """What a checkpoint holds.

    Args:
        path: The file.
        mapped: Whether tensors are read only when they are used, if the format can: cheap, but the file must stay.

    Raises:
        NotWhole: It was read, and is damaged or no checkpoint. (Of damage to tensors only :func:`check_records` knows.)
        OSError, MemoryError: It cannot be read.
    """
    mapped = check_records(path, only_index=True) and mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as e:
        if host_is_full(e):
            raise MemoryError(one_line(e)) from e
        raise NotWhole(why_unreadable(e)) from e


def weights_in(checkpoint: Any, ema: bool = False) -> tuple[dict[str, Any], str]:
    """The weights in a checkpoint, under the names that a model of timm has for them.

    Args:
        checkpoint: What was read: a training's, timm's or Lightning's, or the weights alone.
        ema: Whether averaged weights are wanted, if it has any.

    Returns:
        Name -> weight, and the name of the entry that they are from; empty where the file is the weights alone.

    Raises:
        NotWhole: It has none, or averaged ones only.
    """
    if not isinstance(checkpoint, dict):
        raise NotWhole(f"it holds a {type(checkpoint).__name__}, no weights")
    for entry in (*(AVERAGED if ema else ()), "state_dict", "model"):
        if isinstance(checkpoint.get(entry), dict):
            weights = checkpoint[entry]
            break
    else:
        if any(isinstance(checkpoint.get(entry), dict) for entry in AVERAGED):
            raise NotWhole("it has averaged weights only")
        entry, weights = "", checkpoint
    weights = clean_state_dict(weights)
    if weights and all(str(name).startswith("model.") for name in weights):  # Lightning's, of the module's attribute
        weights = {name.removeprefix("model."): weight for name, weight in weights.items()}
    return weights, entry


def weights_of(path: str, ema: bool = False) -> tuple[dict[str, Any], str]:
    """The weights in a file, mapped into memory where its format allows; what is damaged is found.

    Args:
        path: The file, of torch.
        ema: As of :func:`weights_in`.

    Returns:
        As :func:`weights_in`.

    Raises:
        NotWhole: It is damaged, or has no weights.
        OSError, MemoryError: It cannot be read.
    """
    status = os.stat(path)
    identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if identity not in _known_whole:  # its names may be many, and it is looked at before it is used
        check_records(path)
        _known_whole.add(identity)
    return weights_in(read(path), ema)


_known_whole: set[tuple[int, ...]] = set()


def newest_checkpoint(folder: str) -> str | None:
    """The whole checkpoint of the latest epoch in a run's folder; torn files are skipped with a warning.

    Where the run went back to an earlier one, that is the latest epoch since then.

    Args:
        folder: Where ``last.pth.tar``, ``checkpoint-*.pth.tar`` and ``recovery-*.pth.tar`` are. A process that was
            killed may have left a newer one that is whole under the name of one being written.

    Returns:
        Its path, or None if there is none.

    Raises:
        Unreadable: A file, or the folder, cannot be read: what is in it may be newer than all others.
    """
    found = []
    for path in _candidates(folder):
        try:
            progress = _progress(path)
        except NotWhole as e:
            _skip(path, e)
            continue
        except (OSError, MemoryError) as e:
            raise Unreadable(f"{path} cannot be read ({_reason(e)})") from e
        being_written, is_last = files.is_being_written(path), os.path.basename(path) == files.LAST
        found.append((*progress, not being_written, is_last, os.path.getmtime(path), path))
    damaged: set[tuple[int, int]] = set()
    for *_, path in sorted(found, reverse=True):
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in damaged:
                raise NotWhole("it is the same file as that before")
            if not check_records(path):
                _logger.warning(f"{path} has no checksums: whether it is damaged cannot be told.")
            return path
        except NotWhole as e:
            damaged.add((status.st_dev, status.st_ino))
            _skip(path, e)
        except (OSError, MemoryError) as e:
            raise Unreadable(f"{path} cannot be read ({_reason(e)})") from e
    return None


def next_branch(path: str) -> int:
    """The number of the branch of a run that goes on with one of its checkpoints.

    A run may go back. What it writes from there on is newer than what it left, though that is of later epochs: it is of
    the next branch.

    Args:
        path: The checkpoint, in the run's folder.

    Returns:
        That of the checkpoint; a new one, if others in the folder are further.
    """
    own = _known_progress(path)
    others = [progress for other in _candidates(os.path.dirname(path) or ".")
              if (progress := _known_progress(other)) is not None]
    newest = max(others, default=None)
    if newest is None or newest == own:
        return 0 if newest is None else newest[0]
    return newest[0] + 1


def _known_progress(path: str) -> tuple[int, float, float] | None:
    """As :func:`_progress`; None where a file does not tell."""
    try:
        return _progress(path)
    except (NotWhole, Unreadable, OSError, MemoryError):
        return None


def _progress(path: str) -> tuple[int, float, float]:
    """How often the run had gone back, epochs that are done, and what share of the one that has begun."""
    try:
        checkpoint = read(path)
    except NotWhole as e:
        reason = str(e)
    else:
        try:
            place = checkpoint.get("position")
            if os.path.basename(path) == files.RECOVERY_TMP and not place:
                raise NotWhole("it is from within an epoch, and does not say where")  # timm's
            kept = checkpoint.get("saver")
            branch = int(kept.get("branch", 0)) if isinstance(kept, dict) else 0
            return branch, float(checkpoint["epoch"]) + (0.0 if place else 1.0), _share(place) if place else 0.0
        except (AttributeError, LookupError, TypeError, ValueError):
            reason = "it is no checkpoint of a training"
    if files.is_a_runs_own(path) and check_records(path):
        raise Unreadable(f"{path} cannot be gone on with, though nothing is damaged: {reason}; move it away, or name a "
                         f"checkpoint by --resume")
    raise NotWhole(reason)


def _share(place: dict[str, Any]) -> float:
    """How much of an epoch is done: its batches are others where the run goes on with another number of ranks."""
    if "batches" in place:
        return float(place["batch"]) / float(place["batches"])
    return float(place["batch"]) * 1e-12  # older versions do not say of how many: all that do were written since then


def _candidates(folder: str) -> list[str]:
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise Unreadable(f"{folder} cannot be read ({_reason(e)})") from e
    return [os.path.join(folder, name) for name in sorted(names) if name.endswith(files.ENDING)]


def _skip(path: str, reason: NotWhole) -> None:
    if files.is_being_written(path):
        _logger.info(f"{path} was being written when the run ended, and is skipped.")
    else:
        _logger.warning(f"{path} is not a whole checkpoint ({reason}) and is skipped.")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or one_line(error)
