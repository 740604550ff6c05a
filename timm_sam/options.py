"""The command line of train.py: timm's flags, the SAM group, YAML defaults, and checks that name flag and remedy."""
import argparse
import difflib
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from timm.utils import ParseKwargs

from .flags import add_train_flags
from .perturbation import VARIANTS
from .sam import BN_STATS
from .selection import SELECTIONS

_UNSET = object()


class OptionError(ValueError):
    """A mistake that the user can mend: one line with flag, value and remedy. The scripts exit with code 2."""


class OptionParser(argparse.ArgumentParser):
    """Reports an error as one line, without the usage of 180 flags around it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> Any:
        report(self.prog, message)
        raise SystemExit(2)


def report(prog: str, message: object) -> None:
    """Prints the one line of an error, once per machine: every rank finds the same mistake."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{prog}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)  # the launcher stops all ranks when one is gone: leave rank 0 the time to speak


def build_train_parser(prog: str = "train.py") -> OptionParser:
    """The parser of train.py: timm's flags with timm's defaults, ``-c`` and the group ``SAM``."""
    parser = OptionParser(prog=prog, description="Trains an image classifier of timm, with SAM or SAM-ON if asked to.")
    parser.add_argument("-c", "--config", metavar="FILE", default="",
                        help="YAML file of defaults; its keys are the names of the flags, with underscores")
    add_train_flags(parser)
    add_sam_flags(parser)
    return parser


def add_sam_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the group ``SAM``. Without ``--sam-variant`` training is timm's own."""
    add = parser.add_argument_group("SAM").add_argument
    add("--sam-variant", choices=tuple(VARIANTS), default=None,
        help="perturbation of Table 9 of the SAM-ON paper; none: plain training")
    add("--sam-rho", type=_non_negative, default=None, metavar="RHO",
        help="radius of the perturbation; required with --sam-variant")
    add("--sam-params", choices=SELECTIONS, default="onlynorm",
        help="what is perturbed: the normalization layers (SAM-ON), all parameters (SAM), or all but those")
    add("--sam-filter", default=None, metavar="REGEX",
        help="perturb only parameters in whose name this is found, such as 'layer4'")
    add("--sam-eta", type=_non_negative, default=None, metavar="ETA",
        help="eta of Table 9; none: the variant's own (elementwise_l2_orig 0.01, fisher 1, other elementwise 0)")
    add("--sam-bn-stats", choices=BN_STATS, default="clean",
        help="which passes update running statistics: the one at w only, or both")
    add("--sam-ascent-fraction", type=_fraction, default=1.0, metavar="F",
        help="take the gradient that gives eps from the first F of each batch only")
    add("--sam-no-shared-forward", action="store_true",
        help="compute both forward passes in full, also below the first perturbed layer")
    add("--sam-every", type=_positive_int, default=1, metavar="K",
        help="perturb every K-th update, starting with the first; the others are plain")
    add("--sam-start-epoch", type=_epoch, default=0, metavar="N", help="first epoch with SAM")
    add("--sam-end-epoch", type=_epoch, default=None, metavar="N", help="first epoch without SAM again; none: never")


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line over the YAML file that ``-c`` names over the flags' defaults.

    Raises:
        SystemExit: With code 2, after one line on stderr, for anything wrong with the values.
    """
    early = OptionParser(prog=parser.prog, add_help=False)
    early.add_argument("-c", "--config", default="")
    try:
        config = early.parse_known_args(argv)[0].config if not _asks_for_help(argv) else ""
        if config:
            parser.set_defaults(**load_yaml(config, parser))
        # what the command line leaves out keeps the mark, so that a flag given with its default value is noticed too
        sam_dests = [a.dest for a in parser._actions if a.dest.startswith("sam_")]
        args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(sam_dests, _UNSET)))
        given = [dest for dest in sam_dests if getattr(args, dest) is not _UNSET]
        for dest in sam_dests:
            if dest not in given:
                setattr(args, dest, parser.get_default(dest))
        check_sam(args, given)
        check_train(args)
    except OptionError as e:
        parser.error(str(e))
    return args


def _asks_for_help(argv: Sequence[str] | None) -> bool:
    return any(a in ("-h", "--help") for a in (sys.argv[1:] if argv is None else argv))


def load_yaml(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Reads a YAML file of defaults: ``{dest: value}``, values converted as on the command line.

    Raises:
        OptionError: The file cannot be read, is not a mapping, has a key that is no flag, or a value of a wrong type.
    """
    try:
        with open(path, encoding="utf-8") as f:
            config = yaml.safe_load(f)
    except OSError as e:
        raise OptionError(f"--config {path}: {e.strerror or e}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise OptionError(f"--config {path}: not a YAML file: {e}") from None
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise OptionError(f"--config {path}: holds a {type(config).__name__}; write 'flag_name: value' lines")
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    for key in config:
        if key not in actions:
            close = difflib.get_close_matches(str(key).replace("-", "_"), actions, 1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it, or see --help for the flags"
            raise OptionError(f"--config {path}: unknown key {key!r}; {hint}")
    return {key: _yaml_value(path, actions[key], value) for key, value in config.items()}


def _yaml_value(path: str, action: argparse.Action, value: Any) -> Any:
    def wrong(expected: str) -> OptionError:
        return OptionError(f"--config {path}: {action.dest}: {value!r} is not {expected}")

    if value is None:
        return None
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict):
            raise wrong("a mapping of keyword arguments")
        return value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    if many != isinstance(value, (list, tuple)):
        raise wrong("a list" if many else "a single value")
    values = list(value) if many else [value]
    if isinstance(action.nargs, int) and len(values) != action.nargs:
        raise wrong(f"a list of {action.nargs} values")
    convert: Any = action.type or str
    out = []
    for v in values:
        text_ok = convert is str and isinstance(v, (str, int, float)) and not isinstance(v, bool)
        if convert is not str and (isinstance(v, bool) or not isinstance(v, (int, float, str))) or \
                convert is str and not text_ok or convert is int and isinstance(v, float):
            raise wrong(f"of type {_type_name(convert)}")
        try:
            out.append(convert(v))  # YAML 1.1 reads 1e-3 as a string; converting makes it the number it looks like
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            raise wrong(f"of type {_type_name(convert)}") from None
        if action.choices is not None and out[-1] not in action.choices:
            raise wrong(f"one of {', '.join(map(str, action.choices))}")
    return out if many else out[0]


def _type_name(convert: Any) -> str:
    names = {_fraction: "number in (0, 1]", _non_negative: "number >= 0", _positive_int: "integer >= 1",
             _epoch: "integer >= 0", str: "text"}
    return names.get(convert, convert.__name__)


def dump_args(args: argparse.Namespace) -> str:
    """The options as YAML, such that ``-c`` reads them back."""
    kept = {key: value for key, value in vars(args).items() if key != "config"}
    return yaml.safe_dump(kept, default_flow_style=False)


def _number(text: str, convert: Any, at_least: float, expected: str) -> Any:
    try:
        value = convert(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= at_least):
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")
    return value


def _non_negative(text: str) -> float:
    return _number(text, float, 0, "a finite number >= 0")


def _positive_int(text: str) -> int:
    return _number(text, int, 1, "an integer >= 1")


def _fraction(text: str) -> float:
    value = _number(text, float, 0, "a number in (0, 1]")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], got {text}")
    return value


