"""What the commands' parsers share: one-line errors, YAML files of defaults, numbers with ranges."""
import argparse
import difflib
import errno
import math
import os
import re
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from timm import utils

from . import recipes
from .errors import OptionError, one_line, report, shown


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default, but to texts that say it themselves: ``(default ...)`` or ``(required ...)``."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = re.search(r"\((default|required)\b", action.help or "")
        return action.help if said else super()._get_help_string(action)


class OptionParser(argparse.ArgumentParser):
    """Reports an error as one line, without the usage of 200 flags around it.

    Flags are not abbreviated: ``--task multilabel`` would be read as ``--task-loss-weight`` by a version that does not
    know it yet. An unknown flag is an error that names the nearest ones.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

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


def program(module: str, otherwise: str = "") -> str:
    """What the command of a module was started as, which its help and its errors name.

    Args:
        module: Such as ``timm_sam.train``.
        otherwise: The script that starts it too; without one, the module is named.

    Returns:
        The script's name, ``python -m MODULE``, or the name that an installed package gives the command.
    """
    started = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    installed = module.replace("_", "-").replace(".", "-")
    if started == installed:
        return installed
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    by_name = spec is not None and spec.name in (module, f"{module}.__main__")
    return f"python -m {module}" if by_name or not otherwise else otherwise


class ParseKwargs(utils.ParseKwargs):
    """``KEY=VALUE ...`` as a dictionary, with timm's reading of the values."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        wrong = [v for v in values if v and "=" not in v]
        if wrong:
            raise argparse.ArgumentError(self, f"{wrong[0]!r} is not KEY=VALUE")
        super().__call__(parser, namespace, values, option_string)


def config_defaults(parser: argparse.ArgumentParser, argv: Sequence[str] | None,
                    gone: Mapping[str, str] | None = None) -> list[str]:
    """Makes what the YAML file or recipe of ``-c`` says the defaults of ``parser``.

    Args:
        parser: Of the command.
        argv: Its arguments; None: those of the process.
        gone: As of :func:`load_yaml`.

    Returns:
        What was left out, in one line, if anything was.

    Raises:
        OptionError: As :func:`load_yaml`.
    """
    early = OptionParser(prog=parser.prog, add_help=False)
    early.add_argument("-c", "--config", default="")
    asks_for_help = any(a in ("-h", "--help") for a in (sys.argv[1:] if argv is None else argv))
    config = "" if asks_for_help else early.parse_known_args(argv)[0].config
    if config:
        values, left_out = load_yaml(config, parser, gone)
        parser.set_defaults(**values)
        if left_out:
            return [f"--config {config}: left out, as there are no such flags any more: {'; '.join(left_out)}"]
    return []


def load_yaml(path: str, parser: argparse.ArgumentParser,
              gone: Mapping[str, str] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Reads a YAML file of defaults: ``{dest: value}``, values converted as on the command line.

    The key ``base`` names another such file, relative to this one, or a recipe, whose values this one overrides.

    Args:
        path: Of the file, or the name of a recipe (:func:`timm_sam.cli.recipes.find`).
        parser: Of the command.
        gone: Keys that older scripts wrote, and what to say of each: they are left out.

    Returns:
        The values, and of each key that was left out what to say.

    Raises:
        OptionError: A file cannot be read, is not a mapping, has a key that is no flag, or a value of a wrong type; or
            files name each other as base.
    """
    actions = {a.dest: a for a in parser._actions if a.dest not in ("help", "config")}
    values: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for file, config in reversed(_read_yaml(_found(path, f"--config {path}"), [])):
        for key, value in config.items():
            if gone is not None and key in gone:
                left_out[key] = f"{key}: {shown(value)} ({gone[key]})"
                continue
            if key not in actions:
                name = key.replace("-", "_")[:80] if isinstance(key, str) else ""
                close = difflib.get_close_matches(name, actions, 1)
                hint = f"did you mean {close[0]!r}?" if close else "remove it, or see --help for the flags"
                raise OptionError(f"--config {file}: unknown key {shown(key)}; {hint}")
            values[key] = yaml_value(f"--config {file}", actions[key], value)
    return values, list(left_out.values())


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: of its values PyYAML takes the last, without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:  # as they are written: what '<<' merges may be given once more
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"{shown(key.value)} stands in it twice, in lines {lines[key.value]} and {line}: "
                                 f"remove one")
            lines[key.value] = line
        return node


def read_yaml(path: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """What a YAML file holds.

    Raises:
        OSError: It cannot be read, or is no regular file: a pipe may never end.
        ValueError: It is no YAML, or no text, or the loader refuses it.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        kind = "it is a directory" if os.path.isdir(path) else "it is no regular file"
        raise OSError(errno.EINVAL, kind)
    with open(path, encoding="utf-8") as f:
        try:
            return yaml.load(f, loader)
        except OSError:
            raise
        except Exception as e:  # it makes dates, numbers and more of text, and fails in as many ways
            raise ValueError(one_line(e)) from e


_MOST_BASES = 50


def _found(name: str, origin: str, beside: str = "") -> str:
    """As :func:`timm_sam.cli.recipes.find`, with whoever named the file before its error."""
    try:
        return recipes.find(name, beside)
    except OptionError as e:
        raise OptionError(f"{origin}: {e}") from None


def _read_yaml(path: str, above: list[str]) -> list[tuple[str, dict[Any, Any]]]:
    """The mapping in a file, followed by those of its bases."""
    if len(above) > _MOST_BASES:
        raise OptionError(f"--config {above[0]}: has more than {_MOST_BASES} bases, one of another; write them as one")
    if os.path.realpath(path) in above:
        raise OptionError(f"--config {path}: is its own base, by {' -> '.join(above)}; remove one 'base'")
    try:
        config = read_yaml(path, _EachKeyOnce)
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
    if not isinstance(base, str) or not base or not _is_writable_text(base):
        raise OptionError(f"--config {path}: base: {shown(base)} is not the path of a YAML file")
    base = _found(base, f"--config {path}: base: {base}", os.path.dirname(path))
    return [(path, config), *_read_yaml(base, [*above, os.path.realpath(path)])]


def yaml_value(origin: str, action: argparse.Action, value: Any) -> Any:
    """A flag's value in a YAML file, converted as on the command line.

    Raises:
        OptionError: It has a wrong type; the message begins with ``origin``.
    """
    def wrong(expected: str, what: Any = value) -> OptionError:
        return OptionError(f"{origin}: {action.dest}: {shown(what)} is not {expected}")

    if value is None:
        if action.default is not None:
            raise wrong(f"a value of this flag: leave it out for the default, {shown(action.default)}")
        return None
    if isinstance(action, ParseKwargs):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise wrong("a mapping of keyword arguments")
        _check_plain(value, wrong)
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
    if action.nargs == "+" and not values and action.default != []:
        raise wrong("a list of one value or more")
    convert: Any = action.type or str
    out = [_converted(convert, v, wrong) for v in values]
    for v in out:
        if action.choices is not None and v not in action.choices:
            raise wrong(f"one of {', '.join(map(str, action.choices))}")
    return out if many else out[0]


def _converted(convert: Any, value: Any, wrong: Callable[..., OptionError]) -> Any:
    """One value of a YAML file as a flag's type."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong(f"of type {_type_name(convert)}")
    if isinstance(value, float) and convert in (int, positive_int, epoch):
        if not value.is_integer():  # of infinity and NaN, too; older scripts wrote epochs: 300.0
            raise wrong(f"of type {_type_name(convert)}")
        value = int(value)
    if isinstance(value, int) and value.bit_length() > 1024:
        raise wrong(f"a number of this size, but of type {_type_name(convert)}")
    try:
        converted = convert(value)  # YAML 1.1 reads 1e-3 as a string; converting makes it the number it looks like
    except (TypeError, ValueError, OverflowError, argparse.ArgumentTypeError):
        raise wrong(f"of type {_type_name(convert)}") from None
    if isinstance(converted, str) and not _is_writable_text(converted):
        raise wrong("text that can be written: it has a NUL character, or half a surrogate pair")
    return converted


def _is_writable_text(text: str) -> bool:
    """Whether a file may have this name: bytes that are no UTF-8 may be in one, other lone surrogates may not."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _check_plain(value: Any, wrong: Callable[..., OptionError]) -> None:
    """Keyword arguments are numbers, text, dates and the like, in lists and mappings; aliases may make them endless."""
    left, budget = [value], 10_000
    while left:
        part = left.pop()
        budget -= 1
        if budget < 0:
            raise wrong("a mapping of keyword arguments, but endless or far too large")
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, (list, tuple, set)):
            left += part
        elif isinstance(part, str) and not _is_writable_text(part):
            raise wrong("text that can be written: it has a NUL character, or half a surrogate pair", part)
        elif isinstance(part, int) and part.bit_length() > 1024:
            raise wrong("a number of this size", part)


def _type_name(convert: Any) -> str:
    names = {fraction: "number in (0, 1]", non_negative: "number >= 0", positive_int: "integer >= 1",
             epoch: "integer >= 0", str: "text"}
    return names.get(convert, convert.__name__)


def dump_args(args: argparse.Namespace) -> str:
    """The options as YAML, such that ``-c`` reads them back."""
    kept = {key: value for key, value in vars(args).items() if key != "config"}
    return yaml.safe_dump(kept, default_flow_style=False)


_LARGEST = {int: 2 ** 31 - 1}  # of what counts something


def _number(text: str, convert: Any, at_least: float, expected: str) -> Any:
    try:
        value = convert(text)
    except (ValueError, OverflowError):
        value = math.nan
    if not at_least <= value <= _LARGEST.get(convert, math.inf) or value == math.inf:
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text if isinstance(text, str) else shown(text)}")
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
