"""Results of validate.py, read back from its JSON files: numbers of checkpoints, known by their hashes."""
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cli.errors import OptionError

_MOST_BYTES = 1 << 28  # of a file of results: far more than any evaluation writes


@dataclass(frozen=True)
class Key:
    """What a number is of.

    Attributes:
        group: ``ID``, ``OOD``, ``adversarial``, ``calibration``, ...
        dataset: Name of the data set.
        measure: Name of the measure.
        unit: Of the number.
    """

    group: str
    dataset: str
    measure: str
    unit: str = "%"

    @property
    def lower_is_better(self) -> bool:
        return self.group == "calibration" or self.measure.startswith("drop") or self.measure == "mce"


@dataclass(frozen=True)
class Number:
    """A number of one checkpoint: its value, and what the file keeps beside it (None: nothing)."""

    value: float
    detail: Any = None


@dataclass
class Evaluated:
    """One checkpoint in one file of results.

    Attributes:
        file: The file.
        checkpoint: Path of the checkpoint, as the file has it.
        sha256: Its hash.
        numbers: What was measured; what outputs that are not finite gave is left out.
        folders: Data set -> the folder that it was read from.
    """

    file: str
    checkpoint: str
    sha256: str
    numbers: dict[Key, Number]
    folders: dict[str, str] = field(default_factory=dict)


def read_evaluations(paths: Sequence[str]) -> list[Evaluated]:
    """Reads files of results.

    Raises:
        OptionError: One is no JSON that validate.py writes of suites.
    """
    return [evaluated for path in dict.fromkeys(paths) for evaluated in _read(
        "--evaluations", path, "the JSON files of validate.py", "is no JSON file that validate.py writes of suites; "
        "make one by --results-file NAME.json with --eval")]


def read_cards(paths: Sequence[str]) -> list[Evaluated]:
    """Reads tables of flatness cards, or of other analyses: they are written as those of evaluations are.

    Raises:
        OptionError: One is no JSON table that an analysis writes.
    """
    return [evaluated for path in dict.fromkeys(paths) for evaluated in _read(
        "--cards", path, "card.json of an analysis", "is no table of an analysis; make one by python -m "
        "timm_sam.analyze card, and give its card.json")]


def _read(flag: str, path: str, wanted: str, instead: str) -> list[Evaluated]:
    wrong = f"{flag} {path}: it {instead}"
    try:
        if not os.path.isfile(path):
            raise OptionError(f"{flag} {path}: there is no such file; give {wanted}")
        if os.path.getsize(path) > _MOST_BYTES:
            raise OptionError(wrong)
        with open(path, encoding="utf-8") as f:
            content = json.load(f)
        folders = {str(entry["name"]): str(entry["folder"]) for entry in content["protocol"]["datasets"]}
        found = [Evaluated(path, str(entry["path"]), str(entry["sha256"]), {}, folders)
                 for entry in content["protocol"]["checkpoints"]]
        for row in content["results"]:
            key = Key(str(row["group"]), str(row["dataset"]), str(row["measure"]), str(row.get("unit", "%")))
            broken = row.get("non_finite") or [0] * len(found)
            details = row.get("details") or [None] * len(found)
            for evaluated, value, lost, detail in zip(found, row["values"], broken, details, strict=True):
                if value is not None and not lost and math.isfinite(float(value)):
                    evaluated.numbers[key] = Number(float(value), _beside(path, detail))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as e:
        if isinstance(e, OptionError):
            raise
        raise OptionError(wrong) from None
    return found


def _beside(path: str, detail: Any) -> Any:
    """A file is named from the results' folder on."""
    return os.path.join(os.path.dirname(path), detail) if isinstance(detail, str) else detail


def merged(same: Iterable[Evaluated], notes: list[str]) -> dict[Key, Number]:
    """What several files say of one checkpoint; where they differ the first counts, with a note."""
    numbers: dict[Key, Number] = {}
    origins: dict[Key, str] = {}
    for evaluated in same:
        for key, number in evaluated.numbers.items():
            first = numbers.setdefault(key, number)
            origin = origins.setdefault(key, evaluated.file)
            if first.value != number.value:
                notes.append(f"{key.measure} of {key.dataset} of {evaluated.checkpoint} is {first.value:g} in "
                             f"{origin}, which counts, and {number.value:g} in {evaluated.file}")
            elif first.detail is None:
                numbers[key] = number
    return numbers
