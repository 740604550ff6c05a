"""What the log says of training: one line every few updates."""
import datetime
import logging
import time

import torch
from timm import utils

from ..cli.device import Process
from .meters import Meters

_logger = logging.getLogger(__name__)


class Progress:
    """Writes log lines, on the first rank.

    Args:
        process: This one.
        updates_per_epoch: Updates of an epoch.
        first_update: Updates that were made before this process began.
        total_updates: Updates of all epochs.
    """

    def __init__(self, process: Process, updates_per_epoch: int, first_update: int, total_updates: int) -> None:
        self._process = process
        self._updates_per_epoch = updates_per_epoch
        self._first_update = first_update
        self._total_updates = total_updates
        self._started = time.time()
        self._sharing: str | None = None

    def time_left(self, updates: int) -> datetime.timedelta:
        """Expected time to the end of training, evaluation included, after ``updates`` of all updates."""
        per_update = (time.time() - self._started) / max(1, updates - self._first_update)
        return datetime.timedelta(seconds=round(per_update * (self._total_updates - updates)))

    def log_sharing(self, sharing: str | None) -> None:
        """Says once whether SAM's passes share a part of the forward."""
        if sharing and self._sharing is None:
            self._sharing = sharing
            if self._process.primary:
                _logger.info(f"SAM forward: {sharing}")

    def log_update(self, epoch: int, update_idx: int, num_updates: int, meters: Meters, nonfinite: int,
                   optimizer: torch.optim.Optimizer, update_time: utils.AverageMeter, data_time: utils.AverageMeter,
                   samples: float) -> float:
        """One line, and the average loss of the epoch over all ranks. Every rank has to call it.

        Args:
            epoch: From 0.
            update_idx: Of the epoch, from 0.
            num_updates: Of all epochs.
            meters: Averages of the epoch.
            nonfinite: Batches of the epoch on this rank whose gradient at w was not finite.
            optimizer: With the learning rates.
            update_time: Seconds per update.
            data_time: Seconds of waiting for data.
            samples: Of the update, on all ranks.
        """
        process = self._process
        now = {name: process.mean(meter.val) for name, meter in meters.meters.items()}
        loss_avg = process.mean(meters["loss"].avg)
        nonfinite = round(process.mean(float(nonfinite)) * process.world_size)
        if not process.primary:
            return loss_avg
        rates = [group["lr"] for group in optimizer.param_groups]
        sam = ""
        if "sam_loss" in now and meters["sam_loss"].count:
            sam = (f"SAM loss: {now['sam_loss']:#.3g} ({meters['sam_loss'].avg:#.3g})  "
                   f"|g|: {now['sam_grad_norm']:#.3g}  |eps|: {now['sam_eps_norm']:#.3g}  ")
            if nonfinite:
                sam += f"non-finite: {nonfinite}  "
        updates = self._updates_per_epoch
        _logger.info(
            f"Train: {epoch} [{update_idx:>4d}/{updates} ({100. * (update_idx + 1) / updates:>3.0f}%)]  "
            f"Loss: {now['loss']:#.3g} ({loss_avg:#.3g})  {sam}"
            f"Time: {update_time.val:.3f}s, {samples / update_time.val:>7.2f}/s  "
            f"({update_time.avg:.3f}s, {samples / update_time.avg:>7.2f}/s)  "
            f"LR: {sum(rates) / len(rates):.3e}  "
            f"Data: {data_time.val:.3f} ({data_time.avg:.3f})  "
            f"Left: {self.time_left(num_updates)}")
        return loss_avg
