"""One data set and one model, as timm's script evaluates them: the same numbers, digit for digit."""
import argparse
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm import utils
from timm.data import RealLabelsImagenet
from torch import Tensor

from ..cli.errors import OptionError
from ..cli.tasks import is_multilabel
from .multilabel import LabelledBatch, collect, scores_of
from .scoring import Batch, mean_of, non_finite_rows, score
from .session import Session
from .sets.label_spaces import LabelSpace
from .sets.loaders import Loaded, read_valid_labels, single_dataset, single_loader
from .subject import build_subject

_logger = logging.getLogger(__name__)

_SHOWN = {"top1": "Acc@1", "top5": "Acc@5"}  # how log lines name results


def evaluate_single(session: Session, model: str, checkpoint: str | None,
                    batch_size: int) -> "OrderedDict[str, Any]":
    """Evaluates one model on the data set that timm's flags name.

    Args:
        session: The options, and what is open.
        model: Its name.
        checkpoint: File of the weights; None: timm's.
        batch_size: Images per batch.

    Returns:
        The entries of timm's script, accuracies in percent rounded to four digits; and ``non_finite``, where there are
        some, the number of images whose outputs are NaN or infinite.

    Raises:
        OptionError: The model, its weights or the data set are not what the options say.
    """
    args, ranks = session.args, session.ranks
    parts = ranks.run(lambda: _share(session, model, checkpoint, batch_size))
    results: OrderedDict[str, Any] = OrderedDict(model=model)
    broken = sum(batch.non_finite for part in parts for batch in part.batches) + sum(
        int(non_finite_rows(batch.outputs).sum()) for part in parts for batch in part.labelled)
    if is_multilabel(args):
        images, scores = _of_several_classes(args, parts)
        results.update((name, round(value, 4)) for name, value in scores.items() if name != "loss")
    else:
        images, top1, top5 = _of_one_class(args, parts)
        results.update(top1=round(top1, 4), top1_err=round(100 - top1, 4), top5=round(top5, 4),
                       top5_err=round(100 - top5, 4))
    if not images:
        raise OptionError(
            f"--data-dir {args.data_dir} --split {args.split} holds no images: check the folder and the split")
    if args.metrics_avg:
        results.update(_class_metrics(
            args.metrics_avg, np.concatenate([batch for part in parts for batch in part.targets]),
            np.concatenate([batch for part in parts for batch in part.predictions])))
    shown = "  ".join(f"{_SHOWN.get(name, name)} {value:.3f}" for name, value in results.items()
                      if name != "model" and not name.endswith("_err"))
    results.update(parts[0].about)
    if broken:
        results.update(non_finite=broken)
        session.note_non_finite(checkpoint or model, broken, images)
    if ranks.primary:
        _logger.info(f"{model}: {shown}  ({images:,} images)")
    return results


def _of_one_class(args: argparse.Namespace, parts: "Sequence[_Share]") -> tuple[int, float, float]:
    """Number of images, and the shares of them in percent whose class is the first, or one of the first five."""
    batches = sorted((batch for part in parts for batch in part.batches), key=lambda batch: batch.index)
    scores = mean_of(batches)
    top1, top5 = scores.top1, scores.top5
    if args.real_labels and batches:
        top1, top5 = (float(np.mean([right for part in parts for right in part.real[k]])) * 100 for k in (1, 5))
    return scores.images, top1, top5


def _of_several_classes(args: argparse.Namespace, parts: "Sequence[_Share]") -> "tuple[int, OrderedDict[str, float]]":
    """Number of images, and the metrics of timm's evaluator."""
    batches = sorted((batch for part in parts for batch in part.labelled), key=lambda batch: batch.index)
    return sum(len(batch.targets) for batch in batches), scores_of(args, batches)


def with_smaller_batches(evaluate: Callable[[int], "OrderedDict[str, Any]"], model: str, batch_size: int,
                         num_gpu: int, device: torch.device) -> "OrderedDict[str, Any]":
    """Evaluates with smaller and smaller batches as long as memory is short.

    Args:
        evaluate: Images per batch -> the results.
        model: Its name.
        batch_size: The first one, per device.
        num_gpu: Devices that share each batch.
        device: Whose memory it is.

    Returns:
        The results, or the entries ``model`` and ``error``.
    """
    left: int | None = batch_size
    error = "unknown"
    while left:
        with contextlib.suppress(AttributeError, RuntimeError):
            torch.get_device_module(device).empty_cache()
        try:
            return evaluate(left * num_gpu)
        except RuntimeError as e:
            error = " ".join(str(e).split())
            if not utils.check_batch_size_retry(error):
                break
        left = utils.decay_batch_step(left)
        if left:
            _logger.warning(f"{model}: {error[:200]}; trying --batch-size {left}")
    _logger.error(f"{model} failed: {error}")
    return OrderedDict(model=model, error=error)


