"""Options -> data sets and loaders of an evaluation, through timm's factories, shared by the ranks."""
import argparse
import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, create_naflex_loader
from torch.utils.data import Dataset, IterableDataset

from ...cli import rules
from ...cli.errors import OptionError, one_line
from ...cli.image_folders import class_to_idx, open_files, open_named
from ...cli.models import image_mode
from ...cli.tasks import target_transform
from ..ranks import Ranks, batches_of
from ..subject import Subject
from .images import SuiteDataset, open_image, prepared, unreadable
from .suites import Suite

_logger = logging.getLogger(__name__)

# What decoders raise. Of what else a data set does an error is a bug.
_UNREADABLE = (OSError, SyntaxError, ValueError, ArithmeticError, struct.error, Image.DecompressionBombError)


@dataclass
class Loaded:
    """A rank's share of a data set.

    Attributes:
        loader: Of batches, in order.
        places: Process in the data set of each batch.
        indices: Samples of this rank, in order; None: all of a stream.
    """

    loader: Any
    places: list[int]
    indices: list[int] | None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Strict(Dataset):
    """Samples of one of timm's or torchvision's data sets, in a given order; an image that cannot be read is an error.

    timm's data sets go on with the next sample instead. ``transform`` is the data set's own.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], where: str) -> None:
        self.dataset = dataset
        self.indices = indices
        self.where = where
        # undecoded bytes (--tf-preprocessing) and data sets of torchvision are read as they are
        self.decodes = isinstance(dataset, ImageDataset) and not dataset.load_bytes

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        index = self.indices[place]
        try:
            if not self.decodes:
                return self.dataset[index]
            file, target = self.dataset.reader[index][:2]
        except _UNREADABLE as e:
            raise unreadable(e, self.where, self._name(index)) from None
        with file:
            image = open_image(file, self.dataset.input_img_mode, self.where, self._name(index))
        if target is not None and self.dataset.target_transform is not None:
            target = self.dataset.target_transform(target)
        return prepared(self.transform, image, self.where, self._name(index)), -1 if target is None else target

    def _name(self, index: int) -> str:
        """What errors call a sample."""
        return (self.decodes and self.dataset.filename(index, absolute=True)) or f"of sample {index}"


def single_dataset(args: argparse.Namespace, subject: Subject, verbose: bool = True) -> Any:
    """The data set that timm's flags name.

    Args:
        args: All options.
        subject: The model, whose preprocessing is used.
        verbose: Whether to log what is left out.

    Raises:
        OptionError: It is missing, or has more classes than the model.
    """
    origin, img_mode = f"--split {args.split}", image_mode(args, subject.name, subject.data_config)
    transform = target_transform(args, subject.num_classes)
    outputs = len(read_valid_labels(args, subject.num_classes)) if args.valid_labels else subject.num_classes
    if rules.reads_files(args):
        dataset: Any = open_files(args.data_dir, args.split, origin, class_map=args.class_map, input_key=args.input_key,
                                  img_mode=img_mode, load_bytes=args.tf_preprocessing, verbose=verbose,
                                  target_key=args.target_key, target_format=args.target_format,
                                  target_transform=transform)
    else:
        dataset = open_named(
            args.dataset, args.data_dir, args.split, origin, num_classes=outputs,
            counted_by="--valid-labels" if args.valid_labels else "--num-classes",
            class_map=args.class_map, img_mode=img_mode,
            download=args.dataset_download, num_samples=args.num_samples, input_key=args.input_key,
            target_key=args.target_key, target_format=args.target_format, target_transform=transform,
            trust_remote_code=args.dataset_trust_remote_code, seed=args.seed)
    if classes := class_to_idx(dataset):
        needed = max(classes.values()) + 1
        if needed > outputs:
            raise OptionError(
                f"--data-dir {args.data_dir} has {needed} classes, the model {outputs} outputs"
                f"{' that count' if args.valid_labels else ''}: mend --num-classes, or check that this is the folder "
                f"above the classes")
        if needed < outputs and not args.class_map:
            _logger.warning(
                f"The data set has {needed} classes, the model {outputs} outputs: classes are numbered by their "
                f"folders' order, which is wrong if some are missing; see --class-map, --valid-labels and --eval.")
    return dataset


def read_valid_labels(args: argparse.Namespace, num_classes: int) -> list[int]:
    """The outputs that ``--valid-labels`` names, in the file's order.

    Raises:
        OptionError: A line is not the index of an output, or a line is there twice.
    """
    try:
        with open(args.valid_labels, encoding="utf-8") as f:
            labels = [int(line) for line in f.read().split("\n") if line.strip()]
    except (OSError, ValueError) as e:
        raise OptionError(
            f"--valid-labels {args.valid_labels}: {one_line(e)}; write one index of an output per line") from None
    if not labels or min(labels) < 0 or max(labels) >= num_classes or len(set(labels)) < len(labels):
        raise OptionError(
            f"--valid-labels {args.valid_labels}: write different indices from 0 to {num_classes - 1}, one per line")
    return labels


def single_loader(args: argparse.Namespace, subject: Subject, dataset: Any, batch_size: int, ranks: Ranks) -> Loaded:
    """This rank's batches of the data set that timm's flags name.

    Args:
        args: All options.
        subject: The model, whose preprocessing is used.
        dataset: Of :func:`single_dataset`.
        batch_size: Images per batch; not the options', where memory is short.
        ranks: Who shares the work.

    Raises:
        OptionError: The data set is a stream, and there are several ranks.
    """
    if isinstance(dataset, IterableDataset):
        if ranks.count > 1:
            raise OptionError(
                f"--dataset {args.dataset} is a stream, which processes cannot share exactly: run one process")
        loader = _loader(args, subject, dataset, batch_size)
        return Loaded(loader, list(range(len(loader))), None)
    batches = batches_of(range(len(dataset)), batch_size)
    places = ranks.share(range(len(batches)))
    indices = [i for place in places for i in batches[place]]
    dataset = Strict(dataset, indices, f"--data-dir {args.data_dir}")
    return Loaded(_loader(args, subject, dataset, batch_size), places, indices)


def suite_loader(args: argparse.Namespace, subject: Subject, suite: Suite, batches: Sequence[Sequence[int]],
                 places: Sequence[int], raw: bool = False) -> Loaded:
    """Batches of a suite.

    Args:
        args: All options.
        subject: The model, whose preprocessing is used.
        suite: The data set.
        batches: All batches, as positions in ``suite.samples``; all of one size, but for the last.
        places: Which of them are wanted.
        raw: Leave images in [0, 1] instead of normalizing them.
    """
    indices = [i for place in places for i in batches[place]]
    dataset = SuiteDataset(suite, image_mode(args, subject.name, subject.data_config), indices)
    loader = _loader(args, subject, dataset, max(map(len, batches)), crop_border(args, suite), raw, suite.crop_pct)
    return Loaded(loader, list(places), indices)


def crop_border(args: argparse.Namespace, suite: Suite) -> int:
    """Pixels to cut from each side of a suite's images: what the options say, else what the suite needs."""
    return suite.crop_border_pixels if args.crop_border_pixels is None else args.crop_border_pixels


