"""Rules that options keep, each with what to say when one is broken; those that several commands have in common."""
import argparse
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image

from .errors import OptionError
from .models import channels

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
LOWER_PRECISIONS = ("float16", "bfloat16")
# Options of the same name in every command, and the values that they may have.
KNOWN: dict[str, Collection[Any]] = {
    "model_dtype": (None, "float32", *LOWER_PRECISIONS),
    "interpolation": ("", *INTERPOLATIONS),
    "input_img_mode": (None, *Image.MODES),
    "fuser": ("", "te", "old", "nvfuser"),
}

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


def reads_files(args: argparse.Namespace) -> bool:
    """Whether the data set is a folder or a tar file, not one that a library knows by its name."""
    return not args.dataset or args.dataset.split("/")[0].lower() in ("folder", "tar")


def known(args: argparse.Namespace, values: Mapping[str, Collection[Any]]) -> Rules:
    """Options (``{dest: the values that it may have}``) with a limited choice, and the compiler's backend and mode."""
    values = dict(values)
    if args.torchcompile is not None:
        values["torchcompile"] = tuple(torch.compiler.list_backends(exclude_tags=()))
    if args.torchcompile == "inductor":
        values["torchcompile_mode"] = (None, *torch._inductor.list_mode_options())
    for dest, allowed in values.items():
        value = getattr(args, dest)
        shown = ", ".join(str(a) for a in allowed if a)
        yield value not in allowed, f"{flag(dest)} {value} is unknown: use one of {shown}"


def at_least_one(args: argparse.Namespace, dests: Iterable[str]) -> Rules:
    """Options that count something, or are None."""
    for dest in dests:
        value = getattr(args, dest)
        yield value is not None and value < 1, f"{flag(dest)} {value} must be >= 1"


def per_channel(args: argparse.Namespace) -> Rules:
    """Mean and standard deviation: one number per channel, or one for all."""
    count = channels(args)
    for dest in ("mean", "std"):
        value = getattr(args, dest)
        yield (value is not None and len(value) not in (1, count),
               f"{flag(dest)} {value} must be one number, or {count} for {count} channels")


def amp_takes_float32(args: argparse.Namespace) -> Rules:
    yield (args.amp and args.model_dtype in LOWER_PRECISIONS,
           f"--amp needs float32 weights, got --model-dtype {args.model_dtype}: leave one of the two out")


def device_is_there(args: argparse.Namespace, others: Collection[str] | None = None) -> Rules:
    """The device is one of torch's, and there is CUDA if it is that; ``others`` are modules that may bring it."""
    yield not is_device(args.device), f"--device {args.device} is no device of torch: use cuda, cuda:1, cpu, mps, ..."
    yield (args.device.split(":")[0] == "cuda" and not torch.cuda.is_available() and not others,
           f"--device {args.device}: torch finds no CUDA device here; add --device cpu, or install a driver")


def class_map_is_there(args: argparse.Namespace) -> Rules:
    found = [os.path.exists(path) for path in (args.class_map, os.path.join(args.data_dir or "", args.class_map))]
    yield (bool(args.class_map) and not any(found),
           f"--class-map {args.class_map} does not exist: give a text file, relative to --data-dir or absolute")
