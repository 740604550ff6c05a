"""The folders of evaluation sets: where they are as published, and what is in them.

Layouts: ImageNet (https://image-net.org), ImageNetV2 (https://github.com/modestyachts/ImageNetV2), ImageNet-R
(https://github.com/hendrycks/imagenet-r), ImageNet-A (https://github.com/hendrycks/natural-adv-examples),
ImageNet-Sketch (https://github.com/HaohanWang/ImageNet-Sketch), ObjectNet (https://objectnet.dev), ImageNet-C
(https://github.com/hendrycks/robustness; see :mod:`.corruptions`).
"""
import os
from collections.abc import Sequence

from ...cli.errors import OptionError
from ...cli.image_files import EXTENSIONS, extension, is_hidden

# What --eval-root looks for below its folder, the first that exists; a set's name -> folders, in the order of tables.
PUBLISHED: dict[str, tuple[str, ...]] = {
    "imagenet": ("imagenet/val", "ImageNet/val", "imagenet-1k/val", "imagenet1k/val", "ILSVRC2012/val", "val"),
    "imagenetv2": ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency", "imagenetv2"),
    "imagenet-r": ("imagenet-r",),
    "imagenet-a": ("imagenet-a",),
    "imagenet-sketch": ("imagenet-sketch", "ImageNet-Sketch", "sketch"),
    "objectnet": ("objectnet-1.0", "objectnet"),
    "imagenet-c": ("imagenet-c", "ImageNet-C"),
}

# Where the class folders are if DIR is the folder around them, as the archives unpack.
_INSIDE: dict[str, tuple[str, ...]] = {
    "imagenet": ("val",),
    "imagenet-real": ("val",),
    "imagenetv2": ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency"),
    "imagenet-r": ("imagenet-r",),
    "imagenet-a": ("imagenet-a",),
    "imagenet-sketch": ("sketch", "imagenet-sketch"),
    "objectnet": ("images", "objectnet-1.0/images"),
}


def find_suites(root: str) -> tuple[dict[str, str], list[str]]:
    """Looks for the published folders (``PUBLISHED``) below ``root``.

    Returns:
        ``(found, missing)``: name -> folder for ``open_suite``, and the names without one; both in ``PUBLISHED``'s
        order. Only the folders' existence is looked at.

    Raises:
        OptionError: ``root`` is not a folder.
    """
    if not os.path.isdir(root):
        raise OptionError(f"--eval-root {root}: no such folder; give the one that holds the evaluation sets")
    found = {}
    for name, folders in PUBLISHED.items():
        paths = [os.path.join(root, *folder.split("/")) for folder in folders]
        path = next((path for path in paths if os.path.isdir(path)), None)
        if path is not None:
            found[name] = path
    return found, [name for name in PUBLISHED if name not in found]


def class_root(name: str, folder: str, flag: str) -> str:
    """The folder of class folders: ``folder``, or the one in it where the archive of the set unpacks it.

    Raises:
        OptionError: There is no such folder; the message begins with ``flag``.
    """
    if os.path.isfile(folder):
        raise OptionError(f"{flag}: {folder} is a file, and suites and analyses read folders; unpack it")
    if not os.path.isdir(folder):
        raise OptionError(f"{flag}: no such folder; check the path")
    for inside in _INSIDE.get(name, ()):
        path = os.path.join(folder, *inside.split("/"))
        if os.path.isdir(path):
            return path
    return os.path.normpath(folder)


def class_folders(root: str, flag: str) -> list[str]:
    """The names of the class folders in ``root``, sorted.

    Raises:
        OptionError: There are none, or images beside them, or the folder cannot be read.
    """
    entries = _entries(root, flag)
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise OptionError(f"{flag}: {root} has no class folders; give the folder that holds them")
    stray = sorted(entry.name for entry in entries if extension(entry.name) in EXTENSIONS and not entry.is_dir())
    if stray:
        raise OptionError(f"{flag}: {root} has {len(stray)} images beside its class folders ({some(stray, 3)}), which "
                          f"are of no class; move them away")
    return names


def images_in(folder: str, flag: str) -> tuple[list[str], list[str]]:
    """The names of a class folder's image files, and of its other files.

    Raises:
        OptionError: It holds folders: nothing says what those are.
    """
    images: list[str] = []
    others: list[str] = []
    for entry in _entries(folder, flag):
        if entry.is_dir():
            raise OptionError(
                f"{flag}: {folder} holds a folder, {entry.name!r}, where images are expected; give the folder whose "
                f"folders are the classes")
        (images if extension(entry.name) in EXTENSIONS else others).append(entry.name)
    return images, others


def _entries(folder: str, flag: str) -> list[os.DirEntry]:
    """What is in a folder and not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_hidden(entry.name)]
    except OSError as e:
        raise OptionError(f"{flag}: {folder} cannot be read: {e.strerror}; check its permissions") from None


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first of some names, for errors."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
