"""What validate.py found of the runs, laid out as the paper's Tables 4, 13, 14 and 15; what tells variants apart."""
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..cli import document
from ..cli.document import Block, Entry, Figure, Link, Points, Section
from ..cli.image_folders import SYNONYMS
from ..cli.text import csv_text, spread
from ..evaluation.evaluated import Key
from .differences import PLAIN, SAME, Difference, baseline_of, headlines
from .evaluations import Joined, Spread
from .links import Links
from .statistics import Interval
from .tables import NO_CHOICE, Cell, Table

FILES = ("evaluations.csv", "differences.csv")
DIGITS = {"%": 2}  # of a unit; others have small numbers
_NORMS = {"l2": "ℓ₂", "linf": "ℓ∞"}


@dataclass(frozen=True)
class Side:
    """Tables of the same data and model, side by side; of each its place in the report, from 1."""

    title: str
    tables: Sequence[tuple[int, Table]]


def sides(tables: Sequence[Table]) -> list[Side]:
    """As in Table 4, those that have one optimizer each stand side by side; others would not be told apart."""
    groups: dict[tuple[str, str], list[tuple[int, Table]]] = {}
    for number, table in enumerate(tables, 1):
        groups.setdefault((table.data, table.model), []).append((number, table))
    found: list[Side] = []
    for (data, model), group in groups.items():
        if len({table.optimizer for _, table in group}) == len(group) > 1:
            found.append(Side(f"{model} on {data}", group))
        else:
            found += [Side(table.title, [(number, table)]) for number, table in group]
    return found


def evaluation_sections(tables: Sequence[Table], joined: Joined, pictures: Mapping[int, Sequence[Figure]],
                        found: Mapping[int, Sequence[Difference]], links: Links) -> list[Section]:
    """The sections of the report that are on evaluations.

    Args:
        tables: As they are numbered in the report.
        joined: What is known of their runs.
        pictures: What the sections show, by the number of the table.
        found: Number of a table -> its differences: ``≈`` marks what cannot be told from the baseline.
        links: Ways to the runs.
    """
    sections: list[Section] = []
    same = {(number, id(difference.cell), difference.key) for number, several in found.items()
            for difference in several if difference.verdict == SAME}
    for side in sides(tables):
        writer = _Writer(side, joined, same, links)
        if not writer.keys:
            continue
        first = [key for key in headlines(joined) if key in writer.keys]
        attack = [key for key in writer.keys if key.group == "adversarial"]
        parts: list[Block] = [
            "At the chosen radii, mean ± sample standard deviation over the seeds that were evaluated, as Table 4 of "
            "the paper (and, for one data set, Table 13). Bold: the better of all and onlynorm; ≈: not distinguishable "
            f"from the baseline. {_chosen_on(side, joined)}"]
        if first:
            parts.append(writer.table(["", "data set"], [([key.group, _what(key, joined)], key) for key in first]))
        if attack:
            rows = [([*_radius(key), *_of(key, attack)], key) for key in attack if key.measure != "clean"]
            rows += [(["Clean acc.", "", *_of(key, attack)], key) for key in attack if key.measure == "clean"]
            parts += ["Under attack, as Tables 14 and 15:",
                      writer.table(["threat model", "ε", *(["data set"] if _several(attack) else [])], rows)]
        others = [key for key in writer.keys if key not in first and key not in attack]
        if others:
            parts += ["Further measures:", writer.table(
                ["", "data set", "measure"], [([key.group, key.dataset, _measure(key)], key) for key in others])]
        parts += [figure for number, _ in side.tables for figure in pictures.get(number, ())]
        sections.append(Section(f"Evaluations: {side.title}", parts))
    return sections + _left_over(joined, links)


def _chosen_on(side: Side, joined: Joined) -> str:
    """Whether radii were chosen on what is reported."""
    if not any(cell.rho is not None for _, table in side.tables for cell in table.cells):
        return "No radius was chosen."
    choosing = [table for _, table in side.tables if table.has_choice]
    if not choosing:
        return NO_CHOICE
    if all(table.held_out is not None for table in choosing):
        return "Radii were chosen on held-out training images, on none of these."
    same = [name for name, folders in joined.folders.items()
            if any(_is_split(folder, *table.validated_on) for folder in folders
                   for table in choosing if table.held_out is None)]
    if same:
        return (f"Radii were chosen on {', '.join(same)}, on what is reported here: the more were "
                f"tried, the luckier these numbers are (train.py --holdout).")
    return ("Radii were chosen on the images that the runs validated on; by their folders none of these data sets is "
            "that.")


