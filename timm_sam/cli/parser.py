"""What the commands' parsers share: one-line errors, YAML files of defaults, numbers with ranges."""
import argparse
import difflib
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from timm import utils

from .errors import OptionError, report


class OptionParser(argparse.ArgumentParser):
    """Reports an error as one line, without the usage of 200 flags around it.

    Flags are not abbreviated: ``--task multilabel`` would be read as ``--task-loss-weight`` by a version that does not
    know it yet. An unknown flag is an error that names the nearest ones.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._nearest(unknown)}")
        return found

    def _nearest(self, unknown: Sequence[str]) -> str:
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        hints = []
        for flag in (text.partition("=")[0] for text in unknown if text.startswith("-")):
            abbreviated = sorted((f for f in flags if len(flag) > 2 and f.startswith(flag)), key=len)
            close = abbreviated or difflib.get_close_matches(flag, flags)
            hints.append(f"for {flag} did you mean {', '.join(close[:3])}?" if close else
                         f"{flag} is like no flag, see --help")
        return f"; {'; '.join(hints)}" if hints else ""

    def error(self, message: str) -> Any:
        report(self.prog, message)
        raise SystemExit(2)


class ParseKwargs(utils.ParseKwargs):
    """``KEY=VALUE ...`` as a dictionary, with timm's reading of the values."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        wrong = [v for v in values if v and "=" not in v]
        if wrong:
            raise argparse.ArgumentError(self, f"{wrong[0]!r} is not KEY=VALUE")
        super().__call__(parser, namespace, values, option_string)


def config_defaults(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Makes what the YAML file of ``-c`` says the defaults of ``parser``.

    Raises:
        OptionError: As :func:`load_yaml`.
    """
    early = OptionParser(prog=parser.prog, add_help=False)
    early.add_argument("-c", "--config", default="")
    asks_for_help = any(a in ("-h", "--help") for a in (sys.argv[1:] if argv is None else argv))
    config = "" if asks_for_help else early.parse_known_args(argv)[0].config
    if config:
        parser.set_defaults(**load_yaml(config, parser))


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


def read_yaml(path: str) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no YAML, or no text.
    """
    with open(path, encoding="utf-8") as f:
        try:
            return yaml.safe_load(f)
        except yaml.YAMLError as e:
            raise ValueError(str(e)) from e


def _read_yaml(path: str, above: list[str]) -> list[tuple[str, dict[Any, Any]]]:
    """The mapping in a file, followed by those of its bases."""
    if os.path.realpath(path) in above:
        raise OptionError(f"--config {path}: is its own base, by {' -> '.join(above)}; remove one 'base'")
    try:
        config = read_yaml(path)
    except OSError as e:
        raise OptionError(f"--config {path}: {e.strerror or e}; give the path of a YAML file") from None
    except ValueError as e:
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
                convert is str and not text_ok or isinstance(v, float) and convert in (int, positive_int, epoch):
            raise wrong(f"of type {_type_name(convert)}")
        try:
            out.append(convert(v))  # YAML 1.1 reads 1e-3 as a string; converting makes it the number it looks like
        except (TypeError, ValueError, argparse.ArgumentTypeError):
            raise wrong(f"of type {_type_name(convert)}") from None
        if action.choices is not None and out[-1] not in action.choices:
            raise wrong(f"one of {', '.join(map(str, action.choices))}")
    return out if many else out[0]


def _type_name(convert: Any) -> str:
    names = {fraction: "number in (0, 1]", non_negative: "number >= 0", positive_int: "integer >= 1",
             epoch: "integer >= 0", str: "text"}
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


def non_negative(text: str) -> float:
    return _number(text, float, 0, "a finite number >= 0")


def positive_int(text: str) -> int:
    return _number(text, int, 1, "an integer >= 1")


def fraction(text: str) -> float:
    value = _number(text, float, 0, "a number in (0, 1]")
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], got {text}")
    return value


def epoch(text: str) -> int:
    return _number(text, int, 0, "an integer >= 0")
