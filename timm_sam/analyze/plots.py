"""Figures of analyses, drawn with matplotlib (extra ``report``)."""
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ..cli.figures import MARKERS, SETTINGS
from ..cli.figures import label as shown
from ..cli.text import sample_std
from ..evaluation.tables import Measure
from .card import NORMS
from .hessian_rows import ERROR
from .norms import KINDS, NORM_BIAS, NORM_WEIGHT, Tensors, edges, pooled, shares
from .sharpness import Measured

_COLORS = ("#777777", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1)), (0, (2, 1)), (0, (5, 1, 1, 1)))  # outlines have no markers
_LONGEST = 24  # letters of a name beside an axis
_ACROSS = 4  # panels side by side
Point = tuple[float, Sequence[float], Sequence[int]]  # x, a value per checkpoint, how much of each is not finite


def draw_sharpness(measures: Sequence[Measure], asked: Sequence[Measured], labels: Sequence[str], path: str) -> None:
    """Sharpness over the radius: a panel per kind and norm, a line per label, with the deviation of its seeds.

    Args:
        measures: The rows.
        asked: What they are, in any order.
        labels: Of the checkpoints; equal ones are one line.
        path: PNG file to write.

    Raises:
        OSError: The file cannot be written.
    """
    rows = {measure.name: measure for measure in measures}
    panels = {}
    for family in dict.fromkeys(measured.family for measured in asked):
        points = sorted((m for m in asked if m.family == family), key=lambda m: m.radius)
        panels[family] = [(m.radius, rows[str(m)].values, rows[str(m)].broken) for m in points]
    _draw_panels(panels, labels, path, "radius", "sharpness")


def draw_ranks(measures: Sequence[Measure], labels: Sequence[str], path: str) -> None:
    """Rank over the share of the variance: a panel per layer and centring, a line per label.

    Args:
        measures: The rows.
        labels: Of the checkpoints; equal ones are one line.
        path: PNG file to write.

    Raises:
        OSError: The file cannot be written.
    """
    panels: dict[str, list[Point]] = {}
    for measure in measures:  # rows of several shares have the same curve
        curves = [dict(detail["curve"]) for detail in measure.details]
        panels[measure.name.rpartition(" ")[0]] = [
            (share, [curve[share] for curve in curves], measure.broken) for share in curves[0]]
    _draw_panels(panels, labels, path, "share of the variance", "rank", log=True)


def draw_lines(measures: Sequence[Measure], labels: Sequence[str], path: str) -> None:
    """The loss over t: a panel per direction, a line per label.

    Args:
        measures: The rows.
        labels: Of the checkpoints; equal ones are one line.
        path: PNG file to write.

    Raises:
        OSError: The file cannot be written.
    """
    panels: dict[str, list[Point]] = {}
    for measure in measures:
        panels.setdefault(measure.name.rpartition(" ")[0], []).append(
            (measure.details[0]["t"], measure.values, measure.broken))
    _draw_panels(panels, labels, path, "t", "loss at w + t eps")


def draw_points(measures: Sequence[Measure], labels: Sequence[str], path: str) -> None:
    """A panel per measure, a point per checkpoint above its label, and the mean of each label.

    Args:
        measures: The rows, of which curvature's error and what a card has of norms are left out.
        labels: Of the checkpoints.
        path: PNG file to write.

    Raises:
        OSError: The file cannot be written.
    """
    named = list(dict.fromkeys(labels))
    measures = [measure for measure in measures if measure.name != ERROR and measure.group != NORMS]
    with matplotlib.rc_context(SETTINGS):
        figure, panels = _grid(len(measures))
        for panel, measure in zip(panels, measures):
            for i, label in enumerate(named):
                values = [value for value, of, lost in zip(measure.values, labels, measure.broken)
                          if of == label and not lost]
                color = _COLORS[i % len(_COLORS)]
                panel.plot([i] * len(values), values, color=color, marker=MARKERS[i % len(MARKERS)], linestyle="none")
                if len(values) > 1:
                    panel.hlines(statistics.fmean(values), i - 0.2, i + 0.2, color=color)
            panel.set_title(shown(measure.name), fontsize=9)
            panel.set_xlim(-0.5, len(named) - 0.5)
            panel.set_xticks(range(len(named)), [_short(label) for label in named], rotation=30, ha="right")
        figure.savefig(path, dpi=130)


