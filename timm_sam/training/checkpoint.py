"""Checkpoints in timm's format: what timm's script writes resumes here, and the other way round."""
import argparse
import logging
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import yaml
from timm import utils
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from timm.utils.summary import trim_summary

from ..cli.device import Process
from ..cli.errors import OptionError
from ..cli.parser import dump_args
from ..runs import files
from ..runs.checkpoints import newest_checkpoint, why_unreadable
from ..runs.sameness import changed_options
from .plain import Update

_logger = logging.getLogger(__name__)


def resume(
        path: str,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer | None,
        scaler: Any,
        verbose: bool,
) -> int | None:
    """Loads model, optimizer and loss scale from a training checkpoint of this project or timm.

    Args:
        path: The file.
        task: Receives the weights.
        optimizer: Receives its state, unless None.
        scaler: Receives the loss scale, unless None.
        verbose: Whether to log.

    Returns:
        The epoch to go on with, or None if the file names none.

    Raises:
        OptionError: The file cannot be read, or is of another model or optimizer.
    """
    try:
        return resume_task_checkpoint(task, path, optimizer=optimizer, loss_scaler=scaler, log_info=verbose)
    except Exception as e:
        raise OptionError(
            f"--resume {path} cannot be resumed: {why_unreadable(e)}; give a whole checkpoint of this model and "
            f"optimizer (or --no-resume-opt)") from e


def resume_ema(path: str, task: TrainingTask) -> None:
    """Loads the averaged weights, or the plain ones if the file has no others.

    Raises:
        OptionError: They do not fit the model.
    """
    try:
        load_task_ema_checkpoint(task, path)
    except Exception as e:
        raise OptionError(f"--resume {path}: its averaged weights cannot be loaded: {why_unreadable(e)}; leave out "
                          f"--model-ema, or give a whole checkpoint") from e


def resolve_resume(args: argparse.Namespace, process: Process) -> str:
    """The checkpoint to go on with: ``--resume auto`` is the newest whole one of the experiment's folder, or none.

    Raises:
        OptionError: ``auto`` without ``--experiment``, hence no folder that would be the same after a restart.
    """
    if args.resume != "auto":
        return args.resume
    if not args.experiment:
        raise OptionError("--resume auto needs --experiment NAME: the folder whose newest checkpoint is resumed")
    path = process.from_primary(newest_checkpoint(_folder(args)) if process.primary else None) or ""
    if process.primary:
        _logger.info(f"--resume auto: {path or 'no checkpoint yet, starting anew'}")
    return path


def resume_methods(saved: dict[str, Any], update: Update, verbose: bool) -> None:
    """Gives SAM's methods what they kept."""
    if "sam_methods" in saved:
        update.load_method_state_dict(saved["sam_methods"])
    elif update.method_state_dict() and verbose:
        _logger.info("What SAM's method keeps from update to update starts as new: the checkpoint has none of it.")


def metadata(path: str) -> dict[str, Any]:
    """The entries of a checkpoint beside its tensors' values; empty without a path."""
    return load_checkpoint_metadata(path) if path else {}


class _Source:
    """What timm's saver asks for a checkpoint's entries: those of the task, and ``extras``."""

    def __init__(self, task: TrainingTask) -> None:
        self.task = task
        self.extras: dict[str, Any] = {}

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> dict[str, Any]:
        state = self.task.get_checkpoint_state(ema=ema, **kwargs)
        return state if ema else {**state, **self.extras}