def _loader(args: argparse.Namespace, subject: Subject, dataset: Any, batch_size: int, border: int | None = None,
            raw: bool = False, crop: float | None = None) -> Any:
    config = subject.data_config
    channels = config["input_size"][0]
    kwargs: dict[str, Any] = dict(
        batch_size=batch_size,
        use_prefetcher=not args.no_prefetcher,
        interpolation=config["interpolation"],
        mean=(0.0,) * channels if raw else config["mean"],
        std=(1.0,) * channels if raw else config["std"],
        num_workers=args.workers,
        crop_pct=subject.crop_pct if crop is None else crop,
        crop_mode=config["crop_mode"],
        crop_border_pixels=args.crop_border_pixels if border is None else border or None,
        pin_memory=args.pin_mem,
        device=subject.device,
        img_dtype=subject.dtype or torch.float32,
    )
    if args.naflex_loader:
        return create_naflex_loader(
            dataset, patch_size=_patch_size(subject) or (16, 16), max_seq_len=args.naflex_max_seq_len, **kwargs)
    # without persistent workers those of one set are gone when the next one starts
    return create_loader(dataset, input_size=config["input_size"], tf_preprocessing=args.tf_preprocessing,
                         persistent_workers=False, **kwargs)


def _patch_size(subject: Subject) -> Any:
    """Of a NaFlex model."""
    return getattr(getattr(subject.model, "embeds", None), "patch_size", None)
