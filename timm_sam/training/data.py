"""Options -> data sets and loaders, through timm's factories."""
import argparse
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    Mixup,
    NaFlexMixup,
    create_loader,
    create_naflex_loader,
)
from torchvision.datasets import ImageFolder

from ..cli.device import Process
from ..cli.errors import OptionError, one_line
from ..cli.image_folders import class_to_idx, open_files, open_named
from ..cli.models import image_mode
from ..cli.rules import reads_files
from ..cli.tasks import is_multilabel, target_transform
from . import cifar_policy, posterize
from .agreement import check_data
from .downloads import one_at_first
from .holdout import hold_out
from .losses import mixup_active

_logger = logging.getLogger(__name__)


@dataclass
class Data:
    """What an epoch needs to know of its data.

    Attributes:
        train: Training loader.
        eval: Validation loader, or None without a validation split.
        mixup: timm's, applied to each batch by the loop; None when the loader mixes, or nothing does.
        reference_batch_size: Batch size that learning rate and loss scaling refer to: --batch-size, or the average of
            a size schedule.
        loss_scale: How losses of batches of other sizes are weighed: ``none``, ``sqrt`` or ``linear``.
        naflex: Whether batches are NaFlex dictionaries.
    """

    train: Any
    eval: Any
    mixup: Any
    reference_batch_size: float
    loss_scale: str
    naflex: bool

    @property
    def loaders(self) -> tuple[Any, Any]:
        """Training, validation."""
        return self.train, self.eval

    def updates_per_epoch(self, accum_steps: int) -> int:
        """Updates of an epoch, the last of which may have fewer batches."""
        return (len(self.train) + accum_steps - 1) // accum_steps

    def set_epoch(self, epoch: int, args: argparse.Namespace) -> None:
        """Tells samplers and iterable data sets the epoch; turns mixup off when its time is over."""
        for holder in (self.train.dataset, self.train.batch_sampler, self.train.sampler):
            if hasattr(holder, "set_epoch"):
                holder.set_epoch(epoch)
                if holder is not self.train.dataset:
                    break
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
            if not args.no_prefetcher and getattr(self.train, "mixup_enabled", False):
                self.train.mixup_enabled = False
            elif self.mixup is not None:
                self.mixup.mixup_enabled = False


def create_data(
        args: argparse.Namespace,
        process: Process,
        data_config: Mapping[str, Any],
        num_classes: int,
        patch_size: tuple[int, int] | None,
        model_dtype: torch.dtype | None,
) -> Data:
    """Builds the data sets and loaders of both splits.

    Args:
        args: All options.
        process: This one; its device is where batches go.
        data_config: Of ``timm.data.resolve_input_data_config``.
        num_classes: Number of the model's outputs.
        patch_size: The model's patch size (height, width), where it has one; for --naflex-loader.
        model_dtype: Type of the images, float32 if None.

    Raises:
        OptionError: A data set is missing or empty, or does not fit the number of classes.
    """
    with one_at_first(process, args.dataset_download):
        train_set, eval_set = _datasets(args, process, data_config, num_classes)
    held_out = "" if args.holdout is None else f" less --holdout {args.holdout:g}"
    check_data(args, process, {f"--train-split {args.train_split}{held_out}": train_set,
                               f"--val-split {args.val_split}": eval_set if args.holdout is None else None})
    common = dict(
        mean=data_config["mean"],
        std=data_config["std"],
        pin_memory=args.pin_mem,
        img_dtype=model_dtype or torch.float32,
        device=process.device,
        distributed=process.distributed,
        use_prefetcher=not args.no_prefetcher,
        persistent_workers=args.persistent_workers,
    )
    mixup_options = _mixup_options(args, num_classes) if mixup_active(args) else None
    stays = args.persistent_workers or args.use_multi_epochs_loader
    if mixup_options and args.mixup_off_epoch and args.workers and stays and process.primary and not (
            args.naflex_loader or args.no_prefetcher):
        _logger.warning(f"--mixup-off-epoch {args.mixup_off_epoch} does not reach workers that live on between epochs: "
                        f"add --no-persistent-workers")
    mixup = None
    if args.naflex_loader:
        patch_size = patch_size or (16, 16)
        train = _naflex_train_loader(args, process, train_set, data_config, patch_size, mixup_options, common)
        reference, loss_scale = float(args.batch_size), args.naflex_loss_scale
    else:
        collate = None
        if mixup_options is not None and not args.no_prefetcher:
            collate = FastCollateMixup(**mixup_options)
        elif mixup_options is not None:
            mixup = Mixup(**mixup_options)
        train = _train_loader(args, process, train_set, data_config, collate, common)
        reference, loss_scale = float(args.batch_size), "none"
        if args.train_img_sizes is not None:
            reference, loss_scale = train.batch_sampler.average_batch_size, args.variable_batch_loss_scale
    if args.aa == cifar_policy.NAME and not args.no_aug:
        cifar_policy.add_cifar10_policy(train)
    return Data(
        train=train,
        eval=None if eval_set is None else _eval_loader(args, process, eval_set, data_config, patch_size, common),
        mixup=mixup,
        reference_batch_size=reference,
        loss_scale=loss_scale,
        naflex=args.naflex_loader,
    )


