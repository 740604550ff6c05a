"""Which class folders an evaluation set must have, and which classes they are."""
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from timm.utils.misc import natural_key

from ...cli.errors import OptionError
from .corruptions import is_part
from .folders import some
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

_WORDNET_ID = re.compile(r"n\d{8}")


@dataclass
class Classes:
    """Which class folders a set must have: ``names[i]`` are those of class i; others are unknown.

    ``index`` maps a folder's name to its class, None if it is none; folders in ``ignored`` are left out.
    """

    what: str
    names: Sequence[str]
    index: Callable[[str], int | None]
    space: LabelSpace
    ignored: frozenset[str] = frozenset()


def classes_of(name: str, root: str, folders: Sequence[str], num_classes: int,
               class_to_idx: Mapping[str, int] | None, flag: str) -> Classes:
    """The classes of an evaluation set.

    Args:
        name: Of the set.
        root: Its folder of class folders.
        folders: The names of these.
        num_classes: Number of the model's outputs.
        class_to_idx: Training label space, folder name -> output, where it is known.
        flag: What errors begin with.

    Raises:
        OptionError: Which class is which is not known, or not what the model's outputs are.
    """
    if name in ("imagenet", "imagenet-real", "imagenet-sketch") or is_part(name):
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
        return Classes("ObjectNet", labels.folders, index.get, labels.space, labels.others)
    return _training(folders, num_classes, class_to_idx, flag)


def _wordnet(outputs: Sequence[int], space: LabelSpace, what: str) -> Classes:
    names = [imagenet_wordnet_ids()[output] for output in outputs]
    return Classes(what, names, {name: i for i, name in enumerate(names)}.get, space)


def _imagenetv2(folders: Sequence[str], flag: str) -> Classes:
    """Folders named by the class's number (as published) or by its WordNet id, not by both."""
    numbers = [folder for folder in folders if _number(folder) is not None]
    if not numbers:
        return _wordnet(range(IMAGENET_CLASSES), imagenet_space(), "ImageNetV2")
    ids = [folder for folder in folders if _WORDNET_ID.fullmatch(folder)]
    if ids:
        raise OptionError(
            f"{flag}: class folders named by number ({some(numbers)}) and by WordNet id ({some(ids)}) together; "
            f"keep one kind")
    return Classes("ImageNetV2", [str(i) for i in range(IMAGENET_CLASSES)], _number, imagenet_space())


def _number(folder: str) -> int | None:
    """The class that a folder's name is the number of: its value, with or without leading zeros."""
    number = int(folder) if folder.isascii() and folder.isdecimal() else IMAGENET_CLASSES
    return number if number < IMAGENET_CLASSES else None


def named_as_imagenet(folders: Sequence[str], num_classes: int) -> bool:
    """Whether class folders are ImageNet's by their names, for a model of ImageNet."""
    return num_classes == IMAGENET_CLASSES and all(map(_WORDNET_ID.fullmatch, folders))


def _training(folders: Sequence[str], num_classes: int, class_to_idx: Mapping[str, int] | None,
              flag: str) -> Classes:
    space = LabelSpace(f"training ({num_classes} classes)")
    if class_to_idx is not None:
        names = [""] * num_classes
        for folder, index in class_to_idx.items():
            if not 0 <= index < num_classes:
                raise OptionError(
                    f"{flag}: the class map (--class-map) gives {folder!r} number {index}, the model has {num_classes} "
                    f"outputs; use the class map and --num-classes of the training")
            names[index] = names[index] or str(folder)
        return Classes("the class map", names, class_to_idx.get, space)
    if named_as_imagenet(folders, num_classes):
        return _wordnet(range(IMAGENET_CLASSES), imagenet_space(), "ImageNet")
    if len(folders) != num_classes:
        raise OptionError(
            f"{flag}: {len(folders)} class folders ({some(folders)}) for a model with {num_classes} outputs, so that "
            f"which class is which is not known; give --class-map FILE, or a folder of all {num_classes} classes")
    names = sorted(folders, key=natural_key)
    return Classes("the model", names, {name: i for i, name in enumerate(names)}.get, space)
