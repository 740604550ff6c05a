"""The runs themselves: the paper's table, all radii, and what is not averaged; CSV for programs."""
from collections.abc import Iterable, Mapping, Sequence

from ..cli import document
from ..cli.document import Block, Document, Entry, Figure, Section
from ..cli.text import csv_text, spread
from .links import Links
from .runs import FINISHED, Run
from .tables import NAMES, NO_CHOICE, Cell, Row, Table

CSV_FILES = ("report.csv", "runs.csv")


def report_document(tables: Sequence[Table], runs: Sequence[Run], epoch: str, pictures: Mapping[int, Sequence[Figure]],
                    compared: Mapping[int, Sequence[Block]], evaluated: Sequence[Section], links: Links) -> Document:
    """The whole report.

    Args:
        tables: In their order.
        runs: All that were found.
        epoch: Whose accuracy the tables hold.
        pictures: What is shown of a table, by its number.
        compared: What is said of differences, by the number of the table.
        evaluated: What is said of evaluations.
        links: Ways to the runs.
    """
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.status] = counts.get(run.status, 0) + 1
    found = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    first = [f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {found}."]
    if tables:
        which = "of the last epoch" if epoch == "last" else "of each run's best epoch, which flatters noisy runs"
        chosen = (
            "The radius is the one with the highest mean among those with most seeds and without diverged runs. It is "
            "chosen on the same images, as is the paper's (Table 7): the more radii a cell has tried, the luckier its "
            "number." if any(table.has_choice for table in tables) else
            NO_CHOICE)
        first.append(
            f"Validation {_measured(tables)} in %, {which}: mean ± sample standard deviation over seeds, in brackets "
            f"the number of seeds and the radius. {chosen} Bold: the better of all and onlynorm; underlined: the best "
            "of all; †: radius at the edge of those tried, so that a better one may lie beyond.")
    if len(tables) > 1:
        first.append("Runs that differ in more than seed and SAM are in tables of their own.")
    sections = [Section(f"{i}. {table.title}", [
        *_held_out(table), _paper_table(table, links), *pictures.get(i, ()),
        "All radii; time is that of training, evaluation left out, over plain training:", _grid_table(table, links),
        *compared.get(i, ())]) for i, table in enumerate(tables, 1)]
    sections += evaluated
    left_out = [run for run in runs if run.status != FINISHED]
    if left_out:
        sections.append(Section("Not averaged", [document.Table(["run", "status", "why"], [
            [Entry(run.path, code=True, links=[links.run(run.path)]), run.status, run.reason] for run in left_out])]))
    return Document("Report", first, sections)


def grid_csv(tables: Sequence[Table]) -> str:
    """One line per table, row, column and radius."""
    lines = []
    for i, table in enumerate(tables, 1):
        for cell in table.cells:
            some = bool(cell.runs)
            lines.append([
                i, table.title, table.metric, table.data, table.model, cell.row.variant or "plain",
                " ".join(f"{key}={value}" for key, value in cell.row.options), cell.selection or "",
                "" if cell.rho is None else f"{cell.rho:g}", len(cell.runs), f"{cell.mean:.4f}" if some else "",
                f"{cell.std:.4f}" if cell.std is not None else "", len(cell.diverged), int(cell.chosen),
                f"{cell.seconds:.1f}" if cell.seconds is not None else "",
                f"{cell.relative_time:.3f}" if cell.relative_time is not None else "",
                " ".join(map(str, cell.seeds))])
    return csv_text(["table", "title", "metric", "data", "model", "variant", "options", "selection", "rho", "n",
                     "top1_mean", "top1_std", "diverged", "chosen", "train_seconds", "relative_time", "seeds"], lines)


def runs_csv(runs: Iterable[Run], epoch: str) -> str:
    """One line per run that was found, whatever its status."""
    lines = []
    for run in runs:
        path, *who = identity(run)
        lines.append([
            path, run.status, run.reason, *who,
            f"{run.rows[-1]['epoch']:g}" if run.rows else "", run.epochs or "",
            f"{run.accuracy(epoch):.4f}" if run.status == FINISHED else "",
            f"{run.seconds:.1f}" if run.seconds is not None else ""])
    path, *names = IDENTITY
    return csv_text([path, "status", "reason", *names, "last_epoch", "epochs", "top1", "train_seconds"], lines)


IDENTITY = ("path", "model", "variant", "selection", "rho", "seed")


def identity(run: Run) -> list[str]:
    """Which run it is, in the columns ``IDENTITY``."""
    args = run.args
    variant, rho = args.get("sam_variant"), args.get("sam_rho")
    return [run.path, args.get("model", ""), variant or ("plain" if args else ""),
            args["sam_params"] if variant else "", "" if rho is None else f"{rho:g}", str(args.get("seed", ""))]


def _held_out(table: Table) -> list[str]:
    if table.held_out is None:
        return []
    return [f"Validated on {100 * table.held_out:g} % of the training images, which were held out: radii are chosen on "
            f"them, and evaluations of other images know nothing of the choice."]


def _measured(tables: Sequence[Table]) -> str:
    """What the numbers of the tables are."""
    metrics = {table.metric for table in tables}
    names = ["top-1 accuracy"] if "top1" in metrics else []
    return " or ".join([*names, *(["mAP (where the title says so)"] if "map" in metrics else [])])


def _paper_table(table: Table, links: Links) -> document.Table:
    shown = [cell for cell in table.cells if cell.chosen]
    best = max(shown, key=lambda cell: cell.mean) if len(shown) > 1 else None
    columns = table.selections or ["all"]
    lines: list[list[Entry | str]] = []
    for row in table.rows:
        if row.variant is None:
            # as in the paper: plain training has no selection, its number stands in the first column
            lines.append([f"plain ({table.optimizer})", _entry(table, row, None, best, links),
                          *[""] * (len(columns) - 1)])
            continue
        lines.append([row.name, *(_entry(table, row, column, best, links) for column in columns)])
    return document.Table(["variant", *columns], lines)


def _entry(table: Table, row: Row, selection: str | None, best: Cell | None, links: Links) -> Entry:
    cells = table.of(row, selection)
    cell = table.chosen(row, selection)
    if cell is None:
        lost = any(cell.diverged for cell in cells)
        return Entry("diverged" if lost else "" if not cells else "–", links=links.behind(*cells, lost=True))
    rivals = [other for other in (table.chosen(row, s) for s in ("all", "onlynorm")) if other is not None]
    better = selection in ("all", "onlynorm") and len(rivals) == 2 and cell.mean == max(r.mean for r in rivals)
    rho = "" if cell.rho is None else f", ρ {cell.rho:g}{'†' if cell.at_edge else ''}"
    gone = sum(len(other.diverged) for other in cells)
    return Entry(spread(cell.mean, cell.std), strong=better, underlined=cell is best, number=cell.mean,
                 note=f" ({len(cell.runs)}{rho}{f'; {gone} diverged at other ρ' if gone else ''})",
                 links=links.behind(cell), anchor=links.of_choice(cell))


def _grid_table(table: Table, links: Links) -> document.Table:
    lines: list[list[Entry | str]] = []
    for cell in table.cells:
        results = [spread(cell.mean, cell.std)] if cell.runs else []
        if cell.diverged:
            results.append(f"{len(cell.diverged)} diverged")
        time = f"{cell.relative_time:.2f}" if cell.relative_time is not None else "unknown" if cell.runs else ""
        behind = links.behind(cell, lost=True)
        lines.append([
            Entry(cell.row.name, anchor=links.of_radius(cell)), cell.selection or "",
            Entry("" if cell.rho is None else f"{cell.rho:g}", number=cell.rho),
            Entry(", ".join(results), strong=cell.chosen and cell.rho is not None, links=behind,
                  number=cell.mean if cell.runs else None),
            Entry(str(len(cell.runs)), number=len(cell.runs), links=behind, spelled=True),
            Entry(time, number=cell.relative_time)])
    return document.Table(["variant", "selection", "ρ", NAMES[table.metric], "n", "time"], lines)
