"""The learning-rate schedule, of timm's factory."""
import argparse
import warnings
from typing import Any

import torch
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2, scheduler_kwargs

from ..cli.errors import OptionError, one_line


def create_schedule(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int,
                    decreasing_metric: bool) -> tuple[Any, int]:
    """timm's learning-rate scheduler (or None) and the number of epochs in all.

    Raises:
        OptionError: The schedule is unknown or its lengths contradict each other.
    """
    try:
        return create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=decreasing_metric),
            updates_per_epoch=updates_per_epoch)
    except (ValueError, AssertionError) as e:
        own = ", --lr-decay-fn and --lr-stable-timescale" if args.sched in ("wsd", "rsqrt") else ""
        raise OptionError(f"--sched {args.sched}: {one_line(e) or 'refuses its options'}; check --epochs, "
                          f"--warmup-epochs, --decay-epochs{own}") from e


def planned_epochs(args: argparse.Namespace) -> int:
    """The number of epochs in all, warm-up, cool-down and cycles included.

    Raises:
        OptionError: As :func:`create_schedule`.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the schedule's deprecation, say: nothing is trained with it here
        # the number of updates per epoch only matters to schedules that move with them; it cancels out
        return int(create_schedule(args, optimizer, 1000, False)[1])


def check_epochs(args: argparse.Namespace, num_epochs: int) -> None:
    """Checks the numbers of epochs at which something happens.

    Args:
        args: All options.
        num_epochs: Of the schedule, warm-up, cool-down and cycles included.

    Raises:
        OptionError: One is not reached.
    """
    stop = args.stop_epoch
    if stop is not None and not 1 <= stop <= num_epochs:
        raise OptionError(f"--stop-epoch {stop} must be from 1 to {num_epochs}, the epochs of the schedule")
    out = [n for n in args.save_epochs or () if not 1 <= n <= num_epochs]
    if out:
        raise OptionError(f"--save-epochs {' '.join(map(str, out))}: counts of epochs done must be from 1 to "
                          f"{num_epochs}, the epochs of the schedule")


def last_epoch(args: argparse.Namespace, num_epochs: int) -> int:
    """How many epochs are trained of those of the schedule."""
    return num_epochs if args.stop_epoch is None else min(args.stop_epoch, num_epochs)


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
        elif start_epoch <= scheduler.warmup_t:
            scheduler.step(start_epoch)
        else:  # of timm, which does not keep the history: it begins anew, but not with the rate of the warm-up
            scheduler.update_groups(scheduler.base_values)
    elif on_updates:
        scheduler.step_update(updates)
    elif start_epoch:  # the first epoch is trained as the scheduler was made, without the noise that a step adds
        scheduler.step(start_epoch)


def schedule_state(scheduler: Any) -> dict[str, Any] | None:
    """What a checkpoint has to hold of a scheduler: that of a plateau has a history."""
    if not isinstance(scheduler, PlateauLRScheduler):
        return None
    return dict(plateau=scheduler.lr_scheduler.state_dict(), restore_lr=scheduler.restore_lr,
                lr=[group["lr"] for group in scheduler.optimizer.param_groups])