def _is_split(folder: str, data: str, split: str) -> bool:
    """Whether a folder is a split of a data folder, by their names: either may lie elsewhere now."""
    parts = os.path.normpath(folder).split(os.sep)
    names = {split.lower(), *(name for names in SYNONYMS if split.lower() in names for name in names)}
    return len(parts) > 1 and parts[-1].lower() in names and parts[-2] == data


class _Writer:
    """The columns of one section: the chosen cells of its tables."""

    def __init__(self, side: Side, joined: Joined, same: set[tuple[int, int, Key | None]], links: Links) -> None:
        self._joined, self._same, self._links = joined, same, links
        self._columns = [(number, table, cell) for number, table in side.tables for cell in table.cells if cell.chosen]
        self._several = len(side.tables) > 1
        self.keys = [key for key in joined.keys
                     if any(joined.of(cell, key).values for _, _, cell in self._columns)]

    def table(self, head: Sequence[str], rows: Sequence[tuple[Sequence[str], Key]]) -> document.Table:
        header = [*head, *(self._label(table, cell) for _, table, cell in self._columns)]
        return document.Table(header, [
            [*labels, *(self._entry(number, table, cell, key) for number, table, cell in self._columns)]
            for labels, key in rows], left=len(head))

    def _label(self, table: Table, cell: Cell) -> str:
        name = PLAIN if cell.row.variant is None else f"{cell.row.name} {cell.selection}"
        return f"{table.optimizer}: {name}" if self._several else name

    def _entry(self, number: int, table: Table, cell: Cell, key: Key) -> Entry:
        found = self._joined.of(cell, key)
        if found.mean is None:
            return Entry("–")
        rivals = [self._joined.of(other, key) for other in table.cells
                  if other.chosen and other.row == cell.row and other.selection in ("all", "onlynorm")]
        better = cell.selection in ("all", "onlynorm") and len(rivals) == 2 and _best(rivals, key) == found.mean
        part = "" if len(found.values) == found.of else f" ({len(found.values)} of {found.of})"
        return Entry(spread(found.mean, found.std, DIGITS.get(key.unit, 4)), number=found.mean, strong=better,
                     note=f"{' ≈' if (number, id(cell), key) in self._same else ''}{part}",
                     links=self._links.evaluated(self._joined, key, cell))


def _best(rivals: Sequence[Spread], key: Key) -> float | None:
    means = [rival.mean for rival in rivals if rival.mean is not None]
    return None if len(means) < len(rivals) else min(means) if key.lower_is_better else max(means)


def _what(key: Key, joined: Joined) -> str:
    """The label of a row of Table 4."""
    if key.group != "adversarial":
        return key.dataset if key.measure == "top1" else f"{key.dataset} {key.measure}"
    norm, radius = _radius(key)
    attacked = [other for other in joined.keys if other.group == "adversarial"]
    return f"{norm}, ε = {radius}" + "".join(f" ({name})" for name in _of(key, attacked))


def _radius(key: Key) -> tuple[str, str]:
    norm, _, radius = key.measure.partition(" ")
    return _NORMS.get(norm, norm), radius


def _several(keys: Sequence[Key]) -> bool:
    return len({key.dataset for key in keys}) > 1


def _of(key: Key, keys: Sequence[Key]) -> list[str]:
    """The data set, where there are several."""
    return [key.dataset] if _several(keys) else []


def _measure(key: Key) -> str:
    return key.measure if key.unit in ("%", "") else f"{key.measure} ({key.unit})"


