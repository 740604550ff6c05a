"""The command line of validate.py: timm's flags, suites, attacks, and checks that name flag and remedy."""
import argparse
import glob
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from PIL import Image
from timm.utils import natural_key

from ..cli.errors import OptionError
from ..cli.parser import OptionParser, ParseKwargs, yaml_value
from ..cli.rules import INTERPOLATIONS, Rules, is_device
from .sets.suites import PUBLISHED
from .subject import file_sha256

FORMATS = ("csv", "json", "md")
# what a run's args.yaml says of the model and its images, and validate.py has as flags too
_OF_A_RUN = ("model", "num_classes", "in_chans", "img_size", "input_size", "mean", "std", "interpolation", "crop_pct",
             "gp", "fast_norm", "class_map", "input_img_mode", "model_kwargs", "naflex_loader", "naflex_max_seq_len")


@dataclass(frozen=True)
class Radius:
    """The size of a ball around an image, and how it was written: ``0.25/255``."""

    norm: str
    value: float
    text: str

    def __str__(self) -> str:
        return f"{self.norm} {self.text}"


def build_validate_parser(prog: str = "validate.py") -> OptionParser:
    """The parser of validate.py: timm's flags with timm's defaults, and the groups ``Suites`` and ``Attack``."""
    parser = OptionParser(prog=prog, description="Evaluates image classifiers of timm: on one data set as timm's own "
                                                 "script does, or on suites of data sets and under attack.")
    _add_dataset(parser)
    _add_model(parser)
    _add_input(parser)
    _add_execution(parser)
    _add_results(parser)
    _add_suites(parser)
    _add_attack(parser)
    return parser


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DIR",
                        help="root folder of the data set, used when --data-dir is not given (deprecated)")
    add = parser.add_argument_group("Dataset").add_argument
    add("--data-dir", metavar="DIR", help="root folder of the data set, above the split's folder or the classes")
    add("--dataset", metavar="TYPE/NAME", default="",
        help="source of the data: torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME or wds/NAME; empty for folder or tar")
    add("--split", metavar="NAME", default="validation",
        help="split to evaluate; val, valid, eval and the like match too")
    add("--num-samples", type=int, metavar="N", help="size of the split in samples, for streamed data sets")
    add("--dataset-download", action="store_true", help="let torch/ and tfds/ data sets download what is missing")
    add("--class-map", type=str, metavar="FILE", default="",
        help="class names to indices: a text file with one name per line; for folders whose rank is not their label")
    add("--input-key", type=str, metavar="KEY",
        help="field that holds the image, or file extensions joined by semicolons")
    add("--input-img-mode", type=str, metavar="MODE",
        help="PIL mode of the images; none: RGB for three channels, else L")
    add("--target-key", type=str, metavar="KEY", help="field that holds the label")
    add("--dataset-trust-remote-code", action="store_true",
        help="allow a Hugging Face data set to run its repository's code on this machine")
    add("--real-labels", type=str, metavar="FILE", default="",
        help="JSON list of the reassessed labels of ImageNet's validation images: accuracy by those")
    add("--valid-labels", type=str, metavar="FILE", default="",
        help="text file with the indices of the outputs that count, one per line, in the order of the labels")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Model").add_argument
    add("--model", "-m", metavar="NAME", default="dpn92",
        help="model, or without a checkpoint: all, a wildcard, or a file with one name per line")
    add("--pretrained", action="store_true", help="load timm's weights")
    add("--num-classes", type=int, metavar="N", help="number of outputs; none: the model's own")
    add("--gp", type=str, metavar="POOL",
        help="global pooling: fast, avg, max, avgmax or avgmaxc; none: the model's own")
    add("--checkpoint", nargs="+", type=str, metavar="PATH", default="",
        help="weights: a file, several (evaluated one by one, with mean and standard deviation), or a folder of them; "
             "in suites those of a folder count as one checkpoint each, copies once")
    add("--use-ema", action="store_true",
        help="take the averaged weights of a checkpoint; without any: an error in suites, else the plain ones")
    add("--reparam", action="store_true", help="merge the model's branches, where it can be done")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE",
        help="further arguments of the model's constructor")


