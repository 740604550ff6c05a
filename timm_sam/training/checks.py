"""Checks of the options against each other and the machine, before anything is built or written."""
import argparse
import math
import os
import re
from collections.abc import Collection
from typing import Any

from PIL import Image, ImageMode

from ..cli.errors import OptionError, one_line, shown
from ..cli.models import channels
from ..cli.ranges import in_order, in_range, weights
from ..cli.rules import (
    INTERPOLATIONS,
    KNOWN,
    LOWER_PRECISIONS,
    Rules,
    amp_takes_float32,
    apply,
    class_map_is_there,
    crop_has_size,
    device_is_there,
    flag,
    integers_are_normalized,
    known,
    per_channel,
    reads_files,
)
from ..cli.tasks import EVALUATORS, is_multilabel, task_rules
from .losses import create_loss, loss_type, mixup_active
from .ranges import RANGES
from .schedule import check_epochs, last_epoch, planned_epochs

# modes in which PIL neither blends images nor knows what is grey
_WITHOUT_COLORS = ("La", "LAB", "P", "PA", "RGBa",
                   *(mode for mode in Image.MODES if ImageMode.getmode(mode).typestr != "|u1"))
_MOST_EPOCHS = 10 ** 9  # of a schedule: cycles that grow come to any number


def check_numbers(args: argparse.Namespace) -> None:
    """Checks the range of each of timm's numbers, as they are given.

    Raises:
        OptionError: With flag, value and remedy.
    """
    apply(args, lambda args: in_range(args, RANGES))


def check_values(args: argparse.Namespace) -> None:
    """Checks timm's options, each by itself and against the others, once they are completed.

    Raises:
        OptionError: With flag, value and remedy.
    """
    apply(args, _choices, _lengths, task_rules, _losses, _conflicts, _filter)
    create_loss(args)
    epochs = _epochs(args)
    check_epochs(args, epochs)
    apply(args, lambda args: _start(args, epochs))


def _epochs(args: argparse.Namespace) -> int:
    """The epochs of the schedule.

    Raises:
        OptionError: There is no such schedule.
    """
    try:
        epochs = planned_epochs(args)
    except (ArithmeticError, TypeError) as e:  # of numbers that are allowed one by one
        raise OptionError(f"--sched {args.sched}: {one_line(e)}; use smaller --epochs, --lr-cycle-mul, "
                          f"--lr-cycle-limit, --warmup-epochs and --cooldown-epochs") from None
    if not 1 <= epochs <= _MOST_EPOCHS:
        raise OptionError(f"--sched {args.sched} has {shown(epochs)} epochs: mend --epochs, --lr-cycle-mul, "
                          f"--lr-cycle-limit, --warmup-epochs or --cooldown-epochs")
    return epochs


def _start(args: argparse.Namespace, epochs: int) -> Rules:
    end = last_epoch(args, epochs)
    yield (args.start_epoch is not None and args.start_epoch >= end,
           f"--start-epoch {args.start_epoch}: there is nothing to train from there on, training ends after {end} "
           f"epochs; lower it, or raise --epochs")


def _filter(args: argparse.Namespace) -> Rules:
    """--sam-filter can be used: how long it takes on the names of the model is seen when that is built."""
    try:
        re.compile(args.sam_filter or "")
        reason = None
    except re.error as e:
        reason = f"is not a regular expression ({e}): mend or quote it"
    except (ArithmeticError, RecursionError, MemoryError) as e:
        reason = f"is too large ({one_line(e)}): write it shorter"
    yield reason is not None, f"--sam-filter {shown(args.sam_filter)} {reason}"


def check_surroundings(args: argparse.Namespace) -> None:
    """Checks that the machine and its files have what the options name.

    Raises:
        OptionError: With flag, value and remedy.
    """
    apply(args, _surroundings)


def _choices(args: argparse.Namespace) -> Rules:
    names: dict[str, Collection[Any]] = {
        **KNOWN,
        "clip_mode": ("norm", "value", "agc"),
        "dist_bn": ("", "broadcast", "reduce"),
        "mixup_mode": ("batch", "pair", "elem", "half"),
        "remode": ("const", "rand", "pixel"),
        "train_crop_mode": (None, "rrc", "rkrc", "rkrr"),
        "train_interpolation": ("", "random", *INTERPOLATIONS),
        "lr_base_scale": ("", "linear", "sqrt"),
        "worker_seeding": ("all", "part"),
        "eval_metric": EVALUATORS[args.task].metric_names,
    }
    if args.amp:
        names["amp_dtype"] = LOWER_PRECISIONS
    yield from known(args, names)


