"""Evaluation sets: their samples and classes, by the name of the set and its folder."""
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from timm.utils.misc import natural_key

from ...cli.errors import OptionError
from ...cli.image_files import counted
from . import corruptions
from .classes import Classes, classes_of, named_as_imagenet
from .folders import PUBLISHED, class_folders, class_root, images_in, some
from .label_spaces import IMAGENET_CLASSES, LabelSpace

# Sets of other names that are in distribution, whatever their place.
REAL = "imagenet-real"  # ImageNet's images with other labels: see :mod:`.real`
ID_NAMES = ("id", "val", "valid", "validation", "test", "eval")


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
        crop_pct: Share of the image that the crop keeps, if it is not the options' or the model's own: of images that
            are cropped already.
        flags: What makes its numbers not those of the whole set.
        notes: What is worth knowing and changes no number.
        origin: The flags that the set is from, with their values; empty: ``--eval NAME=DIR``.
    """

    name: str
    root: str
    samples: list[tuple[str, int]]
    space: LabelSpace
    kind: str
    num_classes: int
    crop_border_pixels: int = 0
    crop_pct: float | None = None
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origin: str = ""

    @property
    def flag(self) -> str:
        """What errors of this set begin with."""
        return self.origin or f"--eval {self.name}={self.root}"

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


def open_suites(folders: Mapping[str, str], num_classes: int, class_to_idx: Mapping[str, int] | None = None,
                allow_partial: bool = False, origins: Mapping[str, str] | None = None) -> list[Suite]:
    """``open_suite`` of several sets (name -> folder), in their order.

    ``origins`` are the flags that some of them are from, by name, where these are not ``--eval NAME=DIR``.

    Where none of them is in distribution, the first one is, unless it is a published set. Folders that only their
    rank numbers must be the same in all sets; with ``allow_partial`` they may be some of those of a complete one.

    Raises:
        OptionError: Such folders differ, and all that ``open_suite`` raises.
    """
    flags = {name: _flag(name, folder, (origins or {}).get(name)) for name, folder in folders.items()}
    ranked = {} if class_to_idx is not None else _ranked(folders, num_classes, flags)
    complete = next((name for name, names in ranked.items() if len(names) == num_classes), "")
    ranks = {folder: i for i, folder in enumerate(sorted(ranked.get(complete, ()), key=natural_key))}
    suites = []
    for name, folder in folders.items():
        names = ranked.get(name, ())
        shared = bool(ranks) and bool(names) and (allow_partial or len(names) == num_classes)
        other = [folder for folder in names if folder not in ranks]
        if shared and other:
            raise OptionError(
                f"{flags[name]}: class folders ({some(other)}) that {complete}={folders[complete]} lacks, so "
                f"that their order numbers the two differently; give --class-map FILE, or rename them")
        suites.append(open_suite(name, folder, num_classes, ranks if shared else class_to_idx, allow_partial,
                                 flags[name]))
    if suites and not _is_published(suites[0].name) and all(suite.kind == "ood" for suite in suites):
        suites[0].kind = "id"
    return suites


def open_suite(name: str, folder: str, num_classes: int, class_to_idx: Mapping[str, int] | None = None,
               allow_partial: bool = False, origin: str | None = None) -> Suite:
    """Finds the classes and images of an evaluation set.

    The names in ``PUBLISHED`` have their own label spaces and take the folder of class folders or the one around it
    as the archive unpacks. Any other name is a set of class folders in the training label space: numbered by
    ``class_to_idx``; without it as ImageNet, if the model has 1000 outputs and the folders are WordNet ids; else in
    timm's natural order, if there are as many folders as outputs.

    ImageNet, also with reassessed labels, ImageNetV2 (as in the SAM-ON paper's Table 4) and the names in ``ID_NAMES``
    are in distribution, all others out of it (but see ``open_suites``).

    Args:
        name: Of the set.
        folder: Where it is.
        num_classes: Number of the model's outputs.
        class_to_idx: Training label space, folder name -> output, where it is known (--class-map, training data).
        allow_partial: Turns missing classes into an entry of ``flags``.
        origin: The flags that the set is from, for errors; None: ``--eval NAME=DIR``.

    Raises:
        OptionError: The folder is missing or not the set it is said to be: a class of the label space has no images
            (see ``allow_partial``), a class folder is in no label space, the model's outputs do not fit.
    """
    flag = _flag(name, folder, origin)
    if _is_published(name) and num_classes != IMAGENET_CLASSES:
        raise OptionError(
            f"{flag}: {name.split('/')[0]} needs a model with {IMAGENET_CLASSES} outputs, this one has {num_classes}; "
            f"evaluate an ImageNet model, or give the set another name to take its folders as training classes")
    root = class_root(name, folder, flag)
    names = class_folders(root, flag)
    classes = classes_of(name, root, names, num_classes, class_to_idx, flag)
    return _collect(name, root, names, classes, allow_partial, flag)


def _is_published(name: str) -> bool:
    """Whether a set, or what it is a part of, has its own label space."""
    return name in PUBLISHED or name == REAL or corruptions.is_part(name)


def _flag(name: str, folder: str, origin: str | None) -> str:
    return origin or f"--eval {name}={folder}"


def _ranked(folders: Mapping[str, str], num_classes: int, flags: Mapping[str, str]) -> dict[str, list[str]]:
    """The class folders of those sets (name -> folder) whose classes are known by their folders' order only."""
    ranked = {}
    for name, folder in folders.items():
        if not _is_published(name):
            names = class_folders(class_root(name, folder, flags[name]), flags[name])
            if not named_as_imagenet(names, num_classes):
                ranked[name] = names
    return ranked


def _collect(name: str, root: str, folders: Sequence[str], classes: Classes, allow_partial: bool,
             flag: str) -> Suite:
    targets = {folder: classes.index(folder) for folder in folders if folder not in classes.ignored}
    unknown = [folder for folder, target in targets.items() if target is None]
    if unknown:
        raise OptionError(
            f"{flag}: {len(unknown)} of {len(folders)} class folders in {root} are not classes of {classes.what}: "
            f"{some(unknown)}; check that this is {name}, and move other folders away")
    samples: list[tuple[str, int]] = []
    left_out = 0
    no_images: list[str] = []
    for folder in folders:
        images, others = images_in(os.path.join(root, folder), flag)
        no_images += others
        target = targets.get(folder)
        if target is None:
            left_out += len(images)
        else:
            samples += [(os.path.join(root, folder, image), target) for image in images]
    if not samples:
        seen = f" ({counted(no_images)})" if no_images else ""
        raise OptionError(f"{flag}: no images in the class folders of {root}{seen}; unpack the data set again")
    samples.sort(key=lambda sample: (sample[1], os.path.basename(sample[0]), sample[0]))

    # an output without a name in the class map is none of the training's classes
    wanted = [i for i, class_name in enumerate(classes.names) if class_name]
    present = {target for _, target in samples}
    missing = [classes.names[i] for i in wanted if i not in present]
    if missing and not allow_partial:
        raise OptionError(
            f"{flag}: {len(missing)} of {len(wanted)} classes of {classes.what} have no folder or no images in {root}: "
            f"{some(missing)}; complete the set, or add --allow-partial to score the others")
    return Suite(
        name=name,
        root=root,
        samples=samples,
        space=classes.space,
        kind="id" if name in ("imagenet", "imagenetv2", REAL) or name.lower() in ID_NAMES else "ood",
        num_classes=len(classes.names),
        crop_border_pixels=2 if name == "objectnet" else 0,  # its images have a red border one pixel wide
        crop_pct=1.0 if corruptions.is_part(name) else None,  # its images are centre crops of 224 pixels
        flags=[f"partial: {len(wanted) - len(missing)} of {len(wanted)} classes"] if missing else [],
        notes=[*([f"{left_out} images of classes outside ImageNet left out"] if left_out else []),
               *filter(None, [counted(no_images)])],
        origin=flag,
    )
