"""Ranges of numeric options: each number of a command stands in its table."""
import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import shown
from .rules import Rules, flag

_LARGEST = 2 ** 31 - 1  # of what counts something, where no smaller limit is given


@dataclass(frozen=True)
class Range:
    """Which finite numbers an option may have; None is always among them.

    Attributes:
        low, high: The bounds; None: there is none, but for integers, which stay below 2^31.
        without_low, without_high: Whether the bound itself is out.
    """

    low: float | None = None
    high: float | None = None
    without_low: bool = False
    without_high: bool = False

    def demand(self, value: float) -> str | None:
        """What a value is to be, in words; None: it is that."""
        whole = isinstance(value, int)
        finite = whole or math.isfinite(value)
        below = self.low is not None and (value <= self.low if self.without_low else value < self.low)
        high = _LARGEST if whole and self.high is None else self.high
        above = high is not None and (value >= high if self.without_high else value > high)
        if finite and not below and not above:
            return None
        bounds = []
        if self.low is not None:
            bounds.append(f"{'>' if self.without_low else '>='} {_text(self.low)}")
        if high is not None and (above or self.high is not None):
            bounds.append(f"{'<' if self.without_high else '<='} {_text(high)}")
        return " ".join([*([] if whole else ["a finite number"]), " and ".join(bounds)]).rstrip()


ANY = Range()
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, without_low=True)
COUNT = Range(1)
PROBABILITY = Range(0, 1)
BELOW_ONE = Range(0, 1, without_high=True)
BETWEEN = Range(0, 1, without_low=True, without_high=True)
# of images: a larger one takes gigabytes by itself
PIXELS = Range(1, 2 ** 15)
# of a loader: the system ends before that, and not only for this process
WORKERS = Range(0, 1024)
# NumPy takes what is below 2^32, and each rank adds its number
SEED = Range(0, 2 ** 32 - 2 ** 16)


def in_range(args: argparse.Namespace, ranges: Mapping[str, Range]) -> Rules:
    """Options that are numbers, or lists of numbers.

    Args:
        args: All options.
        ranges: ``{dest: its range}``.
    """
    for dest, allowed in ranges.items():
        value = getattr(args, dest)
        numbers = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        demand = next((d for number in numbers if (d := allowed.demand(number)) is not None), None)
        yield demand is not None, f"{flag(dest)} {shown(value)} must be {demand}"


def in_order(args: argparse.Namespace, dests: tuple[str, ...]) -> Rules:
    """Options that are a lower and an upper number."""
    for dest in dests:
        value = getattr(args, dest)
        yield value is not None and len(value) != 2, f"{flag(dest)} {shown(value)} must be two numbers, lower and upper"
        yield (value is not None and value[0] > value[1],
               f"{flag(dest)} {shown(value)}: the lower number comes first; turn them round")


def weights(args: argparse.Namespace, dests: tuple[str, ...]) -> Rules:
    """Options that say how often each of some things is chosen."""
    for dest in dests:
        value: Any = getattr(args, dest)
        yield (bool(value) and sum(value) <= 0,
               f"{flag(dest)} {shown(value)}: one of them at least must be > 0, or nothing can be chosen")


def _text(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"
