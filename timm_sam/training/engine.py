"""One epoch of training, plain or with SAM.

Nothing here reads the device between two log lines: losses and norms stay tensors until they are printed.
"""
import argparse
import functools
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.utils
from timm import utils
from timm.task import TrainingTask
from torch import Tensor, nn

from ..cli.device import Process, to_device
from ..cli.errors import OptionError
from ..cli.processes import settle
from . import states
from .averaging import rounding_state
from .batches import Weigher, chunks, samples_of
from .data import Data
from .diverged import Watch
from .factory import trained
from .loggers import Loggers
from .losses import of_each_sample
from .meters import Meters
from .output import writing
from .plain import Update
from .position import Fetching, Resumed, position
from .preemption import Preempted, Preemption
from .progress import Progress
from .saver import Saver
from .schedule import schedule_state
from .single_samples import TrainingSamples
from .workers import TrackedLoader

# what SAM measures beside the loss, in the order of Stats, and what it counts: columns of the summary
SAM_MEASURES = ("sam_loss", "sam_grad_norm", "sam_eps_norm")
SAM_COUNTS = ("sam_nonfinite",)


@dataclass(frozen=True)
class Run:
    """What stays the same from epoch to epoch.

    Attributes:
        args: All options, as they were given.
        process: This one, with its device.
        task: What is trained, with its loss.
        data: The loaders.
        optimizer: The base optimizer.
        update: What makes its gradients: SAM, or the plain backward pass.
        measures: Names of what ``update`` measures beside the loss, in the order of its ``stats``.
        counts: Name of the number of batches whose gradient was not finite, if ``update`` counts them.
        scaler: Loss scaler of float16, or None.
        autocast: Context of a forward pass.
        model_dtype: Of weights and images; None: float32.
        scheduler: timm's, or None.
        preemption: Knows whether the run is to stop.
        progress: Writes the log.
        watch: Ends a run that has diverged.
        tracked: The training loader whose workers' states are known, or None.
        output_dir, saver, loggers: Where results go; None on all ranks but the first.
    """

    args: argparse.Namespace
    process: Process
    task: TrainingTask
    data: Data
    optimizer: torch.optim.Optimizer
    update: Update
    measures: tuple[str, ...]
    counts: tuple[str, ...]
    scaler: torch.amp.GradScaler | None
    autocast: Callable[[], AbstractContextManager]
    model_dtype: torch.dtype | None
    scheduler: Any
    preemption: Preemption
    progress: Progress
    watch: Watch
    tracked: TrackedLoader | None = None
    output_dir: str | None = None
    saver: Saver | None = None
    loggers: Loggers | None = None

    @property
    def modules(self) -> dict[str, nn.Module | None]:
        """The trained model and its average."""
        return {name: self.task.get_trainable_module(ema=name == "ema") for name in ("model", "ema")}

    @property
    def updates_per_epoch(self) -> int:
        return self.data.updates_per_epoch(self.args.grad_accum_steps)


def train_one_epoch(run: Run, epoch: int, saved_position: dict[str, Any] | None = None) -> "OrderedDict[str, float]":
    """Trains for one epoch, or for the rest of it.

    Args:
        run: The run.
        epoch: From 0.
        saved_position: Where in this epoch a checkpoint was written from which it goes on.

    Raises:
        Preempted: SIGTERM came; the update was finished, and a recovery checkpoint written.
        Diverged: The loss or the weights are not finite any more.
        OptionError: There was no batch at all.

    Returns:
        ``loss``, the average over samples (the one at w, with SAM), and with SAM ``sam_loss`` (at w + eps),
        ``sam_grad_norm``, ``sam_eps_norm`` (averages over the perturbed batches) and ``sam_nonfinite`` (batches whose
        gradient was not finite, of all ranks).
    """
    args, process, data, optimizer = run.args, run.process, run.data, run.optimizer
    data.set_epoch(epoch, args)
    trained(run.task).train()

    resumed = Resumed(process, saved_position)
    meters = Meters("loss", *run.measures)
    meters.load_state_dict(resumed.meters)
    update_time, data_time = utils.AverageMeter(), utils.AverageMeter()
    batches, group = len(data.train), args.grad_accum_steps
    in_last_group = batches % group
    num_updates = resumed.update(epoch * run.updates_per_epoch)
    nonfinite_before = run.update.nonfinite
    samples: Any = 0
    begins = True  # an update, with the next batch
    samples_of_epoch = TrainingSamples(run.args, run.process, trained(run.task), data, run.autocast, epoch)
    started_from = states.local_states(process.device, run.tracked, data.loaders)
    optimizer.zero_grad()
    settle()
    data_start = update_start = time.time()

    def nonfinite() -> int:
        return resumed.nonfinite + int(run.update.nonfinite - nonfinite_before)

    fetching = Fetching(data.train, process.device)
    for batch_idx, (input, target) in resumed.rest(fetching):
        last_batch = batch_idx == batches - 1
        need_update = last_batch or (batch_idx + 1) % group == 0
        update_idx = batch_idx // group
        accum_steps = in_last_group if batch_idx >= batches - in_last_group else group

        input, target = prepared(run, input, target)
        if args.no_prefetcher and data.mixup is not None:
            input, target = data.mixup(input, target)
        if args.channels_last and not data.naflex:
            input = input.contiguous(memory_format=torch.channels_last)
        data_time.update(accum_steps * (time.time() - data_start))
        weigh = Weigher(data, process, input["patches"].shape[0] if data.naflex else input.shape[0], accum_steps)

        if begins:
            run.update.begin(epoch, num_updates, samples_of_epoch)
        begins = need_update
        accumulate(run, (input, target), weigh, need_update, meters)
        samples = samples + weigh.global_batch_size
        if not need_update:
            data_start = time.time()
            continue

        _step(run)
        num_updates += 1
        optimizer.zero_grad()
        run.task.update_ema(step=num_updates)
        if args.synchronize_step and process.device.type != "cpu":
            torch.get_device_module(process.device).synchronize()
        now = time.time()
        update_time.update(now - update_start)
        update_start = now

        if update_idx % args.log_interval == 0 or last_batch:
            meters.flush()
            run.watch.loss(epoch, num_updates, run.progress.log_update(
                epoch, update_idx, num_updates, meters, nonfinite() if run.counts else 0, optimizer, update_time,
                data_time, float(samples)))
            if args.save_images and run.output_dir and not data.naflex:
                with writing(run.output_dir):
                    torchvision.utils.save_image(
                        input, os.path.join(run.output_dir, f"train-batch-{batch_idx}.jpg"), padding=0, normalize=True)
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=num_updates, metric=meters["loss"].avg)
        # asked after each update, though at the end of an epoch it is the run that stops
        stop = run.preemption.should_stop(num_updates) and not last_batch
        if stop or args.recovery_interval and (update_idx + 1) % args.recovery_interval == 0:
            run.watch.weights(epoch, num_updates)
            place = position(
                process, epoch=epoch, batch=batch_idx + 1, batches=batches, group=group, update=num_updates,
                nonfinite=nonfinite(), meters=meters.state_dict(), started_from=started_from,
                fetched_from=fetching.state() or started_from, now=states.local_states(process.device, None, ()))
            extras = checkpoint_extras(run, position=place)
            if run.saver is not None:
                run.saver.save_recovery(epoch, update_idx, extras)
        if stop:
            run.preemption.together()
            raise Preempted
        samples = 0
        data_start = time.time()

    if not meters["loss"].count and not meters.waiting:
        raise OptionError(f"--train-split {args.train_split}: no batch came of it in epoch {epoch}, and nothing was "
                          f"trained; see the warnings above, and mend the files, or --dataset and --data-dir")
    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()
    run.watch.weights(epoch, num_updates)
    meters.flush()
    metrics = OrderedDict(loss=process.mean(meters["loss"].avg))
    for name in run.measures:
        metrics[name] = process.mean(meters[name].avg if meters[name].count else math.nan)
    for name in run.counts:
        metrics[name] = round(process.mean(float(nonfinite())) * process.world_size)
    return metrics


