"""Whether ranks that were started machine by machine train one model: by the same options, on the same data."""
import argparse
import hashlib
from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset

from ..cli.device import Process
from ..cli.errors import OptionError, shown
from ..cli.image_folders import class_to_idx
from ..cli.rules import flag
from ..runs.sameness import NOT_COMPARED, normal

# Paths may differ from machine to machine, and what is in them is not compared here.
_PLACES = ("data_dir", "class_map", "class_stats", "initial_checkpoint", "pretrained_path")
# Two runs may differ in these, the ranks of one may not: all of them draw, log and save at the same updates.
_TOGETHER = ("seed", "log_interval", "recovery_interval", "save_epochs", "allow_nonfinite")


def check_options(args: argparse.Namespace, process: Process) -> None:
    """Compares the options with those of the other ranks. Every rank has to call it.

    With other rates or radii the ranks' weights would part in silence, and with other intervals they would wait for
    each other for ever.

    Raises:
        OptionError: A rank has others than the first; all ranks raise it.
    """
    mine = {name: normal(value) for name, value in vars(args).items()
            if name in _TOGETHER or name not in NOT_COMPARED and name not in _PLACES}
    found = _first_difference(process, mine)
    if found is not None:
        rank, name, other, first = found
        raise OptionError(f"{flag(name)} is {shown(other)} on rank {rank}, and {shown(first)} on rank 0: all ranks "
                          f"train one model; start them with the same options on every machine")


def check_data(args: argparse.Namespace, process: Process, splits: Mapping[str, Any]) -> None:
    """Compares the data sets with those of the other ranks. Every rank has to call it.

    A class that is missing on one machine gives all that follow it another number there, and a split that is smaller
    ends an epoch there before the others do.

    Args:
        args: All options.
        process: This one.
        splits: Flag and name of each split, and its data set, or None; streams do not know what comes.

    Raises:
        OptionError: A rank has others than the first; all ranks raise it.
    """
    mine = {f"{what} of {split}": value for split, dataset in splits.items()
            if dataset is not None and not isinstance(dataset, IterableDataset)
            for what, value in _contents(dataset).items()}
    found = _first_difference(process, mine)
    if found is not None:
        rank, what, other, first = found
        named = "is another" if what.startswith("numbering") else f"is {other}, and {first} on rank 0"
        raise OptionError(f"{flag('data_dir')} {args.data_dir}: on rank {rank} the {what} {named}: all machines need "
                          f"the same images in the same folders; copy what is missing")


def _contents(dataset: Any) -> dict[str, Any]:
    classes = class_to_idx(dataset)
    text = repr(sorted(classes.items(), key=repr)).encode()
    return {"number of images": len(dataset), "number of classes": len(classes),
            "numbering of the classes": hashlib.blake2b(text, digest_size=16).hexdigest()}


def _first_difference(process: Process, mine: Mapping[str, Any]) -> tuple[int, str, Any, Any] | None:
    """The first rank that differs from rank 0, in what, and what the two have."""
    ranks = process.gather(mine)
    for rank, other in enumerate(ranks):
        for name in (*ranks[0], *(name for name in other if name not in ranks[0])):
            values = other.get(name), ranks[0].get(name)
            if values[0] != values[1]:
                return rank, name, *values
    return None