def _lengths(args: argparse.Namespace) -> Rules:
    yield from in_order(args, ("scale", "ratio", "cutmix_minmax"))
    yield (args.lr_noise is not None and len(args.lr_noise) > 2,
           f"--lr-noise {args.lr_noise} must be where it starts, and where it ends")
    yield (args.lr_noise is not None and len(args.lr_noise) == 2 and args.lr_noise[0] >= args.lr_noise[1],
           f"--lr-noise {args.lr_noise} ends before it starts: give the earlier fraction of the schedule first")
    milestones = args.decay_milestones
    yield (args.sched == "multistep" and list(milestones) != sorted(milestones),
           f"--decay-milestones {' '.join(map(str, milestones))} must be in rising order")
    yield from per_channel(args)
    yield from crop_has_size(args)
    yield from integers_are_normalized(args)
    colors = args.aa or args.color_jitter or args.grayscale_prob or args.gaussian_blur_prob
    yield (args.input_img_mode in _WITHOUT_COLORS and bool(colors) and not args.no_aug,
           f"--input-img-mode {args.input_img_mode}: the augmentation of colors does not take such images; add "
           f"--no-aug or --color-jitter 0, or use L or RGB")
    probs, sizes = args.naflex_patch_size_probs or (), args.naflex_patch_sizes or ()
    yield from weights(args, ("train_size_probs", "naflex_patch_size_probs"))
    yield (bool(probs) and len(probs) != len(sizes),
           f"--naflex-patch-size-probs has {len(probs)} values for {len(sizes)} --naflex-patch-sizes: give as many")


def _losses(args: argparse.Namespace) -> Rules:
    """What goes with the loss. The rest is for timm's factory to say."""
    loss, splits = loss_type(args), args.aug_splits
    yield (is_multilabel(args) and args.kd_model_name is not None,
           f"--kd-model-name {args.kd_model_name}: timm has no distillation for --task multilabel; leave one out")
    yield (loss == "jsd" and splits < 2,
           f"--loss jsd compares augmentation splits, got --aug-splits {splits}: add --aug-splits 3")
    yield (loss in ("twoway", "zlpr", "db") and not is_multilabel(args),
           f"--loss {loss} is for several classes at once: add --task multilabel, or choose another loss")
    yield (is_multilabel(args) and loss in ("ce", "jsd"),
           f"--loss {loss} is for one class at a time: leave out --task multilabel, or choose bce, say")
    for dest in ("bce_sum", "bce_target_thresh"):
        value = getattr(args, dest)
        yield (bool(value) and loss != "bce",
               f"{flag(dest)}{'' if value is True else f' {value}'} is for --loss bce, not {loss}: leave it out")
    sums = loss == "asl" and args.asl_reduction == "sum"
    yield (sums and args.sam_m is not None,
           "--asl-reduction sum adds up samples, --sam-m averages over its chunks of them: use batchmean")
    yield (loss in ("twoway", "zlpr") and mixup_active(args),
           f"--loss {loss} needs targets that are 0 or 1: leave out --mixup and --cutmix")
    yield (loss in ("twoway", "zlpr") and args.smoothing > 0,
           f"--loss {loss} needs targets that are 0 or 1: leave out --smoothing {args.smoothing}")