def draw_card(measures: Sequence[Measure], number: int, path: str) -> None:
    """One checkpoint: losses along SAM's directions, ranks over the share of the variance, weights of norm layers.

    Args:
        measures: The rows of all checkpoints.
        number: Of this one.
        path: PNG file to write.

    Raises:
        OSError: The file cannot be written.
    """
    rows = [(measure.name, measure.details[number]) for measure in measures
            if measure.details and not measure.broken[number]]
    of_norms = [detail for _, detail in rows if "edges" in detail]
    with matplotlib.rc_context(SETTINGS):
        figure, (line, rank, *more) = _grid(2 + len(of_norms))
        line.set(title="loss", xlabel="t", ylabel="loss at w + t eps")
        rank.set(title="feature rank", xlabel="share of the variance", ylabel="rank", yscale="log")
        for panel, key in ((line, "losses"), (rank, "curve")):
            for i, (name, curve) in enumerate((name, detail[key]) for name, detail in rows if key in detail):
                panel.plot(*zip(*curve), color=_COLORS[(i + 1) % len(_COLORS)], marker=MARKERS[i % len(MARKERS)],
                           markersize=3, label=shown(name))
            if panel.has_data():
                panel.legend(fontsize=7)
        for panel, detail in zip(more, of_norms):
            panel.stairs(detail["shares"], detail["edges"], color=_COLORS[1])
            panel.set(title=detail["kind"], xlabel="value", ylabel="share of parameters")
        figure.savefig(path, dpi=130)


def _short(label: str) -> str:
    """A name beside an axis: of a path that is long the end, which tells most."""
    text = shown(label)
    return text if len(text) <= _LONGEST else f"\u2026{text[1 - _LONGEST:]}"


def _grid(count: int) -> tuple[Figure, list[Any]]:
    """A figure of so many panels, a few side by side."""
    across = min(count, _ACROSS)
    down = -(-count // across)
    figure = Figure(figsize=(4 * across, 3.5 * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for panel in axes[count:]:
        panel.remove()
    return figure, axes[:count]


def _draw_panels(panels: Mapping[str, Sequence[Point]], labels: Sequence[str], path: str, xlabel: str, ylabel: str,
                 log: bool = False) -> None:
    """A line per label in each panel, with the deviation of its seeds."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _grid(len(panels))
        for panel, (title, points) in zip(axes, panels.items()):
            for i, label in enumerate(dict.fromkeys(labels)):
                seeds = [(x, [value for value, of, lost in zip(values, labels, broken) if of == label and not lost])
                         for x, values, broken in points]
                kept = [(x, values) for x, values in seeds if values]
                panel.errorbar(
                    [x for x, _ in kept], [statistics.fmean(values) for _, values in kept],
                    [sample_std(values) or 0.0 for _, values in kept], color=_COLORS[i % len(_COLORS)],
                    marker=MARKERS[i % len(MARKERS)], capsize=2, label=shown(label))
            panel.set(xlabel=xlabel, ylabel=ylabel, title=shown(title))
            if log:
                panel.set_yscale("log")
        axes[0].legend(fontsize=8)
        figure.savefig(path, dpi=130)


def draw_norms(found: Sequence[Tensors], signed: str, sizes: str) -> None:
    """Distributions of parameters: an outline per label, as shares of the parameters of a kind.

    Args:
        found: Of every checkpoint; the first label is grey.
        signed: PNG file of weights and biases of normalization layers, with their signs (Figure 5).
        sizes: PNG file of absolute values of each kind, on a logarithmic axis (Figure 9).

    Raises:
        OSError: A file cannot be written.
    """
    for path, kinds, log in ((signed, (NORM_WEIGHT, NORM_BIAS), False), (sizes, KINDS, True)):
        with matplotlib.rc_context(SETTINGS):
            figure = Figure(figsize=(4 * len(kinds), 3.5), layout="constrained")
            for panel, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
                samples = {label: np.abs(values) if log else values
                           for label, values in pooled(found, kind).items() if len(values)}
                panel.set(title=kind, xlabel="absolute value" if log else "value", ylabel="share of parameters")
                if not samples:
                    continue
                bins = edges(samples)
                for i, (label, heights) in enumerate(shares(samples, bins).items()):
                    panel.stairs(heights, bins, color=_COLORS[i % len(_COLORS)], linewidth=1.2,
                                 linestyle=_DASHES[i % len(_DASHES)], label=shown(label))
                if log:
                    panel.set_yscale("log")
                panel.legend(fontsize=8)
            figure.savefig(path, dpi=130)