class Saver:
    """timm's saver, with entries of ours in its checkpoints.

    Args:
        args: What checkpoints hold as the options.
        task: Whose weights are saved.
        optimizer: The base optimizer.
        scaler: The loss scaler, or None.
        folder: Where.
        decreasing: Whether a lower metric is better.
    """

    def __init__(self, args: argparse.Namespace, task: TrainingTask, optimizer: torch.optim.Optimizer, scaler: Any,
                 folder: str, decreasing: bool) -> None:
        self._source = _Source(task)
        self._saver = CheckpointSaver(
            model=task.get_trainable_module(), optimizer=optimizer, args=args, amp_scaler=scaler,
            checkpoint_dir=folder, recovery_dir=folder, decreasing=decreasing, max_history=args.checkpoint_hist,
            task=self._source)

    def go_on(self, path: str) -> None:
        """Takes over the list of checkpoints that an earlier start of the run kept."""
        self._saver.load_state_dict_from_checkpoint(path)

    def save(self, epoch: int, metric: float, extras: dict[str, Any]) -> tuple[float | None, int | None]:
        """Writes the checkpoint of an epoch; returns the best metric so far and its epoch."""
        self._source.extras = extras
        return self._saver.save_checkpoint(epoch, metric=metric)

    def save_milestone(self, epochs: int) -> None:
        """Keeps the checkpoint that was written last as that of a number of epochs done, whatever its metric."""
        self._saver.save_milestone(epochs)

    def save_recovery(self, epoch: int, update: int, extras: dict[str, Any]) -> None:
        """Writes a checkpoint inside an epoch."""
        self._source.extras = extras
        self._saver.save_recovery(epoch, batch_idx=update)


def check_output(args: argparse.Namespace) -> None:
    """Refuses to write a new run over another one.

    Raises:
        OptionError: The experiment's folder has results that the run would not continue.
    """
    folder = _folder(args)
    if not args.experiment or not os.path.isdir(folder) or _inside(args.resume, folder):
        return
    if args.resume == "auto":
        # more epochs are a reason to go on; anything else is another run under the name of this one
        changed = [name for name in _changed(folder, dump_args(args)) if name not in ("epochs", "stop_epoch")]
        if changed and any(name.endswith(files.ENDING) for name in os.listdir(folder)):
            flag = "--" + changed[0].replace("_", "-")
            raise OptionError(
                f"--resume auto: the run in {folder} had another {flag} than {getattr(args, changed[0])}; choose "
                f"another --experiment, or go on with other options by --resume {os.path.join(folder, files.LAST)}")
        return
    if any(name == files.SUMMARY or name.endswith(files.ENDING) for name in os.listdir(folder)):
        raise OptionError(
            f"--experiment {args.experiment}: {folder} holds another run; choose another name, or go on with "
            f"--resume {os.path.join(folder, files.LAST)}")


def _changed(folder: str, args_text: str) -> list[str]:
    """The options that make this run another one than that in the folder; none if that one's are unknown."""
    try:
        with open(os.path.join(folder, files.ARGS), encoding="utf-8") as f:
            before = yaml.safe_load(f)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return []
    return changed_options(before, yaml.safe_load(args_text)) if isinstance(before, dict) else []


def _folder(args: argparse.Namespace, name: str = "") -> str:
    return os.path.join(args.output or os.path.join(".", "output", "train"), args.experiment or name)


def _inside(path: str, folder: str) -> bool:
    return bool(path) and os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder)


def create_output(args: argparse.Namespace, name: str, resume: str, start_epoch: int, saver: Callable[[str], Saver],
                  args_text: str) -> tuple[str, Saver]:
    """Makes the run's folder with ``args.yaml``, and the saver in it.

    Args:
        args: All options.
        name: The folder's name if ``--experiment`` gives none.
        resume: The checkpoint that is resumed, or empty.
        start_epoch: Rows of an earlier ``summary.csv`` from this epoch on are dropped.
        saver: Makes the saver of a folder.
        args_text: The options as they were given (:func:`dump_args`).

    Raises:
        OptionError: The folder cannot be written.

    Returns:
        The folder's path and the saver.
    """
    folder = _folder(args, name)
    try:
        folder = utils.get_outdir(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise OptionError(f"--output {args.output or './output/train'}: {folder} cannot be written ({e.strerror}); "
                          f"choose another folder") from e
    made = saver(folder)
    if _inside(resume, folder):
        made.go_on(resume)
    if _inside(resume, folder) or args.resume == "auto":
        trim_summary(os.path.join(folder, files.SUMMARY), start_epoch)
    path = os.path.join(folder, files.ARGS)
    changed = _changed(folder, args_text)
    if changed:
        _logger.warning(f"Going on with other options than before: {', '.join(changed)}. The earlier ones are kept in "
                        f"{files.ARGS_BEFORE.format(start_epoch)}.")
        os.replace(path, os.path.join(folder, files.ARGS_BEFORE.format(start_epoch)))
    with open(path, "w", encoding="utf-8") as f:
        f.write(args_text)
    return folder, made