def prepared(run: Run, input: Any, target: Tensor) -> tuple[Any, Tensor]:
    """A batch on the device; a prefetching loader has brought it there."""
    if not run.args.no_prefetcher:
        return input, target
    return to_device(input, run.process.device, run.model_dtype), target.to(device=run.process.device)


def accumulate(run: Run, batch: tuple[Any, Tensor], weigh: Weigher, last: bool, meters: Meters) -> None:
    """Adds the gradient of one (micro-)batch; with --sam-m in chunks, each with its own eps and batch statistics.

    Args:
        run: The run.
        batch: Inputs and targets, on the device.
        weigh: What its losses weigh in the update.
        last: Whether it is the last one of the update.
        meters: Get losses and norms.
    """
    args = run.args
    splits = max(1, args.aug_splits)
    size = weigh.batch_size // splits
    done = 0

    def forward(input: Any, target: Tensor, rows: Tensor | None = None) -> Tensor:
        with run.autocast():
            if not run.update.chooses_samples:
                return run.task(input, target)["loss"]
            if rows is not None:
                input, target = input[rows], target[rows]
            return of_each_sample(run.task.criterion, run.task(input, target)["output"], target)

    for part, per_split in chunks(batch, size, args.sam_m, splits):
        done += per_split
        count = per_split * splits
        ascent = None
        if args.sam_ascent_fraction < 1:
            first = math.ceil(args.sam_ascent_fraction * per_split)
            ascent = functools.partial(forward, *samples_of(part, 0, first, splits))
        loss = run.update.backward(
            functools.partial(forward, *part), ascent_fn=ascent, weigh=functools.partial(weigh, count=count),
            scaler=run.scaler, last=last and done == size)
        stats = run.update.stats
        for name, value in zip(run.measures, stats[1:] if stats is not None else ()):
            if value is not None:  # the update is perturbed
                meters.update(name, value, count)
        run.progress.log_sharing(run.update.sharing)
        # dividing before reading is what timm does: the digits of the average depend on it
        steps = weigh.accum_steps
        meters.update("loss", loss / steps if steps > 1 else loss, count, steps)


def checkpoint_extras(run: Run, **more: Any) -> dict[str, Any]:
    """What a checkpoint holds beside timm's entries. Every rank has to call it."""
    extras = dict(more, buffers=states.buffers_of_all_ranks(run.process, run.modules))
    if (schedule := schedule_state(run.scheduler)) is not None:
        extras["schedule"] = schedule
    if methods := run.update.method_state_dict():
        extras["sam_methods"] = methods
    if (rounding := rounding_state(run.task)) is not None:
        extras["ema_rounding"] = rounding
    return extras


def _step(run: Run) -> None:
    """Clips, and takes the base optimizer's step: the weights are the unperturbed ones, the gradients true to scale."""
    args = run.args
    if args.clip_grad is not None:
        if run.scaler is not None:
            run.scaler.unscale_(run.optimizer)
        utils.dispatch_clip_grad(
            run.task.get_clip_parameters(exclude_head="agc" in args.clip_mode), value=args.clip_grad,
            mode=args.clip_mode)
    if run.scaler is None:
        run.optimizer.step()
    else:
        run.scaler.step(run.optimizer)
        run.scaler.update()
