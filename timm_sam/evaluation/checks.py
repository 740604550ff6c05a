"""Checks of an evaluation's options against each other and the machine, before anything is built or written."""
import argparse
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from ..cli import ranges, rules
from ..cli.rules import LOWER_PRECISIONS, Rules, flag
from ..cli.tasks import is_multilabel, task_rules
from ..cli.text import why_not_writable
from .attack.robustness import STANDARD
from .attack.standard import PACKAGE, is_installed
from .sets.suites import REAL
from .tables import FORMATS

Default = Callable[[str], Any]  # dest -> the flag's default


def files(args: argparse.Namespace, suites: bool) -> Rules:
    """Files and folders that options name are there."""
    for path in args.checkpoint:
        yield not os.path.isfile(path), f"--checkpoint {path} is not a file: give the path of a checkpoint"
    for dest in ("real_labels", "valid_labels"):
        path = getattr(args, dest)
        yield bool(path) and not os.path.isfile(path), f"{flag(dest)} {path} is not a file: give its path"
    folder = rules.reads_files(args)
    yield (folder and not args.data_dir and not suites,
           "--data-dir is missing: give the folder of the data set, or data sets by --eval NAME=DIR")
    yield (folder and bool(args.data_dir) and not os.path.exists(args.data_dir or ""),
           f"--data-dir {args.data_dir} does not exist: give the folder of the data set")
    yield from rules.class_map_is_there(args)


RANGES = {
    "multilabel_threshold": ranges.BETWEEN,
    "num_samples": ranges.COUNT,
    "num_classes": ranges.COUNT,
    "img_size": ranges.PIXELS,
    "in_chans": ranges.COUNT,
    "input_size": ranges.PIXELS,
    "crop_pct": ranges.POSITIVE,
    "crop_border_pixels": ranges.NOT_NEGATIVE,
    "mean": ranges.ANY,
    "std": ranges.POSITIVE,
    "naflex_max_seq_len": ranges.COUNT,
    "workers": ranges.WORKERS,
    "batch_size": ranges.COUNT,
    "log_freq": ranges.COUNT,
    "num_gpu": ranges.Range(1, 1024),
    "seed": ranges.SEED,
    "quantize_weights": ranges.Range(2, 16),
    "attack_num_samples": ranges.COUNT,
    "attack_steps": ranges.COUNT,
    "attack_targets": ranges.COUNT,
}


def values(args: argparse.Namespace) -> Rules:
    """Each option for itself, and the device."""
    yield from ranges.in_range(args, RANGES)
    yield from rules.known(args, {
        **rules.KNOWN,
        "amp_dtype": LOWER_PRECISIONS,
        "crop_mode": (None, "squash", "border", "center"),
        "results_format": FORMATS,
    })
    yield from rules.per_channel(args)
    yield from rules.crop_has_size(args)
    yield from rules.integers_are_normalized(args)
    yield from rules.device_is_there(args)
    there, device = torch.cuda.device_count(), torch.device(args.device)
    # where there is none, DataParallel does nothing
    yield (args.num_gpu > 1 and 0 < there < args.num_gpu,
           f"--num-gpu {args.num_gpu}: there are {there} CUDA devices here; use as many or fewer")
    yield (args.num_gpu > 1 and there > 0 and (device.type, device.index or 0) != ("cuda", 0),
           f"--num-gpu {args.num_gpu}: batches are shared by the first CUDA devices, not by --device {args.device}; "
           f"use --device cuda, or leave --num-gpu out")


def conflicts(args: argparse.Namespace, suites: bool) -> Rules:
    """Options that exclude each other, what is not installed, and results that would be replaced."""
    yield (args.metrics_avg is not None and importlib.util.find_spec("sklearn") is None,
           f"--metrics-avg {args.metrics_avg} needs scikit-learn: pip install scikit-learn, or leave it out")
    yield (args.tf_preprocessing and importlib.util.find_spec("tensorflow") is None,
           "--tf-preprocessing needs tensorflow: install it, or leave --tf-preprocessing out")
    yield from rules.amp_takes_float32(args)
    yield args.num_gpu > 1 and "WORLD_SIZE" in os.environ, \
        f"--num-gpu {args.num_gpu} and torchrun are two ways to share the work: leave --num-gpu out"
    yield os.path.isdir(args.results_file), f"--results-file {args.results_file} is a folder: name a file in it"
    reason = why_not_writable(args.results_file) if args.results_file else None
    yield reason is not None, f"--results-file {args.results_file}: {reason}; make room for it, or name another file"
    exists = not suites and bool(args.results_file) and os.path.exists(args.results_file)
    yield (exists and not args.overwrite,
           f"--results-file {args.results_file} exists: add --overwrite to replace it, or name another file")


