"""Fashion-MNIST as an image folder: ``python -m timm_sam.fashion DIR``.

70,000 pictures of clothes, 28x28 grey levels (Xiao et al., https://arxiv.org/abs/1708.07747), from the files that
Debian's package ``dataset-fashion-mnist`` installs. Written as ``DIR/train/<class>/<index>.png`` (a class-balanced part
of the 60,000 training images) and ``DIR/validation/...`` (all 10,000 test images).
"""
import gzip
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..cli.errors import OptionError, one_line, report
from ..cli.new_folder import check_new, written_aside
from ..cli.parser import OptionParser, program

SOURCE = "/usr/share/datasets/fashion-mnist"
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
SPLITS = {"train": "train", "validation": "t10k"}
_IMAGES, _LABELS = 2051, 2049  # the numbers that files of the IDX format begin with


def export(folder: str, train_size: int | None = None, source: str = SOURCE, seed: int = 0) -> dict[str, int]:
    """Writes the images.

    Args:
        folder: Where; must not exist, or hold nothing.
        train_size: Number of training images to keep, a tenth of each class; None keeps all.
        source: Folder of the four files.
        seed: Draws the kept images.

    Returns:
        Number of images per split.

    Raises:
        OptionError: The files are not there, or no such files; the size is out of range, or no multiple of ten; the
            folder is in use or cannot be written.
    """
    check_new(folder)
    data = {split: (_read(source, f"{name}-images-idx3-ubyte.gz", _IMAGES),
                    _read(source, f"{name}-labels-idx1-ubyte.gz", _LABELS)) for split, name in SPLITS.items()}
    kept = {split: np.arange(len(labels)) for split, (_, labels) in data.items()}
    if train_size is not None:
        labels = data["train"][1]
        each, rest = divmod(train_size, len(CLASSES))
        least = min(int((labels == number).sum()) for number in range(len(CLASSES)))
        if rest or not 1 <= each <= least:
            raise OptionError(f"--train-size {train_size} is not a multiple of {len(CLASSES)} in {len(CLASSES)}.."
                              f"{least * len(CLASSES)}: as many of each class are kept")
        generator = np.random.default_rng(seed)
        kept["train"] = np.concatenate([generator.choice(np.flatnonzero(labels == number), each, replace=False)
                                        for number in range(len(CLASSES))])
    with written_aside(folder, ".fashion-") as temporary:
        for split, (images, labels) in data.items():
            for name in CLASSES:
                os.makedirs(os.path.join(temporary, split, name))
            for index in np.sort(kept[split]).tolist():
                path = os.path.join(temporary, split, CLASSES[labels[index]], f"{index:05d}.png")
                Image.fromarray(images[index]).save(path)
    return {split: len(indices) for split, indices in kept.items()}


def _read(source: str, name: str, magic: int) -> Any:
    """An array of bytes in the IDX format: a number, the sizes, the values.

    Raises:
        OptionError: There is no such file, or it is something else.
    """
    path = os.path.join(source, name)
    try:
        with gzip.open(path) as f:
            content = f.read()
        header = np.frombuffer(content, ">i4", 1 + (magic & 0xff))
        if header[0] != magic:
            raise ValueError(f"it begins with {header[0]}, not {magic}")
        return np.frombuffer(content, np.uint8, offset=header.nbytes).reshape(tuple(header[1:]))
    except FileNotFoundError:
        raise OptionError(f"--source {source} has no {name}: apt-get install dataset-fashion-mnist, or name the folder "
                          f"of the files") from None
    except (OSError, EOFError, ValueError) as e:
        raise OptionError(f"--source {source}: {name} is no file of Fashion-MNIST ({one_line(e)}): name the folder of "
                          f"the files") from e


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(prog=program("timm_sam.fashion"), description="Writes Fashion-MNIST as PNG folders.")
    parser.add_argument("folder", metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--train-size", type=int, default=None, metavar="N",
                        help="keep N training images, as many of each class; none: all 60,000")
    parser.add_argument("--source", default=SOURCE, metavar="DIR", help="folder of the four files of the data set")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the images of --train-size, >= 0")
    args = parser.parse_args(argv)
    try:
        if args.seed < 0:
            raise OptionError(f"--seed {args.seed} is negative: use 0 or more")
        counts = export(args.folder, args.train_size, args.source, args.seed)
    except OptionError as e:
        report(parser.prog, e)
        return 2
    print(f"{args.folder}: " + ", ".join(f"{n} images in {split}" for split, n in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
