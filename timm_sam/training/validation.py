"""The model on the validation split, between epochs."""
import logging
import time
from typing import Any

import torch
from timm import utils
from timm.task import evaluation_sample_limit
from torch import Tensor, nn

from ..cli.processes import settle
from .engine import Run, prepared

_logger = logging.getLogger(__name__)


def evaluate(run: Run, model: nn.Module, suffix: str = "") -> dict[str, float]:
    """Evaluates a model on the whole validation split, each sample once.

    Ranks take samples in turns; those that a rank sees again, so that all have as many, are left out of the metrics.

    Args:
        run: Its validation loader, task, precision and device.
        model: Images (or NaFlex batches) -> logits.
        suffix: Marks the log lines.

    Returns:
        The metrics of the task's evaluator, over all ranks and in its order: ``loss``, ``top1``, ``top5``, or with
        several classes per target ``loss``, ``map``, ``micro_f1``, ``macro_f1``, ``sample_f1``. All but the loss in
        percent.
    """
    args, process = run.args, run.process
    views = max(1, args.tta)
    limit = evaluation_sample_limit(run.data.eval)
    evaluator: Any = run.task.create_evaluator(max_samples=None if limit is None else limit // views)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    batch_time = utils.AverageMeter()
    model.eval()
    settle()
    last_idx = len(run.data.eval) - 1
    end = time.time()
    with torch.inference_mode():
        for batch_idx, (input, target) in enumerate(run.data.eval):
            input, target = prepared(run, input, target)
            input = _as_the_weights(input, dtype)
            if args.channels_last and not run.data.naflex:
                input = input.contiguous(memory_format=torch.channels_last)
            with run.autocast():
                output = model(input)
                if isinstance(output, (tuple, list)):
                    output = output[0]
                if views > 1:  # consecutive rows are views of one image
                    output = output.unfold(0, views, views).mean(dim=2)
                    target = target[0:target.size(0):views]
            evaluator.update(output, target)

            batch_time.update(time.time() - end)
            end = time.time()
            if process.primary and (batch_idx == last_idx or batch_idx % args.log_interval == 0):
                _logger.info(f"Test{suffix}: [{batch_idx:>4d}/{last_idx}]  Time: {batch_time.val:.3f} "
                             f"({batch_time.avg:.3f})  {_shown(evaluator.summary())}")
    metrics = evaluator.compute(distributed=process.distributed)
    if process.primary:
        _logger.info(f"Test{suffix}: {_shown(metrics)}")
    return metrics


def _as_the_weights(input: Any, dtype: torch.dtype | None) -> Any:
    """Images in the type of the weights: an average in float32 gets those that were made for a half-precision model."""
    if isinstance(input, Tensor) and input.is_floating_point() and dtype is not None:
        return input.to(dtype)
    if isinstance(input, dict) and "patches" in input:
        return {**input, "patches": _as_the_weights(input["patches"], dtype)}
    return input


def _shown(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name}: {value:.4f}" for name, value in metrics.items())
