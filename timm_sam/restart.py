"""Going on where a run stopped, bit for bit: random states, the loader's workers, signals, and which file to take.

A run that was killed and resumed is to be the run that was not. Beside weights, optimizer and schedule this takes the
state of every random generator on every rank at the end of the last epoch, those of the loader's worker processes
included: they live on from epoch to epoch (persistent workers), and augment the next epoch from where they are.
"""
import argparse
import glob
import logging
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm import utils
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .random_state import RandomState

_logger = logging.getLogger("train")

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped by SIGTERM with a checkpoint written, resume it


class _Tagging:
    """A collate function that adds the worker's number and random state to the batch."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> tuple[Any, int, bytes]:
        batch = self.collate(samples)
        info = get_worker_info()
        assert info is not None
        return batch, info.id, pickle.dumps(RandomState(set()))  # as bytes: a tensor would take a file descriptor


class _Restoring:
    """A worker's set-up that ends with the random state which the worker of an earlier process had."""

    def __init__(self, init: Callable[[int], None] | None, states: dict[int, dict[str, Any]]) -> None:
        self.init = init
        self.states = states

    def __call__(self, worker_id: int) -> None:
        if self.init is not None:
            self.init(worker_id)
        if worker_id in self.states:
            RandomState.from_dict(self.states[worker_id]).restore()


class TrackedLoader:
    """Stands in for a DataLoader with persistent workers, and knows their random states after the last batch.

    Everything but iteration is the loader's own; ``collate_fn`` is the one that the loader was made with.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.collate_fn = loader.collate_fn
        self.states: dict[int, bytes] = {}
        loader.collate_fn = _Tagging(loader.collate_fn)

    def __iter__(self) -> Iterator[Any]:
        for batch, worker, state in self.loader:
            self.states[worker] = state
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)


class _OwnGroup:
    """A worker's set-up that begins with a process group of its own.

    torchrun passes SIGTERM on to the whole group of a rank. The rank finishes its update and writes a checkpoint; its
    workers would die at once, and take the rank with them.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self.init = init

    def __call__(self, worker_id: int) -> None:
        os.setpgid(0, 0)
        if self.init is not None:
            self.init(worker_id)


class Fetching:
    """Iterates over a loader, and knows this process's random state as it was before the last batch was fetched.

    timm's prefetcher is one batch ahead, and draws random numbers for it in this process (random erasing; without
    workers all of its augmentation), in between those that the model draws.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader = loader
        self.device = device
        self.before: RandomState | None = None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield batch
            self.before = RandomState({self.device})

    def state(self) -> dict[str, Any] | None:
        """As :func:`local_states`; None in front of the second batch."""
        return None if self.before is None else dict(process=self.before.to_dict(), workers={})


def _data_loader(loader: Any) -> Any:
    """torch's loader inside of timm's prefetcher and of ours."""
    inner = getattr(loader, "loader", loader)
    return inner.loader if isinstance(inner, TrackedLoader) else inner


def dismiss(loaders: Sequence[Any]) -> None:
    """Ends the workers that live on.

    Left to the garbage collector, the queues to them may be gone before they are told, and each takes five seconds to
    look around.
    """
    for inner in map(_data_loader, loaders):
        for name in ("_iterator", "iterator"):  # of torch's DataLoader, and of timm's MultiEpochsDataLoader
            if getattr(inner, name, None) is not None:
                setattr(inner, name, None)


def shield(loader: Any) -> None:
    """Keeps signals to the process group of this process from the workers of timm's loader."""
    inner = _data_loader(loader)
    if isinstance(inner, DataLoader) and inner.num_workers:
        inner.worker_init_fn = _OwnGroup(inner.worker_init_fn)


def track(loader: Any) -> tuple[Any, TrackedLoader | None]:
    """Makes a training loader's workers known to checkpoints, if it has any that live on.

    Args:
        loader: timm's loader, with or without its prefetcher.

    Returns:
        The loader to iterate over, and the tracked one inside it, or None where there is nothing to track: without
        workers all random numbers come from this process; iterable data sets and multi-epoch loaders have an order of
        their own that cannot be set.
    """
    inner = _data_loader(loader)
    plain = type(inner) is DataLoader and not isinstance(inner.dataset, IterableDataset)
    if not plain or not inner.persistent_workers:
        return loader, None
    tracked = TrackedLoader(inner)
    if inner is loader:
        return tracked, tracked
    loader.loader = tracked
    return loader, tracked


