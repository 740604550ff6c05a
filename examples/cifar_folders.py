#!/usr/bin/env python3
"""Writes CIFAR as the image folders that the recipes in hparams/cifar read.

    python examples/cifar_folders.py cifar10 data/cifar10

Training images get 4 black pixels on each side, once and for all: timm's loader has no "pad and crop", but it can draw
random windows of 32x32 out of these (see hparams/cifar/base.yaml). Validation images stay as they are.
"""
import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageOps
from torchvision.datasets import CIFAR10, CIFAR100

PADDING = 4


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes CIFAR as image folders, training images padded by 4 pixels.")
    parser.add_argument("name", choices=("cifar10", "cifar100"))
    parser.add_argument("out", type=Path, help="folder to write; it gets train/ and validation/")
    parser.add_argument("--source", type=Path, default=Path("data/torchvision"), metavar="DIR",
                        help="where torchvision keeps the archive, downloaded if it is not there")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.exit(2, f"{parser.prog}: {args.out} exists: name another folder, or remove it\n")
    half = args.out.with_name(args.out.name + ".half-written")
    shutil.rmtree(half, ignore_errors=True)
    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[args.name]
    try:
        for split in ("train", "validation"):
            write(dataset(args.source, train=split == "train", download=True), half / split, split == "train")
    except (OSError, RuntimeError) as e:
        parser.exit(2, f"{parser.prog}: {args.name} cannot be had or written: {e}; check the network and the disk, or "
                       f"give --source\n")
    half.rename(args.out)
    print(f"Wrote {args.out}")
    return 0


def write(images: CIFAR10, folder: Path, pad: bool) -> None:
    """Writes each image to ``folder/<class>/<number>.png``."""
    for name in images.classes:
        (folder / name).mkdir(parents=True)
    for number, (image, label) in enumerate(images):
        if pad:
            image = ImageOps.expand(image, border=PADDING)
        image.save(folder / images.classes[label] / f"{number:05}.png")


if __name__ == "__main__":
    sys.exit(main())