def _add_input(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Input").add_argument
    add("--img-size", type=int, metavar="N", help="height and width of the images; none: the model's own")
    add("--in-chans", type=int, metavar="N", help="channels of the images; none: 3")
    add("--input-size", nargs=3, type=int, metavar="N", help="channels, height and width of the images")
    add("--use-train-size", action="store_true", help="take the size of training where the model has another for tests")
    add("--crop-pct", type=float, metavar="SHARE", help="share of the image that the centre crop keeps")
    add("--crop-mode", type=str, metavar="MODE", help="squash, border or center; none: the model's own")
    add("--crop-border-pixels", type=int, metavar="N", help="pixels to cut from each side before resizing")
    add("--mean", type=float, nargs="+", metavar="MEAN", help="mean that is subtracted, per channel or for all")
    add("--std", type=float, nargs="+", metavar="STD", help="standard deviation to divide by, per channel or for all")
    add("--interpolation", type=str, metavar="NAME", default="", help="of resizing; empty: the model's own")
    add("--tf-preprocessing", action="store_true", help="TensorFlow's preprocessing (needs tensorflow)")
    add("--test-pool", action="store_true", help="pool over larger images than those of training, where it can be done")
    add("--naflex-loader", action="store_true", help="keep the aspect ratio (needs a NaFlex model)")
    add("--naflex-max-seq-len", type=int, default=576, metavar="N",
        help="patches per image at most, for --naflex-loader")


def _add_execution(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Execution")
    add = group.add_argument
    add("-j", "--workers", type=int, default=4, metavar="N", help="processes that load images")
    add("-b", "--batch-size", type=int, default=256, metavar="N", help="images per batch and process")
    add("--log-freq", type=int, default=10, metavar="N", help="batches between two log lines")
    add("--num-gpu", type=int, default=1, metavar="N", help="devices that share each batch (DataParallel)")
    add("--no-prefetcher", action="store_true", help="normalize on the CPU")
    add("--pin-mem", action="store_true", help="pin the memory of the batches")
    add("--channels-last", action="store_true", help="channels-last memory layout")
    add("--device", type=str, default="cuda", help="device: cuda, cuda:1, cpu, mps, ...")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", type=str, default="float16", metavar="TYPE",
        help="lower precision of --amp: float16 or bfloat16")
    add("--model-dtype", type=str, metavar="TYPE", help="type of the weights, without --amp; none: float32")
    add("--fuser", type=str, default="", metavar="NAME", help="fuser of torchscript: te, old or nvfuser")
    add("--fast-norm", action="store_true", help="normalization layers in low precision under --amp")
    add("--retry", action="store_true", help="with too large a batch try smaller ones")
    add("--seed", type=int, default=42, metavar="S", help="of all random choices: subsets and the starts of attacks")
    add("--torchcompile-mode", type=str, metavar="MODE", help="mode of torch.compile")
    one_of = parser.add_mutually_exclusive_group()
    one_of.add_argument("--torchscript", action="store_true", help="script the model")
    one_of.add_argument("--torchcompile", nargs="?", type=str, const="inductor", metavar="BACKEND",
                        help="compile the model, with inductor unless another backend is named")
    one_of.add_argument("--aot-autograd", action="store_true", help="fuse the model by AOT autograd")


def _add_results(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Results").add_argument
    add("--results-file", type=str, metavar="FILE", default="",
        help="file for the results; of suites by its extension: .json, .csv, .md, or all three without one")
    add("--results-format", type=str, default="csv", metavar="FORMAT",
        help=f"what is written to --results-file: {', '.join(FORMATS)} (md for suites only)")
    add("--metrics-avg", choices=("micro", "macro", "weighted"), type=str,
        help="also precision, recall and F1 score, averaged over classes in this way (needs scikit-learn)")
    add("--overwrite", action="store_true", help="replace the results of an earlier evaluation")


def _add_suites(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Suites").add_argument
    add("--eval", nargs="+", default=[], metavar="NAME=DIR",
        help=f"data sets: {', '.join(PUBLISHED)} in their label spaces; any other name: class folders of training")
    add("--eval-root", metavar="DIR",
        help="folder with published data sets under their own names: all that are found")
    add("--allow-partial", action="store_true",
        help="evaluate sets that lack classes, and mark them, instead of failing")
    add("--skip-existing", action="store_true",
        help="go on with what --results-file has of an evaluation that was interrupted, or had fewer sets")


def _add_attack(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Attack").add_argument
    add("--attack", nargs="+", default=[], metavar="NORM=RADIUS,...", type=_radii,
        help="robust accuracy under APGD-CE and APGD-T: l2=0.25,0.5 linf=0.25/255,0.5/255 (images in [0, 1])")
    add("--attack-set", metavar="NAME", help="data set that is attacked; none: the first in-distribution set")
    add("--attack-num-samples", type=int, metavar="N",
        help="images that are attacked, class-balanced; none: all, at most 5000")
    add("--attack-steps", type=int, default=100, metavar="N", help="iterations of each attack")
    add("--attack-targets", type=int, default=9, metavar="N", help="target classes of APGD-T")


def _radii(text: str) -> list[Radius]:
    norm, _, values = text.partition("=")
    if norm not in ("l2", "linf") or not values:
        raise argparse.ArgumentTypeError(f"must be l2=RADIUS,... or linf=RADIUS,..., got {text!r}")
    radii = []
    for value in values.split(","):
        try:
            numbers = [float(part) for part in value.split("/")]
            radius = numbers[0] / numbers[1] if len(numbers) == 2 else numbers[0]
        except (ValueError, ZeroDivisionError):
            numbers, radius = [], math.nan
        if len(numbers) > 2 or not (math.isfinite(radius) and radius > 0):
            raise argparse.ArgumentTypeError(f"radius {value!r} of {text!r} is not a number > 0 such as 0.5 or 0.5/255")
        radii.append(Radius(norm, radius, value))
    return radii


def parse_validate_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses and checks a command line.

    ``checkpoint`` becomes a list of files (``left_out``: what was in folders beside them), ``eval`` a list of pairs
    (name, folder), ``attack`` a list of radii; ``suites`` says whether anything is asked that timm's script does not
    do. What the command line does not say of the model and its images is taken from the ``args.yaml`` beside the
    checkpoints, if ``--model`` is not given.

    Raises:
        SystemExit: With code 2, after one line on stderr, for anything wrong with the values.
    """
    # only what was given says that a default may be replaced
    given = parser.parse_args(argv, argparse.Namespace(**{a.dest: None for a in parser._actions if a.dest != "help"}))
    args = parser.parse_args(argv)
    args.format_given = given.results_format is not None
    try:
        args.eval = [_named_folder(text) for text in args.eval]
        args.attack = list(dict.fromkeys(radius for radii in args.attack for radius in radii))
        _release_data(args)
        args.data_dir = args.data or args.data_dir
        args.suites = bool(args.eval or args.eval_root or args.attack) or len(args.checkpoint) > 1
        args.folder_of_checkpoints = len(args.checkpoint) == 1 and os.path.isdir(args.checkpoint[0])
        args.checkpoint, args.left_out = _checkpoint_files([path for path in args.checkpoint or () if path],
                                                           args.suites)
        if given.model is None and args.checkpoint:
            _take_from_run(parser, args, given)
        _check(args)
    except OptionError as e:
        parser.error(str(e))
    return args


def _named_folder(text: str) -> tuple[str, str]:
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise OptionError(f"--eval {text}: write NAME=DIR, such as imagenet-r=/data/imagenet-r")
    return name, folder


def _release_data(args: argparse.Namespace) -> None:
    """``--checkpoint FILE DIR`` is timm's way to name the data after the checkpoint, not two checkpoints."""
    last = args.checkpoint[-1] if len(args.checkpoint) > 1 else ""
    if not args.data and not args.data_dir and not args.eval and os.path.isdir(last) and not _in_folder(last):
        args.data = args.checkpoint.pop()


def _in_folder(path: str) -> list[str]:
    """The checkpoints in a folder: timm's script takes these two endings."""
    return [file for ending in ("*.pth.tar", "*.pth") for file in glob.glob(os.path.join(glob.escape(path), ending))]


def _checkpoint_files(paths: Sequence[str], distinct: bool) -> tuple[list[str], list[str]]:
    """The files that paths of files and folders stand for, and those left out of folders.

    With ``distinct`` these are the files that a training has not finished, and copies of a file before them: last,
    best and a numbered checkpoint are often the same weights, which must count once.
    """
    kept: list[str] = []
    left_out: list[str] = []
    seen: dict[str, str] = {}
    for path in paths:
        if not os.path.isdir(path):
            kept.append(path)
            continue
        files = sorted(_in_folder(path), key=natural_key)
        unfinished = [f for f in files if distinct and os.path.basename(f).startswith(("tmp", "recovery"))]
        files = [f for f in files if f not in unfinished]
        if not files:
            raise OptionError(f"--checkpoint {path} holds no *.pth.tar and no *.pth; give the file")
        left_out += unfinished
        for file in files:
            first = seen.setdefault(file_sha256(file), file) if distinct else file
            (kept if first == file else left_out).append(file)
    return kept, left_out


def _take_from_run(parser: argparse.ArgumentParser, args: argparse.Namespace, given: argparse.Namespace) -> None:
    """Completes the options by what the runs that wrote the checkpoints were started with.

    Raises:
        OptionError: An ``args.yaml`` cannot be read, or two of them differ in what the command line does not say.
    """
    paths = [os.path.join(os.path.dirname(checkpoint), "args.yaml") for checkpoint in args.checkpoint]
    paths = [path for path in dict.fromkeys(paths) if os.path.isfile(path)]
    if not paths:
        return
    actions = {action.dest: action for action in parser._actions}
    path, *others = paths
    values = _of_run(actions, path)
    for other in others:
        theirs = _of_run(actions, other)
        for key in (*_OF_A_RUN, "bn_eps"):
            default = actions[key].default if key in actions else None
            mine, its = values.get(key, default), theirs.get(key, default)
            if mine != its and getattr(given, key, None) is None:
                remedy = f"evaluate them one by one, or give --{key.replace('_', '-')}" if key in actions else (
                    "evaluate them one by one")
                raise OptionError(f"--checkpoint: {key} is {mine!r} in {path}, and {its!r} in {other}; {remedy}")
    if given.img_size is not None and "input_size" in values:
        # timm would prefer it to the size that the command line asks for
        values.setdefault("in_chans", values.pop("input_size")[0])
    bn_eps = values.pop("bn_eps", None)
    for key, value in values.items():
        if getattr(given, key) is None:
            setattr(args, key, value)
    if bn_eps is not None:
        args.model_kwargs = {"bn_eps": bn_eps, **args.model_kwargs}
    args.taken_from = path


def _of_run(actions: dict[str, argparse.Action], path: str) -> dict[str, Any]:
    """What an ``args.yaml`` says of the model and its images."""
    try:
        with open(path, encoding="utf-8") as f:
            run = yaml.safe_load(f)
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        run = None
    if not isinstance(run, dict):
        raise OptionError(f"--model is not given, and {path} cannot be read; name the model of the checkpoint")
    values = {key: yaml_value(path, actions[key], run[key]) for key in _OF_A_RUN if run.get(key) is not None}
    if isinstance(run.get("bn_eps"), float):  # a flag of train.py only, but part of what the model computes
        values["bn_eps"] = run["bn_eps"]
    return values


def _check(args: argparse.Namespace) -> None:
    for rules in (_files, _values, _conflicts, _suite_rules):
        for broken, message in rules(args):
            if broken:
                raise OptionError(message)


def _files(args: argparse.Namespace) -> Rules:
    for path in args.checkpoint:
        yield not os.path.isfile(path), f"--checkpoint {path} is not a file: give the path of a checkpoint"
    for dest in ("real_labels", "valid_labels"):
        path = getattr(args, dest)
        yield bool(path) and not os.path.isfile(path), f"--{dest.replace('_', '-')} {path} is not a file: give its path"
    folder = not args.dataset or args.dataset.split("/")[0].lower() in ("folder", "tar")
    yield (folder and not args.data_dir and not args.suites,
           "--data-dir is missing: give the folder of the data set, or data sets by --eval NAME=DIR")
    yield (folder and bool(args.data_dir) and not os.path.exists(args.data_dir or ""),
           f"--data-dir {args.data_dir} does not exist: give the folder of the data set")
    found = [os.path.exists(path) for path in (args.class_map, os.path.join(args.data_dir or "", args.class_map))]
    yield (bool(args.class_map) and not any(found),
           f"--class-map {args.class_map} does not exist: give a text file, relative to --data-dir or absolute")


def _values(args: argparse.Namespace) -> Rules:
    for dest in ("batch_size", "log_freq", "num_gpu", "num_samples", "num_classes", "img_size", "in_chans",
                 "attack_num_samples", "attack_steps", "attack_targets", "naflex_max_seq_len"):
        value = getattr(args, dest)
        yield value is not None and value < 1, f"--{dest.replace('_', '-')} {value} must be >= 1"
    size = args.input_size
    yield size is not None and min(size) < 1, f"--input-size {size}: channels, height and width must be >= 1"
    yield (args.crop_pct is not None and not 0 < args.crop_pct < math.inf,
           f"--crop-pct {args.crop_pct} must be > 0: 1 keeps the whole image, 0.875 cuts its border")
    border = args.crop_border_pixels
    yield border is not None and border < 0, f"--crop-border-pixels {border} must be >= 0"
    yield args.workers < 0, f"--workers {args.workers} must be >= 0"
    yield not 0 <= args.seed < 2 ** 63, f"--seed {args.seed} must be >= 0 and < 2^63"
    names = {
        "model_dtype": (None, "float32", "float16", "bfloat16"),
        "amp_dtype": ("float16", "bfloat16"),
        "crop_mode": (None, "squash", "border", "center"),
        "interpolation": ("", *INTERPOLATIONS),
        "input_img_mode": (None, *Image.MODES),
        "fuser": ("", "te", "old", "nvfuser"),
        "results_format": FORMATS,
    }
    if args.torchcompile is not None:
        names["torchcompile"] = tuple(torch.compiler.list_backends(exclude_tags=()))
    if args.torchcompile == "inductor":
        names["torchcompile_mode"] = (None, *torch._inductor.list_mode_options())
    for dest, allowed in names.items():
        value = getattr(args, dest)
        shown = ", ".join(str(a) for a in allowed if a)
        yield value not in allowed, f"--{dest.replace('_', '-')} {value} is unknown: use one of {shown}"
    channels = args.in_chans or (args.input_size[0] if args.input_size else 3)
    for dest in ("mean", "std"):
        value = getattr(args, dest)
        yield (value is not None and len(value) not in (1, channels),
               f"--{dest} {value} must be one number, or {channels} for {channels} channels")
        yield (value is not None and not all(math.isfinite(v) and (v > 0 or dest == "mean") for v in value),
               f"--{dest} {value} must be finite{'' if dest == 'mean' else ' and > 0'}")
    yield not is_device(args.device), f"--device {args.device} is no device of torch: use cuda, cuda:1, cpu, mps, ..."
    yield (args.device.split(":")[0] == "cuda" and not torch.cuda.is_available(),
           f"--device {args.device}: torch finds no CUDA device here; add --device cpu, or install a driver")


def _conflicts(args: argparse.Namespace) -> Rules:
    yield (args.metrics_avg is not None and importlib.util.find_spec("sklearn") is None,
           f"--metrics-avg {args.metrics_avg} needs scikit-learn: pip install scikit-learn, or leave it out")
    yield (args.amp and args.model_dtype in ("float16", "bfloat16"),
           f"--amp needs float32 weights, got --model-dtype {args.model_dtype}: leave one of the two out")
    yield args.num_gpu > 1 and "WORLD_SIZE" in os.environ, \
        f"--num-gpu {args.num_gpu} and torchrun are two ways to share the work: leave --num-gpu out"
    exists = not args.suites and bool(args.results_file) and os.path.exists(args.results_file)
    yield (exists and not args.overwrite,
           f"--results-file {args.results_file} exists: add --overwrite to replace it, or name another file")
    folder = os.path.dirname(os.path.abspath(args.results_file))
    yield (bool(args.results_file) and not os.path.isdir(folder),
           f"--results-file {args.results_file}: there is no folder {folder}; make it, or name another file")
    yield os.path.isdir(args.results_file), f"--results-file {args.results_file} is a folder: name a file in it"


def _suite_rules(args: argparse.Namespace) -> Rules:
    """What belongs to suites only, and what suites do not have."""
    if not args.suites:
        only = {"allow_partial": False, "skip_existing": False, "attack_set": None, "attack_num_samples": None}
        for dest, default in only.items():
            flag, value = "--" + dest.replace("_", "-"), getattr(args, dest)
            yield value != default, f"{flag} has no effect without --eval or --attack: add one, or leave it out"
        yield args.results_format == "md", "--results-format md is for suites: use csv or json, or add --eval NAME=DIR"
        return
    yield (not (args.eval or args.eval_root or args.data_dir),
           "no data set: give --eval NAME=DIR, --eval-root DIR or --data-dir DIR")
    names = [name for name, _ in args.eval]
    twice = {name for name in names if names.count(name) > 1}
    yield bool(twice), f"--eval names {', '.join(sorted(twice))} twice: give each data set a name of its own"
    paths = [os.path.normpath(path) for path in args.checkpoint]
    twice = {path for path in paths if paths.count(path) > 1}
    yield bool(twice), f"--checkpoint {', '.join(sorted(twice))} is given twice: leave one out"
    yield (args.eval_root is not None and not os.path.isdir(args.eval_root),
           f"--eval-root {args.eval_root} is not a folder: give the folder that holds the data sets")
    for dest in ("dataset", "dataset_download", "dataset_trust_remote_code", "num_samples", "input_key", "target_key",
                 "real_labels", "valid_labels", "metrics_avg", "tf_preprocessing", "retry"):
        value, flag = getattr(args, dest), "--" + dest.replace("_", "-")
        yield (bool(value),
               f"{flag} is for a single data set: leave it out with --eval, --attack or several checkpoints")
    yield args.skip_existing and not args.results_file, "--skip-existing needs --results-file: what is done is there"
    yield args.skip_existing and args.overwrite, "--skip-existing keeps what --overwrite removes: leave one out"
    extension = os.path.splitext(args.results_file)[1][1:]
    yield (bool(extension) and not args.format_given and extension not in FORMATS,
           f"--results-file {args.results_file}: unknown kind .{extension}; use .json, .csv or .md, none for all "
           f"three, or add --results-format")
    if not args.attack:
        for dest, default in {"set": None, "num_samples": None, "steps": 100, "targets": 9}.items():
            yield (getattr(args, f"attack_{dest}") != default,
                   f"--attack-{dest.replace('_', '-')} has no effect without --attack: add --attack l2=0.5, or leave "
                   f"it out")
        return
    yield args.naflex_loader, "--attack needs images of one size: leave out --naflex-loader"
    yield (args.amp or args.model_dtype in ("float16", "bfloat16"),
           "--attack works in float32 only: leave out --amp and --model-dtype")
    yield (args.torchscript or args.aot_autograd,
           "--attack differentiates by the images, which scripted and fused models may not allow: leave out "
           "--torchscript and --aot-autograd")