def local_states(device: torch.device, tracked: TrackedLoader | None) -> dict[str, Any]:
    """The random states of this process and of its loader's workers, in a form that checkpoints can hold."""
    workers = {} if tracked is None else {i: pickle.loads(s).to_dict() for i, s in tracked.states.items()}
    return dict(process=RandomState({device}).to_dict(), workers=workers)


def of_all_ranks(args: argparse.Namespace, mine: dict[str, Any]) -> dict[str, Any]:
    """The states of all ranks, for a checkpoint. Every rank has to call it.

    Returns:
        ``world_size`` and ``ranks``, the states of :func:`local_states` by rank.
    """
    ranks: list[Any] = [mine]
    if args.distributed:
        ranks = [None] * args.world_size
        torch.distributed.all_gather_object(ranks, mine)
    return dict(world_size=args.world_size, ranks=ranks)


def of_this_rank(args: argparse.Namespace, saved: dict[str, Any]) -> Any:
    """This rank's part of :func:`of_all_ranks`; the first rank's, if it is of another number of ranks."""
    return saved["ranks"][args.rank if saved["world_size"] == args.world_size else 0]


def buffers_of_all_ranks(args: argparse.Namespace, modules: Mapping[str, nn.Module | None]) -> dict[str, Any] | None:
    """The buffers in which ranks differ from the first one, whose buffers a checkpoint has anyway.

    BatchNorm's running statistics are each rank's own until they are next shared (DDP, --dist-bn), and in averages of
    the model for the whole epoch. Every rank has to call it.

    Args:
        args: All options.
        modules: Name -> module, or None where there is none.

    Returns:
        As :func:`of_all_ranks`, per rank ``{module's name: {buffer's name: value}}``; None for a single rank.
    """
    if not args.distributed:
        return None
    mine = {name: {key: buffer.cpu() for key, buffer in module.named_buffers()}
            for name, module in modules.items() if module is not None}
    first = [mine]
    torch.distributed.broadcast_object_list(first)
    return of_all_ranks(args, {
        name: {key: buffer for key, buffer in buffers.items() if not torch.equal(buffer, first[0][name][key])}
        for name, buffers in mine.items()})


def restore_buffers(args: argparse.Namespace, saved: dict[str, Any] | None,
                    modules: Mapping[str, nn.Module | None]) -> None:
    """Gives this rank the buffers that it had, after all have been given those of the first."""
    if saved is None or saved["world_size"] != args.world_size:
        return
    for name, buffers in saved["ranks"][args.rank].items():
        own = {} if modules[name] is None else dict(modules[name].named_buffers())
        for key in buffers.keys() & own.keys():
            own[key].copy_(buffers[key])


def restore_process(args: argparse.Namespace, saved: dict[str, Any]) -> bool:
    """Sets this process's random states to those of its rank; False if they are of another number of ranks."""
    if saved["world_size"] != args.world_size:
        return False
    RandomState.from_dict(saved["ranks"][args.rank]["process"], torch.device(args.device)).restore()
    return True


def restore(args: argparse.Namespace, saved: dict[str, Any] | None, tracked: TrackedLoader | None,
            loaders: Sequence[Any]) -> None:
    """Sets the random states with which an epoch starts, of this process and of its workers to be.

    Args:
        args: All options.
        saved: Of :func:`of_all_ranks`; None, or of another number of ranks or workers: the run goes on with new ones.
        tracked: The training loader.
        loaders: All loaders.
    """
    if saved is None or saved["world_size"] != args.world_size:
        if utils.is_primary(args):
            ranks = None if saved is None else saved["world_size"]
            reason = "has none" if ranks is None else f"is of {ranks} rank(s), this run has {args.world_size}"
            _logger.info(f"Random states start anew: the checkpoint {reason}.")
        return
    for inner in map(_data_loader, loaders):
        if isinstance(inner, DataLoader) and inner.persistent_workers:
            inner.generator = torch.Generator()  # in the run that goes on, the workers were started long ago
    workers = saved["ranks"][args.rank]["workers"]
    if tracked is not None and len(workers) == tracked.num_workers:
        tracked.loader.worker_init_fn = _Restoring(tracked.loader.worker_init_fn, workers)
        tracked.states = {i: pickle.dumps(RandomState.from_dict(s)) for i, s in workers.items()}
    restore_process(args, saved)


