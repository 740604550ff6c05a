"""Going on from a checkpoint: what timm's script writes resumes here, and the other way round (``saver.py``)."""
import logging
from typing import Any

import torch
from timm.task import TrainingTask

from ..cli.errors import OptionError, one_line
from ..runs.checkpoints import read, weights_in
from ..runs.sameness import normal
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
    kept: list[str] = []
    try:
        saved = read(path, mapped=False)
        weights, entry = weights_in(saved)
        task.load_checkpoint_state(weights, saved.get("task_state") if entry == "state_dict" else None)
        if optimizer is not None and "optimizer" in saved:
            own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved["optimizer"])
            _check_options(optimizer, own)
            kept = _kept(optimizer, own)
        if scaler is not None and scaler.state_dict_key in saved:
            scaler.load_state_dict(saved[scaler.state_dict_key])
        epoch = None
        if entry and "epoch" in saved:  # older versions of the format name the next one
            epoch = int(saved["epoch"]) + int(saved.get("version", 1) > 1)
    except Exception as e:  # foreign files hold anything
        hint = "start from them by --initial-checkpoint" if "averaged weights only" in str(e) else (
            "give a whole checkpoint of this model and optimizer (or --no-resume-opt)")
        raise OptionError(f"--resume {path} cannot be resumed: {one_line(e)}; {hint}") from e
    if verbose:
        _logger.info(f"Weights of {path} loaded" + ("." if epoch is None else f", which goes on with epoch {epoch}."))
        if optimizer is not None and "optimizer" not in saved:
            _logger.warning(f"--resume {path} has no state of the optimizer, which starts anew.")
        if kept:
            _logger.warning(f"--resume {path}: the optimizer goes on with what it had, {', '.join(kept)}; "
                            f"--no-resume-opt starts it anew.")
        if scaler is not None and scaler.state_dict_key not in saved:
            _logger.warning(f"--resume {path} has no loss scale, which starts anew.")
    return epoch


def _kept(optimizer: torch.optim.Optimizer, own: list[dict[str, Any]]) -> list[str]:
    """The checkpoint's options of the optimizer that differ from the given ones: as in torch, those are not used.

    Args:
        optimizer: It has loaded a state.
        own: Its groups before that.

    Returns:
        Of each option in words what it is, and what was given.
    """
    found: dict[str, str] = {}
    for before, group in zip(own, optimizer.param_groups):
        for name in ("lr", "weight_decay", "momentum", "betas", "eps"):
            if name not in before or name not in group:
                continue
            # the highest rate of the schedule, which goes on from it
            saved = group.get("initial_lr", group[name]) if name == "lr" else group[name]
            if normal(saved) != normal(before[name]):
                found.setdefault(name, f"{name} {saved} instead of {before[name]}")
    return list(found.values())


def _check_options(optimizer: torch.optim.Optimizer, own: list[dict[str, Any]]) -> None:
    """Groups are replaced as they are, so that those of another optimizer would be noticed in the first step.

    Args:
        optimizer: It has loaded a state.
        own: Its groups before that.

    Raises:
        ValueError: Options of the optimizer are gone.
    """
    lost = {name for before, group in zip(own, optimizer.param_groups)
            for name in optimizer.defaults if name in before and name not in group}
    if lost:
        raise ValueError(f"the state is of another optimizer, one without {', '.join(sorted(lost))}")


def resume_ema(path: str, task: TrainingTask) -> None:
    """Loads the averaged weights, or the plain ones if the file has no others.

    Raises:
        OptionError: They do not fit the model.
    """
    try:
        saved = read(path, mapped=False)
        weights, entry = weights_in(saved, ema=True)
        task_state = {"state_dict_ema": "task_state_ema", "state_dict": "task_state"}.get(entry, "")
        task.load_checkpoint_state(weights, saved.get(task_state), ema=True)
    except Exception as e:
        raise OptionError(f"--resume {path}: its averaged weights cannot be loaded: {one_line(e)}; leave out "
                          f"--model-ema, or give a whole checkpoint") from e


def resume_methods(saved: dict[str, Any], update: Update, verbose: bool) -> None:
    """Gives SAM's methods what they kept."""
    if "sam_methods" in saved:
        update.load_method_state_dict(saved["sam_methods"])
    elif update.method_state_dict() and verbose:
        _logger.info("What SAM's method keeps from update to update starts as new: the checkpoint has none of it.")


def metadata(path: str) -> dict[str, Any]:
    """The entries of a checkpoint beside its weights; empty without a path, or where the file is the weights alone."""
    if not path:
        return {}
    saved = read(path)
    return saved if weights_in(saved)[1] else {}
