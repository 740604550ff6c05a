"""Rules that options keep, each with what to say when one is broken."""
import argparse
from collections.abc import Callable, Iterator

import torch

from .errors import OptionError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

Rules = Iterator[tuple[bool, str]]  # (is broken, what to say)


def apply(args: argparse.Namespace, *rules: Callable[[argparse.Namespace], Rules]) -> None:
    """Looks at all rules in order.

    Raises:
        OptionError: The first that is broken.
    """
    for some in rules:
        for broken, message in some(args):
            if broken:
                raise OptionError(message)


def flag(dest: str) -> str:
    """The flag whose value is ``args.<dest>``."""
    return "--" + dest.replace("_", "-")


def is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True
