"""Writing checkpoints, in timm's format and under timm's names, such that a kill at any moment loses nothing.

A checkpoint is written under a name of its own, brought to the disk, and only then renamed: ``last.pth.tar`` is always
a whole one. What follows from it, a second name for one of the best epochs and the removal of the worst, is made up for
by the next start if this one is killed in between: each checkpoint holds the list of those before it, and its metric.
"""
import argparse
import logging
import math
import os
import re
from contextlib import suppress
from typing import Any, TypeGuard

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..cli.errors import OptionError, one_line
from ..runs import files
from ..runs.checkpoints import NotWhole, next_branch, read

_logger = logging.getLogger(__name__)

_RECOVERY = re.compile(re.escape(files.RECOVERY).replace(r"\{\}", r"(\d+)"))
_VERSION = 2  # of timm's format: the epoch is that which is done


class Saver:
    """Keeps the newest checkpoint, those of the best epochs, and two from within an epoch.

    Args:
        args: What checkpoints hold as the options; ``model`` and ``checkpoint_hist`` count here.
        task: Whose weights are saved.
        optimizer: The base optimizer.
        scaler: The loss scaler, or None.
        folder: Where.
        decreasing: Whether a lower metric is better.
    """

    def __init__(self, args: argparse.Namespace, task: TrainingTask, optimizer: torch.optim.Optimizer, scaler: Any,
                 folder: str, decreasing: bool) -> None:
        self._args, self._task, self._optimizer, self._scaler = args, task, optimizer, scaler
        self._folder = folder
        self._decreasing = decreasing
        self._history: list[tuple[str, float | None]] = []  # names and metrics, the best first
        self._best: tuple[float, int] | None = None  # metric and epoch
        self._recoveries: list[str] = []  # names, the older first
        self._branch = 0  # how often the run has gone back to an earlier checkpoint
        self._newest = ""  # name of what was written last, for messages

    def go_on(self, path: str) -> None:
        """Takes over the list of checkpoints that an earlier start of the run kept, and what it did not get to do.

        Args:
            path: The checkpoint that is resumed, in the folder.

        Raises:
            OptionError: The folder cannot be written.
        """
        self._newest = os.path.basename(path)
        self._branch = next_branch(path)
        try:
            checkpoint = read(path)
            saved = checkpoint.get("saver")
        except (AttributeError, NotWhole):
            saved = None
        if not isinstance(saved, dict):
            _logger.warning(f"{path} has no list of the best checkpoints: they are ranked anew.")
            return
        self._history = [entry for entry in map(self._listed, saved.get("checkpoint_files") or ()) if entry is not None]
        self._sort()
        epoch, metric = saved.get("best_epoch"), saved.get("best_metric")
        self._best = (metric, epoch) if _is_epoch(epoch) and _is_metric(metric) else None
        epoch, metric = saved.get("pending") or (None, None)
        try:
            self._recoveries = self._superseded(path, checkpoint.get("epoch"))
            if _is_epoch(epoch) and _is_metric(metric):
                self._rank(path, epoch, metric)
            self._mend_best(path)
        except OSError as e:
            raise self._failed(e) from e
        _logger.info(f"Going on with {len(self._history)} of the best checkpoints; " + (
            "none is best yet." if self._best is None else f"best metric {self._best[0]} (epoch {self._best[1]})."))

    def save(self, epoch: int, metric: float, extras: dict[str, Any]) -> tuple[float | None, int | None]:
        """Writes the checkpoint of an epoch.

        Args:
            epoch: That is done, from 0.
            metric: What ranks it; one that is not a number is worse than all.
            extras: Further entries.

        Returns:
            The best metric so far, and its epoch.

        Raises:
            OptionError: The folder cannot be written (any more).
        """
        state = {**self._state(epoch, extras), "metric": float(metric), "saver": self._listing((epoch, float(metric)))}
        self._write(state, files.TMP, files.LAST)
        try:
            self._rank(self._path(files.LAST), epoch, float(metric))
        except OSError as e:
            raise self._failed(e) from e
        return self._best or (None, None)

    def save_recovery(self, epoch: int, update: int, extras: dict[str, Any]) -> None:
        """Writes a checkpoint inside an epoch; the two newest stay, of earlier starts, too.

        Raises:
            OptionError: As :meth:`save`.
        """
        name = files.RECOVERY.format(epoch, update)
        self._write({**self._state(epoch, extras), "saver": self._listing((None, None))}, files.RECOVERY_TMP, name)
        self._recoveries = [*(n for n in self._recoveries if n != name), name]
        while len(self._recoveries) > 2:
            self._remove(self._recoveries.pop(0))

    def save_milestone(self, epochs: int) -> None:
        """Keeps the checkpoint that was written last as that of a number of epochs done, whatever its metric.

        Raises:
            OptionError: As :meth:`save`.
        """
        try:
            files.duplicate(self._path(files.LAST), self._path(files.MILESTONE.format(epochs)))
        except OSError as e:
            raise self._failed(e) from e

    def _superseded(self, path: str, epoch: Any) -> list[str]:
        """The recovery checkpoints that are no further than the one that is resumed, the older first.

        Each start leaves two of them, and a run may be stopped many times.
        """
        resumed = _RECOVERY.fullmatch(os.path.basename(path))
        last = (int(resumed[1]), int(resumed[2])) if resumed else (epoch if _is_epoch(epoch) else -1, math.inf)
        found = filter(None, map(_RECOVERY.fullmatch, os.listdir(self._folder)))
        places = {(int(name[1]), int(name[2])): name[0] for name in found}
        return [places[place] for place in sorted(places) if place <= last]

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _state(self, epoch: int, extras: dict[str, Any]) -> dict[str, Any]:
        state = dict(epoch=epoch, arch=self._args.model, optimizer=self._optimizer.state_dict(), version=_VERSION,
                     args=self._args)
        if self._scaler is not None:
            state[self._scaler.state_dict_key] = self._scaler.state_dict()
        for ema in (False, True):
            state.update(self._task.get_checkpoint_state(ema=ema, unwrap_fn=unwrap_model))
        return {**state, **extras}

    def _listing(self, pending: tuple[int | None, float | None]) -> dict[str, Any]:
        metric, epoch = self._best or (None, None)
        return dict(checkpoint_files=list(self._history), best_epoch=epoch, best_metric=metric, pending=pending,
                    branch=self._branch)

    def _write(self, state: dict[str, Any], tmp: str, name: str) -> None:
        try:
            try:
                with open(self._path(tmp), "wb") as f:
                    torch.save(state, f)
                    files.write_through(f)
            except BaseException:
                with suppress(OSError):
                    os.unlink(self._path(tmp))
                raise
            files.rename(self._path(tmp), self._path(name))
        except (OSError, RuntimeError) as e:  # torch says by the latter that writing has failed
            raise self._failed(e) from e
        self._newest = name

    @property
    def kept(self) -> str:
        """What a run that ends here leaves to go on with, in words."""
        return f"{self._path(self._newest)} is whole, go on with --resume auto" if self._newest else "nothing was kept"

    def _failed(self, error: Exception) -> OptionError:
        while not isinstance(error, OSError) and isinstance(error.__context__, Exception):
            error = error.__context__
        reason = getattr(error, "strerror", None) or one_line(error)
        return OptionError(f"--output: no checkpoint can be written in {self._folder} ({reason}); {self.kept} when "
                           f"there is room and leave to write")

    # Which are best

    def _listed(self, entry: Any) -> tuple[str, float | None] | None:
        """An entry of a checkpoint's list, if it names a file of this folder: others are never touched."""
        try:
            name, metric = entry
        except (TypeError, ValueError):
            return None
        ours = isinstance(name, str) and name == os.path.basename(name) and "\0" not in name and \
            name.startswith("checkpoint-") and name.endswith(files.ENDING)
        if not ours or not (metric is None or _is_metric(metric)):
            _logger.warning(f"The list of checkpoints names {name!r}, which is none of this folder's: left out.")
            return None
        return (name, metric) if os.path.isfile(self._path(name)) else None

    def _key(self, metric: float | None) -> tuple[int, float]:
        if metric is None or math.isnan(metric):
            return (2 if metric is None else 1, 0.0)
        return (0, metric if self._decreasing else -metric)

    def _sort(self) -> None:
        self._history.sort(key=lambda entry: self._key(entry[1]))  # of equal ones the earlier comes first

    def _rank(self, source: str, epoch: int, metric: float) -> None:
        """Gives a whole checkpoint the names that it has earned, and removes those that it displaces."""
        name = files.OF_EPOCH.format(epoch)
        self._history = [entry for entry in self._history if entry[0] != name] + [(name, metric)]
        self._sort()
        kept = self._history[:self._args.checkpoint_hist]
        displaced = self._history[self._args.checkpoint_hist:]
        self._history = kept
        if (name, metric) in kept:
            files.duplicate(source, self._path(name))
        if self._best is None or self._key(metric) < self._key(self._best[0]):
            self._best = metric, epoch
            files.duplicate(source, self._path(files.BEST))
        for other, _ in displaced:
            if other != name:
                self._remove(other)
        listing = "".join(f"\n {name}: {metric}" for name, metric in self._history)
        _logger.info(f"Current checkpoints, the best first:{listing}")

    def _mend_best(self, path: str) -> None:
        """Sees to it that ``model_best`` is the best epoch's: an earlier start may have been killed before that."""
        if self._best is None:
            return
        epoch = self._best[1]
        if _epoch_of(self._path(files.BEST)) == epoch:
            return
        for source in (self._path(files.OF_EPOCH.format(epoch)), path):
            if _epoch_of(source) == epoch:
                files.duplicate(source, self._path(files.BEST))
                return
        _logger.warning(f"{files.BEST} is not that of the best epoch so far ({epoch}), whose checkpoint is gone.")

    def _remove(self, name: str) -> None:
        try:
            os.unlink(self._path(name))
        except FileNotFoundError:
            pass
        except OSError as e:
            _logger.warning(f"{self._path(name)} cannot be removed: {e.strerror}")


def _is_epoch(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_metric(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _epoch_of(path: str) -> int | None:
    """The epoch that a checkpoint is the end of, or None where there is no whole one."""
    try:
        checkpoint = read(path)
        return None if checkpoint.get("position") else int(checkpoint["epoch"])
    except (OSError, NotWhole, AttributeError, LookupError, TypeError, ValueError):
        return None
