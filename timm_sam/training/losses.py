"""Options -> the training loss, by timm's factory of losses."""
import argparse
import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.loss import (
    LOSS_TYPES,
    BinaryCrossEntropy,
    create_classification_loss,
    load_class_stats,
    resolve_class_weights,
)
from torch import Tensor, nn

from ..cli.errors import OptionError, one_line
from ..cli.rules import flag
from ..cli.tasks import is_multilabel

# arguments of the factory -> options of other names
_WEIGHTS = {"class_weight": "loss_class_weight", "pos_weight": "loss_pos_weight"}


def loss_type(args: argparse.Namespace) -> str:
    """The loss by its name in ``timm.loss.LOSS_TYPES``."""
    return args.loss or ("bce" if is_multilabel(args) else "ce")


def mixup_active(args: argparse.Namespace) -> bool:
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def own_options(loss: str) -> list[str]:
    """Options that belong to one loss: the arguments of the factory that begin with its name."""
    return [name for name in inspect.signature(create_classification_loss).parameters
            if name.startswith(f"{loss}_") and name != "jsd_splits"]


def without_effect(args: argparse.Namespace, defaults: Mapping[str, Any]) -> list[str]:
    """Flags of other losses than the one that is minimized, with their values, where these are not the defaults.

    Those of bce are not among them: timm's factory refuses them.
    """
    others = [dest for name in LOSS_TYPES if name not in (loss_type(args), "bce") for dest in own_options(name)]
    return [f"{flag(dest)} {getattr(args, dest)}" for dest in others if getattr(args, dest) != defaults.get(dest)]


def criterion_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of timm's ``create_classification_loss``.

    Raises:
        OptionError: A file of statistics or weights cannot be read, or holds no numbers of the kind.
    """
    loss = loss_type(args)
    try:
        stats = load_class_stats(args.class_stats)
    except (OSError, ValueError, TypeError) as e:
        raise OptionError(f"--class-stats {args.class_stats}: {one_line(e)}; give a JSON file with pos_counts (one "
                          f"number per class) and num_samples") from None
    if loss == "db" and stats is None:
        raise OptionError("--loss db needs --class-stats FILE: how many images each class has")
    kwargs: dict[str, Any] = dict(
        loss_type=loss,
        multi_label=is_multilabel(args),
        smoothing=args.smoothing,
        soft_targets=mixup_active(args),  # dense, and smoothed where they are mixed
        bce_sum=args.bce_sum,
        bce_target_thresh=args.bce_target_thresh,
    )
    for name, dest in _WEIGHTS.items():
        value = getattr(args, dest)
        try:
            kwargs[name] = resolve_class_weights(
                value, name, class_stats=stats, power=args.loss_weight_power, beta=args.loss_weight_beta,
                max_weight=args.loss_weight_max)
        except (OSError, ValueError, TypeError) as e:
            raise OptionError(f"{flag(dest)} {value}: {one_line(e)}; give a number, one per class with commas between, "
                              f"a file of them, or a method with --class-stats FILE") from None
    if loss == "jsd":
        kwargs["jsd_splits"] = args.aug_splits
    elif loss == "db":
        kwargs["class_counts"], kwargs["num_samples"] = stats  # type: ignore[misc]  # not None, see above
    kwargs.update((name, getattr(args, name)) for name in own_options(loss))
    return kwargs


def create_loss(args: argparse.Namespace) -> nn.Module:
    """The training loss.

    Raises:
        OptionError: As :func:`criterion_kwargs`, or the factory refuses the options.
    """
    kwargs = criterion_kwargs(args)
    try:
        return create_classification_loss(**kwargs)
    except (ValueError, TypeError) as e:
        loss = kwargs["loss_type"]
        given = "".join(f", {flag(dest)} {getattr(args, dest)}" for dest in
                        ("loss_class_weight", "loss_pos_weight", "bce_target_thresh", "bce_sum", "mixup", "cutmix",
                         "cutmix_minmax", *own_options(loss)) if getattr(args, dest))
        raise OptionError(f"--loss {loss} with --task {args.task}, --smoothing {args.smoothing}{given}: {one_line(e)}; "
                          f"leave out what does not go with it, or choose another --loss") from None


def of_each_sample(criterion: Any, output: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample of a batch, (m,): that of the batch is their mean.

    Args:
        criterion: A cross entropy, of single labels or mixed ones, or a binary one (:func:`whole_batch_only`).
        output: Logits, (m, classes).
        target: Labels (m,), or (m, classes).
    """
    if isinstance(criterion, BinaryCrossEntropy):  # it writes its targets, which torch.vmap cannot follow
        each = copy.copy(criterion)
        each.reduction, each.sum_classes = "none", False
        losses = each(output, target)
        return losses.sum(-1) if criterion.sum_classes else losses.mean(-1)
    return torch.vmap(lambda o, t: criterion(o[None], t[None]))(output, target)


def whole_batch_only(args: argparse.Namespace) -> Iterator[str]:
    """Options, as they are given, whose loss is not the mean of losses of single samples."""
    if loss_type(args) not in ("ce", "bce"):
        yield f"--loss {loss_type(args)}"
    if is_multilabel(args):
        yield f"--task {args.task}"
    if args.kd_model_name is not None:
        yield f"--kd-model-name {args.kd_model_name}"
    if args.naflex_loader:
        yield "--naflex-loader"
    if args.aug_splits > 1:
        yield f"--aug-splits {args.aug_splits}"


def check_lengths(args: argparse.Namespace, num_classes: int) -> None:
    """Weights and counts have as many entries as the model has outputs, or are one number for all.

    Raises:
        OptionError: They have not.
    """
    kwargs = criterion_kwargs(args)
    for name, dest in {**_WEIGHTS, "class_counts": "class_stats"}.items():
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.numel() != num_classes:
            raise OptionError(f"{flag(dest)} {getattr(args, dest)} has {value.numel()} entries but the model has "
                              f"{num_classes} classes: give one per class, or mend --num-classes")
