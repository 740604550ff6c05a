"""Scores of targets with several classes each: over the whole data set, as its metrics are defined."""
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cli.errors import OptionError, one_line
from ..cli.tasks import create_evaluator
from .scoring import outputs_of
from .subject import Subject

_logger = logging.getLogger(__name__)


@dataclass
class LabelledBatch:
    """What the model says of one batch.

    Attributes:
        index: Its place in the data set, from 0.
        outputs: Logits (B, num_classes), float32, on the CPU.
        targets: 0 to 1 (B, num_classes), float32, on the CPU.
    """

    index: int
    outputs: Tensor
    targets: Tensor


def collect(subject: Subject, loader: Iterable[tuple[Any, Tensor]], places: Sequence[int], *, prefetcher: bool,
            channels_last: bool, log_freq: int) -> list[LabelledBatch]:
    """Runs the model over a loader and keeps what it says: average precision ranks all images of a class.

    Args:
        subject: The model.
        loader: Batches of images with float targets (B, num_classes).
        places: Place of each batch in the data set.
        prefetcher, channels_last: As of :func:`~timm_sam.evaluation.scoring.outputs_of`.
        log_freq: Batches between two log lines.

    Raises:
        OptionError: A target is none of the model's classes, or of another kind than the options say.
    """
    batches: list[LabelledBatch] = []
    began = time.time()
    try:
        for output, target in outputs_of(subject, loader, prefetcher=prefetcher, channels_last=channels_last):
            index = len(batches)
            place = places[index] if index < len(places) else index
            batches.append(LabelledBatch(place, output.float().cpu(), target.float().cpu()))
            if index % log_freq == 0:
                seen = sum(len(batch.targets) for batch in batches)
                _logger.info(f"Test: [{index + 1:>4d}/{len(places)}]  {seen / max(time.time() - began, 1e-9):>7.1f} "
                             f"images/s")
    except OptionError:
        raise
    except ValueError as e:  # of timm's MultiLabelTarget
        raise OptionError(f"--task multilabel with --target-format: {one_line(e)}; check --target-key, --target-format "
                          f"and --num-classes") from e
    return batches


def scores_of(args: Any, batches: Sequence[LabelledBatch]) -> "OrderedDict[str, float]":
    """The metrics of timm's evaluator: the loss, and in percent mean average precision and F1 scores.

    Args:
        args: All options.
        batches: Of the whole data set, in order: the same floats however ranks shared them.
    """
    evaluator = create_evaluator(args, torch.device("cpu"))
    for batch in batches:
        evaluator.update(batch.outputs, batch.targets)
    scores: OrderedDict[str, float] = evaluator.compute()
    return scores