def of_one_set(args: argparse.Namespace, default: Default) -> Rules:
    """What belongs to suites only is not asked for, and targets are what is asked of them."""
    yield from task_rules(args)
    for dest in ("real_labels", "valid_labels"):
        yield (is_multilabel(args) and bool(getattr(args, dest)),
               f"{flag(dest)} is for one class per image: leave it out with --task multilabel")
    for dest in ("calibration", "quantize_weights", "save_outputs", "allow_partial", "skip_existing", "attack_version",
                 "attack_set", "attack_num_samples"):
        yield (getattr(args, dest) != default(dest),
               f"{flag(dest)} has no effect without --eval or --attack: add one, or leave it out")
    yield args.results_format == "md", "--results-format md is for suites: use csv or json, or add --eval NAME=DIR"


def of_suites(args: argparse.Namespace, default: Default, format_given: bool) -> Rules:
    """What suites need, and what they do not have."""
    yield (not (args.eval or args.eval_root or args.data_dir),
           "no data set: give --eval NAME=DIR, --eval-root DIR or --data-dir DIR")
    yield (is_multilabel(args),
           "--task multilabel is for a single data set: leave out --eval, --attack and other checkpoints, or give "
           "--task classification")
    names = [name for name, _ in args.eval]
    yield (bool(args.real_labels) and REAL not in names,
           f"--real-labels {args.real_labels} is for --data-dir, or for --eval {REAL}=DIR: leave it out")
    yield (REAL in names and not args.real_labels,
           f"--eval {REAL}=... needs the labels: add --real-labels real.json")
    twice = {name for name in names if names.count(name) > 1}
    yield bool(twice), f"--eval names {', '.join(sorted(twice))} twice: give each data set a name of its own"
    yield (args.eval_root is not None and not os.path.isdir(args.eval_root),
           f"--eval-root {args.eval_root} is not a folder: give the folder that holds the data sets")
    for dest in ("dataset", "dataset_download", "dataset_trust_remote_code", "num_samples", "input_key", "target_key",
                 "target_format", "valid_labels", "metrics_avg", "tf_preprocessing", "retry"):
        yield (bool(getattr(args, dest)),
               f"{flag(dest)} is for a single data set: leave it out with --eval, --attack or several checkpoints")
    yield args.skip_existing and not args.results_file, "--skip-existing needs --results-file: what is done is there"
    bits = args.quantize_weights or ()
    yield len(set(bits)) < len(bits), f"--quantize-weights {' '.join(map(str, bits))}: name each number once"
    yield (bool(bits) and (args.torchscript or args.aot_autograd),
           "--quantize-weights rounds the weights of layers, which scripted and fused models do not show: leave out "
           "--torchscript and --aot-autograd")
    yield (args.save_outputs is not None and not args.results_file,
           f"--save-outputs {args.save_outputs} needs --results-file: outputs are kept beside it")
    yield args.skip_existing and args.overwrite, "--skip-existing keeps what --overwrite removes: leave one out"
    extension = os.path.splitext(args.results_file)[1][1:]
    yield (bool(extension) and not format_given and extension not in FORMATS,
           f"--results-file {args.results_file}: unknown kind .{extension}; use .json, .csv or .md, none for all "
           f"three, or add --results-format")
    if not args.attack:
        for dest in ("attack_version", "attack_set", "attack_num_samples", "attack_steps", "attack_targets"):
            yield (getattr(args, dest) != default(dest),
                   f"{flag(dest)} has no effect without --attack: add --attack l2=0.5, or leave it out")
        return
    if args.attack_version == STANDARD:
        yield (not is_installed(), f"--attack-version standard needs {PACKAGE}: pip install {PACKAGE}, or leave it out")
        for dest in ("attack_steps", "attack_targets"):
            yield (getattr(args, dest) != default(dest),
                   f"{flag(dest)} is of our own attacks, --attack-version standard has its own: leave one out")
    yield args.naflex_loader, "--attack needs images of one size: leave out --naflex-loader"
    yield (args.amp or args.model_dtype in LOWER_PRECISIONS,
           "--attack works in float32 only: leave out --amp and --model-dtype")
    yield (args.torchscript or args.aot_autograd,
           "--attack differentiates by the images, which scripted and fused models may not allow: leave out "
           "--torchscript and --aot-autograd")
