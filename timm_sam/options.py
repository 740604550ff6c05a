"""The command line of train.py: timm's flags, the SAM group, YAML defaults, and checks that name flag and remedy."""
import argparse
import difflib
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from .checks import check_sam, check_train
from .errors import OptionError, report
from .flags import ParseKwargs, add_train_flags
from .perturbation import VARIANTS
from .sam import BN_STATS
from .selection import SELECTIONS

_UNSET = object()


class OptionParser(argparse.ArgumentParser):
    """Reports an error as one line, without the usage of 180 flags around it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> Any:
        report(self.prog, message)
        raise SystemExit(2)


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
    add("--sam-m", type=_positive_int, default=None, metavar="M",
        help="samples that share one perturbation: each rank's batch is taken in chunks of M; none: the whole of it")
    add("--sam-sync", action="store_true",
        help="average the gradient that gives eps over all ranks, so that they share one perturbation")
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

    The key ``base`` names another such file, relative to this one, whose values this one overrides.

    Raises:
        OptionError: A file cannot be read, is not a mapping, has a key that is no flag, or a value of a wrong type; or
            files name each other as base.
    """
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    values: dict[str, Any] = {}
    for file, config in reversed(_read_yaml(path, [])):
        for key, value in config.items():
            if key not in actions:
                close = difflib.get_close_matches(str(key).replace("-", "_"), actions, 1)
                hint = f"did you mean {close[0]!r}?" if close else "remove it, or see --help for the flags"
                raise OptionError(f"--config {file}: unknown key {key!r}; {hint}")
            values[key] = yaml_value(f"--config {file}", actions[key], value)
    return values


def _read_yaml(path: str, above: list[str]) -> list[tuple[str, dict[Any, Any]]]:
    """The mapping in a file, followed by those of its bases."""
    if os.path.realpath(path) in above:
        raise OptionError(f"--config {path}: is its own base, by {' -> '.join(above)}; remove one 'base'")
    try:
        with open(path, encoding="utf-8") as f:
            config = yaml.safe_load(f)
    except OSError as e:
        raise OptionError(f"--config {path}: {e.strerror or e}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise OptionError(f"--config {path}: not a YAML file: {e}") from None
    if config is None:
        config = {}
    if not isinstance(config, dict):
        raise OptionError(f"--config {path}: holds a {type(config).__name__}; write 'flag_name: value' lines")
    if "base" not in config:
        return [(path, config)]
    base = config.pop("base")
    if not isinstance(base, str):
        raise OptionError(f"--config {path}: base: {base!r} is not the path of a YAML file")
    base = os.path.join(os.path.dirname(path), base)
    return [(path, config), *_read_yaml(base, [*above, os.path.realpath(path)])]


def yaml_value(origin: str, action: argparse.Action, value: Any) -> Any:
    """A flag's value in a YAML file, converted as on the command line.

    Raises:
        OptionError: It has a wrong type; the message begins with ``origin``.
    """
    def wrong(expected: str) -> OptionError:
        return OptionError(f"{origin}: {action.dest}: {value!r} is not {expected}")

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
                convert is str and not text_ok or isinstance(v, float) and convert in (int, _positive_int, _epoch):
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
