"""Accuracy of a model on the batches of a loader, in a label space."""
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm import utils
from torch import Tensor, nn

from ..cli.device import to_device
from ..multi_tensor import widest
from .sets.label_spaces import LabelSpace
from .subject import Subject

_logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """What one batch of one data set came to.

    Attributes:
        index: Its place in the data set, from 0.
        size: Number of images.
        loss: Mean cross entropy, in the label space.
        top1, top5: Accuracy in percent, as ``timm.utils.accuracy`` rounds it, in the label space.
        non_finite: Number of images with outputs that are NaN or infinite: which class is "best" of them means nothing.
        right1_all: Number of images whose best of all outputs is right, where that may differ from top1.
    """

    index: int
    size: int
    loss: float
    top1: float
    top5: float
    non_finite: int = 0
    right1_all: int | None = None


@dataclass
class Scores:
    """Accuracy on a data set.

    Attributes:
        images: Number of images.
        loss: Mean cross entropy, in the label space.
        top1, top5: In percent, in the label space.
        right1, right5: The same as numbers of images.
        right1_all: As right1 among all outputs, where a prediction outside the label space is wrong.
        non_finite: Number of images with outputs that are NaN or infinite.
    """

    images: int
    loss: float
    top1: float
    top5: float
    right1: int
    right5: int
    right1_all: int
    non_finite: int = 0


def outputs_of(subject: Subject, loader: Iterable[tuple[Any, Tensor]], *, prefetcher: bool,
               channels_last: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Runs the model over a loader, without gradients.

    Args:
        subject: The model.
        loader: Batches of images (B, C, H, W) or NaFlex dictionaries, with targets.
        prefetcher: Whether the loader has brought the batches to the device.
        channels_last: Whether images go in that layout.

    Yields:
        Logits (B, num_classes) and targets, on the device.
    """
    for input, target in loader:
        if not prefetcher:
            target = target.to(device=subject.device)
            input = to_device(input, subject.device, subject.dtype)
        if channels_last and isinstance(input, Tensor):
            input = input.contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), subject.autocast():
            output = subject.model(input)
        yield output[0] if isinstance(output, (tuple, list)) else output, target


def score(
        subject: Subject,
        loader: Iterable[tuple[Any, Tensor]],
        places: Sequence[int],
        space: LabelSpace,
        title: str,
        *,
        prefetcher: bool,
        channels_last: bool,
        log_freq: int,
        watch: Sequence[Callable[[Tensor, Tensor, Tensor], None]] = (),
) -> list[Batch]:
    """Runs the model over a loader. Nothing reads the device between two log lines.

    Args:
        subject: The model.
        loader: Batches of images (B, C, H, W) or NaFlex dictionaries, with targets (B,) in the label space.
        places: Process of each batch in the data set; how many there are in all is the length (streams may have fewer).
        space: What counts as right.
        title: Of the log lines.
        prefetcher: Whether the loader has brought the batches to the device.
        channels_last: Whether images go in that layout.
        log_freq: Batches between two log lines.
        watch: Are called with each batch's outputs (B, K), these in the label space (B, C), and targets (B,).

    Returns:
        One entry per batch.
    """
    loss_fn = nn.CrossEntropyLoss().to(subject.device)
    waiting: list[Tensor] = []
    batches: list[Batch] = []
    sizes: list[int] = []

    def flush() -> None:
        for values in torch.stack(waiting).tolist() if waiting else ():
            index = len(batches)
            place = places[index] if index < len(places) else index
            batches.append(Batch(place, sizes[index], *values[:3], *map(int, values[3:])))
        waiting.clear()

    meter = utils.AverageMeter()
    end = time.time()
    with torch.inference_mode():
        batches_run = outputs_of(subject, loader, prefetcher=prefetcher, channels_last=channels_last)
        for index, (output, target) in enumerate(batches_run):
            with subject.autocast():
                reduced = space.reduce(output)
                loss = loss_fn(reduced, target) if space.sets is None else _loss_of_sets(reduced, target, space)
            for look in watch:
                look(output, reduced, target)
            accuracy = utils.accuracy(reduced, target, topk=(1, 5)) if space.sets is None else _hits(
                reduced, target, space)
            counts = [non_finite_rows(output).sum()]
            if space.differs:
                counts.append(space.right_of_all(output, target).sum())
            waiting.append(torch.stack([value.to(widest(value.device)) for value in (loss, *accuracy, *counts)]))
            sizes.append(target.shape[0])
            meter.update((time.time() - end) / target.shape[0], target.shape[0])
            end = time.time()
            if index % log_freq == 0:
                flush()
                _log(title, batches, len(places), meter)
    flush()
    if batches and (len(batches) - 1) % log_freq:
        _log(title, batches, len(places), meter)
    return batches


def _loss_of_sets(logits: Tensor, targets: Tensor, space: LabelSpace) -> Tensor:
    """Mean cross entropy where the classes of a set are one class."""
    right = space.accepted(logits.shape[1], targets)
    return -logits.float().log_softmax(dim=1).masked_fill(~right, -torch.inf).logsumexp(dim=1).mean()


def _hits(logits: Tensor, targets: Tensor, space: LabelSpace) -> list[Tensor]:
    """Shares of images in percent of whose best and best five classes one is right."""
    best = logits.topk(min(5, logits.shape[1]), 1, True, True)[1]
    hits = space.accepted(logits.shape[1], targets).gather(1, best)
    return [100 * hits[:, :k].any(dim=1).float().mean() for k in (1, 5)]


def non_finite_rows(outputs: Tensor) -> Tensor:
    """(B,): which rows of (B, K) hold a NaN or an infinity."""
    return ~torch.isfinite(outputs).all(dim=1)


def _log(title: str, batches: list[Batch], count: int, meter: utils.AverageMeter) -> None:
    now = mean_of(batches)
    left = max(0, count - len(batches)) * meter.avg * batches[0].size
    _logger.info(f"{title}: [{len(batches):>4d}/{count}]  Loss: {now.loss:>6.4f}  Acc@1: {now.top1:>7.3f}  "
                 f"Acc@5: {now.top5:>7.3f}  {1 / max(meter.avg, 1e-9):>7.1f} images/s  Left: {left:.0f}s")


def mean_of(batches: Sequence[Batch]) -> Scores:
    """The scores of a whole data set from those of its batches, in order: the same floats however they were shared."""
    def average(name: str) -> float:
        meter = utils.AverageMeter()
        for batch in batches:
            meter.update(getattr(batch, name), batch.size)
        return meter.avg

    right1, right5 = (sum(round(getattr(batch, name) * batch.size / 100) for batch in batches)
                      for name in ("top1", "top5"))
    plain = [batch.right1_all for batch in batches if batch.right1_all is not None]
    images = sum(batch.size for batch in batches)
    return Scores(
        images=images, loss=average("loss"), top1=100 * right1 / max(1, images), top5=100 * right5 / max(1, images),
        right1=right1, right5=right5, right1_all=sum(plain) if plain else right1,
        non_finite=sum(batch.non_finite for batch in batches))
