"""Evaluation sets by name: their folders as published, their classes, and the samples of both.

Layouts: ImageNet (https://image-net.org), ImageNetV2 (https://github.com/modestyachts/ImageNetV2), ImageNet-R
(https://github.com/hendrycks/imagenet-r), ImageNet-A (https://github.com/hendrycks/natural-adv-examples),
ImageNet-Sketch (https://github.com/HaohanWang/ImageNet-Sketch), ObjectNet (https://objectnet.dev).
"""
import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from timm.data.readers import get_img_extensions
from timm.utils.misc import natural_key

from ...cli.errors import OptionError
from .label_spaces import (
    IMAGENET_CLASSES,
    LabelSpace,
    imagenet_a_space,
    imagenet_r_space,
    imagenet_space,
    imagenet_subset,
    imagenet_wordnet_ids,
    objectnet_labels,
)

# What --eval-root looks for below its folder, the first that exists; a set's name -> folders, in the order of tables.
PUBLISHED: dict[str, tuple[str, ...]] = {
    "imagenet": ("imagenet/val", "ImageNet/val", "imagenet-1k/val", "imagenet1k/val", "ILSVRC2012/val", "val"),
    "imagenetv2": ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency", "imagenetv2"),
    "imagenet-r": ("imagenet-r",),
    "imagenet-a": ("imagenet-a",),
    "imagenet-sketch": ("imagenet-sketch", "ImageNet-Sketch", "sketch"),
    "objectnet": ("objectnet-1.0", "objectnet"),
}

# Where the class folders are if DIR is the folder around them, as the archives unpack.
_INSIDE: dict[str, tuple[str, ...]] = {
    "imagenet": ("val",),
    "imagenetv2": ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency"),
    "imagenet-r": ("imagenet-r",),
    "imagenet-a": ("imagenet-a",),
    "imagenet-sketch": ("sketch", "imagenet-sketch"),
    "objectnet": ("images", "objectnet-1.0/images"),
}

# Sets of other names that are in distribution, whatever their place.
ID_NAMES = ("id", "val", "valid", "validation", "test", "eval")

_WORDNET_ID = re.compile(r"n\d{8}")
_MORE_IMG_EXTENSIONS = {".webp"}  # timm reads it, but does not look for it


@dataclass
class Suite:
    """One evaluation set.

    Attributes:
        name: As in ``--eval NAME=DIR``.
        root: The folder of the class folders.
        samples: ``(path, class)``, sorted by class and file name; classes are those of ``space``.
        space: How the model's outputs become classes.
        kind: ``id`` or ``ood``: in or out of the training distribution.
        num_classes: Of ``space``; more than ``samples`` have where the set is partial.
        crop_border_pixels: What ``create_loader`` is to cut off each side before it resizes.
        flags: What makes its numbers not those of the whole set.
        notes: What is worth knowing and changes no number.
    """

    name: str
    root: str
    samples: list[tuple[str, int]]
    space: LabelSpace
    kind: str
    num_classes: int
    crop_border_pixels: int = 0
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def flag(self) -> str:
        """What errors of this set begin with."""
        return _flag(self.name, self.root)

    @functools.cached_property
    def samples_sha256(self) -> str:
        """Fingerprint: the files' names below ``root`` with their classes and sizes, in order.

        Raises:
            OptionError: A file is gone.
        """
        digest = hashlib.sha256()
        for path, target in self.samples:
            try:
                entry = f"{os.path.relpath(path, self.root)}\0{target}\0{os.path.getsize(path)}\n"
            except OSError as e:
                raise OptionError(f"{self.flag}: {path} cannot be read: {e.strerror}; restore the file") from None
            digest.update(entry.encode("utf-8", "replace"))
        return digest.hexdigest()


@dataclass
class _Classes:
    """Which class folders a set must have: ``names[i]`` are those of class i; others are unknown.

    ``index`` maps a folder's name to its class, None if it is none; folders in ``ignored`` are left out.
    """

    what: str
    names: Sequence[str]
    index: Callable[[str], int | None]
    space: LabelSpace
    ignored: frozenset[str] = frozenset()


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


def open_suites(folders: Mapping[str, str], num_classes: int, class_to_idx: Mapping[str, int] | None = None,
                allow_partial: bool = False) -> list[Suite]:
    """``open_suite`` of several sets (name -> folder), in their order.

    Where none of them is in distribution, the first one is, unless it is a published set. Folders that only their
    rank numbers must be the same in all sets; with ``allow_partial`` they may be some of those of a complete one.

    Raises:
        OptionError: Such folders differ, and all that ``open_suite`` raises.
    """
    ranked = {} if class_to_idx is not None else _ranked(folders, num_classes)
    complete = next((name for name, names in ranked.items() if len(names) == num_classes), None)
    ranks = {folder: i for i, folder in enumerate(sorted(ranked.get(complete, ()), key=natural_key))}
    suites = []
    for name, folder in folders.items():
        names = ranked.get(name, ())
        shared = bool(ranks) and bool(names) and (allow_partial or len(names) == num_classes)
        other = [folder for folder in names if folder not in ranks]
        if shared and other:
            raise OptionError(
                f"{_flag(name, folder)}: class folders ({_some(other)}) that {complete}={folders[complete]} lacks, so "
                f"that their order numbers the two differently; give --class-map FILE, or rename them")
        suites.append(open_suite(name, folder, num_classes, ranks if shared else class_to_idx, allow_partial))
    if suites and suites[0].name not in PUBLISHED and all(suite.kind == "ood" for suite in suites):
        suites[0].kind = "id"
    return suites


