"""Label spaces: which model outputs are the classes of an evaluation set, and what counts as a hit.

ImageNet-R and -A score 200 of ImageNet's 1000 outputs (https://arxiv.org/abs/2006.16241,
https://arxiv.org/abs/1907.07174); an ObjectNet class may own several outputs (https://objectnet.dev).
"""
import functools
import importlib.resources
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from ...cli.errors import OptionError, one_line

IMAGENET_CLASSES = 1000
FOLDERS_FILE = "folder_to_objectnet_label.json"
LABELS_FILE = "objectnet_to_imagenet_1k.json"
NAMES_FILE = "imagenet_to_label_2012_v2"
ORDER_FILE = "pytorch_to_imagenet_2012_id.json"

_NO_CLASS = torch.iinfo(torch.int64).min  # no target has this value


@dataclass(frozen=True)
class LabelSpace:
    """The classes of an evaluation set as a view of a model's K outputs.

    Attributes:
        name: For tables and results, e.g. ``imagenet-r (200 classes)``.
        groups: ``groups[i]`` are the outputs that class i owns, disjoint; None: the K outputs are the classes.
        sets: Where images have several labels: target t stands for the classes ``sets[t]``, any of which is right;
            None: target t is class t.

    Raises:
        ValueError: A group is empty or an output occurs twice, or there are sets of groups.
    """

    name: str
    groups: tuple[tuple[int, ...], ...] | None = None
    sets: tuple[tuple[int, ...], ...] | None = None
    _needed: int = field(default=0, init=False, repr=False, compare=False)  # number of outputs
    _tables: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.sets is not None and (self.groups is not None or not all(self.sets)):
            raise ValueError(f"label space {self.name!r}: sets of classes must be of outputs, and not empty")
        if self.groups is None:
            return
        outputs = Counter(output for group in self.groups for output in group)
        if not self.groups or not all(self.groups) or min(outputs) < 0 or max(outputs.values()) > 1:
            raise ValueError(f"label space {self.name!r}: groups of outputs must be disjoint, not empty and from 0 on")
        object.__setattr__(self, "_needed", max(outputs) + 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}  # tensors of a GPU stay in the process that made them

    @property
    def differs(self) -> bool:
        """Whether hits in this space and among all K outputs are two numbers (``top1``, ``top1_1000way``)."""
        return self.groups is not None

    def num_classes(self, outputs: int) -> int:
        """Number of classes for a model with ``outputs`` outputs."""
        return outputs if self.groups is None else len(self.groups)

    def reduce(self, logits: Tensor) -> Tensor:
        """The logits of the classes: of each group the best one. Differentiable; no copy without groups.

        Args:
            logits: ``(B, K)``, any floating point type, any device.

        Returns:
            ``(B, C)``, C the number of classes.

        Raises:
            ValueError: There are fewer outputs than the groups name.
        """
        if self.groups is None:
            return logits
        if logits.shape[1] < self._needed:
            raise ValueError(f"label space {self.name!r} needs {self._needed} outputs, not {logits.shape[1]}")
        members = logits.index_select(1, self._members(logits.device))
        if members.shape[1] == len(self.groups):
            return members
        # max, not amax: a group's gradient goes to one output, undivided, though its padding repeats the first one
        return members.unflatten(1, (len(self.groups), -1)).max(dim=2).values

    def accepted(self, classes: int, targets: Tensor) -> Tensor:
        """Which classes are right.

        Args:
            classes: Number of all of them, as :meth:`reduce` gives logits.
            targets: ``(B,)``, int64.

        Returns:
            ``(B, classes)``, boolean.
        """
        if self.sets is None:
            return torch.arange(classes, device=targets.device) == targets[:, None]
        key = ("sets", targets.device)
        if key not in self._tables:
            width = max(map(len, self.sets))
            self._keep(key, [[*several, *several[:1] * (width - len(several))] for several in self.sets],
                       targets.device)
        right = torch.zeros(len(targets), classes, dtype=torch.bool, device=targets.device)
        return right.scatter_(1, self._tables[key][targets], True)

    def label_of(self, targets: Tensor) -> Tensor:
        """``(B,)``: a class of each target, the first of several."""
        if self.sets is None:
            return targets
        return torch.tensor([several[0] for several in self.sets], device=targets.device)[targets]

    def right_of_all(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Which samples are right by the best of all K outputs: one outside the target's group is wrong.

        Args:
            logits: ``(B, K)``, the model's outputs, not reduced.
            targets: ``(B,)``, int64: classes of this space, 0 to C - 1.

        Returns:
            ``(B,)``, boolean.
        """
        # not argmax: ties fall as for timm.utils.accuracy with topk=(1, 5), which counts in the space itself
        best = logits.topk(min(5, logits.shape[1]), 1, True, True)[1][:, 0]
        return (best if self.groups is None else self.owners(logits.shape[1], logits.device)[best]) == targets

    def owners(self, outputs: int, device: torch.device) -> Tensor:
        """``(outputs,)``: the class of each output; what is no class is none that a target has.

        Only for spaces that differ from the outputs.
        """
        key = ("owners", outputs, device)
        if key not in self._tables:
            assert self.groups is not None
            owners = [_NO_CLASS] * outputs
            for index, group in enumerate(self.groups):
                for output in group:
                    owners[output] = index
            self._keep(key, owners, device)
        return self._tables[key]

    def _members(self, device: torch.device) -> Tensor:
        """The groups one after the other, each padded to the largest one's length with its first output."""
        key = ("members", device)
        if key not in self._tables:
            assert self.groups is not None
            width = max(len(group) for group in self.groups)
            self._keep(key, [i for group in self.groups for i in (*group, *group[:1] * (width - len(group)))], device)
        return self._tables[key]

    def _keep(self, key: Any, values: list, device: torch.device) -> None:
        with torch.inference_mode(False):  # a table made inside inference mode could not be used under autograd later
            self._tables[key] = torch.tensor(values, device=device)


@functools.cache
def imagenet_wordnet_ids() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1k in the order of model outputs."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


@functools.cache
def imagenet_subset(variant: str) -> tuple[int, ...]:
    """The outputs of ImageNet-1k that are the classes of ImageNet-R (``r``) or -A (``a``): timm's list, ascending."""
    file = importlib.resources.files("timm.data") / "_info" / f"imagenet_{variant}_indices.txt"
    return tuple(sorted(int(line) for line in file.read_text(encoding="utf-8").split()))


def imagenet_space() -> LabelSpace:
    """ImageNet-1k: also of ImageNetV2 and ImageNet-Sketch."""
    return LabelSpace("imagenet")


def subset_space(name: str, outputs: Sequence[int]) -> LabelSpace:
    """The space whose class i is ``outputs[i]`` alone.

    Raises:
        ValueError: There is no output, or one occurs twice.
    """
    return LabelSpace(f"{name} ({len(outputs)} classes)", tuple((int(output),) for output in outputs))


def imagenet_r_space() -> LabelSpace:
    return subset_space("imagenet-r", imagenet_subset("r"))


def imagenet_a_space() -> LabelSpace:
    return subset_space("imagenet-a", imagenet_subset("a"))


@dataclass(frozen=True)
class ObjectNetLabels:
    """What ObjectNet's ``mappings`` folder says.

    Attributes:
        space: One group of ImageNet outputs per overlapping class.
        folders: The image folder of each class of ``space``, in the order of its classes (sorted by name).
        others: Image folders of the classes that ImageNet lacks.
    """

    space: LabelSpace
    folders: tuple[str, ...]
    others: frozenset[str]


def objectnet_labels(mappings: str, flag: str = "--eval objectnet", outputs: int = IMAGENET_CLASSES) -> ObjectNetLabels:
    """Reads the four files of ObjectNet's own ``mappings`` folder.

    A label's ImageNet names are looked up in the names file, whose line numbers (from 0) are ILSVRC2012 ids; the order
    file turns those into outputs. A name that stands on two lines ("crane") keeps both of its lines; a label that used
    it could not be resolved, and is an error (the published labels do not).

    Args:
        mappings: The folder.
        flag: What errors begin with.
        outputs: Number of ImageNet classes.

    Raises:
        OptionError: A file is missing, malformed, or does not agree with the others; the message names it.
    """
    names = _names(mappings, flag, outputs)
    output_of_line = _order(mappings, flag, outputs)
    folder_of = _folder_of_label(mappings, flag)
    groups: dict[str, tuple[int, ...]] = {}
    taken: dict[int, str] = {}
    for label, joined in _strings(mappings, LABELS_FILE, flag).items():
        if label not in folder_of:
            raise _malformed(mappings, LABELS_FILE, flag, f"label {label!r} has no folder in {FOLDERS_FILE}")
        group = []
        for name in joined.split("; "):
            lines = names.get(name.strip(), [])
            if len(lines) != 1:
                what = f"stands on {len(lines)} lines of" if lines else "is not in"
                raise _malformed(mappings, LABELS_FILE, flag, f"label {label!r}: {name!r} {what} {NAMES_FILE}")
            output = output_of_line[lines[0]]
            if output in taken:
                raise _malformed(mappings, LABELS_FILE, flag, f"{name!r} belongs to {taken[output]!r} and {label!r}")
            taken[output] = label
            group.append(output)
        groups[folder_of[label]] = tuple(sorted(group))
    if not groups:
        raise _malformed(mappings, LABELS_FILE, flag, "no label")
    folders = tuple(sorted(groups))
    return ObjectNetLabels(
        LabelSpace(f"objectnet ({len(folders)} groups)", tuple(groups[folder] for folder in folders)),
        folders,
        frozenset(folder_of.values()) - set(folders),
    )


def _names(mappings: str, flag: str, outputs: int) -> dict[str, list[int]]:
    """ImageNet name -> its lines in the names file."""
    lines = [line.strip() for line in _text(mappings, NAMES_FILE, flag).rstrip().splitlines()]
    if len(lines) != outputs or not all(lines):
        raise _malformed(mappings, NAMES_FILE, flag, f"{sum(map(bool, lines))} names instead of {outputs}, one a line")
    names: dict[str, list[int]] = {}
    for number, name in enumerate(lines):
        names.setdefault(name, []).append(number)
    return names


def _order(mappings: str, flag: str, outputs: int) -> dict[int, int]:
    """Line of the names file -> model output."""
    try:
        order = {int(line): int(output) for output, line in _mapping(mappings, ORDER_FILE, flag).items()}
    except (TypeError, ValueError) as e:
        raise _malformed(mappings, ORDER_FILE, flag, one_line(e)) from None
    if not set(order) == set(order.values()) == set(range(outputs)):
        raise _malformed(mappings, ORDER_FILE, flag, f"not a one-to-one map of 0..{outputs - 1} to itself")
    return order


def _folder_of_label(mappings: str, flag: str) -> dict[str, str]:
    folder_of: dict[str, str] = {}
    for folder, label in _strings(mappings, FOLDERS_FILE, flag).items():
        if label in folder_of:
            raise _malformed(
                mappings, FOLDERS_FILE, flag, f"folders {folder_of[label]!r} and {folder!r} have one label, {label!r}")
        folder_of[label] = folder
    return folder_of


def _strings(mappings: str, file: str, flag: str) -> dict[str, str]:
    content = _mapping(mappings, file, flag)
    for key, value in content.items():
        if not isinstance(value, str):
            raise _malformed(mappings, file, flag, f"{key!r} is {value!r}, not a string")
    return content


def _mapping(mappings: str, file: str, flag: str) -> dict[str, Any]:
    try:
        content = json.loads(_text(mappings, file, flag))
    except json.JSONDecodeError as e:
        raise _malformed(mappings, file, flag, f"not JSON: {e}") from None
    if not isinstance(content, dict):
        raise _malformed(mappings, file, flag, f"a JSON {type(content).__name__}, not an object")
    return content


def _text(mappings: str, file: str, flag: str) -> str:
    try:
        with open(os.path.join(mappings, file), encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as e:
        raise _malformed(mappings, file, flag, getattr(e, "strerror", None) or one_line(e)) from None


def _malformed(mappings: str, file: str, flag: str, what: str) -> OptionError:
    return OptionError(
        f"{flag}: {os.path.join(mappings, file)}: {what}; restore the mappings folder from the published objectnet-1.0")
