"""scikit-learn's digits as an image folder: ``python -m timm_sam.digits DIR``.

1,797 real scans of handwritten digits (UCI Optical Recognition of Handwritten Digits, 8x8 grey levels 0 to 16), which
scikit-learn ships inside its package. Written as ``DIR/train/<digit>/<index>.png`` and ``DIR/validation/...``, the
layout of an ImageNet folder. Needs the extra ``digits``.
"""
import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence

from .errors import OptionError, report
from .options import OptionParser

VALIDATION_SHARE = 0.2
SPLIT_SEED = 0


def export(folder: str, size: int = 32, tune: bool = False) -> dict[str, int]:
    """Writes the images.

    Args:
        folder: Where; must not exist, or hold nothing.
        size: Height and width in pixels, >= 8; scans are enlarged bicubically.
        tune: Split the training part once more, and leave the validation part out: a data set for choosing
            hyperparameters without having seen the validation images.

    Returns:
        Number of images per split.

    Raises:
        OptionError: The folder is in use, the size is too small, or scikit-learn is missing.
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
    if os.path.isdir(folder) and os.listdir(folder) or os.path.isfile(folder):
        raise OptionError(f"{folder} is in use: remove it, or name another folder")

    data = load_digits()
    train, validation = train_test_split(
        np.arange(len(data.target)), test_size=VALIDATION_SHARE, stratify=data.target, random_state=SPLIT_SEED)
    if tune:
        train, validation = train_test_split(
            train, test_size=VALIDATION_SHARE, stratify=data.target[train], random_state=SPLIT_SEED)
    splits = {"train": train, "validation": validation}
    parent = os.path.dirname(os.path.abspath(folder))
    try:
        os.makedirs(parent, exist_ok=True)
    except OSError as e:
        raise OptionError(f"{folder} cannot be made ({e.strerror}): name another folder") from e
    # written aside and moved in one piece: an interrupted export leaves nothing that looks like a data set
    temporary = tempfile.mkdtemp(dir=parent, prefix=".digits-")
    try:
        for split, indices in splits.items():
            for i in sorted(indices.tolist()):
                path = os.path.join(temporary, split, str(data.target[i]), f"{i:04d}.png")
                os.makedirs(os.path.dirname(path), exist_ok=True)
                grey = np.round(data.images[i] * (255 / 16)).astype(np.uint8)
                Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC).save(path)
        os.chmod(temporary, 0o755)
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return {split: len(indices) for split, indices in splits.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(prog="python -m timm_sam.digits", description="Writes scikit-learn's digits as PNG folders.")
    parser.add_argument("folder", metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--size", type=int, default=32, metavar="N", help="height and width of the images in pixels")
    parser.add_argument("--tune", action="store_true",
                        help="split the training part once more, to choose hyperparameters without validation images")
    args: argparse.Namespace = parser.parse_args(argv)
    try:
        counts = export(args.folder, args.size, args.tune)
    except OptionError as e:
        report(parser.prog, e)
        return 2
    print(f"{args.folder}: " + ", ".join(f"{n} images in {split}" for split, n in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