def _epoch(text: str) -> int:
    return _number(text, int, 0, "an integer >= 0")


def check_sam(args: argparse.Namespace, given: Sequence[str] = ()) -> None:
    """Checks the SAM group.

    Args:
        args: All options.
        given: Names of the SAM options that stand on the command line, whatever their value.

    Raises:
        OptionError: Options that contradict each other.
    """
    if args.sam_variant is None:
        neutral = {"sam_params": "onlynorm", "sam_bn_stats": "clean", "sam_ascent_fraction": 1.0,
                   "sam_no_shared_forward": False, "sam_every": 1, "sam_start_epoch": 0}
        for dest, value in vars(args).items():
            if dest.startswith("sam_") and (dest in given or value != neutral.get(dest)):
                raise OptionError(
                    f"{_flag(dest)} {value} has no effect without --sam-variant: add --sam-variant sam, or leave "
                    f"{_flag(dest)} out")
        return
    if args.sam_rho is None:
        raise OptionError(
            f"--sam-variant {args.sam_variant} needs --sam-rho: add --sam-rho RHO, a number >= 0 (see hparams/ for "
            f"the values of the paper)")
    if args.sam_eta is not None and VARIANTS[args.sam_variant].eta is None:
        raise OptionError(f"--sam-eta {args.sam_eta}: --sam-variant {args.sam_variant} has no eta; leave it out")
    if args.sam_filter is not None:
        try:
            re.compile(args.sam_filter)
        except re.error as e:
            raise OptionError(
                f"--sam-filter {args.sam_filter!r} is not a regular expression ({e}): mend or quote it") from None
    if args.sam_end_epoch is not None and args.sam_end_epoch <= args.sam_start_epoch:
        raise OptionError(
            f"--sam-end-epoch {args.sam_end_epoch} is not after --sam-start-epoch {args.sam_start_epoch}: raise it, or "
            f"leave it out")


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def check_train(args: argparse.Namespace) -> None:
    """Checks timm's options against each other and the machine, before anything is built or written.

    Raises:
        OptionError: With flag, value and remedy.
    """
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    if args.data and not args.data_dir:
        args.data_dir = args.data
    for rule, message in _rules(args):
        if rule:
            raise OptionError(message)


