"""Batches: where they go, parts of them, and what their losses weigh."""
import argparse
from typing import Any

import torch
from timm import utils
from torch import Tensor

from .data import Data


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(batch, dict):
        return {k: to_device(v, device, dtype) for k, v in batch.items()}
    if not isinstance(batch, Tensor):  # NaFlex batches name their sequence length
        return batch
    return batch.to(device=device, dtype=dtype if batch.is_floating_point() else None)


def samples_of(batch: Any, start: int, stop: int, splits: int) -> Any:
    """Samples ``start`` to ``stop`` of a batch, of each of its augmentation splits."""
    if isinstance(batch, tuple):
        return tuple(samples_of(b, start, stop, splits) for b in batch)
    if isinstance(batch, dict):
        return {k: samples_of(v, start, stop, splits) for k, v in batch.items()}
    if not isinstance(batch, Tensor):
        return batch
    return batch[start:stop] if splits == 1 else torch.cat([part[start:stop] for part in batch.chunk(splits)])


class Weigher:
    """Turns the mean loss of a (micro-)batch into its share of the update's loss."""

    def __init__(self, args: argparse.Namespace, data: Data, device: torch.device, batch_size: int,
                 accum_steps: int) -> None:
        self.accum_steps = accum_steps
        self.batch_size = batch_size
        self.scale = 1.0
        self.rank_scale: Tensor | None = None
        if data.loss_scale != "none":
            self.scale = batch_size / data.reference_batch_size
            if data.loss_scale == "sqrt":
                self.scale = self.scale ** 0.5
        self.global_batch_size: Any = batch_size * args.world_size
        if data.naflex and args.distributed:
            # ranks have different batch sizes, DDP averages over ranks: weigh each by its samples
            total = utils.reduce_tensor(torch.tensor(batch_size, device=device, dtype=torch.float32), 1)
            self.global_batch_size = total
            self.rank_scale = args.world_size * batch_size / total

    def __call__(self, loss: Tensor) -> Tensor:
        if self.accum_steps > 1:
            loss = loss / self.accum_steps
        if self.scale != 1.0:
            loss = self.scale * loss
        if self.rank_scale is not None:
            loss = loss * self.rank_scale
        return loss
