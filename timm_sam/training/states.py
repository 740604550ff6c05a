"""Going on where a run stopped, bit for bit: random states, buffers, of all ranks and of the loader's workers.

A run that was killed and resumed is to be the run that was not. Beside weights, optimizer and schedule this takes the
state of every random generator on every rank at the end of the last epoch, those of the loader's worker processes
included: they live on from epoch to epoch (persistent workers), and augment the next epoch from where they are.
"""
import logging
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..cli.device import Process
from ..random_state import RandomState
from .workers import Restoring, TrackedLoader, has_started, start_silently

_logger = logging.getLogger(__name__)


def local_states(device: torch.device, tracked: TrackedLoader | None, loaders: Sequence[Any]) -> dict[str, Any]:
    """The random states of this process and of its loader's workers, in a form that checkpoints can hold.

    Args:
        device: Of this process.
        tracked: The training loader.
        loaders: All loaders.

    Returns:
        ``process``, ``workers`` by number, and ``started``: which loaders have workers already. Starting them takes a
        random number, which a run that goes on must take again if it had not been taken, and only then.
    """
    workers = {} if tracked is None else {i: pickle.loads(s).to_dict() for i, s in tracked.states.items()}
    return dict(process=RandomState({device}).to_dict(), workers=workers,
                started=[has_started(loader) for loader in loaders])


def of_all_ranks(process: Process, mine: Any) -> dict[str, Any]:
    """Something of all ranks, for a checkpoint. Every rank has to call it.

    Returns:
        ``world_size`` and ``ranks``, what each has by rank.
    """
    return dict(world_size=process.world_size, ranks=process.gather(mine))


def of_this_rank(process: Process, saved: dict[str, Any]) -> Any:
    """This rank's part of :func:`of_all_ranks`; the first rank's, if it is of another number of ranks."""
    return saved["ranks"][process.rank if saved["world_size"] == process.world_size else 0]


def buffers_of_all_ranks(process: Process, modules: Mapping[str, nn.Module | None]) -> dict[str, Any] | None:
    """The buffers in which ranks differ from the first one, whose buffers a checkpoint has anyway.

    BatchNorm's running statistics are each rank's own until they are next shared (DDP, --dist-bn), and in averages of
    the model for the whole epoch. Every rank has to call it.

    Args:
        process: This one.
        modules: Name -> module, or None where there is none.

    Returns:
        As :func:`of_all_ranks`, per rank ``{module's name: {buffer's name: value}}``; None for a single rank.
    """
    if not process.distributed:
        return None
    mine = {name: {key: buffer.cpu() for key, buffer in module.named_buffers()}
            for name, module in modules.items() if module is not None}
    first = process.from_primary(mine)
    return of_all_ranks(process, {
        name: {key: buffer for key, buffer in buffers.items() if not torch.equal(buffer, first[name][key])}
        for name, buffers in mine.items()})


def restore_buffers(process: Process, saved: dict[str, Any] | None, modules: Mapping[str, nn.Module | None]) -> None:
    """Gives this rank the buffers that it had, after all have been given those of the first."""
    if saved is None or saved["world_size"] != process.world_size:
        return
    for name, buffers in saved["ranks"][process.rank].items():
        module = modules[name]
        own = {} if module is None else dict(module.named_buffers())
        for key in buffers.keys() & own.keys():
            own[key].copy_(buffers[key])


def restore_process(process: Process, saved: dict[str, Any]) -> None:
    """Sets this process's random states to those of its rank, unless they are of another number of ranks."""
    if saved["world_size"] == process.world_size:
        RandomState.from_dict(saved["ranks"][process.rank]["process"], process.device).restore()


def restore(process: Process, saved: dict[str, Any] | None, tracked: TrackedLoader | None,
            loaders: Sequence[Any]) -> None:
    """Sets the random states with which an epoch starts, of this process and of its workers to be.

    Args:
        process: This one.
        saved: Of :func:`of_all_ranks`; None, or of another number of ranks or workers: the run goes on with new ones.
        tracked: The training loader.
        loaders: All loaders.
    """
    if saved is None or saved["world_size"] != process.world_size:
        if process.primary:
            ranks = None if saved is None else saved["world_size"]
            reason = "has none" if ranks is None else f"is of {ranks} rank(s), this run has {process.world_size}"
            _logger.info(f"Random states start anew: the checkpoint {reason}.")
        return
    mine = saved["ranks"][process.rank]
    workers = mine["workers"]
    # checkpoints of 0.1.0 do not say what had been started: no worker's state means that the first epoch was running
    started = mine.get("started", [bool(workers) or tracked is None] * len(loaders))
    for loader, was_started in zip(loaders, started):
        if was_started:
            start_silently(loader)
    if tracked is not None and len(workers) == tracked.num_workers:
        tracked.loader.worker_init_fn = Restoring(tracked.loader.worker_init_fn, workers)
        tracked.states = {i: pickle.dumps(RandomState.from_dict(s)) for i, s in workers.items()}
    restore_process(process, saved)