def _left_over(joined: Joined, links: Links) -> list[Section]:
    """What has no counterpart, and what is odd."""
    sections = []
    if joined.runs_without:
        sections.append(Section("Runs without an evaluation", [document.Table(["run", "status"], [
            [Entry(run.path, code=True, links=[links.run(run.path)]), run.status] for run in joined.runs_without])]))
    if joined.without_run:
        sections.append(Section("Evaluations without a run", [document.Table(["file", "checkpoint", "SHA-256"], [
            [Entry(e.file, code=True), Entry(e.checkpoint, code=True), e.sha256[:12]] for e in joined.without_run])]))
    if joined.notes:
        sections.append(Section("Notes on evaluations", [Points(list(dict.fromkeys(joined.notes)))]))
    return sections


def difference_blocks(table: Table, baseline: str, found: Sequence[Difference], joined: Joined | None,
                      links: Links) -> list[Block]:
    """What is said of a table's differences from the baseline; nothing without any."""
    base = baseline_of(table, baseline)
    if not found or base is None:
        return []
    lines: list[list[Entry | str]] = []
    for d in found:
        what = "runs' validation" if d.key is None else (
            d.key.dataset if d.key.measure == "top1" else f"{d.key.dataset}, {d.key.measure}")
        name = PLAIN if d.cell.row.variant is None else f"{d.cell.row.name} {d.cell.selection}"
        digits = 2 if d.key is None else DIGITS.get(d.key.unit, 4)
        behind = (links.behind(d.cell, base) if d.key is None or joined is None
                  else links.evaluated(joined, d.key, d.cell, base))
        lines.append([name, Entry("" if d.cell.rho is None else f"{d.cell.rho:g}", number=d.cell.rho), what,
                      Entry(f"{d.difference:+.{digits}f}", number=d.difference, links=behind),
                      _ends(d.over_images, digits, behind), _ends(d.over_seeds, digits, behind), d.verdict])
    return [f"Minus {baseline}, with 95 % intervals over images (paired bootstrap, these models on other images) and "
            f"over seeds (Welch, other seeds on these images); better or worse only if no interval that is known "
            f"holds 0; no interval: no outputs, and single seeds or seeds that all came out alike. Of twenty "
            f"comparisons of equals one is expected to come out as different.",
            document.Table(["variant", "ρ", "in", "difference", "over images", "over seeds", "verdict"], lines)]


def _ends(interval: Interval | None, digits: int, behind: Sequence[Link]) -> Entry:
    if interval is None:
        return Entry("–")
    return Entry(f"{interval.low:+.{digits}f} to {interval.high:+.{digits}f}", number=interval.low, links=behind)


def evaluations_csv(tables: Sequence[Table], joined: Joined) -> str:
    """One line per table, row, column, radius and measure."""
    lines = []
    for number, table in enumerate(tables, 1):
        for cell in table.cells:
            for key in joined.keys:
                found = joined.of(cell, key)
                if found.mean is not None:
                    lines.append([number, *_cell(cell), int(cell.chosen), key.group, key.dataset, key.measure, key.unit,
                                  len(found.values), found.of, f"{found.mean:.4f}",
                                  "" if found.std is None else f"{found.std:.4f}"])
    return csv_text(["table", "variant", "options", "selection", "rho", "chosen", "group", "dataset", "measure", "unit",
                     "n", "of", "mean", "std"], lines)


def differences_csv(baseline: str, found: Mapping[int, Sequence[Difference]]) -> str:
    """One line per table, chosen cell and measure."""
    lines = []
    for number, several in found.items():
        for d in several:
            key = d.key or Key("runs", "validation", "top1")
            ends = [end for interval in (d.over_images, d.over_seeds) for end in (
                ("", "") if interval is None else (f"{interval.low:.4f}", f"{interval.high:.4f}"))]
            lines.append([number, baseline, *_cell(d.cell), key.group, key.dataset, key.measure, key.unit,
                          f"{d.difference:.4f}", *ends, d.verdict])
    return csv_text(["table", "baseline", "variant", "options", "selection", "rho", "group", "dataset", "measure",
                     "unit", "difference", "images_low", "images_high", "seeds_low", "seeds_high", "verdict"], lines)


def _cell(cell: Cell) -> list[str]:
    return [cell.row.variant or PLAIN, " ".join(f"{key}={value}" for key, value in cell.row.options),
            cell.selection or "", "" if cell.rho is None else f"{cell.rho:g}"]
