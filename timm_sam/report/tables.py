"""Runs in the form of the paper's tables: one grid of variants, selections and radii per setting."""
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..cli.errors import one_line
from ..cli.text import sample_std
from ..perturbation import VARIANTS
from ..runs.sameness import NOT_COMPARED, data_name, normal, placeless
from .runs import DIVERGED, DUPLICATE, FINISHED, UNREADABLE, Run, default_args

NO_CHOICE = "No variant and selection has several radii: none was chosen here."
# These make the cells of one table.
GRID = ("sam_variant", "sam_params", "sam_rho")
SELECTIONS = ("all", "onlynorm", "nonorm")
NAMES = {"top1": "top-1", "map": "mAP"}  # of metrics, for people


@dataclass(frozen=True, order=True)
class Row:
    """A row of the table: a variant, and the other SAM options that are not at their defaults."""

    position: int
    variant: str | None
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        options = "".join(f", {key.removeprefix('sam_')} {value}" for key, value in self.options)
        return f"{self.variant or 'plain'}{options}"


@dataclass
class Cell:
    """The runs that differ in seed only.

    Attributes:
        row: Its row.
        selection: Its column; None for plain runs.
        rho: Radius; None for plain runs.
        runs: What is averaged.
        diverged: Runs of the cell that ended in NaN or infinity; they are not in the average.
        accuracies: Of ``runs``, in percent.
        chosen: Whether the table shows this radius for its row and column.
        at_edge: Chosen among several radii, and the smallest or largest of them.
        relative_time: Training time over that of the plain runs; None where either is unknown.
    """

    row: Row
    selection: str | None
    rho: float | None
    runs: list[Run] = field(default_factory=list)
    diverged: list[Run] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    chosen: bool = False
    at_edge: bool = False
    relative_time: float | None = None

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return sample_std(self.accuracies)

    @property
    def seconds(self) -> float | None:
        """Mean training time of the runs that were timed."""
        times = [run.seconds for run in self.runs if run.seconds is not None]
        return statistics.fmean(times) if times else None

    @property
    def seeds(self) -> list[int]:
        return sorted(run.args["seed"] for run in self.runs)


@dataclass
class Table:
    """All runs of one setting: same data, model and options but for seed and SAM.

    Attributes:
        data: Name of the data set.
        model: Name of the model.
        optimizer: Name of the base optimizer.
        differs: Options in which other tables of the same data and model differ, with this table's values.
        cells: In the order of rows, columns and radii.
    """

    data: str
    model: str
    optimizer: str
    differs: dict[str, str]
    cells: list[Cell]

    @property
    def metric(self) -> str:
        """The name of what the accuracies are."""
        return self._some_run.metric

    @property
    def held_out(self) -> float | None:
        """Share of the training images that were validated on instead of a split of its own; None: there is one."""
        return self._some_run.args.get("holdout")

    @property
    def has_choice(self) -> bool:
        """Whether there are several radii of a variant and selection, so that one of them had to be chosen."""
        places = [(cell.row, cell.selection) for cell in self.cells]
        return len(set(places)) < len(places)

    @property
    def validated_on(self) -> tuple[str, str]:
        """Name of the data folder, and of the split in it that the runs validated on."""
        args = self._some_run.args
        return data_name(args["data_dir"]), str(args["val_split"])

    @property
    def _some_run(self) -> Run:
        return next(run for cell in self.cells for run in (*cell.runs, *cell.diverged))

    @property
    def title(self) -> str:
        differs = "".join(f", {key} {value}" for key, value in self.differs.items())
        metric = "" if self.metric == "top1" else f" ({NAMES[self.metric]})"
        return f"{self.model} on {self.data}{differs}{metric}"

    def chosen(self, row: Row, selection: str | None) -> Cell | None:
        cells = self.of(row, selection)
        return next((cell for cell in cells if cell.chosen), None)

    def of(self, row: Row, selection: str | None) -> list[Cell]:
        return [cell for cell in self.cells if cell.row == row and cell.selection == selection]

    @property
    def plain(self) -> Cell | None:
        return next((cell for cell in self.cells if cell.row.variant is None and cell.runs), None)

    @property
    def rows(self) -> list[Row]:
        return sorted({cell.row for cell in self.cells})

    @property
    def selections(self) -> list[str]:
        there = {cell.selection for cell in self.cells}
        return [selection for selection in SELECTIONS if selection in there]


