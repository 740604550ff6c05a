"""Image files: which formats are read, which files are passed over, and how their numbers become 8 bits."""
import io
import os
from collections import Counter
from collections.abc import Iterable
from typing import BinaryIO

import numpy as np
from PIL import Image

# Of image folders and tar files, in training as in evaluation: timm's own three, and what else Pillow always reads.
EXTENSIONS = frozenset((".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))

_DEEP = ("I", "F")  # what modes with more than 8 bits begin with
_TO_65535 = ("PNG", "PPM")  # formats whose mode "I" has 16 bits: some versions of Pillow read them so


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not for us: thumbnails, checkpoints of notebooks, macOS's ``._`` files."""
    return name.startswith(".")


def extension(name: str) -> str:
    """``.png`` of ``A.PNG``."""
    return os.path.splitext(name)[1].lower()


def counted(names: Iterable[str]) -> str:
    """Files by their extensions: ``3 files left out, by their names no images: 2 .txt, 1 .md``; empty: none."""
    kinds = Counter(extension(name) or "without extension" for name in names)
    total = sum(kinds.values())
    listed = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
    return f"{total} file{'s' if total > 1 else ''} left out, by their names no images: {listed}" if total else ""


def is_deep(mode: str) -> bool:
    """Whether an image of this mode has more than 8 bits per channel."""
    return mode.startswith(_DEEP)


def eight_bits(image: Image.Image) -> Image.Image:
    """An image with 8 bits per channel: Pillow's own conversion makes 255 of every value above 255.

    Args:
        image: Of any mode; one of 16 bits becomes ``L``, 0 to 65535 as 0 to 255, all others stay as they are.

    Raises:
        ValueError: It has 32-bit numbers, whose range nothing tells.
    """
    if not is_deep(image.mode):
        return image
    if not image.mode.startswith("I;16") and not (image.mode == "I" and image.format in _TO_65535):
        raise ValueError(f"mode {image.mode}, 32-bit numbers of no known range: save it with 8 or 16 bits")
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))


def open_file(path: str) -> BinaryIO:
    """Opens a file to be read; a pipe that has the name of an image is not waited for."""
    return open(path, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))


def readable(file: BinaryIO, mode: str | None) -> BinaryIO:
    """A file from which ``PIL.Image.open`` reads the image with 8 bits, for what opens files itself.

    Args:
        file: Of an image; stays open if it is what is returned.
        mode: That the image is converted to afterwards; nothing is done for one of more than 8 bits.

    Raises:
        OSError: It is no image, too large to be decoded safely, or :func:`eight_bits` refuses it; the file is closed.
    """
    try:
        image = Image.open(file)
        if not is_deep(image.mode) or (mode and is_deep(mode)):
            file.seek(0)
            return file
        buffer = io.BytesIO()
        eight_bits(image).save(buffer, "BMP")
    except Image.DecompressionBombError as e:
        file.close()
        raise OSError(str(e)) from e
    except ValueError as e:
        file.close()
        raise OSError(f"{getattr(file, 'name', 'image')}: {e}") from e
    except OSError:
        file.close()
        raise
    file.close()
    buffer.seek(0)
    return buffer
