"""The report's figures, drawn with matplotlib (extra ``report``).

Colours are Okabe and Ito's, which colour-blind readers tell apart; markers and dashes say the same once more.
"""
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter

from ..cli.figures import MARKERS, SETTINGS, label
from .flatness import Tau
from .runs import Run
from .tables import NAMES, Cell, Row, Table

# colour, marker, dashes: of the paper's figures, all is solid, OnlyNorm dashed, no-norm dotted
SELECTION_STYLE: dict[str, tuple[str, str, Literal["-", "--", ":"]]] = {
    "all": ("#0072B2", "o", "-"), "onlynorm": ("#D55E00", "s", "--"), "nonorm": ("#009E73", "^", ":")}
SELECTION_FILL: dict[str, Literal["full", "none", "left"]] = {"all": "full", "onlynorm": "none", "nonorm": "left"}
# column of summary.csv, name, look
LOSSES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("train_loss", "at w", dict(linestyle="-", fillstyle="full")),
    ("train_sam_loss", "at w + eps", dict(linestyle="--", fillstyle="none")))
PLAIN = "#555555"
ROW_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#B8A800")


def draw(kind: str, table: Table, epoch: str, path: str) -> bool:
    """Draws one figure.

    Args:
        kind: ``rho``: accuracy over radius; ``time``: accuracy over training time; ``loss``: losses over epochs.
        table: Whose runs.
        epoch: Whose accuracy the table holds, ``"last"`` or ``"best"``.
        path: PNG file to write.

    Returns:
        Whether there was something to draw.

    Raises:
        OSError: The file cannot be written.
    """
    functions: dict[str, Callable[[Table, str], Figure | None]] = {
        "rho": _over_rho, "time": _over_time, "loss": _losses}
    with matplotlib.rc_context(SETTINGS):
        figure = functions[kind](table, epoch)
        if figure is None:
            return False
        figure.savefig(path, dpi=130)
    return True


def panels(names: Sequence[str], title: str) -> tuple[Figure, list[Any]]:
    """A figure with one panel per name, side by side and in up to three columns, with common axes."""
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(max(6.0, 3.5 * columns), 2.8 * lines + 1.1), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel().tolist()
    for ax in axes[len(names):]:
        ax.remove()
    for ax, name in zip(axes, names):
        ax.set_title(label(name), fontsize=10)
    figure.suptitle(label(title), fontsize=11, wrap=True)
    return figure, axes[:len(names)]


def legend_below(figure: Figure, handles: Sequence[Any]) -> None:
    """A legend under all panels: as many entries side by side as are not cut off, and room for all lines of them."""
    widest = max(len(handle.get_label()) for handle in handles)
    columns = min(len(handles), max(1, int(figure.get_figwidth() / (0.75 + 0.085 * widest))))
    lines = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.21 * (lines - 1))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, columnspacing=1.2)


def _accuracy_label(table: Table, epoch: str) -> str:
    return f"validation {NAMES[table.metric]} (%), {epoch} epoch"


def _seeds_note(table: Table) -> str:
    counts = sorted({len(cell.runs) for cell in table.cells if cell.runs})
    if counts == [1]:
        return "one seed"
    return f"mean ± std over {'–'.join(str(n) for n in {counts[0]: 0, counts[-1]: 0})} seeds"