def build_tables(runs: Iterable[Run], epoch: str = "last") -> tuple[list[Table], list[Run]]:
    """Groups runs that differ in seed only, and chooses a radius for each row and column.

    The radius is the one with the highest mean validation accuracy among those that have the most seeds and of whose
    runs none diverged.

    Args:
        runs: As read; only finished and diverged ones enter the tables.
        epoch: Whose accuracy counts: ``"last"``, or ``"best"`` for each run's highest.

    Returns:
        The tables, and all runs, where those that repeat the options and the seed of another have become duplicates.
    """
    settings: dict[str, dict[tuple[Any, ...], Cell]] = {}
    all_runs: list[Run] = []
    for run in runs:
        setting, place = None, None
        if run.status in (FINISHED, DIVERGED):
            try:
                setting, place = _setting_key(run), _place(run)
            except Exception as e:  # options of types that nobody gives them
                run = replace(run, status=UNREADABLE, reason=f"args.yaml: {type(e).__name__}: {one_line(e, 100)}")
        if setting is not None and place is not None:
            cells = settings.setdefault(setting, {})
            row, selection, rho = place
            cell = cells.setdefault((row, selection, rho), Cell(row, selection, rho))
            twin = next((r for r in cell.runs + cell.diverged if r.args["seed"] == run.args["seed"]), None)
            if twin is not None:
                run = replace(run, status=DUPLICATE, reason=_twin_reason(run, twin, epoch))
            elif run.status == DIVERGED:
                cell.diverged.append(run)
            else:
                cell.runs.append(run)
                cell.accuracies.append(run.accuracy(epoch))
        all_runs.append(run)
    described = [json.loads(key) for key in settings]
    tables = [_table(setting, _differing(setting, described), list(cells.values()))
              for setting, cells in zip(described, settings.values())]
    return sorted(tables, key=lambda table: (table.data, table.model, table.title)), all_runs


def _twin_reason(run: Run, twin: Run, epoch: str) -> str:
    same = run.status == twin.status and (run.status == DIVERGED or run.accuracy(epoch) == twin.accuracy(epoch))
    return f"same options and seed as {twin.path}, {'same' if same else 'another'} result"


def _setting(run: Run) -> dict[str, Any]:
    """Everything in which runs of one table agree."""
    args = {key: normal(placeless(key, value)) for key, value in run.args.items()
            if key not in NOT_COMPARED and not key.startswith("sam_")}
    args["ranks"] = run.ranks if run.ranks is not None else "unknown"
    return args


def _setting_key(run: Run) -> str:
    return json.dumps(_setting(run), sort_keys=True, default=str)


def _place(run: Run) -> tuple[Row, str | None, float | None]:
    """Row, column and radius of a run."""
    args = run.args
    variant = args["sam_variant"]
    if variant is None:
        return Row(-1, None), None, None
    defaults = {**default_args(), "sam_eta": VARIANTS[variant].eta}
    options = tuple(sorted((key, str(value)) for key, value in args.items()
                           if key.startswith("sam_") and key not in GRID and value is not None
                           and normal(value) != normal(defaults.get(key))))
    return Row(list(VARIANTS).index(variant), variant, options), args["sam_params"], float(args["sam_rho"])


def _differing(setting: dict[str, Any], settings: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """In what a setting differs from others with the same data and model."""
    same = [s for s in settings if all(s.get(name) == setting.get(name) for name in ("data_dir", "dataset", "model"))]
    names = sorted({name for s in same for name in s if s[name] != setting.get(name)})
    return {name: written(setting.get(name)) for name in names}


def written(value: Any) -> str:
    """An option's value as it is written, whole numbers without a fraction."""
    if isinstance(value, dict):
        return " ".join(f"{k}={written(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(written, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(setting: dict[str, Any], differs: dict[str, str], cells: list[Cell]) -> Table:
    cells.sort(key=lambda c: (c.row, SELECTIONS.index(c.selection) if c.selection else -1, c.rho or 0.0))
    table = Table(setting["dataset"] or setting["data_dir"] or "unnamed data", setting["model"], setting["opt"],
                  differs, cells)
    for row, selection in {(cell.row, cell.selection) for cell in cells}:
        _choose(table.of(row, selection))
    plain = table.plain
    for cell in cells:
        if plain is not None and plain.seconds and cell.seconds is not None and _devices(cell) == _devices(plain):
            cell.relative_time = cell.seconds / plain.seconds
    return table


def _choose(cells: Sequence[Cell]) -> None:
    whole = [cell for cell in cells if cell.runs and not cell.diverged]
    most = max((len(cell.runs) for cell in whole), default=0)
    candidates = [cell for cell in whole if len(cell.runs) == most]
    if not candidates:
        return
    best = max(candidates, key=lambda cell: cell.mean)
    best.chosen = True
    best.at_edge = len(cells) > 1 and best in (cells[0], cells[-1])


def _devices(cell: Cell) -> set[str | None]:
    return {run.device for run in cell.runs}