@dataclass
class _Share:
    """What one rank has seen.

    Attributes:
        about: What the results say of the model beside its scores.
        batches: Its scores.
        real: Rank k -> whether the best k hold one of the real labels, per image that has some.
        labelled: What the model says of each batch, where targets have several classes.
        predictions, targets: Of each batch, with --metrics-avg.
    """

    about: "OrderedDict[str, Any]"
    batches: list[Batch] = field(default_factory=list)
    real: dict[int, list[bool]] = field(default_factory=dict)
    labelled: list[LabelledBatch] = field(default_factory=list)
    predictions: list[np.ndarray] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)


def _share(session: Session, model: str, checkpoint: str | None, batch_size: int) -> _Share:
    """Does this rank's part of an evaluation."""
    args = session.args
    subject = build_subject(args, checkpoint, session.device, model, verbose=session.primary)
    dataset = single_dataset(args, subject, session.primary)
    space = LabelSpace("training")
    if args.valid_labels:
        space = LabelSpace("valid labels", tuple((i,) for i in read_valid_labels(args, subject.num_classes)))
    loaded = single_loader(args, subject, dataset, batch_size, session.ranks)
    real = real_labels(args, dataset, loaded)
    share = _Share(OrderedDict(
        param_count=round(subject.param_count / 1e6, 2), img_size=subject.data_config["input_size"][-1],
        crop_pct=subject.crop_pct, interpolation=subject.data_config["interpolation"]))

    if is_multilabel(args):
        share.labelled = collect(
            subject, loaded, loaded.places, prefetcher=not args.no_prefetcher, channels_last=args.channels_last,
            log_freq=args.log_freq)
        if args.metrics_avg:
            share.predictions = [(batch.outputs.sigmoid() >= args.multilabel_threshold).numpy()
                                 for batch in share.labelled]
            share.targets = [(batch.targets >= 0.5).numpy() for batch in share.labelled]
        return share

    def watch(_: Tensor, outputs: Tensor, targets: Tensor) -> None:
        if real is not None:
            real.add_result(outputs)
        if args.metrics_avg:
            share.predictions.append(outputs.argmax(dim=1).cpu().numpy())
            share.targets.append(targets.cpu().numpy())

    share.batches = score(
        subject, loaded, loaded.places, space, "Test", prefetcher=not args.no_prefetcher,
        channels_last=args.channels_last, log_freq=args.log_freq, watch=[watch])
    if real is not None:
        share.real = real.is_correct
    if loaded.indices is None and (seen := sum(batch.size for batch in share.batches)) < len(dataset):
        _logger.warning(f"--dataset {args.dataset} gave {seen:,} of {len(dataset):,} images: the number is wrong "
                        f"(--num-samples), or what could not be read was passed over, see above")
    return share


def real_labels(args: argparse.Namespace, dataset: Any, loaded: Loaded) -> RealLabelsImagenet | None:
    """What counts by the labels of ``--real-labels``; None: there are none.

    Args:
        args: All options.
        dataset: With the names of its files: ImageNet's whole validation split.
        loaded: This rank's share of it.

    Raises:
        OptionError: The file is no list of lists, or not of these images.
    """
    if not args.real_labels:
        return None
    try:
        names = dataset.filenames(basename=True)
        real = RealLabelsImagenet(names, real_json=args.real_labels)
        if not all(name in real.real_labels for name in names):
            raise ValueError("files of other names")
        if not all(isinstance(several, list) for several in real.real_labels.values()):
            raise ValueError("no lists of labels")
    except (AssertionError, AttributeError, TypeError, ValueError, OSError):
        raise OptionError(
            f"--real-labels {args.real_labels}: needs a JSON list of one list per image, and ImageNet's whole "
            f"validation split as a folder or tar; leave it out for other data") from None
    if loaded.indices is not None:
        real.filenames = [names[i] for i in loaded.indices]  # it counts the samples of this rank
    return real


def _class_metrics(average: str, targets: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score, precision_score, recall_score
    metrics = dict(precision=precision_score, recall=recall_score, f1_score=f1_score)
    return {f"{average}_{name}": round(100 * metric(targets, predictions, average=average, zero_division=0), 4)
            for name, metric in metrics.items()}
