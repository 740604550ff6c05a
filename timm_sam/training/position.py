"""Where inside an epoch a checkpoint was written, and how the epoch goes on from there."""
import logging
from collections.abc import Iterator
from typing import Any

import torch

from ..cli.device import Process
from ..random_state import RandomState
from .states import of_all_ranks, of_this_rank, restore_process

_logger = logging.getLogger(__name__)


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
        """As :func:`local_states`, of this process only; None in front of the second batch."""
        return None if self.before is None else dict(process=self.before.to_dict(), workers={})


def position(process: Process, *, epoch: int, batch: int, batches: int, group: int, update: int, nonfinite: int,
             meters: dict[str, Any], started_from: dict[str, Any], fetched_from: dict[str, Any],
             now: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint inside an epoch holds of its place. Every rank has to call it.

    Args:
        process: This one.
        epoch: From 0.
        batch: Batches of the epoch that were trained on.
        batches: Batches of the epoch in all.
        group: Of how many batches an update is made.
        update: Updates of all epochs.
        nonfinite: Batches of the epoch on this rank whose gradient at w was not finite.
        meters: The averages of the epoch so far, on this rank.
        started_from: Random states of this rank with which the epoch began.
        fetched_from: Those before the loader made the batch that comes next.
        now: Those of now.
    """
    return dict(
        epoch=epoch, batch=batch, batches=batches, group=group, update=update,
        nonfinite=of_all_ranks(process, nonfinite),
        started_from=of_all_ranks(process, started_from), fetched_from=of_all_ranks(process, fetched_from),
        random_state=of_all_ranks(process, now), meters=of_all_ranks(process, meters))


def fitted(process: Process, saved: dict[str, Any], batches: int, group: int) -> dict[str, Any]:
    """A saved place as one in an epoch of other batches: of another number of ranks, or other options.

    The number of a batch means nothing there: it may be behind the end of the epoch. What counts is the share of the
    epoch that is done, by which the schedule goes on from where it was, too.

    Args:
        process: This one.
        saved: Of :func:`position`.
        batches: Batches of an epoch now.
        group: Of how many batches an update is made now.
    """
    # what older checkpoints do not say can only have changed with the number of ranks
    had = saved.get("batches", round(batches * process.world_size / saved["nonfinite"]["world_size"]))
    grouped = saved.get("group", group)
    if (had, grouped) == (batches, group):
        return saved
    per_epoch = -(-batches // group)
    done = -(-saved["batch"] // grouped) * per_epoch // -(-had // grouped)
    batch = min(done * group, batches)
    if process.primary:
        _logger.warning(f"The checkpoint is of an epoch of {had} batches, {saved['batch']} of them done. There are "
                        f"{batches} now, of which {batch} are left out for them.")
    return {**saved, "batch": batch, "update": saved["epoch"] * per_epoch + done}


class Resumed:
    """The place from which an epoch goes on; without a saved one it is the epoch's beginning.

    Args:
        process: This one.
        saved: Of :func:`position`, or None.

    Attributes:
        nonfinite: Batches whose gradient was not finite, of this epoch and rank, up to there.
        meters: The averages up to there; empty at the beginning.
    """

    def __init__(self, process: Process, saved: dict[str, Any] | None) -> None:
        self._process = process
        self._saved = saved
        self.nonfinite: int = 0
        if saved is not None:  # of all ranks together it is as many, whatever their number is now
            counts = saved["nonfinite"]
            same = counts["world_size"] == process.world_size
            self.nonfinite = counts["ranks"][process.rank] if same else sum(counts["ranks"]) * process.primary
        self.meters: dict[str, Any] = {} if saved is None else of_this_rank(process, saved["meters"])

    def update(self, first: int) -> int:
        """Updates of all epochs up to there; ``first`` at the beginning."""
        return first if self._saved is None else self._saved["update"]

    def rest(self, batches: Any) -> Iterator[tuple[int, Any]]:
        """The batches that are still to be trained on, numbered from the epoch's beginning."""
        for index, batch in enumerate(batches):
            if self._saved is None or index >= self._saved["batch"]:
                yield index, batch
                continue
            # the workers make these batches all the same, and with them the random numbers of those that follow
            if index == self._saved["batch"] - 2:
                restore_process(self._process, self._saved["fetched_from"])
            if index == self._saved["batch"] - 1:
                restore_process(self._process, self._saved["random_state"])
