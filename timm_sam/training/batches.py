"""Batches: where they go, parts of them, and what their losses weigh."""
from collections.abc import Iterator
from typing import Any

import torch
from timm import utils
from torch import Tensor

from ..cli.device import Process
from .data import Data


def samples_of(batch: Any, start: int, stop: int, splits: int) -> Any:
    """Samples ``start`` to ``stop`` of a batch, of each of its augmentation splits."""
    if isinstance(batch, tuple):
        return tuple(samples_of(b, start, stop, splits) for b in batch)
    if isinstance(batch, dict):
        return {k: samples_of(v, start, stop, splits) for k, v in batch.items()}
    if not isinstance(batch, Tensor):
        return batch
    return batch[start:stop] if splits == 1 else torch.cat([part[start:stop] for part in batch.chunk(splits)])


def chunks(batch: Any, size: int, chunk: int | None, splits: int) -> Iterator[tuple[Any, int]]:
    """A batch in parts that share one perturbation each.

    Args:
        batch: Inputs and targets.
        size: Samples of each of its augmentation splits.
        chunk: Samples of a part; None: the whole batch.
        splits: How many augmentation splits there are.

    Yields:
        A part, and how many samples of each split it has.
    """
    chunk = min(size, chunk or size)
    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        yield batch if chunk == size else samples_of(batch, start, stop, splits), stop - start


class Weigher:
    """Turns the mean loss of a (micro-)batch into its share of the update's loss.

    Args:
        data: Which losses are weighed, and against what.
        process: This one.
        batch_size: Samples of the (micro-)batch.
        accum_steps: Micro-batches of the update.
    """

    def __init__(self, data: Data, process: Process, batch_size: int, accum_steps: int) -> None:
        self.accum_steps = accum_steps
        self.batch_size = batch_size
        self.scale = 1.0
        self.rank_scale: Tensor | None = None
        if data.loss_scale != "none":
            self.scale = batch_size / data.reference_batch_size
            if data.loss_scale == "sqrt":
                self.scale = self.scale ** 0.5
        self.global_batch_size: Any = batch_size * process.world_size
        if data.naflex and process.distributed:
            # ranks have different batch sizes, DDP averages over ranks: weigh each by its samples
            total = utils.reduce_tensor(torch.tensor(batch_size, device=process.device, dtype=torch.float32), 1)
            self.global_batch_size = total
            self.rank_scale = process.world_size * batch_size / total

    def __call__(self, loss: Tensor, count: int) -> Tensor:
        """The share of the first, second, ... ``count`` samples with this mean loss."""
        if self.accum_steps > 1:
            loss = loss / self.accum_steps
        if self.scale != 1.0:
            loss = self.scale * loss
        if self.rank_scale is not None:
            loss = loss * self.rank_scale
        return loss if count == self.batch_size else loss * (count / self.batch_size)
