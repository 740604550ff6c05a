"""The model on the validation split, between epochs."""
import logging
import time
from collections import OrderedDict

import torch
from timm import utils
from torch import nn

from ..cli.processes import settle
from .engine import Run, prepared
from .meters import Meters

_logger = logging.getLogger(__name__)


def evaluate(run: Run, model: nn.Module, suffix: str = "") -> "OrderedDict[str, float]":
    """Evaluates a model on the validation loader.

    Args:
        run: Its validation loader, precision and device.
        model: Images (or NaFlex batches) -> logits.
        suffix: Marks the log lines.

    Returns:
        ``loss`` (cross entropy), ``top1`` and ``top5`` in percent, averages over samples.
    """
    args, process = run.args, run.process
    loss_fn = nn.CrossEntropyLoss().to(process.device)
    meters = Meters("loss", "top1", "top5")
    batch_time = utils.AverageMeter()
    model.eval()
    settle()
    last_idx = len(run.data.eval) - 1
    end = time.time()
    with torch.inference_mode():
        for batch_idx, (input, target) in enumerate(run.data.eval):
            input, target = prepared(run, input, target)
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
            if process.distributed:
                values = [utils.reduce_tensor(value.detach(), process.world_size) for value in values]
            for name, value in zip(("loss", "top1", "top5"), values):
                meters.update(name, value, output.shape[0])

            if batch_idx == last_idx or batch_idx % args.log_interval == 0:
                meters.flush()
                batch_time.update(time.time() - end)
                if process.primary:
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
