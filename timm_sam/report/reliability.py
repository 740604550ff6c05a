"""The reliability figure: how often a model is right when it is so sure."""
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..cli.figures import MARKERS, SETTINGS, label
from ..evaluation.evaluated import Key
from .evaluations import Joined
from .plots import PLAIN, ROW_COLORS, SELECTION_FILL, SELECTION_STYLE, leftmost, legend_below, panels
from .tables import Cell, Table

_MOST_PANELS = 9


def draw(table: Table, joined: Joined, path: str) -> bool:
    """Draws accuracy over confidence in bins of equal mass, a panel per data set, a line per chosen cell.

    Args:
        table: Whose runs.
        joined: Their numbers, with the bins of calibration errors.
        path: PNG file to write.

    Returns:
        Whether there was something to draw.

    Raises:
        OSError: The file cannot be written.
    """
    cells = [cell for cell in table.cells if cell.chosen]
    keys = [key for key in joined.keys if key.measure == "ece_mass" and any(
        joined.details(cell, key) for cell in cells)][:_MOST_PANELS]
    if not keys:
        return False
    with matplotlib.rc_context(SETTINGS):
        _figure(table, joined, cells, keys).savefig(path, dpi=130)
    return True


def _figure(table: Table, joined: Joined, cells: Sequence[Cell], keys: Sequence[Key]) -> Figure:
    figure, axes = panels([key.dataset for key in keys], f"Reliability: {table.title}, seeds together")
    rows = sorted({cell.row for cell in cells if cell.row.variant is not None})
    drawn: list[Cell] = []
    for ax, key in zip(axes, keys):
        ax.plot([0, 1], [0, 1], color="#aaaaaa", linewidth=1)
        ax.set_xlim(0, 1.01)
        ax.set_ylim(0, 1.01)
        ax.set_xlabel("mean confidence of a bin")
        for cell in cells:
            points = _together(joined.details(cell, key))
            if points:
                ax.plot(*zip(*points), markersize=4.5, linewidth=1.2, **_style(cell, rows))
                drawn.append(cell)
    for ax in leftmost(axes):
        ax.set_ylabel("share that is right")
    handles = [Line2D([], [], label=_name(table, cell), **_style(cell, rows)) for cell in cells if cell in drawn]
    handles.append(Line2D([], [], color="#aaaaaa", linewidth=1, label="calibrated"))
    legend_below(figure, handles)
    return figure


def _together(seeds: Sequence[Any]) -> list[tuple[float, float]]:
    """Mean confidence and accuracy of each bin over all seeds; bins without images are left out."""
    points = []
    for bins in zip(*seeds):
        images = sum(count for count, _, _ in bins)
        if images:
            points.append((sum(count * confidence for count, confidence, _ in bins) / images,
                           sum(count * right for count, _, right in bins) / images))
    return points


def _style(cell: Cell, rows: Sequence[Any]) -> dict[str, Any]:
    if cell.row.variant is None:
        return dict(color=PLAIN, marker="*", linestyle="-.")
    place = rows.index(cell.row)
    return dict(color=ROW_COLORS[place % len(ROW_COLORS)], marker=MARKERS[place % len(MARKERS)],
                linestyle=SELECTION_STYLE[str(cell.selection)][2], fillstyle=SELECTION_FILL[str(cell.selection)],
                markerfacecoloralt="white")


def _name(table: Table, cell: Cell) -> str:
    return label(f"plain ({table.optimizer})" if cell.row.variant is None else f"{cell.row.name} {cell.selection}")
