"""Each variant against a baseline: the difference, its intervals, and whether the two can be told apart."""
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cli.errors import OptionError
from ..evaluation.evaluated import Key
from ..evaluation.outputs import Saved, read
from .evaluations import Joined
from .statistics import Interval, paired_bootstrap, welch
from .tables import Cell, Table

PLAIN = "plain"
SAME, BETTER, WORSE, UNKNOWN = "not distinguishable", "better", "worse", "no interval"


@dataclass(frozen=True)
class Difference:
    """A cell of a table minus the baseline.

    Attributes:
        cell: Whose runs are compared.
        key: In what; None: validation accuracy of the runs themselves.
        difference: Of the means over seeds.
        over_images: Interval of the paired bootstrap; None without outputs of both.
        over_seeds: Welch's interval; None for a single seed.
    """

    cell: Cell
    key: Key | None
    difference: float
    over_images: Interval | None
    over_seeds: Interval | None

    @property
    def verdict(self) -> str:
        """Better or worse only if every interval that is known leaves 0 outside."""
        known = [interval for interval in (self.over_images, self.over_seeds) if interval is not None]
        if not known:
            return UNKNOWN
        if not all(interval.tells_apart for interval in known):
            return SAME
        lower = self.key is not None and self.key.lower_is_better
        return BETTER if (self.difference < 0) == lower else WORSE


def baseline_of(table: Table, name: str) -> Cell | None:
    """The cell that others are compared with: ``plain``, or ``VARIANT:SELECTION`` at its chosen radius."""
    if name == PLAIN:
        return table.plain
    variant, _, selection = name.rpartition(":")
    return next((cell for cell in table.cells if cell.chosen and (cell.row.name, cell.selection) == (
        variant, selection)), None)


def check_baseline(tables: Sequence[Table], name: str) -> None:
    """Raises for a name that stands for nothing.

    Raises:
        OptionError: No table has such a cell, though it is not the default that is asked for.
    """
    if name == PLAIN or not tables or any(baseline_of(table, name) is not None for table in tables):
        return
    there = dict.fromkeys(f"{cell.row.name}:{cell.selection}" for table in tables for cell in table.cells
                          if cell.chosen and cell.selection)
    raise OptionError(f"--baseline {name}: no table has it; use one of {', '.join([PLAIN, *there])}")


def differences(table: Table, baseline: str, joined: Joined | None, notes: list[str]) -> list[Difference]:
    """All chosen cells of a table against its baseline.

    Args:
        table: Whose.
        baseline: As of :func:`baseline_of`.
        joined: What is known of evaluations; None: nothing.
        notes: Takes a line for each file of outputs that cannot be read or compared.

    Returns:
        In validation accuracy, and in each accuracy of data sets and under attack; empty without the baseline.
    """
    base = baseline_of(table, baseline)
    if base is None:
        return []
    found: list[Difference] = []
    outputs = _Reader(notes)
    for cell in table.cells:
        if not cell.chosen or cell is base:
            continue
        found.append(Difference(cell, None, cell.mean - base.mean, None, welch(cell.accuracies, base.accuracies)))
        if joined is None:
            continue
        for key in headlines(joined):
            ours, theirs = joined.of(cell, key).values, joined.of(base, key).values
            if ours and theirs:
                found.append(Difference(cell, key, statistics.fmean(ours) - statistics.fmean(theirs),
                                        outputs.compared(joined, cell, base, key), welch(ours, theirs)))
    return found


def headlines(joined: Joined) -> list[Key]:
    """The rows of the paper's Table 4: the first accuracy of each data set, and robust accuracy."""
    return [key for key in joined.keys if (key.group in ("ID", "OOD") and key.measure in ("top1", "mce")) or (
        key.group == "adversarial" and key.measure != "clean")]


class _Reader:
    """Files of outputs, each read once."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._known: dict[str, Saved | None] = {}

    def compared(self, joined: Joined, cell: Cell, base: Cell, key: Key) -> Interval | None:
        """The paired bootstrap of two cells, image by image, seeds averaged; None where outputs are missing, of some
        seeds, too: the interval would be that of another difference."""
        if key.measure != "top1":
            return None
        sides = [[self._read(path) for path in joined.details(side, key) if isinstance(path, str)]
                 for side in (cell, base)]
        whole = [[saved for saved in side if saved is not None] for side in sides]
        if not all(whole):
            return None
        if any(len(saved) < len(joined.of(side, key).values) for saved, side in zip(whole, (cell, base))):
            self._note(f"outputs on {key.dataset} are not those of all runs: not compared image by image")
            return None
        names = sorted(whole[0][0].names)
        means = []
        for side in whole:
            rights = []
            for saved in side:
                if sorted(saved.names) != names:
                    self._note(f"outputs on {key.dataset} are not of the same images: not compared image by image")
                    return None
                rights.append(saved.right[np.argsort(np.array(saved.names), kind="stable")])
            means.append(np.mean(rights, axis=0))
        return _scaled(paired_bootstrap(*means), 100)

    def _read(self, path: str) -> Saved | None:
        if path not in self._known:
            self._known[path] = None
            try:
                self._known[path] = read(path)
            except ValueError as e:
                self._note(str(e))
        return self._known[path]

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(interval.difference * factor, interval.low * factor, interval.high * factor)
