"""The loader's worker processes: their random states, the signals they do not get, and their end."""
import os
import pickle
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..random_state import RandomState


class _Tagging:
    """A collate function that adds the worker's number and random state to the batch."""

    def __init__(self, collate: Callable) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> tuple[Any, int, bytes]:
        batch = self.collate(samples)
        info = get_worker_info()
        assert info is not None
        return batch, info.id, pickle.dumps(RandomState(set()))  # as bytes: a tensor would take a file descriptor


class Restoring:
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


OUTLIVES = 300.0  # seconds that a worker works on after SIGTERM: an evaluation may come before the checkpoint


class _Shielded:
    """A worker's set-up that begins with a process group of its own, and with patience where SIGTERM comes.

    torchrun passes SIGTERM on to the whole group of a rank; Slurm and systemd send it to every process. The rank
    finishes its update and writes a checkpoint; its workers would die at once, and take the rank with them.

    Args:
        init: The rest of the set-up.
        seconds: That the worker has left then, if its rank has not ended it before.
    """

    def __init__(self, init: Callable[[int], None] | None, seconds: float) -> None:
        self.init, self.seconds = init, seconds

    def __call__(self, worker_id: int) -> None:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, self._end_later)
        if self.init is not None:
            self.init(worker_id)

    def _end_later(self, number: int, frame: Any) -> None:
        if not any(signal.getitimer(signal.ITIMER_REAL)):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, self.seconds)


def data_loader(loader: Any) -> Any:
    """torch's loader inside of timm's prefetcher and of ours."""
    inner = getattr(loader, "loader", loader)
    return inner.loader if isinstance(inner, TrackedLoader) else inner


def has_started(loader: Any) -> bool:
    """Whether a loader's workers that live on have been started, here or in the run that is gone on with."""
    inner = data_loader(loader)
    return isinstance(inner, DataLoader) and inner.persistent_workers and (
        inner._iterator is not None or inner.generator is not None)


def start_silently(loader: Any) -> None:
    """Lets a loader's workers that live on start without a random number of this process.

    In the run that is gone on with they were started long ago.
    """
    inner = data_loader(loader)
    if isinstance(inner, DataLoader) and inner.persistent_workers:
        inner.generator = torch.Generator()


def dismiss(loaders: Sequence[Any]) -> None:
    """Ends the workers that live on.

    Left to the garbage collector, the queues to them may be gone before they are told, and each takes five seconds to
    look around.
    """
    for inner in map(data_loader, loaders):
        for name in ("_iterator", "iterator"):  # of torch's DataLoader, and of timm's MultiEpochsDataLoader
            if getattr(inner, name, None) is not None:
                setattr(inner, name, None)


def shield(loader: Any, seconds: float = OUTLIVES) -> None:
    """Lets the workers of timm's loader work on where SIGTERM is sent to more processes than this one.

    Args:
        loader: timm's loader, whose workers are not started yet.
        seconds: For which they do.
    """
    inner = data_loader(loader)
    if isinstance(inner, DataLoader) and inner.num_workers:
        inner.worker_init_fn = _Shielded(inner.worker_init_fn, seconds)


def track(loader: Any) -> tuple[Any, TrackedLoader | None]:
    """Makes a training loader's workers known to checkpoints, if it has any that live on.

    Args:
        loader: timm's loader, with or without its prefetcher.

    Returns:
        The loader to iterate over, and the tracked one inside it, or None where there is nothing to track: without
        workers all random numbers come from this process; iterable data sets and multi-epoch loaders have an order of
        their own that cannot be set.
    """
    inner = data_loader(loader)
    plain = type(inner) is DataLoader and not isinstance(inner.dataset, IterableDataset)
    if not plain or not inner.persistent_workers:
        return loader, None
    tracked = TrackedLoader(inner)
    if inner is loader:
        return tracked, tracked
    loader.loader = tracked
    return loader, tracked
