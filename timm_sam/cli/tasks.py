"""What a classifier's targets are: one class, or several independent ones; flags, rules and parts for both scripts."""
import argparse
from collections.abc import Callable
from typing import Any

import torch
from timm.data import MultiLabelTarget
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator

from .rules import Rules, reads_files

# --task -> what measures it, with the names of its metrics and the one that ranks
EVALUATORS: dict[str, type[ClassificationEvaluator]] = {
    "classification": ClassificationEvaluator,
    "multilabel": MultiLabelClassificationEvaluator,
}


def add_task(add: Callable[..., Any]) -> None:
    """Adds ``--task``, by the ``add_argument`` of a parser or group."""
    add("--task", choices=tuple(EVALUATORS), default="classification",
        help="what a target is: one class, or any number of classes that do not exclude each other")


def add_target_format(add: Callable[..., Any]) -> None:
    """Adds ``--target-format``."""
    add("--target-format", type=str, choices=("indices", "multihot"),
        help="--task multilabel: the field holds a list of class indices (None means that), or one number per class")


def add_threshold(add: Callable[..., Any]) -> None:
    """Adds ``--multilabel-threshold``."""
    add("--multilabel-threshold", type=float, metavar="P", default=0.5,
        help="--task multilabel: a class is predicted from this probability on; for the F1 scores")


def is_multilabel(args: argparse.Namespace) -> bool:
    return args.task == "multilabel"


def task_rules(args: argparse.Namespace) -> Rules:
    """What targets need, and what they rule out."""
    several = "," in (args.target_key or "")
    if not is_multilabel(args):
        yield (args.target_format == "multihot",
               "--target-format multihot needs --task multilabel: add it, or leave --target-format out")
        yield (several, f"--target-key {args.target_key} names several fields, one class each: add --task multilabel, "
                        f"or name one field")
        return
    yield (reads_files(args),
           "--task multilabel: a folder or a tar file gives each image one class; name a data set whose targets are "
           "several by --dataset, or leave --task out")
    yield (args.num_classes is None,
           "--task multilabel needs --num-classes: targets do not tell how many classes there are")
    if several:
        fields = args.target_key.count(",") + 1
        yield (args.target_format == "multihot",
               f"--target-format multihot: --target-key {args.target_key} names several fields, which are a format of "
               f"their own; leave --target-format out")
        yield (args.num_classes != fields,
               f"--num-classes {args.num_classes}: --target-key names {fields} fields, one class each; use "
               f"--num-classes {fields}")


def target_transform(args: argparse.Namespace, num_classes: int) -> Callable[[Any], torch.Tensor] | None:
    """What makes a float target (num_classes,) of what a data set yields; None: the target is a class."""
    if not is_multilabel(args):
        return None
    return MultiLabelTarget(num_classes, dense=args.target_format == "multihot")


def create_evaluator(args: argparse.Namespace, device: torch.device | None = None, **kwargs: Any) -> Any:
    """timm's evaluator for the targets.

    Args:
        args: All options.
        device: Of the outputs.
        kwargs: Further arguments of the evaluator.
    """
    if is_multilabel(args):
        kwargs["threshold"] = args.multilabel_threshold
    return EVALUATORS[args.task](device=device, **kwargs)