def _datasets(args: argparse.Namespace, process: Process, data_config: Mapping[str, Any],
              num_classes: int) -> tuple[Any, Any]:
    common = dict(class_map=args.class_map, input_key=args.input_key, target_key=args.target_key,
                  img_mode=image_mode(args, args.model, data_config), target_format=args.target_format,
                  target_transform=target_transform(args, num_classes))

    def create(flag: str, split: str, **streamed: Any) -> Any:
        origin = f"{flag} {split}"
        if reads_files(args):
            return open_files(args.data_dir, split, origin, verbose=process.primary, **common)
        return open_named(
            args.dataset, args.data_dir, split, origin, num_classes=num_classes, download=args.dataset_download,
            batch_size=args.batch_size, trust_remote_code=args.dataset_trust_remote_code, **streamed, **common)

    def create_train() -> Any:
        return create("--train-split", args.train_split, is_training=True, seed=args.seed, repeats=args.epoch_repeats,
                      num_samples=args.train_num_samples)

    train_set, eval_set = create_train(), None
    if args.holdout is not None:
        if is_multilabel(args):
            raise OptionError(f"--holdout {args.holdout:g} takes a share of each class, and with --task multilabel "
                              f"images have several: leave it out, and name a split of its own by --val-split")
        _check_classes(args, process, num_classes, train_set, None)
        train_set, eval_set = hold_out(train_set, create_train(), args.holdout, args.holdout_seed)
        if process.primary:
            _logger.info(f"--holdout {args.holdout:g}: {len(eval_set):,} of {len(train_set) + len(eval_set):,} "
                         f"training images are validated on, and not trained on; --val-split is not read")
        return train_set, eval_set
    if args.val_split:
        eval_set = create("--val-split", args.val_split, is_training=False, num_samples=args.val_num_samples)
    _check_roots(args, train_set, eval_set)
    _check_classes(args, process, num_classes, train_set, eval_set)
    return train_set, eval_set


def _check_roots(args: argparse.Namespace, train_set: Any, eval_set: Any) -> None:
    """Where there is no folder for a split, it is the data folder itself: then one split contains the other."""
    folders = reads_files(args) or isinstance(train_set, ImageFolder)
    if eval_set is None or not folders:  # where streams are kept says nothing of what is in them
        return
    train, evaluation = (os.path.realpath(getattr(s, "reader", s).root) for s in (train_set, eval_set))
    if os.path.isfile(train) and train == evaluation:
        raise OptionError(
            f"--val-split {args.val_split}: --data-dir {args.data_dir} is one file, so that training images would be "
            f"validated on; name two in a folder by --train-split A.tar --val-split B.tar, or use --val-split ''")
    if os.path.commonpath([train, evaluation]) not in (train, evaluation):
        return
    at_top = train == os.path.realpath(args.data_dir)
    flag, split = ("--train-split", args.train_split) if at_top else ("--val-split", args.val_split)
    raise OptionError(
        f"{flag} {split}: --data-dir {args.data_dir} has no such folder, so that training and validation images would "
        f"be mixed; add the folder, name the split, or use --val-split '' to train without validation")


def _check_classes(args: argparse.Namespace, process: Process, num_classes: int, train_set: Any,
                   eval_set: Any) -> None:
    train_classes = class_to_idx(train_set)
    if not train_classes or not all(isinstance(index, int) for index in train_classes.values()):
        return
    needed = max(train_classes.values()) + 1
    if needed > num_classes:
        raise OptionError(
            f"--num-classes {num_classes}: the training split below --data-dir {args.data_dir} has {needed} "
            f"classes; use --num-classes {needed}")
    if needed < num_classes and process.primary:
        _logger.warning(
            f"The training split has {needed} classes, the model {num_classes} outputs; --num-classes {needed} "
            f"makes them equal.")
    eval_classes = class_to_idx(eval_set)
    for name, index in eval_classes.items():
        if name not in train_classes:
            raise OptionError(
                f"--val-split {args.val_split} of --data-dir {args.data_dir} has a class {name!r} that the training "
                f"split has not; remove its folder, or give --class-map FILE")
        if train_classes[name] != index:
            missing = sorted(set(train_classes) - set(eval_classes))[:3]
            raise OptionError(
                f"--val-split {args.val_split} of --data-dir {args.data_dir} numbers class {name!r} as {index}, the "
                f"training split as {train_classes[name]}: its folders differ"
                f"{' (missing: ' + ', '.join(missing) + ')' if missing else ''}; add them, or give --class-map FILE")


def _mixup_options(args: argparse.Namespace, num_classes: int) -> dict[str, Any]:
    return dict(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
        multi_label=is_multilabel(args),
    )


