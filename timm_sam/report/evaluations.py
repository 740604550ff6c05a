"""Results of validate.py, and which runs they are of: joined by the hash of the checkpoint."""
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cli.errors import OptionError
from ..cli.text import sample_std
from ..evaluation.tables import GROUPS
from ..evaluation.weights import Hashes
from ..runs import files
from .runs import Run
from .tables import Cell

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


@dataclass
class Joined:
    """Runs and what is known of them.

    Attributes:
        numbers: A run's folder -> its numbers, those of one checkpoint.
        folders: Data set -> the folders that it was read from.
        runs_without: Runs that no evaluation is of.
        without_run: Evaluations of checkpoints that no run has.
        notes: What else is odd, a line each.
    """

    numbers: dict[str, dict[Key, Number]] = field(default_factory=dict)
    folders: dict[str, set[str]] = field(default_factory=dict)
    runs_without: list[Run] = field(default_factory=list)
    without_run: list[Evaluated] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[Key]:
        """All that is known of any run: by group, in the order of the files."""
        found = list(dict.fromkeys(key for numbers in self.numbers.values() for key in numbers))
        known = [*GROUPS, *(key.group for key in found)]
        return sorted(found, key=lambda key: known.index(key.group))

    def of(self, cell: Cell, key: Key) -> "Spread":
        """What the runs of a cell come to."""
        found = [self.numbers.get(run.path, {}).get(key) for run in cell.runs]
        return Spread([number.value for number in found if number is not None], len(cell.runs))

    def details(self, cell: Cell, key: Key) -> list[Any]:
        """What the files keep beside the numbers of the runs of a cell."""
        found = [self.numbers.get(run.path, {}).get(key) for run in cell.runs]
        return [number.detail for number in found if number is not None and number.detail is not None]


@dataclass(frozen=True)
class Spread:
    """Numbers of the seeds of a cell, as far as they were evaluated (``of`` is how many there are in all)."""

    values: list[float]
    of: int

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        return sample_std(self.values)


def read_evaluations(paths: Sequence[str]) -> list[Evaluated]:
    """Reads files of results.

    Raises:
        OptionError: One is no JSON that validate.py writes of suites.
    """
    return [evaluated for path in dict.fromkeys(paths) for evaluated in _read(path)]


def _read(path: str) -> list[Evaluated]:
    wrong = (f"--evaluations {path}: it is no JSON file that validate.py writes of suites; make one by "
             f"--results-file NAME.json with --eval")
    try:
        if not os.path.isfile(path):
            raise OptionError(f"--evaluations {path}: there is no such file; give the JSON files of validate.py")
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
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, OptionError):
            raise
        raise OptionError(wrong) from None
    return found


def _beside(path: str, detail: Any) -> Any:
    """A file is named from the results' folder on."""
    return os.path.join(os.path.dirname(path), detail) if isinstance(detail, str) else detail


def join(runs: Sequence[Run], evaluations: Sequence[Evaluated], epoch: str) -> Joined:
    """Finds the run of each evaluation.

    Args:
        runs: All that were found.
        evaluations: As read.
        epoch: Of several checkpoints of a run the one that counts: ``"last"`` or ``"best"``; another, where that one
            was not evaluated.
    """
    joined, hashes = Joined(), Hashes()
    by_hash: dict[str, list[Evaluated]] = {}
    for evaluated in evaluations:
        by_hash.setdefault(evaluated.sha256, []).append(evaluated)
        for name, folder in evaluated.folders.items():
            joined.folders.setdefault(name, set()).add(folder)
    claimed: set[str] = set()
    preferred = files.BEST if epoch == "best" else files.LAST
    for run in runs:
        there = [sha256 for sha256 in _checkpoints(run.path, preferred, hashes, joined.notes) if sha256 in by_hash]
        claimed.update(there)
        if not there:
            joined.runs_without.append(run)
            continue
        joined.numbers[run.path] = _merged(by_hash[there[0]], joined.notes)
        for other in there[1:]:
            joined.notes.append(f"{by_hash[other][0].checkpoint} is of {run.path}, too, and is not used: "
                                f"{by_hash[there[0]][0].checkpoint} is")
    joined.without_run = [evaluated for evaluated in evaluations if evaluated.sha256 not in claimed]
    return joined


def _checkpoints(folder: str, preferred: str, hashes: Hashes, notes: list[str]) -> list[str]:
    """The hashes of a run's checkpoints, the preferred one's first, then the newest."""
    paths = [path for path in files.checkpoints(folder) if os.path.isfile(path) and not files.is_unfinished(path)]
    paths.sort(key=lambda path: (os.path.basename(path) != preferred, -os.path.getmtime(path), path))
    found: list[str] = []
    for path in paths:
        try:
            found.append(hashes.of_file(path))
        except OptionError as e:
            notes.append(str(e).removeprefix("--checkpoint "))
    return list(dict.fromkeys(found))


def _merged(same: Iterable[Evaluated], notes: list[str]) -> dict[Key, Number]:
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