def open_suite(name: str, folder: str, num_classes: int, class_to_idx: Mapping[str, int] | None = None,
               allow_partial: bool = False) -> Suite:
    """Finds the classes and images of an evaluation set.

    The names in ``PUBLISHED`` have their own label spaces and take the folder of class folders or the one around it
    as the archive unpacks. Any other name is a set of class folders in the training label space: numbered by
    ``class_to_idx``; without it as ImageNet, if the model has 1000 outputs and the folders are WordNet ids; else in
    timm's natural order, if there are as many folders as outputs.

    ``imagenet`` and the names in ``ID_NAMES`` are in distribution, all others out of it (but see ``open_suites``).

    Args:
        name: Of the set.
        folder: Where it is.
        num_classes: Number of the model's outputs.
        class_to_idx: Training label space, folder name -> output, where it is known (--class-map, training data).
        allow_partial: Turns missing classes into an entry of ``flags``.

    Raises:
        OptionError: The folder is missing or not the set it is said to be: a class of the label space has no images
            (see ``allow_partial``), a class folder is in no label space, the model's outputs do not fit.
    """
    flag = _flag(name, folder)
    if name in PUBLISHED and num_classes != IMAGENET_CLASSES:
        raise OptionError(
            f"{flag}: {name} needs a model with {IMAGENET_CLASSES} outputs, this one has {num_classes}; evaluate an "
            f"ImageNet model, or give the set another name to take its folders as training classes")
    root = _class_root(name, folder, flag)
    names = sorted(_class_folders(root, flag))
    classes = _classes(name, root, names, num_classes, class_to_idx, flag)
    return _collect(name, root, names, classes, allow_partial, flag)


def _flag(name: str, folder: str) -> str:
    return f"--eval {name}={folder}"


def _class_root(name: str, folder: str, flag: str) -> str:
    if not os.path.isdir(folder):
        raise OptionError(f"{flag}: no such folder; check the path")
    for inside in _INSIDE.get(name, ()):
        path = os.path.join(folder, *inside.split("/"))
        if os.path.isdir(path):
            return path
    return os.path.normpath(folder)


def _class_folders(root: str, flag: str) -> list[str]:
    names = [entry.name for entry in _entries(root, flag) if entry.is_dir()]
    if not names:
        raise OptionError(f"{flag}: {root} has no class folders; give the folder that holds them")
    return names


def _classes(name: str, root: str, folders: Sequence[str], num_classes: int,
             class_to_idx: Mapping[str, int] | None, flag: str) -> _Classes:
    if name in ("imagenet", "imagenet-sketch"):
        return _wordnet(range(IMAGENET_CLASSES), imagenet_space(), "ImageNet")
    if name == "imagenetv2":
        return _imagenetv2(folders, flag)
    if name == "imagenet-r":
        return _wordnet(imagenet_subset("r"), imagenet_r_space(), "ImageNet-R")
    if name == "imagenet-a":
        return _wordnet(imagenet_subset("a"), imagenet_a_space(), "ImageNet-A")
    if name == "objectnet":
        labels = objectnet_labels(os.path.join(os.path.dirname(os.path.abspath(root)), "mappings"), flag)
        index = {folder: i for i, folder in enumerate(labels.folders)}
        return _Classes("ObjectNet", labels.folders, index.get, labels.space, labels.others)
    return _training(folders, num_classes, class_to_idx, flag)


def _wordnet(outputs: Sequence[int], space: LabelSpace, what: str) -> _Classes:
    names = [imagenet_wordnet_ids()[output] for output in outputs]
    return _Classes(what, names, {name: i for i, name in enumerate(names)}.get, space)


def _imagenetv2(folders: Sequence[str], flag: str) -> _Classes:
    """Folders named by the class's number (as published) or by its WordNet id, not by both."""
    numbers = [folder for folder in folders if _number(folder) is not None]
    if not numbers:
        return _wordnet(range(IMAGENET_CLASSES), imagenet_space(), "ImageNetV2")
    ids = [folder for folder in folders if _WORDNET_ID.fullmatch(folder)]
    if ids:
        raise OptionError(
            f"{flag}: class folders named by number ({_some(numbers)}) and by WordNet id ({_some(ids)}) together; "
            f"keep one kind")
    return _Classes("ImageNetV2", [str(i) for i in range(IMAGENET_CLASSES)], _number, imagenet_space())


