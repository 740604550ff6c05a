#!/usr/bin/env python3
"""Which differences in a report's table can be told from chance, of its means and deviations alone.

    python benchmarks/differences.py benchmarks/results/digits_table.csv

takes the ``report.csv`` of ``python -m timm_sam.report``, or its chosen rows. Two comparisons at the chosen radii: each
cell minus plain training, and ``onlynorm`` minus ``all`` of the same row. Intervals are Welch's over seeds, at 95 %.
"""
import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from timm_sam.cli.document import Table, table_markdown  # noqa: E402
from timm_sam.cli.errors import OptionError, report  # noqa: E402
from timm_sam.cli.parser import OptionParser  # noqa: E402
from timm_sam.report.statistics import Interval, welch_of_moments  # noqa: E402

PLAIN = "plain"


@dataclass(frozen=True)
class Cell:
    """The chosen radius of a row and a column."""

    row: str
    selection: str
    mean: float
    std: float
    n: int

    @property
    def name(self) -> str:
        return f"{self.row} {self.selection}".strip()

    def minus(self, other: "Cell") -> Interval | None:
        return welch_of_moments(self.mean, self.std, self.n, other.mean, other.std, other.n)


def read(path: str) -> dict[str, list[Cell]]:
    """Title of each table -> its chosen cells that have a deviation.

    Raises:
        OptionError: The file is no table of the report.
    """
    found: dict[str, list[Cell]] = {}
    try:
        with open(path, encoding="utf-8", newline="") as f:
            for line in csv.DictReader(f):
                if line["chosen"] == "1" and line["top1_std"]:
                    found.setdefault(line["title"], []).append(Cell(
                        f"{line['variant']} {line['options']}".strip(), line["selection"], float(line["top1_mean"]),
                        float(line["top1_std"]), int(line["n"])))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise OptionError(f"{path} is no report.csv of python -m timm_sam.report ({type(e).__name__}): name one") from e
    if not found:
        raise OptionError(f"{path} has no chosen cell of several seeds: give the report.csv of such runs")
    return found


def pairs(cells: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """What is compared with what."""
    plain = [cell for cell in cells if cell.row == PLAIN]
    by_place = {(cell.row, cell.selection): cell for cell in cells}
    return [(cell, base) for base in plain for cell in cells if cell is not base] + [
        (cell, by_place[cell.row, "all"]) for cell in cells
        if cell.selection == "onlynorm" and (cell.row, "all") in by_place]


def text(title: str, cells: Sequence[Cell]) -> str:
    """A table of all comparisons, and a line that counts them."""
    rows, counts = [], {"above plain": 0, "below plain": 0, "onlynorm above all": 0, "onlynorm below all": 0}
    plain = all_ = 0
    for cell, base in pairs(cells):
        interval = cell.minus(base)
        if interval is None:
            continue
        against_plain = base.row == PLAIN
        plain, all_ = plain + against_plain, all_ + (not against_plain)
        verdict = "not distinguishable"
        if interval.tells_apart:
            verdict = "above" if interval.difference > 0 else "below"
            counts[f"{verdict} plain" if against_plain else f"onlynorm {verdict} all"] += 1
        rows.append([f"{cell.name} - {base.name}", f"{interval.difference:+.2f}",
                     f"{interval.low:+.2f} to {interval.high:+.2f}", verdict])
    table = table_markdown(Table(["difference", "points", "95 % interval", "verdict"], rows, left=1))
    return (f"{title}\n\n{table}\n\nOf {plain} cells {counts['above plain']} are above plain training, "
            f"{counts['below plain']} below; of {all_} variants onlynorm is above all in "
            f"{counts['onlynorm above all']}, below in {counts['onlynorm below all']}; the others are not "
            f"distinguishable.")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the comparisons of each table; returns 0, or 2 for a mistake."""
    parser = OptionParser(prog="differences.py", description="Which differences can be told from chance.")
    parser.add_argument("table", metavar="FILE", help="report.csv of python -m timm_sam.report")
    args = parser.parse_args(argv)
    try:
        print("\n\n".join(text(title, cells) for title, cells in read(args.table).items()))
    except OptionError as e:
        report(parser.prog, e)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