def _over_rho(table: Table, epoch: str) -> Figure | None:
    """Figures 1, 2, 6 and 7: a panel per variant, a line per selection, plain training as horizontal line."""
    rows = [row for row in table.rows if row.variant is not None and any(
        cell.runs for selection in table.selections for cell in table.of(row, selection))]
    if not rows:
        return None
    figure, axes = panels([row.name for row in rows], f"{table.title} ({_seeds_note(table)})")
    plain = table.plain
    floor = _floor(table)
    crashed = below = False
    for ax, row in zip(axes, rows):
        _scale_radii(ax, [cell.rho for s in table.selections for cell in table.of(row, s) if cell.rho is not None])
        ax.set_xlabel("radius ρ")
        if plain is not None:
            ax.axhline(plain.mean, color=PLAIN, linestyle="-.", linewidth=1.2)
            if plain.std is not None:
                ax.axhspan(plain.mean - plain.std, plain.mean + plain.std, color=PLAIN, alpha=0.15, linewidth=0)
        for selection in table.selections:
            color, marker, dashes = SELECTION_STYLE[selection]
            cells = [cell for cell in table.of(row, selection) if cell.runs]
            ax.errorbar([cell.rho for cell in cells], [cell.mean for cell in cells],
                        [cell.std or 0 for cell in cells], color=color, marker=marker, linestyle=dashes, capsize=3,
                        markersize=5.5)
            lost = [cell.rho for cell in table.of(row, selection) if cell.diverged]
            low = [cell.rho for cell in cells if floor is not None and cell.mean < floor]
            crashed, below = crashed or bool(lost), below or bool(low)
            for radii, mark in ((lost, "x"), (low, "$\\downarrow$")):
                ax.plot(radii, [0.04] * len(radii), marker=mark, color=color, markersize=9,
                        markeredgewidth=1.5, linestyle="", transform=ax.get_xaxis_transform())
    if floor is not None:
        axes[0].set_ylim(bottom=floor)
    for ax in leftmost(axes):
        ax.set_ylabel(_accuracy_label(table, epoch))
    handles = [Line2D([], [], color=c, marker=m, linestyle=d, label=name)
               for name, (c, m, d) in SELECTION_STYLE.items() if name in table.selections]
    if plain is not None:
        handles.append(Line2D([], [], color=PLAIN, linestyle="-.", label=label(f"plain ({table.optimizer})")))
    if crashed:
        handles.append(Line2D([], [], color=PLAIN, marker="x", linestyle="", markeredgewidth=2, label="a run diverged"))
    if below:
        handles.append(Line2D([], [], color=PLAIN, marker="$\\downarrow$", markersize=9, linestyle="",
                              label="below the axis"))
    legend_below(figure, handles)
    return figure


def _floor(table: Table) -> float | None:
    """Where the accuracy axis ends, if a few collapsed runs would press all others into a line; else None."""
    means = sorted(cell.mean for cell in table.cells if cell.runs)
    floor = means[-1] - 3 * (means[-1] - statistics.median(means))
    if table.plain is not None:
        floor = min(floor, table.plain.mean - 2 * (table.plain.std or 0))
    return floor if means[0] < floor else None


def leftmost(axes: Sequence[Any]) -> list[Any]:
    return [ax for ax in axes if ax.get_subplotspec().is_first_col()]


def _scale_radii(ax: Any, radii: Sequence[float]) -> None:
    positive = [rho for rho in radii if rho > 0]
    if not positive:
        return
    if len(positive) < len(radii):
        ax.set_xscale("symlog", linthresh=min(positive))  # a logarithm has no place for rho 0
    else:
        ax.set_xscale("log")
    ticks = sorted(set(radii))
    # radii lie where they were chosen, not at powers of ten: label those, and leave out what would overlap
    kept = ticks[:1]
    span = math.log(max(positive) / min(positive)) or 1.0
    for rho in ticks[1:]:
        if kept[-1] <= 0 or math.log(rho / kept[-1]) / span > 0.13:
            kept.append(rho)
    ax.set_xticks(kept, [f"{rho:g}" for rho in kept])
    ax.set_xticks([rho for rho in ticks if rho not in kept], minor=True)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.12)