def _number(folder: str) -> int | None:
    """The class that a folder's name is the number of: its value, with or without leading zeros."""
    number = int(folder) if folder.isascii() and folder.isdecimal() else IMAGENET_CLASSES
    return number if number < IMAGENET_CLASSES else None


def _ranked(folders: Mapping[str, str], num_classes: int) -> dict[str, list[str]]:
    """The class folders of those sets (name -> folder) whose classes are known by their folders' order only."""
    ranked = {}
    for name, folder in folders.items():
        if name not in PUBLISHED:
            flag = _flag(name, folder)
            names = sorted(_class_folders(_class_root(name, folder, flag), flag))
            if not _of_imagenet(names, num_classes):
                ranked[name] = names
    return ranked


def _of_imagenet(folders: Sequence[str], num_classes: int) -> bool:
    return num_classes == IMAGENET_CLASSES and all(map(_WORDNET_ID.fullmatch, folders))


def _training(folders: Sequence[str], num_classes: int, class_to_idx: Mapping[str, int] | None,
              flag: str) -> _Classes:
    space = LabelSpace(f"training ({num_classes} classes)")
    if class_to_idx is not None:
        names = [""] * num_classes
        for folder, index in class_to_idx.items():
            if not 0 <= index < num_classes:
                raise OptionError(
                    f"{flag}: the class map (--class-map) gives {folder!r} number {index}, the model has {num_classes} "
                    f"outputs; use the class map and --num-classes of the training")
            names[index] = names[index] or str(folder)
        return _Classes("the class map", names, class_to_idx.get, space)
    if _of_imagenet(folders, num_classes):
        return _wordnet(range(IMAGENET_CLASSES), imagenet_space(), "ImageNet")
    if len(folders) != num_classes:
        raise OptionError(
            f"{flag}: {len(folders)} class folders ({_some(folders)}) for a model with {num_classes} outputs, so that "
            f"which class is which is not known; give --class-map FILE, or a folder of all {num_classes} classes")
    names = sorted(folders, key=natural_key)
    return _Classes("the model", names, {name: i for i, name in enumerate(names)}.get, space)


def _collect(name: str, root: str, folders: Sequence[str], classes: _Classes, allow_partial: bool,
             flag: str) -> Suite:
    unknown = [f for f in folders if f not in classes.ignored and classes.index(f) is None]
    if unknown:
        raise OptionError(
            f"{flag}: {len(unknown)} of {len(folders)} class folders in {root} are not classes of {classes.what}: "
            f"{_some(unknown)}; check that this is {name}, and move other folders away")
    samples: list[tuple[str, int]] = []
    left_out = 0
    for folder in folders:
        images = _images(os.path.join(root, folder), flag)
        if folder in classes.ignored:
            left_out += len(images)
        else:
            target = classes.index(folder)
            samples += [(os.path.join(root, folder, image), target) for image in images]
    if not samples:
        raise OptionError(f"{flag}: no images in the class folders of {root}; unpack the data set again")
    samples.sort(key=lambda sample: (sample[1], os.path.basename(sample[0]), sample[0]))

    # an output without a name in the class map is none of the training's classes
    wanted = [i for i, class_name in enumerate(classes.names) if class_name]
    present = {target for _, target in samples}
    missing = [classes.names[i] for i in wanted if i not in present]
    if missing and not allow_partial:
        raise OptionError(
            f"{flag}: {len(missing)} of {len(wanted)} classes of {classes.what} have no folder or no images in {root}: "
            f"{_some(missing)}; complete the set, or add --allow-partial to score the others")
    return Suite(
        name=name,
        root=root,
        samples=samples,
        space=classes.space,
        kind="id" if name == "imagenet" or name.lower() in ID_NAMES else "ood",
        num_classes=len(classes.names),
        crop_border_pixels=2 if name == "objectnet" else 0,  # its images have a red border one pixel wide
        flags=[f"partial: {len(wanted) - len(missing)} of {len(wanted)} classes"] if missing else [],
        notes=[f"{left_out} images of classes outside ImageNet left out"] if left_out else [],
    )


def _images(folder: str, flag: str) -> list[str]:
    """The names of a class folder's image files.

    Raises:
        OptionError: It holds folders: nothing says what those are.
    """
    extensions = get_img_extensions(as_set=True) | _MORE_IMG_EXTENSIONS
    images = []
    for entry in _entries(folder, flag):
        if entry.is_dir():
            raise OptionError(
                f"{flag}: {folder} holds a folder, {entry.name!r}, where images are expected; give the folder whose "
                f"folders are the classes")
        if os.path.splitext(entry.name)[1].lower() in extensions:
            images.append(entry.name)
    return images


def _entries(folder: str, flag: str) -> list[os.DirEntry]:
    """What is in a folder and not hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as e:
        raise OptionError(f"{flag}: {folder} cannot be read: {e.strerror}; check its permissions") from None


def _some(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
