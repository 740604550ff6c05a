"""What analyses look at before they begin: their folder, the weights, which of them move, which images are taken."""
import argparse
import hashlib
import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..cli.errors import OptionError, one_line
from ..evaluation import results
from ..evaluation.ranks import batches_of
from ..evaluation.sets.images import class_balanced_subset, shuffled
from ..evaluation.sets.suites import Suite
from ..evaluation.subject import Subject
from ..selection import select_parameters

_logger = logging.getLogger(__name__)
IMAGES = 2048  # of which sharpness is taken, as in the SAM-ON paper


def prepare(args: argparse.Namespace, files: Sequence[str]) -> None:
    """Makes ``args.out``, and looks whether files in it can be written.

    Raises:
        OptionError: One cannot be, or is there and may be neither replaced nor gone on with.
    """
    origin = f"--out {args.out}"
    try:
        os.makedirs(args.out, exist_ok=True)
    except OSError as e:
        raise OptionError(f"{origin} cannot be made ({e.strerror}): name another folder") from None
    results.refuse_special(files, origin)
    if not (args.overwrite or args.skip_existing):
        results.refuse_existing(files, origin)


def check_finite(subject: Subject) -> None:
    """Looks at all parameters and buffers.

    Raises:
        OptionError: A number is NaN or infinite.
    """
    for name, tensor in subject.model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise OptionError(f"--checkpoint {subject.called}: {name} holds NaN or infinite "
                              f"numbers, of which nothing can be said; give another checkpoint")


def labels_of(args: argparse.Namespace, names: Sequence[str]) -> Sequence[str]:
    """What each checkpoint counts to: ``--labels``, or its own short name.

    Raises:
        OptionError: Copies among the checkpoints were left out, so that there are more labels.
    """
    if args.labels and len(args.labels) != len(names):
        raise OptionError(
            f"--labels: {len(args.labels)} names for {len(names)} different checkpoints; give one for each")
    return args.labels or names


def selected(args: argparse.Namespace, subject: Subject, params: str) -> dict[str, nn.Parameter]:
    """The parameters that move, by name: a selection of training, of which ``args.filter`` may keep a part.

    Raises:
        OptionError: None does.
    """
    try:
        return dict(select_parameters(subject.model, params, args.filter))
    except ValueError as e:
        words = f"--params {params}" + ("" if args.filter is None else f" --filter {args.filter}")
        raise OptionError(f"{words}: {one_line(e)}") from None


def chosen_batches(args: argparse.Namespace, suite: Suite, verbose: bool) -> list[list[int]]:
    """``args.num_images`` images, class-balanced and shuffled, in batches of ``args.m``; as positions in the samples.

    Raises:
        OptionError: There are not so many.
    """
    n, there = args.num_images, len(suite.samples)
    if n is None:
        n = min(IMAGES, there) // args.m * args.m
        if n == 0:
            raise OptionError(f"--m {args.m}: {suite.name} has {there} images; use 1 to {there}")
        if n != IMAGES and verbose:
            _logger.info(f"{n} images of {suite.name}: all full batches of --m {args.m}, at most {IMAGES} images")
    chosen = class_balanced_subset(suite, n, args.seed, "--num-images")
    return batches_of(shuffled(suite, chosen, args.seed), args.m)


def loader_batches(args: argparse.Namespace, suite: Suite, most: int, flag: str = "--num-images") -> list[list[int]]:
    """``args.num_images`` images, class-balanced, in batches of the loader; as positions in the samples.

    Args:
        args: All options.
        suite: The data set.
        most: How many images without ``args.num_images``, if there are so many.
        flag: That ``args.num_images`` is from.

    Raises:
        OptionError: There are not so many.
    """
    n = min(most, len(suite.samples)) if args.num_images is None else args.num_images
    return batches_of(class_balanced_subset(suite, n, args.seed, flag), args.batch_size)


def placed(args: argparse.Namespace, subject: Subject, images: Tensor) -> Tensor:
    """Images (B, C, H, W) where the model is, in the memory format that was asked for."""
    images = images.to(subject.device)
    return images.contiguous(memory_format=torch.channels_last) if args.channels_last else images


def batches_sha256(batches: Sequence[Sequence[int]]) -> str:
    """A name of the choice and order of images."""
    return hashlib.sha256(repr(batches).encode()).hexdigest()
