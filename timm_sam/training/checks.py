"""Checks of the options against each other and the machine, before anything is built or written."""
import argparse
import math
import os
import re
from collections.abc import Collection
from typing import Any

from ..cli.models import channels
from ..cli.rules import (
    INTERPOLATIONS,
    KNOWN,
    LOWER_PRECISIONS,
    Rules,
    amp_takes_float32,
    apply,
    at_least_one,
    class_map_is_there,
    device_is_there,
    flag,
    known,
    per_channel,
    reads_files,
)
from ..cli.tasks import EVALUATORS, is_multilabel, task_rules
from .losses import create_loss, loss_type, mixup_active
from .schedule import check_epochs, planned_epochs


def check_values(args: argparse.Namespace) -> None:
    """Checks timm's options, each by itself and against the others.

    Raises:
        OptionError: With flag, value and remedy.
    """
    apply(args, _choices, _ranges, _lengths, task_rules, _losses, _conflicts)
    create_loss(args)
    check_epochs(args, planned_epochs(args))


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
        "mixup_mode": ("batch", "pair", "elem"),
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


def _ranges(args: argparse.Namespace) -> Rules:
    yield from at_least_one(args, (
        "batch_size", "validation_batch_size", "train_batches_per_epoch", "epochs", "log_interval", "val_interval",
        "checkpoint_hist", "num_classes", "img_size", "in_chans"))
    for dest in ("workers", "start_epoch", "warmup_epochs", "cooldown_epochs", "recovery_interval"):
        value = getattr(args, dest)
        yield value is not None and value < 0, f"{flag(dest)} {value} must be >= 0"
    for dest in ("drop", "drop_path", "drop_block", "hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"):
        value = getattr(args, dest)
        yield value is not None and not 0 <= value <= 1, f"{flag(dest)} {value} is a probability: use 0 to 1"
    yield not 0 <= args.smoothing < 1, f"--smoothing {args.smoothing} must be >= 0 and < 1"
    for dest in ("lr", "lr_base", "weight_decay"):
        value = getattr(args, dest)
        yield value is not None and not math.isfinite(value), f"{flag(dest)} {value} must be a finite number"
    yield args.decay_epochs <= 0, f"--decay-epochs {args.decay_epochs} must be > 0"
    for dest in ("lr_stable_timescale", "twoway_tp", "twoway_tn", "loss_weight_max"):
        value = getattr(args, dest)
        yield value is not None and not 0 < value < math.inf, f"{flag(dest)} {value} must be a finite number > 0"
    yield not 0 < args.loss_weight_beta < 1, f"--loss-weight-beta {args.loss_weight_beta} must be > 0 and < 1"


def _lengths(args: argparse.Namespace) -> Rules:
    for dest in ("scale", "ratio", "cutmix_minmax"):
        value = getattr(args, dest)
        yield value is not None and len(value) != 2, f"{flag(dest)} {value} must be two numbers, lower and upper"
    yield from per_channel(args)
    count = channels(args)
    yield (count not in (1, 3) and args.input_img_mode is None,
           f"--in-chans {count}: images are read as RGB or L; name what gives {count} channels by "
           f"--input-img-mode, e.g. RGBA for 4")
    probs, sizes = args.naflex_patch_size_probs or (), args.naflex_patch_sizes or ()
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
    yield splits == 1 or splits < 0, f"--aug-splits {splits} splits nothing: use 0, or 2 and more"
    yield (args.split_bn and splits < 2 and not args.resplit,
           f"--split-bn needs splits, got --aug-splits {splits}: add --aug-splits 2")
    yield args.split_bn and args.sync_bn, "--split-bn and --sync-bn exclude each other: leave one out"
    yield (mixup and splits > 1,
           f"--aug-splits {splits} and --mixup/--cutmix do not go together: leave one of the two out")
    yield (splits > 1 and args.no_prefetcher,
           f"--aug-splits {splits} are put together by the prefetcher: leave out --no-prefetcher")
    yield (mixup and not args.naflex_loader and args.batch_size % 2 == 1 and args.train_img_sizes is None,
           f"--batch-size {args.batch_size} cannot be mixed in pairs by --mixup/--cutmix: use an even number")
    yield (args.naflex_loader and splits > 1,
           f"--aug-splits {splits} does not work with --naflex-loader: leave one of the two out")
    yield (args.naflex_loader and args.train_img_sizes is not None,
           "--naflex-loader and --train-img-sizes are two ways to vary the image size: leave one out")
    yield (args.naflex_loader and args.use_multi_epochs_loader,
           "--use-multi-epochs-loader does not work with --naflex-loader: leave one of the two out")
    yield (args.resume == "auto" and not args.experiment,
           "--resume auto needs --experiment NAME: the folder whose newest checkpoint is resumed")
    yield (args.torchscript and args.torchcompile is not None,
           "--torchscript and --torchcompile exclude each other: leave one out")
    yield args.torchscript and args.sync_bn, "--sync-bn cannot be scripted: leave out --torchscript or --sync-bn"
    yield (bool(args.wandb_resume_id) and not args.resume,
           f"--wandb-resume-id {args.wandb_resume_id} continues a run: add --resume CHECKPOINT")


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
    yield os.path.isfile(args.output), f"--output {args.output} is a file: name a folder"
    parts = args.experiment.split(os.sep)
    yield (os.path.isabs(args.experiment) or ".." in parts or args.experiment == ".",
           f"--experiment {args.experiment} is not a name below --output: leave out '..' and leading slashes")