def _rules(args: argparse.Namespace) -> list[tuple[bool, str]]:
    """Pairs (is broken, what to say)."""
    dtypes = ("float32", "float16", "bfloat16")
    half = ("float16", "bfloat16")
    mixup = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    device_type = args.device.split(":")[0]
    folder = not args.dataset or args.dataset.split("/")[0].lower() in ("folder", "tar")
    return [
        (args.batch_size < 1, f"--batch-size {args.batch_size} must be >= 1"),
        (args.epochs < 1, f"--epochs {args.epochs} must be >= 1"),
        (args.workers < 0, f"--workers {args.workers} must be >= 0"),
        (args.log_interval < 1, f"--log-interval {args.log_interval} must be >= 1"),
        (args.val_interval < 1, f"--val-interval {args.val_interval} must be >= 1"),
        (args.checkpoint_hist < 1, f"--checkpoint-hist {args.checkpoint_hist} must be >= 1"),
        (args.num_classes is not None and args.num_classes < 1, f"--num-classes {args.num_classes} must be >= 1"),
        (args.model_dtype is not None and args.model_dtype not in dtypes,
         f"--model-dtype {args.model_dtype} is unknown: use one of {', '.join(dtypes)}"),
        (args.amp and args.amp_dtype not in half,
         f"--amp-dtype {args.amp_dtype} is unknown: use one of {', '.join(half)}"),
        (args.amp and args.model_dtype in half,
         f"--amp needs float32 weights, got --model-dtype {args.model_dtype}: leave one of the two out"),
        (args.clip_mode not in ("norm", "value", "agc"),
         f"--clip-mode {args.clip_mode} is unknown: use one of norm, value, agc"),
        (args.dist_bn not in ("", "broadcast", "reduce"),
         f"--dist-bn {args.dist_bn} is unknown: use broadcast, reduce or ''"),
        (args.mixup_mode not in ("batch", "pair", "elem"),
         f"--mixup-mode {args.mixup_mode} is unknown: use one of batch, pair, elem"),
        (args.aug_splits == 1 or args.aug_splits < 0,
         f"--aug-splits {args.aug_splits} splits nothing: use 0, or 2 and more"),
        (args.jsd_loss and args.aug_splits < 2,
         f"--jsd-loss compares augmentation splits, got --aug-splits {args.aug_splits}: add --aug-splits 3"),
        (args.split_bn and args.aug_splits < 2 and not args.resplit,
         f"--split-bn needs splits, got --aug-splits {args.aug_splits}: add --aug-splits 2"),
        (args.split_bn and args.sync_bn, "--split-bn and --sync-bn exclude each other: leave one out"),
        (mixup and args.aug_splits > 1 and not args.no_prefetcher and not args.naflex_loader,
         f"--aug-splits {args.aug_splits} and --mixup/--cutmix do not go together in the prefetcher: add "
         "--no-prefetcher"),
        (args.naflex_loader and args.aug_splits > 1,
         f"--aug-splits {args.aug_splits} does not work with --naflex-loader: leave one of the two out"),
        (args.naflex_loader and args.train_img_sizes is not None,
         "--naflex-loader and --train-img-sizes are two ways to vary the image size: leave one out"),
        (args.naflex_loader and args.use_multi_epochs_loader,
         "--use-multi-epochs-loader does not work with --naflex-loader: leave one of the two out"),
        (bool(args.naflex_patch_size_probs) and
         len(args.naflex_patch_size_probs or ()) != len(args.naflex_patch_sizes or ()),
         f"--naflex-patch-size-probs has {len(args.naflex_patch_size_probs or ())} values for "
         f"{len(args.naflex_patch_sizes or ())} --naflex-patch-sizes: give as many"),
        (args.torchscript and args.torchcompile is not None,
         "--torchscript and --torchcompile exclude each other: leave one out"),
        (args.torchscript and args.sync_bn, "--sync-bn cannot be scripted: leave out --torchscript or --sync-bn"),
        (bool(args.wandb_resume_id) and not args.resume,
         f"--wandb-resume-id {args.wandb_resume_id} continues a run: add --resume CHECKPOINT"),
        (device_type == "cuda" and not torch.cuda.is_available() and not args.device_modules,
         f"--device {args.device}: torch finds no CUDA device here; add --device cpu, or install a driver"),
        (folder and not args.data_dir, "--data-dir is missing: give the folder that holds the train and val folders"),
        (folder and bool(args.data_dir) and not os.path.exists(args.data_dir or ""),
         f"--data-dir {args.data_dir} does not exist: give the folder that holds the train and val folders"),
        (bool(args.class_map) and folder and not _class_map_exists(args),
         f"--class-map {args.class_map} does not exist: give a text file, relative to --data-dir or absolute"),
        *((bool(path) and not os.path.isfile(path), f"{flag} {path} is not a file: give the path of a checkpoint")
          for flag, path in (("--resume", args.resume), ("--initial-checkpoint", _local(args.initial_checkpoint)),
                             ("--pretrained-path", _local(args.pretrained_path)))),
    ]


def _class_map_exists(args: argparse.Namespace) -> bool:
    return os.path.exists(args.class_map) or os.path.exists(os.path.join(args.data_dir or "", args.class_map))


def _local(path: str | None) -> str | None:
    """A path of this machine; None for what timm fetches from elsewhere (``hf-hub:``, ``https://``)."""
    return None if path and re.match(r"[a-z][a-z0-9+.-]*:", path) else path