def _conflicts(args: argparse.Namespace) -> Rules:
    mixup, splits = mixup_active(args), args.aug_splits
    yield (bool(args.pretrained_path) and not args.pretrained,
           f"--pretrained-path {args.pretrained_path} is not loaded without --pretrained: add it")
    yield from amp_takes_float32(args)
    yield splits == 1, f"--aug-splits {splits} splits nothing: use 0, or 2 and more"
    yield (mixup and args.mixup_mode == "half" and args.no_prefetcher,
           "--mixup-mode half is the prefetcher's: leave out --no-prefetcher, or choose batch, pair or elem")
    count = channels(args)
    yield (args.save_images and not args.naflex_loader and count not in (1, 3),
           f"--save-images writes JPEG files, which have 1 or 3 channels, not {count}: leave it out")
    yield (args.split_bn and splits < 2 and not args.resplit,
           f"--split-bn needs splits, got --aug-splits {splits}: add --aug-splits 2")
    if args.split_bn and splits < 2:
        yield from _halves(args)
    yield args.split_bn and args.sync_bn, "--split-bn and --sync-bn exclude each other: leave one out"
    yield (mixup and splits > 1,
           f"--aug-splits {splits} and --mixup/--cutmix do not go together: leave one of the two out")
    yield (splits > 1 and args.no_prefetcher,
           f"--aug-splits {splits} are put together by the prefetcher: leave out --no-prefetcher")
    name, batches = _batches(args)
    odd = [batch for batch in batches if batch % 2 == 1]
    yield (mixup and not args.naflex_loader and bool(odd),
           f"{name} {' '.join(map(str, odd))} cannot be mixed in pairs by --mixup/--cutmix: use an even number")
    yield (args.naflex_loader and splits > 1,
           f"--aug-splits {splits} does not work with --naflex-loader: leave one of the two out")
    yield (args.naflex_loader and args.train_img_sizes is not None,
           "--naflex-loader and --train-img-sizes are two ways to vary the image size: leave one out")
    yield (args.naflex_loader and args.use_multi_epochs_loader,
           "--use-multi-epochs-loader does not work with --naflex-loader: leave one of the two out")
    # what is not below --lr-noise-pct is drawn again, for ever if hardly anything is
    yield (args.lr_noise is not None and args.lr_noise_std > 1000 * args.lr_noise_pct,
           f"--lr-noise-std {args.lr_noise_std} hardly ever gives noise below --lr-noise-pct {args.lr_noise_pct}: use "
           f"a smaller one")
    batch = args.validation_batch_size or args.batch_size
    yield (args.tta > 1 and batch % args.tta != 0,
           f"--tta {args.tta} does not divide the {batch} inputs of a validation batch: use a multiple of it for "
           f"--validation-batch-size")
    for dest in ("class_stats", "loss_pos_weight", "loss_class_weight"):
        path = getattr(args, dest)
        yield (path is not None and os.path.exists(path) and not os.path.isfile(path),
               f"{flag(dest)} {path} is no regular file: give the path of one")
    yield (args.resume == "auto" and not args.experiment,
           "--resume auto needs --experiment NAME: the folder whose newest checkpoint is resumed")
    yield (args.torchscript and args.torchcompile is not None,
           "--torchscript and --torchcompile exclude each other: leave one out")
    yield (args.torchscript and args.kd_model_name is not None,
           f"--kd-model-name {args.kd_model_name}: timm's distillation takes no scripted model; leave out "
           f"--torchscript")
    yield args.torchscript and args.sync_bn, "--sync-bn cannot be scripted: leave out --torchscript or --sync-bn"
    yield (bool(args.wandb_resume_id) and not args.resume,
           f"--wandb-resume-id {args.wandb_resume_id} continues a run: add --resume CHECKPOINT")


def _batches(args: argparse.Namespace) -> tuple[str, list[int]]:
    """The sizes of training batches, and the flag that gives them."""
    if args.train_img_sizes is not None and args.train_batch_sizes is not None:
        return "--train-batch-sizes", args.train_batch_sizes
    return "--batch-size", [args.batch_size]


def _halves(args: argparse.Namespace) -> Rules:
    """Without augmentation splits, the layers of --split-bn take the halves of whatever goes through the model."""
    name, batches = _batches(args)
    for batch in batches:
        size = batch // 2 if mixup_active(args) and args.mixup_mode == "half" else batch
        yield (size % 2 == 1,
               f"--split-bn halves each batch, and {name} {batch} gives {size}: use an even number")
        if args.sam_variant is None:
            continue
        chunk = min(args.sam_m or size, size)
        yield (chunk % 2 == 1,
               f"--split-bn halves what shares a perturbation, and --sam-m {args.sam_m} is odd: use an even number")
        for part in {chunk, size % chunk or chunk}:
            first = math.ceil(args.sam_ascent_fraction * part)
            yield (first % 2 == 1,
                   f"--split-bn halves what gives eps, and --sam-ascent-fraction {args.sam_ascent_fraction} takes "
                   f"{first} samples of {part}: use one that gives an even number")


def _surroundings(args: argparse.Namespace) -> Rules:
    """What the machine and its files have to offer."""
    yield from device_is_there(args, args.device_modules)
    if reads_files(args):
        yield not args.data_dir, "--data-dir is missing: give the folder that holds the train and val folders"
        yield (not os.path.exists(args.data_dir or ""),
               f"--data-dir {args.data_dir} does not exist: give the folder that holds the train and val folders")
        yield from class_map_is_there(args)
    for dest in ("resume", "initial_checkpoint", "pretrained_path"):
        path = getattr(args, dest)
        remote = bool(path) and re.match(r"[a-z][a-z0-9+.-]*:", path) is not None  # hf-hub:..., https://...
        auto = dest == "resume" and path == "auto"
        yield (bool(path) and not remote and not auto and not os.path.isfile(path),
               f"{flag(dest)} {path} is not a file: give the path of a checkpoint")
    yield (os.path.exists(args.output) and not os.path.isdir(args.output),
           f"--output {args.output} is a file: name a folder")
    parts = args.experiment.split(os.sep)
    itself = bool(args.experiment) and os.path.normpath(args.experiment) == "."  # also './': the folder of all runs
    yield (os.path.isabs(args.experiment) or ".." in parts or itself,
           f"--experiment {args.experiment} is not a name below --output: leave out '..' and leading slashes")
