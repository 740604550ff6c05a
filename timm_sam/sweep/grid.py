"""``--grid sam_rho=0.05,0.1 sam_params=all,onlynorm``: its cells as flags of train.py, checked by train.py's parser."""
import argparse
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..cli.errors import OptionError
from ..cli.rules import flag
from ..training.checks import check_surroundings
from ..training.options import build_train_parser, read_args

PLAIN = "plain"
# what a sweep gives to its runs itself, and what to say instead
_OURS = {"seed": "--seeds N", "output": "--out DIR", "experiment": "--out DIR", "resume": "nothing: runs go on anyway"}


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        values: Option -> its value as text; empty for plain training with no other key in the grid.
        flags: The same as flags of train.py.
        plain: Whether it is what ``--plain`` adds: training without SAM.
    """

    values: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]
    plain: bool = False

    @property
    def name(self) -> str:
        """As it is written in ``--grid``, and as a folder is called."""
        text = ",".join(f"{key}={value}" for key, value in self.values) or PLAIN
        return re.sub(r"[^\w.,=+-]", "_", text)


def cells(given: Sequence[str], plain: bool) -> list[Cell]:
    """All combinations of the values of ``--grid``.

    Args:
        given: ``KEY=VALUE,...`` each.
        plain: Also training without SAM: the combinations of the keys that are none of SAM's.

    Raises:
        OptionError: A key is no flag of train.py, is there twice, or has no values.
    """
    actions: dict[str, list[argparse.Action]] = {}
    for action in build_train_parser()._actions:
        actions.setdefault(action.dest, []).append(action)
    axes: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for text in given:
        name, equals, values = text.partition("=")
        key = name.lstrip("-").replace("-", "_")
        if not equals or not all(part.strip() for part in values.split(",")):
            raise OptionError(f"--grid {text} is not KEY=VALUE,VALUE,...: name a flag of train.py and its values")
        if key in _OURS:
            raise OptionError(f"--grid {text}: {key} is the sweep's own; use {_OURS[key]}")
        if key not in actions or key in ("help", "config"):
            raise OptionError(f"--grid {text}: train.py has no flag {flag(key)}; see its --help")
        if key in axes:
            raise OptionError(f"--grid names {key} twice: give all of its values at once")
        parts = dict.fromkeys(part.strip() for part in values.split(","))
        axes[key] = [(part, _flags(actions[key], part)) for part in parts]
    found = [_cell(axes, chosen) for chosen in itertools.product(*axes.values())]
    if plain:
        others = {key: values for key, values in axes.items() if not key.startswith("sam_")}
        found = [replace(_cell(others, chosen), plain=True) for chosen in itertools.product(*others.values())] + found
    names = [cell.name for cell in found]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"--grid has two cells whose folders would be called {name}: leave one out")
    return found


def _cell(axes: dict[str, list[tuple[str, tuple[str, ...]]]], chosen: Sequence[tuple[str, tuple[str, ...]]]) -> Cell:
    return Cell(tuple((key, value) for key, (value, _) in zip(axes, chosen)),
                tuple(word for _, words in chosen for word in words))


def _flags(actions: Sequence[argparse.Action], value: str) -> tuple[str, ...]:
    """A value as it stands on the command line; switches take true and false, lists words.

    Args:
        actions: The flags that set the option: a switch may have one for on and one for off.
        value: As it stands in ``--grid``.
    """
    action = actions[0]
    name = next((option for option in action.option_strings if option.startswith("--")), None)
    if name is None:
        raise OptionError(f"--grid {action.dest}={value}: this is no flag of train.py")
    if action.nargs != 0:
        return (name, *value.split()) if action.nargs in ("+", "*") or isinstance(action.nargs, int) else (name, value)
    if value not in ("true", "false"):
        raise OptionError(f"--grid {action.dest}={value}: it is a switch; its values are true and false")
    for action in actions:
        for option in action.option_strings:
            on = not option.startswith("--no-") if isinstance(action, argparse.BooleanOptionalAction) else action.const
            if option.startswith("--") and on is (value == "true"):
                return (option,)
    return ()


def check(found: Sequence[Cell], flags: Sequence[str], prog: str) -> list[argparse.Namespace]:
    """Parses every cell as train.py would, before anything is started or written.

    Args:
        found: The cells.
        flags: What train.py gets in all of them.
        prog: Name of the command: errors begin with it and the cell.

    Returns:
        The options of each.

    Raises:
        OptionError: A flag is given that the sweep or the grid sets.
        SystemExit: With code 2, after one line on stderr that names the cell, for anything that train.py would refuse,
            and for a cell that is another one once more, in other words, or a switch that stays on.
    """
    parser = build_train_parser()
    dests = {option: action.dest for action in parser._actions for option in action.option_strings}
    for word in flags:
        dest = dests.get(word.partition("=")[0], "")
        if dest in _OURS:
            raise OptionError(f"{word}: the sweep sets it; use {_OURS[dest]}")
        if any(dest == key for cell in found for key, _ in cell.values):
            raise OptionError(f"{word} is in --grid too: leave one out")
    every: list[argparse.Namespace] = []
    for number, cell in enumerate(found):
        parser = build_train_parser(f"{prog}: {cell.name}")
        with _quiet(number > 0):
            try:
                args = read_args(parser, [*flags, *cell.flags])
                check_surroundings(args)
            except OptionError as e:
                parser.error(str(e))
        if cell.plain and args.sam_variant is not None:
            parser.error(f"the recipe or a flag sets --sam-variant {args.sam_variant}: give a plain recipe and the "
                         f"variant in --grid, or leave out --plain")
        stuck = next((key for key, value in cell.values
                      if value in ("true", "false") and getattr(args, key) is (value != "true")), None)
        if stuck is not None:
            parser.error(f"the recipe sets {flag(stuck)}, which no flag takes back: use a recipe without it")
        twin = next((other for other, its in zip(found, every) if vars(its) == vars(args)), None)
        if twin is not None:
            parser.error(f"it is the same training as {twin.name}: leave one out")
        every.append(args)
    return every


@contextmanager
def _quiet(really: bool) -> Iterator[None]:
    """No warnings: those of the first cell are those of all."""
    if really:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
