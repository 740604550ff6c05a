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
from timm.scheduler import PlateauLRScheduler
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from timm.utils.summary import trim_summary

from ..cli.errors import OptionError
from ..cli.parser import dump_args
from ..runs.checkpoints import newest_checkpoint, why_unreadable
from ..runs.sameness import changed_options

_logger = logging.getLogger("train")

ARGS_BEFORE = "args-before-epoch-{}.yaml"  # options of a run up to where it went on with others


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


def resolve_auto(args: argparse.Namespace) -> None:
    """Replaces ``--resume auto`` by the newest whole checkpoint of the experiment's folder, or by none.

    Raises:
        OptionError: There is no ``--experiment``, hence no folder that would be the same after a restart.
    """
    args.resume_auto = args.resume == "auto"
    if not args.resume_auto:
        return
    if not args.experiment:
        raise OptionError("--resume auto needs --experiment NAME: the folder whose newest checkpoint is resumed")
    found = [newest_checkpoint(_folder(args)) if utils.is_primary(args) else None]
    if args.distributed:
        torch.distributed.broadcast_object_list(found, src=0)
    args.resume = found[0] or ""
    if utils.is_primary(args):
        _logger.info(f"--resume auto: {args.resume or 'no checkpoint yet, starting anew'}")


def metadata(path: str) -> dict[str, Any]:
    """The entries of a checkpoint beside its tensors' values; empty without a path."""
    return load_checkpoint_metadata(path) if path else {}


def resume_schedule(saved: dict[str, Any], scheduler: Any, start_epoch: int, updates: int, on_updates: bool) -> None:
    """Brings a new scheduler to where an uninterrupted run has it.

    Args:
        saved: The checkpoint's entries.
        scheduler: timm's, or None.
        start_epoch: The epoch with which the run goes on.
        updates: Updates until there.
        on_updates: Whether the rate is set every update.
    """
    if scheduler is None or updates == 0:
        return
    state, metric = saved.get("schedule"), saved.get("metric")
    if isinstance(scheduler, PlateauLRScheduler):
        # the others are functions of the epoch; this one has a history, and cannot step without a metric
        if state is not None:
            scheduler.lr_scheduler.load_state_dict(state["plateau"])
            scheduler.restore_lr = state["restore_lr"]
            for group, lr in zip(scheduler.optimizer.param_groups, state["lr"]):
                group["lr"] = lr
            scheduler.step(start_epoch, metric)
    elif on_updates:
        scheduler.step_update(updates)
    else:
        scheduler.step(start_epoch)


class _Source:
    """What the saver asks for a checkpoint's entries: those of the task, the schedule's history, and the extras."""

    def __init__(self, task: TrainingTask, schedule: Callable[[], Any], extras: Callable[[], dict[str, Any]]) -> None:
        self.task = task
        self.schedule = schedule
        self.extras = extras

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> dict[str, Any]:
        state = self.task.get_checkpoint_state(ema=ema, **kwargs)
        if ema:
            return state
        state.update(self.extras())
        scheduler = self.schedule()
        if isinstance(scheduler, PlateauLRScheduler):
            state["schedule"] = dict(
                plateau=scheduler.lr_scheduler.state_dict(), restore_lr=scheduler.restore_lr,
                lr=[group["lr"] for group in scheduler.optimizer.param_groups])
        return state


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
        changed = [name for name in _changed(folder, dump_args(args)) if name != "epochs"]
        if changed and any(name.endswith(".pth.tar") for name in os.listdir(folder)):
            flag = "--" + changed[0].replace("_", "-")
            raise OptionError(
                f"--resume auto: the run in {folder} had another {flag} than {getattr(args, changed[0])}; choose "
                f"another --experiment, or go on with other options by --resume {os.path.join(folder, 'last.pth.tar')}")
        return
    if any(name == "summary.csv" or name.endswith(".pth.tar") for name in os.listdir(folder)):
        raise OptionError(
            f"--experiment {args.experiment}: {folder} holds another run; choose another name, or go on with "
            f"--resume {os.path.join(folder, 'last.pth.tar')}")


def _changed(folder: str, args_text: str) -> list[str]:
    """The options that make this run another one than that in the folder; none if that one's are unknown."""
    try:
        with open(os.path.join(folder, "args.yaml"), encoding="utf-8") as f:
            before = yaml.safe_load(f)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return []
    return changed_options(before, yaml.safe_load(args_text)) if isinstance(before, dict) else []


def _folder(args: argparse.Namespace, name: str = "") -> str:
    return os.path.join(args.output or os.path.join(".", "output", "train"), args.experiment or name)


def _inside(path: str, folder: str) -> bool:
    return bool(path) and os.path.realpath(os.path.dirname(path)) == os.path.realpath(folder)


def create_output(
        args: argparse.Namespace,
        name: str,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        scaler: Any,
        schedule: Callable[[], Any],
        extras: Callable[[], dict[str, Any]],
        decreasing: bool,
        start_epoch: int,
        args_text: str,
) -> tuple[str, CheckpointSaver]:
    """Makes the run's folder with ``args.yaml``, and timm's saver in it.

    Args:
        args: All options.
        name: The folder's name if ``--experiment`` gives none.
        task: Whose weights are saved.
        optimizer: The base optimizer.
        scaler: The loss scaler, or None.
        schedule: Returns the scheduler.
        extras: Returns further entries for the next checkpoint.
        decreasing: Whether a lower metric is better.
        start_epoch: Rows of an earlier ``summary.csv`` from this epoch on are dropped.
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
    saver = CheckpointSaver(
        model=task.get_trainable_module(), optimizer=optimizer, args=args, amp_scaler=scaler, checkpoint_dir=folder,
        recovery_dir=folder, decreasing=decreasing, max_history=args.checkpoint_hist,
        task=_Source(task, schedule, extras))
    if _inside(args.resume, folder):
        saver.load_state_dict_from_checkpoint(args.resume)
    if _inside(args.resume, folder) or args.resume_auto:
        trim_summary(os.path.join(folder, "summary.csv"), start_epoch)
    path = os.path.join(folder, "args.yaml")
    changed = _changed(folder, args_text)
    if changed:
        _logger.warning(f"Going on with other options than before: {', '.join(changed)}. The earlier ones are kept in "
                        f"{ARGS_BEFORE.format(start_epoch)}.")
        os.replace(path, os.path.join(folder, ARGS_BEFORE.format(start_epoch)))
    with open(path, "w", encoding="utf-8") as f:
        f.write(args_text)
    return folder, saver


