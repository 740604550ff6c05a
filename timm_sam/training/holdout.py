"""Validation on a part of the training set, so that what is chosen is not chosen on the images that are reported on."""
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from timm.data import ImageDataset
from torch.utils.data import Dataset, IterableDataset

from ..cli.errors import OptionError


def split(targets: Sequence[int], names: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Chooses what is held out: of each class its share, rounded, but at least one image, and not all.

    Which ones are the first by a hash of the seed, the class and the name: so the choice depends on nothing else, and
    a smaller share lies within a larger one.

    Args:
        targets: Class of each sample.
        names: Of each sample, different within a class.
        share: Above 0 and below 1.
        seed: Of the choice.

    Returns:
        Indices of what is left and of what is held out, both ascending.

    Raises:
        ValueError: A class has a single image.
    """
    members: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        members.setdefault(int(target), []).append(index)
    held: set[int] = set()
    for target, indices in members.items():
        if len(indices) < 2:
            raise ValueError(f"class {target} has a single image")
        indices.sort(key=lambda i: hashlib.blake2b(
            f"{seed}/{target}/{names[i]}".encode("utf-8", "surrogateescape"), digest_size=16).digest())
        count = min(len(indices) - 1, max(1, int(share * len(indices) + 0.5)))
        held.update(indices[:count])
    return [i for i in range(len(targets)) if i not in held], sorted(held)


def hold_out(train_set: Any, again: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Splits a training set in two.

    Args:
        train_set: Of images with one class each.
        again: The same data set once more: the two parts have transforms of their own.
        share: Of each class that is held out.
        seed: Of the choice.

    Returns:
        What is trained on, and what is validated on.

    Raises:
        OptionError: The classes of its samples cannot be known beforehand, or one has a single image.
    """
    found = None if isinstance(train_set, IterableDataset) else _targets_and_names(train_set)
    if found is None:
        raise OptionError(f"--holdout {share:g}: the classes of this data set are not known before it is read "
                          f"(streams, tfds/, wds/); leave it out, and name a split of its own by --val-split")
    try:
        kept, held = split(*found, share, seed)
    except ValueError as e:
        raise OptionError(f"--holdout {share:g}: {e}, which cannot be trained and validated on; add images, or remove "
                          f"the class") from None
    return _part(train_set, kept), _part(again, held)


def _targets_and_names(dataset: Any) -> tuple[Sequence[int], Sequence[str]] | None:
    """Class and name of each sample, without decoding images; None: they are not to be had."""
    if isinstance(dataset, ImageDataset):
        reader: Any = dataset.reader
        targets = getattr(reader, "targets", None)  # of a tar file
        if targets is None and hasattr(reader, "iter_targets"):  # of the Hub: its files need not have names
            targets = list(reader.iter_targets())
            return targets, list(map(str, range(len(targets))))
        if targets is None and hasattr(reader, "samples"):
            targets = [target for _, target in reader.samples]
        return None if targets is None else ([int(target) for target in targets], dataset.filenames())
    targets = getattr(dataset, "targets", getattr(dataset, "labels", None))  # of torchvision
    if not hasattr(dataset, "__len__") or not isinstance(targets, Iterable):
        return None
    numbers = [int(target) for target in targets]
    return (numbers, list(map(str, range(len(numbers))))) if len(numbers) == len(dataset) else None


def _part(dataset: Any, indices: Sequence[int]) -> Any:
    if isinstance(dataset, ImageDataset):
        # inside the data set: where it goes on with the next image, that is one of the part
        dataset.reader = _PartOfReader(dataset.reader, indices)
        return dataset
    return _Part(dataset, indices)


class _PartOfReader:
    """Some of a reader's samples."""

    def __init__(self, reader: Any, indices: Sequence[int]) -> None:
        self.reader, self.indices = reader, indices

    def __getitem__(self, index: int) -> Any:
        return self.reader[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> Any:
        return self.reader.filename(self.indices[index], basename, absolute)

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[Any]:
        return [self.filename(index, basename, absolute) for index in range(len(self))]

    def __getattr__(self, name: str) -> Any:
        if name == "reader":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.reader, name)


class _Part(Dataset):
    """Some of a data set's samples; ``transform`` is the data set's own, which loaders set."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def __len__(self) -> int:
        return len(self.indices)
