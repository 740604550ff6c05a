"""scikit-learn's digits as an image folder: ``python -m timm_sam.digits DIR``.

1,797 real scans of handwritten digits (UCI Optical Recognition of Handwritten Digits, 8x8 grey levels 0 to 16), which
scikit-learn ships inside its package. Written as ``DIR/train/<digit>/<index>.png`` and ``DIR/validation/...``, the
layout of an ImageNet folder; ``DIR/shifted/<blur|noise|rotation|contrast>/<digit>/<index>.png`` are the validation
images once more, as out-of-distribution test sets. Needs the extra ``digits``.
"""
import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..cli.errors import OptionError, report
from ..cli.new_folder import check_new, written_aside
from ..cli.parser import OptionParser, program
from .shifts import CORRUPTIONS, SEVERITIES, SHIFTS

SIZE = 32  # of the images in pixels, unless asked otherwise
VALIDATION_SHARE = 0.2
SPLIT_SEED = 0


def export(folder: str, size: int = SIZE, tune: bool = False, train_size: int | None = None, label_noise: float = 0.0,
           seed: int = 0, corruptions: bool = False) -> dict[str, int]:
    """Writes the images.

    Args:
        folder: Where; must not exist, or hold nothing.
        size: Height and width in pixels, >= 8; scans are enlarged bicubically.
        tune: Split the training part once more, and leave the validation part out: a data set for choosing
            hyperparameters without having seen the validation images.
        train_size: Number of training images to keep, of each digit in proportion; None keeps all.
        label_noise: Share of the training images that are filed under one of the nine wrong digits, each as likely
            as the others. Validation labels stay true.
        seed: Draws the kept images and the wrong labels.
        corruptions: Also write the validation images as ``DIR/corrupted/<kind>/<severity>``, as ImageNet-C is laid out.

    Returns:
        Number of images per split.

    Raises:
        OptionError: The folder is in use or cannot be written, a size or share is out of range, or scikit-learn is
            missing.
    """
    try:
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as e:
        raise OptionError(f"digits need {e.name}: pip install 'timm_sam[digits]'") from e
    if size < 8:
        raise OptionError(f"--size {size} is smaller than the 8x8 scans: use 8 or more")
    if not 0 <= label_noise < 1:
        raise OptionError(f"--label-noise {label_noise} is not a share in [0, 1)")
    if seed < 0:
        raise OptionError(f"--seed {seed} is negative: use 0 or more")
    check_new(folder)

    data = load_digits()
    train, validation = train_test_split(
        np.arange(len(data.target)), test_size=VALIDATION_SHARE, stratify=data.target, random_state=SPLIT_SEED)
    if tune:
        train, validation = train_test_split(
            train, test_size=VALIDATION_SHARE, stratify=data.target[train], random_state=SPLIT_SEED)
    if train_size is not None:
        if not 10 <= train_size <= len(train) - 10:
            raise OptionError(f"--train-size {train_size} is not in 10..{len(train) - 10}: one image per digit at "
                              f"least is kept, and one left out")
        train, _ = train_test_split(train, train_size=train_size, stratify=data.target[train], random_state=seed)
    labels = data.target.copy()
    generator = np.random.default_rng(seed)
    wrong = generator.choice(np.sort(train), round(label_noise * len(train)), replace=False)
    labels[wrong] = (labels[wrong] + generator.integers(1, 10, len(wrong))) % 10
    splits = {"train": train, "validation": validation}
    with written_aside(folder, ".digits-") as temporary:
        for split, indices in splits.items():
            for i in sorted(indices.tolist()):
                name = os.path.join(str(labels[i]), f"{i:04d}.png")
                grey = np.round(data.images[i] * (255 / 16)).astype(np.uint8)
                image = Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC)
                _save(image, temporary, split, name)
                for number, (shift, apply) in enumerate(SHIFTS.items() if split == "validation" else ()):
                    shifted = apply(image, np.random.default_rng((SPLIT_SEED, number, i)))
                    _save(shifted, temporary, "shifted", shift, name)
                for number, (kind, apply_so) in enumerate(
                        CORRUPTIONS.items() if corruptions and split == "validation" else ()):
                    for severity in SEVERITIES:
                        # the first four numbers are those of shifts, and their draws stay
                        drawn = np.random.default_rng((SPLIT_SEED, 4 + number, severity, i))
                        corrupted = apply_so(image, drawn, severity)
                        _save(corrupted, temporary, "corrupted", kind, str(severity), name)
    return {split: len(indices) for split, indices in splits.items()}


def _save(image: Any, *path: str) -> None:
    file = os.path.join(*path)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    image.save(file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(prog=program("timm_sam.digits"), description="Writes scikit-learn's digits as PNG folders.")
    parser.add_argument("folder", metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--size", type=int, default=SIZE, metavar="N", help="height and width of the images in pixels")
    parser.add_argument("--tune", action="store_true",
                        help="split the training part once more, to choose hyperparameters without validation images")
    parser.add_argument("--train-size", type=int, default=None, metavar="N",
                        help="keep N training images, of each digit in proportion; none: all")
    parser.add_argument("--label-noise", type=float, default=0.0, metavar="SHARE",
                        help="give this share of the training images a wrong label; validation labels stay true")
    parser.add_argument("--corruptions", action="store_true",
                        help="also write DIR/corrupted/KIND/SEVERITY: five kinds of corruption in three severities")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="draws the images of --train-size and the labels of --label-noise")
    args: argparse.Namespace = parser.parse_args(argv)
    try:
        counts = export(args.folder, args.size, args.tune, args.train_size, args.label_noise, args.seed,
                        args.corruptions)
    except OptionError as e:
        report(parser.prog, e)
        return 2
    print(f"{args.folder}: " + ", ".join(f"{n} images in {split}" for split, n in counts.items()) +
          f", and these shifted by {', '.join(SHIFTS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
