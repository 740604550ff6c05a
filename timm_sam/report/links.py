"""Which runs stand behind a number: the list of all runs in HTML, ways to its rows, and ways back."""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cli import document
from ..cli.document import Entry, Link, Section
from ..cli.errors import shown
from ..evaluation.evaluated import Key
from ..runs.sameness import NOT_COMPARED, normal, placeless
from .evaluations import Joined
from .runs import FINISHED, Run
from .tables import NAMES, Cell, Table, written


class Links:
    """Numbers of runs, and of the places that show them.

    Args:
        tables: As they are numbered in the report.
        runs: All that were found. Those of a cell get numbers in a row, as the tables show them; others follow.
    """

    def __init__(self, tables: Sequence[Table], runs: Sequence[Run]) -> None:
        self._places = {id(cell): (number, i, table, cell) for number, table in enumerate(tables, 1)
                        for i, cell in enumerate(table.cells, 1)}
        self._cells = {run.path: cell for table in tables for cell in table.cells
                       for run in (*cell.runs, *cell.diverged)}
        first = list(self._cells)
        by_path = {run.path: run for run in runs}
        self.runs = [by_path[path] for path in first] + [run for run in runs if run.path not in self._cells]
        self._numbers = {run.path: number for number, run in enumerate(self.runs, 1)}

    def run(self, path: str) -> Link:
        number = self._numbers[path]
        return Link(f"run-{number}", f"#{number}")

    def behind(self, *cells: Cell, lost: bool = False) -> list[Link]:
        """All runs of some cells; those that diverged, too, if asked for."""
        return [self.run(run.path) for cell in cells for run in (*cell.runs, *(cell.diverged if lost else ()))]

    def evaluated(self, joined: Joined, key: Key, *cells: Cell) -> list[Link]:
        """The runs of some cells of which a number is known."""
        return [self.run(run.path) for cell in cells for run in cell.runs if key in joined.numbers.get(run.path, {})]

    def of_radius(self, cell: Cell) -> str:
        """The anchor of a cell in the table of all radii."""
        number, i, _, _ = self._places[id(cell)]
        return f"table-{number}-radius-{i}"

    def of_choice(self, cell: Cell) -> str:
        """The anchor of a chosen cell in the table of variants and selections."""
        number, i, _, _ = self._places[id(cell)]
        return f"table-{number}-choice-{i}"

    def back(self, run: Run) -> list[Link]:
        """Where the run counts."""
        cell = self._cells.get(run.path)
        if cell is None:
            return []
        number = self._places[id(cell)][0]
        chosen = [Link(self.of_choice(cell), f"table {number}")] if cell.chosen else []
        return [*chosen, Link(self.of_radius(cell), f"table {number}, all radii")]

    def section(self, epoch: str) -> Section:
        """All runs, whatever their status: what tells them apart, what became of them, and where they count."""
        arguments = _differing(self.runs)
        rows: list[list[Entry | str]] = []
        for run in self.runs:
            score = run.accuracy(epoch) if run.status == FINISHED else None
            rows.append([
                Entry(self.run(run.path).label, number=self._numbers[run.path], anchor=self.run(run.path).anchor),
                Entry(run.path, code=True), Entry(run.status, note=run.reason and f" ({run.reason})"),
                arguments.get(run.path, ""),
                Entry("" if score is None else f"{score:.2f}", number=score,
                      note="" if score is None or run.metric == "top1" else f" {NAMES[run.metric]}"),
                Entry("" if run.seconds is None else f"{run.seconds:.1f}", number=run.seconds),
                Entry("", links=self.back(run), spelled=True)])
        return Section("Runs", [
            "All runs that were found, with those of their arguments that are not the same in all of them. A number in "
            "the tables above leads to the first of its runs, and marks all; the last column leads back.",
            document.Table(["run", "folder", "status", "arguments that differ", f"accuracy (%), {epoch} epoch",
                   "training (s)", "counts in"], rows)])


def _differing(runs: Sequence[Run]) -> dict[str, str]:
    """Folder -> what tells the run's arguments from others'."""
    known = {run.path: _compared(run.args) for run in runs if run.args}
    # SAM's options stand together: a plain run, which has one of them only, may come first
    names = sorted(dict.fromkeys(name for args in known.values() for name in args), key=lambda n: n.startswith("sam_"))
    differing = [name for name in names
                 if len({_said(args[name], normal) for args in known.values() if name in args}) > 1]
    return {path: ", ".join(f"{name} {_said(args[name], written)}" for name in differing if args.get(name) is not None)
            for path, args in known.items()}


def _compared(args: Mapping[str, Any]) -> dict[str, Any]:
    """What may differ: of SAM's options only that there is none, where it is off."""
    return {name: placeless(name, value) for name, value in args.items()
            if (name not in NOT_COMPARED or name == "seed")
            and (args.get("sam_variant") is not None or name == "sam_variant" or not name.startswith("sam_"))}


def _said(value: Any, form: Callable[[Any], Any]) -> str:
    """A value in some form; of types and sizes that nobody gives, cut short."""
    try:
        return str(form(value))
    except Exception:
        return shown(value)