def augmentation(args: argparse.Namespace, data_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the training images undergo, as arguments of timm's loaders."""
    interpolation = args.train_interpolation
    if args.no_aug or not interpolation:
        interpolation = data_config["interpolation"]
    later = args.aa == cifar_policy.NAME  # put in when the loader is there: timm does not know it
    return dict(
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=None if later else args.color_jitter,  # as timm under a policy
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=None if later else args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
        interpolation=interpolation,
        num_workers=args.workers,
        worker_seeding=args.worker_seeding,
    )


@contextmanager
def _refusals() -> Iterator[None]:
    """Makes one line of what timm's loaders have against their options."""
    try:
        yield
    except (ValueError, TypeError, AssertionError) as e:
        raise OptionError(f"the training loader refuses its options: {one_line(e)}; see the flags it names in "
                          f"--help") from e


def _train_loader(args: argparse.Namespace, process: Process, dataset: Any, data_config: Mapping[str, Any],
                  collate: Callable | None, common: Mapping[str, Any]) -> Any:
    if args.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    progressive = args.train_size_schedule == "progressive"
    with _refusals(), posterize.down_to_no_bit():
        loader = create_loader(
            dataset,
            input_size=data_config["input_size"],
            input_size_choices=args.train_img_sizes,
            batch_size_choices=args.train_batch_sizes,
            batch_choice_weights=args.train_size_probs,
            batch_choice_seed=args.seed,
            batch_choice_schedule=args.train_size_schedule,
            batch_schedule_epochs=args.epochs if progressive else None,
            batch_schedule_spread=args.train_size_schedule_spread,
            batch_schedule_random_mix=args.train_size_random_mix,
            num_batches=args.train_batches_per_epoch,
            collate_fn=collate,
            use_multi_epochs_loader=args.use_multi_epochs_loader,
            **common,
            **augmentation(args, data_config),
        )
    if hasattr(dataset, "__len__") and len(dataset) and len(loader) == 0:
        raise OptionError(
            f"--batch-size {args.batch_size}: the training split has {len(dataset)} images for {process.world_size} "
            f"process(es), not one full batch; use a smaller one")
    if args.train_img_sizes is not None and process.primary:
        sampler = loader.batch_sampler
        _logger.info(
            f"Scheduled image sizes {args.train_img_sizes} ({args.train_size_schedule}) with batch sizes "
            f"{sampler.batch_sizes}: {len(sampler)} batches per epoch, {sampler.average_batch_size:.2f} on average.")
    return loader


def _naflex_train_loader(args: argparse.Namespace, process: Process, dataset: Any, data_config: Mapping[str, Any],
                         patch_size: tuple[int, int], mixup_options: dict[str, Any] | None,
                         common: Mapping[str, Any]) -> Any:
    mixup = None
    if mixup_options is not None:
        # NaFlexMixup mixes per batch and has no cutmix bounds
        known = {k: v for k, v in mixup_options.items() if k not in ("mode", "cutmix_minmax")}
        mixup = NaFlexMixup(**known, mixup_off_epoch=args.mixup_off_epoch)
    patches: dict[str, Any] = dict(patch_size=patch_size)
    if args.naflex_patch_sizes:
        patches = dict(patch_size_choices=args.naflex_patch_sizes)
        if args.naflex_patch_size_probs:
            patches["patch_size_choice_probs"] = args.naflex_patch_size_probs
    if process.primary:
        _logger.info(f"NaFlex loader, patch sizes {args.naflex_patch_sizes or patch_size}, sequence lengths "
                     f"{args.naflex_train_seq_lens}.")
    with _refusals(), posterize.down_to_no_bit():
        return create_naflex_loader(
            dataset=dataset,
            channels=data_config["input_size"][0],
            train_seq_lens=args.naflex_train_seq_lens,
            mixup_fn=mixup,
            rank=process.rank,
            world_size=process.world_size,
            patchify_channels_last=not args.naflex_patchify_channels_first,
            **patches,
            **common,
            **augmentation(args, data_config),
        )


def _eval_loader(args: argparse.Namespace, process: Process, dataset: Any, data_config: Mapping[str, Any],
                 patch_size: tuple[int, int] | None, common: Mapping[str, Any]) -> Any:
    workers = args.workers
    if process.distributed and any(kind in args.dataset for kind in ("tfds", "wds")):
        workers = min(2, workers)  # every worker pads its last batch; few workers keep the padding small
    kwargs: dict[str, Any] = dict(
        batch_size=args.validation_batch_size or args.batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        num_workers=workers,
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        **common,
    )
    if args.naflex_loader:
        return create_naflex_loader(
            dataset=dataset,
            channels=data_config["input_size"][0],
            patch_size=patch_size,
            max_seq_len=args.naflex_max_seq_len,
            patchify_channels_last=not args.naflex_patchify_channels_first,
            **kwargs,
        )
    return create_loader(dataset, input_size=data_config["input_size"], **kwargs)