def newest_checkpoint(folder: str) -> str | None:
    """The whole checkpoint of the latest epoch in a run's folder; torn files are skipped with a warning.

    Args:
        folder: Where ``last.pth.tar``, ``checkpoint-*.pth.tar`` and ``recovery-*.pth.tar`` are.

    Returns:
        Its path, or None if there is none.
    """
    found = []
    for path in glob.glob(os.path.join(glob.escape(folder), "*.pth.tar")):
        if os.path.basename(path).startswith(("tmp", "recovery_tmp")):
            continue
        try:
            checkpoint = load_checkpoint_metadata(path)
            done = float(checkpoint["epoch"]) + (0.0 if checkpoint.get("position") else 1.0)
            position = (checkpoint.get("position") or {}).get("batch", 0)
        except Exception as e:
            _logger.warning(f"{path} is not a whole checkpoint ({type(e).__name__}) and is skipped.")
            continue
        is_last = os.path.basename(path) == "last.pth.tar"
        found.append((done, position, is_last, os.path.getmtime(path), path))
    return max(found)[-1] if found else None


class Preemption:
    """Notices SIGTERM, and lets all ranks stop after the same update.

    The signal may reach the ranks at different moments, or some of them only. Who notices it says so in the process
    group's store; the first rank writes there, after its update u, that all stop after u + 3. All read the store after
    each update n, when their device has finished n - 2: gradients are synchronized in every update, so the first rank
    has taken part in n - 2, and all that it wrote before, for stops after n or earlier, is there. (On an accelerator
    the host runs ahead of the device, and without that wait also of the first rank.)

    Args:
        args: All options.
        device: That of the model.
    """

    _WANTED, _AFTER = "timm_sam/stop", "timm_sam/stop_after"
    _AHEAD = 2  # updates that the host may be ahead of the device

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.noticed = False
        self.stop_after: int | None = None
        self.store: Any = None
        if args.distributed:
            from torch.distributed.distributed_c10d import _get_default_store
            self.store = _get_default_store()
        self.primary = utils.is_primary(args)
        self.accelerator = None if device.type == "cpu" else torch.get_device_module(device)
        self.updates_under_way: deque[Any] = deque()
        self.handles = threading.current_thread() is threading.main_thread()  # Python lets no other set a handler
        self.earlier = signal.signal(signal.SIGTERM, self._notice) if self.handles else None

    def _notice(self, number: int, frame: Any) -> None:
        self.noticed = True

    def close(self) -> None:
        if self.handles:
            signal.signal(signal.SIGTERM, self.earlier)

    def together(self) -> None:
        """Waits for all ranks: torchrun ends the others when the first one does."""
        if self.store is not None:
            torch.distributed.barrier()

    def should_stop(self, update: int) -> bool:
        """Whether the run ends now, after the ``update``-th update of all."""
        if self.store is None:
            return self.noticed
        if self.accelerator is not None:
            self.updates_under_way.append(self.accelerator.Event())
            self.updates_under_way[-1].record()
            if len(self.updates_under_way) > self._AHEAD:
                self.updates_under_way.popleft().synchronize()
        if self.stop_after is None:
            if self.noticed:
                self.store.set(self._WANTED, "1")
            if self.primary and (self.noticed or self.store.check([self._WANTED])):
                self.stop_after = update + self._AHEAD + 1
                self.store.set(self._AFTER, str(self.stop_after))
            elif not self.primary and self.store.check([self._AFTER]):
                self.stop_after = int(self.store.get(self._AFTER))
        return self.stop_after is not None and update >= self.stop_after
