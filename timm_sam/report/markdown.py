"""The report as text: Markdown for people, CSV for programs."""
from collections.abc import Iterable, Mapping, Sequence

from ..cli.escape import markdown_code, markdown_text
from ..cli.text import csv_text, markdown, spread
from .runs import FINISHED, Run
from .tables import NAMES, Cell, Row, Table

FILES = ("report.md", "report.csv", "runs.csv")
MARK = "<!-- written by python -m timm_sam.report, which writes over it -->"


def report_text(tables: Sequence[Table], runs: Sequence[Run], epoch: str, pictures: Sequence[str],
                compared: Mapping[int, Sequence[str]], evaluated: Sequence[str]) -> str:
    """The whole report in Markdown.

    Args:
        tables: In their order.
        runs: All that were found.
        epoch: Whose accuracy the tables hold.
        pictures: Names of the files that it shows.
        compared: What is said of differences, by the number of the table.
        evaluated: What is said of evaluations.
    """
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.status] = counts.get(run.status, 0) + 1
    found = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    parts = [MARK, "# Report", f"{len(runs)} run{'s' if len(runs) != 1 else ''}: {found}."]
    if tables:
        which = "of the last epoch" if epoch == "last" else "of each run's best epoch, which flatters noisy runs"
        parts.append(
            f"Validation {_measured(tables)} in %, {which}: mean ± sample standard deviation over seeds, in brackets "
            "the number of seeds and the radius. The radius is the one with the highest mean among those with most "
            "seeds and without diverged runs. It is chosen on the same images, as is the paper's (Table 7): "
            "the more radii a cell has tried, the luckier its number. Bold: the better of all and onlynorm; "
            "underlined: the best of all; †: radius at the edge of those tried, so that a better one may lie beyond.")
    if len(tables) > 1:
        parts.append("Runs that differ in more than seed and SAM are in tables of their own.")
    for i, table in enumerate(tables, 1):
        parts += [f"## {i}. {markdown_text(table.title)}", *_held_out(table), _paper_table(table),
                  *(f"![{name}]({name})" for name in pictures
                    if name.startswith(f"table{i}-") and "reliability" not in name),
                  "All radii; time is that of training, evaluation left out, over plain training:", _grid_table(table),
                  *compared.get(i, ())]
    parts += evaluated
    left_out = [run for run in runs if run.status != FINISHED]
    if left_out:
        lines = [[markdown_code(run.path), run.status, markdown_text(run.reason)] for run in left_out]
        parts += ["## Not averaged", markdown(["run", "status", "why"], lines)]
    return "\n\n".join(parts) + "\n"


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
        args = run.args
        variant, rho = args.get("sam_variant"), args.get("sam_rho")
        lines.append([
            run.path, run.status, run.reason, args.get("model", ""), variant or ("plain" if args else ""),
            args["sam_params"] if variant else "", "" if rho is None else f"{rho:g}", args.get("seed", ""),
            f"{run.rows[-1]['epoch']:g}" if run.rows else "", run.epochs or "",
            f"{run.accuracy(epoch):.4f}" if run.status == FINISHED else "",
            f"{run.seconds:.1f}" if run.seconds is not None else ""])
    return csv_text(["path", "status", "reason", "model", "variant", "selection", "rho", "seed", "last_epoch", "epochs",
                     "top1", "train_seconds"], lines)


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


def _paper_table(table: Table) -> str:
    shown = [cell for cell in table.cells if cell.chosen]
    best = max(shown, key=lambda cell: cell.mean) if len(shown) > 1 else None
    columns = table.selections or ["all"]
    lines = []
    for row in table.rows:
        if row.variant is None:
            # as in the paper: plain training has no selection, its number stands in the first column
            lines.append([f"plain ({markdown_text(table.optimizer)})", _entry(table, row, None, best),
                          *[""] * (len(columns) - 1)])
            continue
        lines.append([markdown_text(row.name), *(_entry(table, row, column, best) for column in columns)])
    return markdown(["variant", *columns], lines)


def _entry(table: Table, row: Row, selection: str | None, best: Cell | None) -> str:
    cells = table.of(row, selection)
    cell = table.chosen(row, selection)
    if cell is None:
        return "diverged" if any(cell.diverged for cell in cells) else "" if not cells else "–"
    text = spread(cell.mean, cell.std)
    rivals = [other for other in (table.chosen(row, s) for s in ("all", "onlynorm")) if other is not None]
    if selection in ("all", "onlynorm") and len(rivals) == 2 and cell.mean == max(r.mean for r in rivals):
        text = f"**{text}**"
    if cell is best:
        text = f"<u>{text}</u>"
    rho = "" if cell.rho is None else f", ρ {cell.rho:g}{'†' if cell.at_edge else ''}"
    lost = sum(len(other.diverged) for other in cells)
    return f"{text} ({len(cell.runs)}{rho}{f'; {lost} diverged at other ρ' if lost else ''})"


def _grid_table(table: Table) -> str:
    lines = []
    for cell in table.cells:
        results = [spread(cell.mean, cell.std)] if cell.runs else []
        if cell.diverged:
            results.append(f"{len(cell.diverged)} diverged")
        text = ", ".join(results)
        time = f"{cell.relative_time:.2f}" if cell.relative_time is not None else "unknown" if cell.runs else ""
        lines.append([markdown_text(cell.row.name), cell.selection or "", "" if cell.rho is None else f"{cell.rho:g}",
                      f"**{text}**" if cell.chosen and cell.rho is not None else text, str(len(cell.runs)), time])
    return markdown(["variant", "selection", "ρ", NAMES[table.metric], "n", "time"], lines)
