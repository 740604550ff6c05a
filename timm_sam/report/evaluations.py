"""Which runs results of validate.py are of: joined by the hash of the checkpoint; where that is gone, by folder."""
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cli.errors import OptionError
from ..cli.text import sample_std
from ..evaluation.evaluated import Evaluated, Key, Number, merged
from ..evaluation.tables import GROUPS
from ..evaluation.weights import Hashes
from ..runs import files
from .runs import FINISHED, Run
from .tables import Cell


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


def join(runs: Sequence[Run], evaluations: Sequence[Evaluated], epoch: str) -> Joined:
    """Finds the run of each evaluation.

    A run that keeps no checkpoint any more, as those that were unpacked, has the evaluations whose files lie in its
    folder and are of a checkpoint that lay there.

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
        paths = _checkpoints(run.path, preferred)
        names = _hashes(paths, hashes, joined.notes) if paths else _left_in(run.path, preferred, evaluations)
        there = [sha256 for sha256 in names if sha256 in by_hash]
        claimed.update(there)
        if not there:
            joined.runs_without.append(run)
            continue
        joined.numbers[run.path] = merged(by_hash[there[0]], joined.notes)
        if names[there[0]] != preferred and run.status == FINISHED:
            joined.notes.append(f"of {run.path} {names[there[0]]} counts, since {preferred}, which the accuracy of its "
                                f"{epoch} epoch is of, is not among the results")
        for other in there[1:]:
            joined.notes.append(f"{by_hash[other][0].checkpoint} is of {run.path}, too, and is not used: "
                                f"{by_hash[there[0]][0].checkpoint} is")
    joined.without_run = [evaluated for evaluated in evaluations if evaluated.sha256 not in claimed]
    return joined


def _checkpoints(folder: str, preferred: str) -> list[str]:
    """A run's checkpoints, the preferred one first, then the newest."""
    paths = [path for path in files.checkpoints(folder) if os.path.isfile(path) and not files.is_unfinished(path)]
    return sorted(paths, key=lambda path: (os.path.basename(path) != preferred, -os.path.getmtime(path), path))


def _hashes(paths: Sequence[str], hashes: Hashes, notes: list[str]) -> dict[str, str]:
    """The hashes of all files that can be read, and their names."""
    found: dict[str, str] = {}
    for path in paths:
        try:
            found.setdefault(hashes.of_file(path), os.path.basename(path))
        except OptionError as e:
            notes.append(str(e).removeprefix("--checkpoint "))
    return found


def _left_in(folder: str, preferred: str, evaluations: Sequence[Evaluated]) -> dict[str, str]:
    """The same of checkpoints that lay in a run's folder, by evaluations that lie there, the preferred one first."""
    name = os.path.basename(os.path.abspath(folder))
    found = [(evaluated.sha256, os.path.basename(evaluated.checkpoint)) for evaluated in evaluations
             if os.path.realpath(os.path.dirname(evaluated.file)) == os.path.realpath(folder)
             and os.path.basename(os.path.dirname(evaluated.checkpoint)) in ("", ".", name)]
    return dict(sorted(found, key=lambda pair: pair[1] != preferred))
