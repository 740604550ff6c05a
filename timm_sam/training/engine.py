"""One epoch of training, plain or with SAM, and evaluation.

Nothing here reads the device between two log lines: losses and norms stay tensors until they are printed.
"""
import argparse
import datetime
import functools
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torchvision.utils
from timm import utils
from timm.task import TrainingTask
from torch import Tensor, nn

from ..cli.processes import settle
from ..sam import SAM
from . import states, workers
from .batches import Weigher, samples_of, to_device
from .data import Data
from .meters import Meters
from .preemption import Preempted, Preemption

_logger = logging.getLogger("train")


@dataclass
class Run:
    """What stays the same from epoch to epoch.

    ``position`` is where in its first epoch the run goes on, if its checkpoint was written inside one; ``extras`` is
    what the next checkpoint holds beside timm's entries.
    """

    args: argparse.Namespace
    task: TrainingTask
    data: Data
    optimizer: torch.optim.Optimizer
    sam: SAM | None
    scaler: torch.amp.GradScaler | None
    autocast: Callable[[], AbstractContextManager]
    device: torch.device
    model_dtype: torch.dtype | None
    scheduler: Any = None
    saver: Any = None
    output_dir: str | None = None
    tracked: workers.TrackedLoader | None = None
    preemption: Preemption | None = None
    position: dict[str, Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    first_update: int = 0
    total_updates: int = 0
    sharing_logged: bool = False
    started: float = field(default_factory=time.time)

    @property
    def modules(self) -> dict[str, nn.Module | None]:
        """The trained model and its average."""
        return {name: self.task.get_trainable_module(ema=name == "ema") for name in ("model", "ema")}

    @property
    def updates_per_epoch(self) -> int:
        steps = self.args.grad_accum_steps
        return (len(self.data.train) + steps - 1) // steps

    def time_left(self, updates: int) -> datetime.timedelta:
        """Expected time to the end of training, evaluation included, after ``updates`` of all updates."""
        per_update = (time.time() - self.started) / max(1, updates - self.first_update)
        return datetime.timedelta(seconds=round(per_update * (self.total_updates - updates)))

    def uses_sam(self, epoch: int, update: int) -> bool:
        """Whether the ``update``-th update of all (from 0) is perturbed."""
        args = self.args
        return (
            self.sam is not None
            and epoch >= args.sam_start_epoch
            and (args.sam_end_epoch is None or epoch < args.sam_end_epoch)
            and update % args.sam_every == 0)


def _mean_over_ranks(value: float, device: torch.device, args: argparse.Namespace) -> float:
    if not args.distributed:
        return value
    tensor = torch.tensor([value], device=device, dtype=torch.float32)
    return utils.reduce_tensor(tensor, args.world_size).item()


def train_one_epoch(run: Run, epoch: int) -> "OrderedDict[str, float]":
    """Trains for one epoch, or for the rest of the one in which the run's checkpoint was written.

    Raises:
        Preempted: SIGTERM came; the update was finished, and a recovery checkpoint written.

    Returns:
        ``loss``, the average over samples (the one at w, with SAM), and with SAM ``sam_loss`` (at w + eps),
        ``sam_grad_norm``, ``sam_eps_norm`` (averages over the perturbed batches) and ``sam_nonfinite`` (batches whose
        gradient was not finite, of all ranks).
    """
    args, task, data, optimizer, device = run.args, run.task, run.data, run.optimizer, run.device
    data.set_epoch(epoch, args)
    module = task.get_trainable_module()
    assert module is not None
    module.train()

    meters = Meters("loss", "sam_loss", "sam_grad_norm", "sam_eps_norm")
    update_time, data_time = utils.AverageMeter(), utils.AverageMeter()
    batches, accum_steps = len(data.train), args.grad_accum_steps
    last_accum_steps = batches % accum_steps
    num_updates = epoch * run.updates_per_epoch
    nonfinite_before = None if run.sam is None else run.sam.nonfinite
    samples: Any = 0
    position, run.position = run.position, None
    started_from = states.local_states(device, run.tracked)
    optimizer.zero_grad()
    settle()
    data_start = update_start = time.time()

    fetching = states.Fetching(data.train, device)
    for batch_idx, (input, target) in enumerate(fetching):
        if position is not None and batch_idx < position["batch"]:
            # the workers make these batches all the same, and with them the random numbers of those that follow
            if batch_idx == position["batch"] - 2:
                states.restore_process(args, position["fetched_from"])
            if batch_idx == position["batch"] - 1:
                if run.sam is not None:
                    run.sam.nonfinite = run.sam.nonfinite + states.of_this_rank(args, position["nonfinite"])
                meters.load_state_dict(states.of_this_rank(args, position["meters"]))
                num_updates = position["update"]
                states.restore_process(args, position["random_state"])
            continue
        last_batch = batch_idx == batches - 1
        # with accum_steps as the batch before left it, as in timm's script: a short last group may step in between
        need_update = last_batch or (batch_idx + 1) % accum_steps == 0
        update_idx = batch_idx // args.grad_accum_steps
        if batch_idx >= batches - last_accum_steps:
            accum_steps = last_accum_steps

        if not args.prefetcher:
            input, target = to_device(input, device, run.model_dtype), target.to(device=device)
            if data.mixup is not None:
                input, target = data.mixup(input, target)
        if args.channels_last and not data.naflex:
            input = input.contiguous(memory_format=torch.channels_last)
        data_time.update(accum_steps * (time.time() - data_start))
        batch_size = input["patches"].shape[0] if data.naflex else input.shape[0]
        weigh = Weigher(args, data, device, batch_size, accum_steps)

        _accumulate(run, (input, target), weigh, need_update, run.uses_sam(epoch, num_updates), meters)
        samples = samples + weigh.global_batch_size
        if not need_update:
            data_start = time.time()
            continue

        _step(run)
        num_updates += 1
        optimizer.zero_grad()
        task.update_ema(step=num_updates)
        if args.synchronize_step and device.type != "cpu":
            torch.get_device_module(device).synchronize()
        now = time.time()
        update_time.update(now - update_start)
        update_start = now

        if update_idx % args.log_interval == 0 or last_batch:
            meters.flush()
            _log_update(run, epoch, update_idx, num_updates, meters, update_time, data_time, float(samples))
            if args.save_images and run.output_dir and not data.naflex:
                torchvision.utils.save_image(
                    input, os.path.join(run.output_dir, f"train-batch-{batch_idx}.jpg"), padding=0, normalize=True)
        if run.scheduler is not None:
            run.scheduler.step_update(num_updates=num_updates, metric=meters["loss"].avg)
        # asked after each update, though at the end of an epoch it is train.py that stops
        stop = run.preemption is not None and run.preemption.should_stop(num_updates) and not last_batch
        if stop or args.recovery_interval and (update_idx + 1) % args.recovery_interval == 0:
            new = 0 if run.sam is None else int(run.sam.nonfinite - nonfinite_before)
            _save_recovery(run, epoch, update_idx, meters, dict(
                epoch=epoch, batch=batch_idx + 1, update=num_updates,
                nonfinite=states.of_all_ranks(args, new),
                started_from=states.of_all_ranks(args, started_from),
                fetched_from=states.of_all_ranks(args, fetching.state() or started_from),
                random_state=states.of_all_ranks(args, states.local_states(device, None))))
        if stop:
            assert run.preemption is not None
            run.preemption.together()
            raise Preempted
        samples = 0
        data_start = time.time()

    if hasattr(optimizer, "sync_lookahead"):
        optimizer.sync_lookahead()
    meters.flush()
    metrics = OrderedDict(loss=_mean_over_ranks(meters["loss"].avg, device, args))
    if run.sam is not None:
        for name in ("sam_loss", "sam_grad_norm", "sam_eps_norm"):
            average = meters[name].avg if meters[name].count else float("nan")
            metrics[name] = _mean_over_ranks(average, device, args)
        new = float(run.sam.nonfinite - nonfinite_before)
        metrics["sam_nonfinite"] = round(_mean_over_ranks(new, device, args) * args.world_size)
    return metrics


def _accumulate(run: Run, batch: tuple[Any, Tensor], weigh: Weigher, need_update: bool, perturb: bool,
                meters: Meters) -> None:
    """Adds the gradient of one (micro-)batch; with --sam-m in chunks, each with its own eps and batch statistics."""
    args, sam = run.args, run.sam
    splits = max(1, args.aug_splits)
    size = weigh.batch_size // splits
    chunk = min(size, args.sam_m or size)

    def forward(input: Any, target: Tensor) -> Tensor:
        with run.autocast():
            return run.task(input, target)["loss"]

    for start in range(0, size, chunk):
        stop = min(start + chunk, size)
        part = batch if chunk == size else samples_of(batch, start, stop, splits)
        count = (stop - start) * splits

        def share(loss: Tensor, count: int = count) -> Tensor:
            return weigh(loss) if count == weigh.batch_size else weigh(loss) * (count / weigh.batch_size)

        with nullcontext() if need_update and stop == size else run.task.no_sync():
            if sam is not None and perturb:
                ascent = None
                if args.sam_ascent_fraction < 1:
                    first = math.ceil(args.sam_ascent_fraction * (stop - start))
                    ascent = functools.partial(forward, *samples_of(part, 0, first, splits))
                loss = sam.backward(functools.partial(forward, *part), ascent_fn=ascent, weigh=share, scaler=run.scaler)
                assert sam.stats is not None
                for name, value in zip(("sam_loss", "sam_grad_norm", "sam_eps_norm"), sam.stats[1:]):
                    meters.update(name, value, count)
                if not run.sharing_logged and sam.sharing and utils.is_primary(args):
                    _logger.info(f"SAM forward: {sam.sharing}")
                    run.sharing_logged = True
            else:
                loss = forward(*part)
                weighed = share(loss)
                second_order = getattr(run.optimizer, "is_second_order", False)
                (weighed if run.scaler is None else run.scaler.scale(weighed)).backward(create_graph=second_order)
                loss = loss.detach()
        # dividing before reading is what timm does: the digits of the average depend on it
        accum_steps = weigh.accum_steps
        meters.update("loss", loss / accum_steps if accum_steps > 1 else loss, count, accum_steps)


def _save_recovery(run: Run, epoch: int, update_idx: int, meters: Meters, position: dict[str, Any]) -> None:
    """Writes a checkpoint from which the epoch goes on at ``position``. All ranks take part."""
    earlier = run.extras
    position["meters"] = states.of_all_ranks(run.args, meters.state_dict())
    run.extras = dict(buffers=states.buffers_of_all_ranks(run.args, run.modules), position=position)
    if run.saver is not None:
        run.saver.save_recovery(epoch, batch_idx=update_idx)
    run.extras = earlier


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


def _log_update(run: Run, epoch: int, update_idx: int, num_updates: int, meters: Meters,
                update_time: utils.AverageMeter, data_time: utils.AverageMeter, samples: float) -> None:
    args = run.args
    now = {name: _mean_over_ranks(meter.val, run.device, args) for name, meter in meters.meters.items()}
    loss_avg = _mean_over_ranks(meters["loss"].avg, run.device, args)
    nonfinite = 0
    if run.sam is not None:
        nonfinite = round(_mean_over_ranks(float(run.sam.nonfinite), run.device, args) * args.world_size)
    if not utils.is_primary(args):
        return
    rates = [group["lr"] for group in run.optimizer.param_groups]
    sam = ""
    if meters["sam_loss"].count:
        sam = (f"SAM loss: {now['sam_loss']:#.3g} ({meters['sam_loss'].avg:#.3g})  "
               f"|g|: {now['sam_grad_norm']:#.3g}  |eps|: {now['sam_eps_norm']:#.3g}  ")
        if nonfinite:
            sam += f"non-finite: {nonfinite}  "
    updates = run.updates_per_epoch
    _logger.info(
        f"Train: {epoch} [{update_idx:>4d}/{updates} ({100. * (update_idx + 1) / updates:>3.0f}%)]  "
        f"Loss: {now['loss']:#.3g} ({loss_avg:#.3g})  {sam}"
        f"Time: {update_time.val:.3f}s, {samples / update_time.val:>7.2f}/s  "
        f"({update_time.avg:.3f}s, {samples / update_time.avg:>7.2f}/s)  "
        f"LR: {sum(rates) / len(rates):.3e}  "
        f"Data: {data_time.val:.3f} ({data_time.avg:.3f})  "
        f"Left: {run.time_left(num_updates)}")


def evaluate(run: Run, model: nn.Module, suffix: str = "") -> "OrderedDict[str, float]":
    """Evaluates a model on the validation loader.

    Args:
        run: Its validation loader, precision and device.
        model: Images (or NaFlex batches) -> logits.
        suffix: Marks the log lines.

    Returns:
        ``loss`` (cross entropy), ``top1`` and ``top5`` in percent, averages over samples.
    """
    args, device = run.args, run.device
    loss_fn = nn.CrossEntropyLoss().to(device)
    meters = Meters("loss", "top1", "top5")
    batch_time = utils.AverageMeter()
    model.eval()
    settle()
    last_idx = len(run.data.eval) - 1
    end = time.time()
    with torch.inference_mode():
        for batch_idx, (input, target) in enumerate(run.data.eval):
            if not args.prefetcher:
                input, target = to_device(input, device, run.model_dtype), target.to(device=device)
            if args.channels_last and not run.data.naflex:
                input = input.contiguous(memory_format=torch.channels_last)
            with run.autocast():
                output = model(input)
                if isinstance(output, (tuple, list)):
                    output = output[0]
                if args.tta > 1:  # consecutive rows are views of one image
                    output = output.unfold(0, args.tta, args.tta).mean(dim=2)
                    target = target[0:target.size(0):args.tta]
                loss = loss_fn(output, target)
            values = [loss, *utils.accuracy(output, target, topk=(1, 5))]
            if args.distributed:
                values = [utils.reduce_tensor(value.detach(), args.world_size) for value in values]
            for name, value in zip(("loss", "top1", "top5"), values):
                meters.update(name, value, output.shape[0])

            if batch_idx == last_idx or batch_idx % args.log_interval == 0:
                meters.flush()
                batch_time.update(time.time() - end)
                if utils.is_primary(args):
                    loss_m, top1, top5 = meters["loss"], meters["top1"], meters["top5"]
                    _logger.info(
                        f"Test{suffix}: [{batch_idx:>4d}/{last_idx}]  "
                        f"Time: {batch_time.val:.3f} ({batch_time.avg:.3f})  "
                        f"Loss: {loss_m.val:>7.3f} ({loss_m.avg:>6.3f})  "
                        f"Acc@1: {top1.val:>7.3f} ({top1.avg:>7.3f})  "
                        f"Acc@5: {top5.val:>7.3f} ({top5.avg:>7.3f})")
            else:
                batch_time.update(time.time() - end)
            end = time.time()
    meters.flush()
    return OrderedDict((name, meters[name].avg) for name in ("loss", "top1", "top5"))