def _over_time(table: Table, epoch: str) -> Figure | None:
    """Figure 3: chosen radii only, training time relative to plain training."""
    timed = [(cell.relative_time, cell) for cell in table.cells if cell.chosen and cell.relative_time is not None]
    if len(timed) < 2:
        return None
    rows = sorted({cell.row for _, cell in timed if cell.row.variant is not None})
    styles = {row: (ROW_COLORS[i % len(ROW_COLORS)], MARKERS[i % len(MARKERS)]) for i, row in enumerate(rows)}
    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    ax = figure.subplots()
    for time, cell in timed:
        color, marker = styles.get(cell.row, (PLAIN, "*"))
        ax.errorbar([time], [cell.mean], [cell.std or 0], color=color, marker=marker, capsize=3,
                    markersize=11 if cell.selection is None else 8, linestyle="", markeredgewidth=1.6,
                    elinewidth=1, fillstyle=SELECTION_FILL[cell.selection or "all"], markerfacecoloralt="white")
    ax.set_xlabel("training time / training time of plain training")
    ax.set_ylabel(_accuracy_label(table, epoch))
    untimed = sum(cell.chosen for cell in table.cells) - len(timed)
    note = f"; {untimed} of unknown time not shown" if untimed else ""
    ax.set_title(label(f"{table.title}, at the chosen radii ({_seeds_note(table)}{note})"), fontsize=10, wrap=True)
    handles = [Line2D([], [], color=PLAIN, marker="*", markersize=11, linestyle="",
                      label=label(f"plain ({table.optimizer})"))]
    handles += [Line2D([], [], color=c, marker=m, linestyle="", label=label(row.name))
                for row, (c, m) in styles.items()]
    handles += [Line2D([], [], color=PLAIN, marker="o", linestyle="", fillstyle=SELECTION_FILL[s],
                       markerfacecoloralt="white", markeredgewidth=1.6, label=s) for s in table.selections]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def _losses(table: Table, epoch: str) -> Figure | None:
    """Training loss at w and at w + eps of the chosen radii, a panel per variant."""
    rows = [row for row in table.rows if row.variant is not None and any(
        table.chosen(row, selection) for selection in table.selections)]
    plain = table.plain
    if not rows and plain is None:
        return None
    names = [row.name for row in rows] or ["plain"]
    figure, axes = panels(names, f"{table.title}, at the chosen radii")
    for ax, row in zip(axes, rows or [Row(-1, None)]):
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        if plain is not None:
            epochs, losses = _curve(plain.runs, "train_loss")
            ax.plot(epochs, losses, color=PLAIN, linestyle="-", linewidth=1.2, marker="*", markersize=5,
                    markevery=max(1, len(epochs) // 5))
        for selection in table.selections:
            cell = table.chosen(row, selection)
            if cell is not None:
                _plot_losses(ax, cell)
    for ax in leftmost(axes):
        ax.set_ylabel("training loss")
    there = [s for s in table.selections if any(table.chosen(row, s) for row in rows)]
    handles = [Line2D([], [], color=SELECTION_STYLE[s][0], marker=SELECTION_STYLE[s][1], label=s) for s in there]
    if plain is not None:
        handles.append(Line2D([], [], color=PLAIN, marker="*", label=label(f"plain ({table.optimizer})")))
    if there:
        handles += [Line2D([], [], color="black", marker="o", markersize=4.5, label=name, **look)
                    for _, name, look in LOSSES]
    legend_below(figure, handles)
    return figure


def _plot_losses(ax: Any, cell: Cell) -> None:
    color, marker, _ = SELECTION_STYLE[str(cell.selection)]
    for column, _, look in LOSSES:
        epochs, losses = _curve(cell.runs, column)
        every = max(1, len(epochs) // 5)
        ax.plot(epochs, losses, color=color, linewidth=1.4, marker=marker, markersize=4.5, markevery=every, **look)


def _curve(runs: Sequence[Run], column: str) -> tuple[list[float], list[float]]:
    """Epochs that all runs have, and the mean over runs."""
    by_epoch: dict[float, list[float]] = {}
    for run in runs:
        for row in run.rows:
            if math.isfinite(row.get(column, math.nan)):  # epochs without SAM have no loss at w + eps
                by_epoch.setdefault(row["epoch"], []).append(row[column])
    epochs = sorted(e for e, values in by_epoch.items() if len(values) == len(runs))
    return epochs, [statistics.fmean(by_epoch[e]) for e in epochs]


def draw_flatness(title: str, found: Sequence[Tau], path: str) -> bool:
    """Draws Kendall's tau of each measure, with its interval: a panel per target, a line per measure.

    Args:
        title: Of the table whose runs they are.
        found: The taus.
        path: PNG file to write.

    Returns:
        Whether there was something to draw.

    Raises:
        OSError: The file cannot be written.
    """
    known = [tau for tau in found if tau.value is not None]
    if not known:
        return False
    measures = list(dict.fromkeys(tau.measure for tau in known))[::-1]
    targets = list(dict.fromkeys(tau.target for tau in known))
    with matplotlib.rc_context(SETTINGS):
        figure, axes = panels(targets, f"Kendall's tau over runs: {title}")
        lines = -(-len(targets) // 3)
        figure.set_size_inches(figure.get_figwidth() + 2, (0.24 * len(measures) + 1.2) * lines + 0.4)
        for ax, target in zip(axes, targets):
            ax.axvline(0, color="#aaaaaa", linewidth=1)
            for tau in known:
                if tau.target == target and tau.value is not None:
                    y = measures.index(tau.measure)
                    ax.plot([tau.value], [y], marker="o", color="#0072B2")
                    if tau.interval is not None:
                        ax.hlines(y, *tau.interval, color="#0072B2")
            ax.set_xlim(-1.05, 1.05)
            ax.set_xticks([-1, -0.5, 0, 0.5, 1])
            ax.set_yticks(range(len(measures)), [label(name) for name in measures], fontsize=8)
            ax.set_xlabel("tau, 95 % interval")
        figure.savefig(path, dpi=130)
    return True
