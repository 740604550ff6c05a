"""Rules that options keep, each with what to say when one is broken; those that several commands have in common."""
import argparse
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from timm.utils.distributed import is_distributed_env, world_info_from_env

from .errors import OptionError, one_line
from .models import channels
from .processes import check_launcher

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
LOWER_PRECISIONS = ("float16", "bfloat16")
# Options of the same name in every command, and the values that they may have.
KNOWN: dict[str, Collection[Any]] = {
    "model_dtype": (None, "float32", *LOWER_PRECISIONS),
    "interpolation": ("", *INTERPOLATIONS),
    "input_img_mode": (None, *Image.MODES),
    "fuser": ("", "te", "old", "legacy", "nvfuser", "nvf"),
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


def _device(name: str) -> torch.device | None:
    try:
        return torch.device(name)
    except (RuntimeError, ValueError, OverflowError):  # text that is none, and numbers that are too large
        return None


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


def per_channel(args: argparse.Namespace) -> Rules:
    """Mean and standard deviation: one number per channel, or one for all."""
    count = channels(args)
    for dest in ("mean", "std"):
        value = getattr(args, dest)
        yield (value is not None and len(value) not in (1, count),
               f"{flag(dest)} {value} must be one number, or {count} for {count} channels")


def crop_has_size(args: argparse.Namespace) -> Rules:
    """Images are resized to their size over the crop's share of it."""
    yield (args.crop_pct is not None and not 0.01 <= args.crop_pct <= 4,
           f"--crop-pct {args.crop_pct} is no share of an image: 1 keeps all, 0.875 cuts its border; use 0.01 to 4")


def integers_are_normalized(args: argparse.Namespace) -> Rules:
    """Images of whole numbers of 32 bits stay so in timm's loader without prefetching."""
    yield (args.input_img_mode == "I" and args.no_prefetcher,
           "--input-img-mode I: without prefetching such images are not normalized; use F, or leave out "
           "--no-prefetcher")


def amp_takes_float32(args: argparse.Namespace) -> Rules:
    yield (args.amp and args.model_dtype in LOWER_PRECISIONS,
           f"--amp needs float32 weights, got --model-dtype {args.model_dtype}: leave one of the two out")


def device_is_there(args: argparse.Namespace, others: Collection[str] | None = None) -> Rules:
    """The device is one of torch's, and the machine has it; ``others`` are modules that may bring it, even its name."""
    device = _device(args.device)
    if device is None and others:
        return
    yield device is None, f"--device {args.device} is no device of torch: use cuda, cuda:1, cpu, mps, ..."
    assert device is not None
    yield (device.type == "meta",
           f"--device {args.device} holds no numbers, only their shapes: use cuda, cuda:1, cpu, mps, ...")
    if others:
        return
    if device.type == "cuda":
        yield (not torch.cuda.is_available(),
               f"--device {args.device}: torch finds no CUDA device here; add --device cpu, or install a driver")
        count = torch.cuda.device_count()
        check_launcher()  # what it has set are numbers
        if is_distributed_env():  # of several processes each takes the index of its place on the machine
            # the last one here, so that the first one says it too: it is the one that speaks
            place = max(world_info_from_env()[0], int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)
            yield (place >= count,
                   f"--device {args.device}: there are {count} CUDA devices here, but also a process number {place} "
                   f"from 0: start one for each device (torchrun --nproc-per-node {count}), and let each see them all")
            return
        yield ((device.index or 0) >= count,
               f"--device {args.device}: there are {count} CUDA devices here, numbered from 0; use one of them")
    elif device.type != "cpu":
        reason = _why_not(device)
        yield reason is not None, f"--device {args.device}: torch has none here ({reason}); use cuda or cpu"


def _why_not(device: torch.device) -> str | None:
    try:
        torch.empty(1, device=device)
    except Exception as e:  # of any kind, and its text is for the programmer: the first sentence will do
        return one_line(e).split(". ")[0]
    return None


def class_map_is_there(args: argparse.Namespace) -> Rules:
    found = [os.path.isfile(path) for path in (args.class_map, os.path.join(args.data_dir or "", args.class_map))]
    yield (bool(args.class_map) and not any(found),
           f"--class-map {args.class_map} does not exist, or is no regular file: give a text file, relative to "
           f"--data-dir or absolute")
