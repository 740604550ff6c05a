#!/usr/bin/env python3
"""Theorem C.5 of the SAM-ON paper beside runs: a problem on which it is nearly tight, and one that it misses.

    python benchmarks/theorem_c5.py --out output/theorem_c5

The theorem bounds how large gradients stay under SAM-ON with step length h, T steps, f that is L-smooth and gradients
of samples with ||g_i||^2 <= M:

    (1/T) sum_t E ||grad f(w_t)||^2  <=  2 (f(w_0) - f*) / (h T)  +  2 L h M  +  L^2 rho^2 (1 + L h),     h <= 1/L

Its proof bounds differences of the gradients of *samples* by L, (18) and (22), so every f_i has to be L-smooth; the
assumption C.1 asks that of f only, and with that alone the theorem is false: ``COUNTEREXAMPLE``. The bound does not
depend on which coordinates are perturbed, so it tells nothing of SAM-ON over SAM.

Paper: https://arxiv.org/abs/2306.04226, Appendix C. Writes a CSV file and a figure (extra ``report``), prints a table.
"""
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from experiment import publish  # of this folder
from numpy.typing import NDArray

from timm_sam.cli.errors import OptionError, report
from timm_sam.cli.parser import OptionParser

Array = NDArray[np.float64]
Gradient = Callable[[Array, Array], Array]
Ascent = Callable[[Array], Array]
SEEDS = 16
XI = 0.5  # noise of a sample in TIGHT
RIPPLE, RIPPLE_RHO = 1.5, 0.01  # height and radius of what the two samples of COUNTEREXAMPLE add


@dataclass(frozen=True)
class Problem:
    """Samples f_1 and f_2, drawn with probability 1/2 each: sign -1 or +1.

    Attributes:
        name: Of the problem.
        value: f at points (n, seeds), shape (seeds,).
        gradient: Of f.
        sample_gradient: Of f_i at points, for signs (seeds,).
        perturbed: How many of the first coordinates are perturbed.
        smoothness, bound, least: L of f, M, f*.
        start: w_0.
        rho, h: Radius and step length.
    """

    name: str
    value: Callable[[Array], Array]
    gradient: Callable[[Array], Array]
    sample_gradient: Gradient
    perturbed: int
    smoothness: float
    bound: float
    least: float
    start: tuple[float, ...]
    rho: float
    h: float

    def right_side(self, steps: int, start: Array | None = None) -> tuple[float, float, float]:
        """The three terms of the bound after so many steps, from ``start`` (n, seeds) or from w_0."""
        w = np.array(self.start)[:, None] if start is None else start
        gap = float(np.mean(self.value(w))) - self.least
        smooth, h = self.smoothness, self.h
        return 2 * gap / (h * steps), 2 * smooth * h * self.bound, smooth ** 2 * self.rho ** 2 * (1 + smooth * h)


def tight(h: float = 0.01) -> Problem:
    """f_i = cos u + sqrt(1 + v^2) - 1 + xi_i v, of which u is perturbed. Every f_i is 1-smooth.

    From u = rho the ascent goes to the maximum u = 0 exactly, where the gradient is 0, so u never moves and adds
    sin(rho)^2 to every term: the last term of the bound is tight up to (sin(rho) / rho)^2.
    """
    def value(w: Array) -> Array:
        return np.cos(w[0]) + np.sqrt(1 + w[1] ** 2) - 1

    def gradient(w: Array) -> Array:
        return np.stack([-np.sin(w[0]), w[1] / np.sqrt(1 + w[1] ** 2)])

    def sample_gradient(w: Array, sign: Array) -> Array:
        g = gradient(w)
        g[1] += XI * sign
        return g

    return Problem(f"tight, h {h:g}", value, gradient, sample_gradient, perturbed=1, smoothness=1.0,
                   bound=1 + (1 + XI) ** 2, least=-1.0, start=(0.5, 2.0), rho=0.5, h=h)


def _slope(w: Array) -> Array:
    return w / np.sqrt(1 + w ** 2)


COUNTEREXAMPLE = Problem(
    "counterexample", value=lambda w: np.sqrt(1 + w[0] ** 2) - 1, gradient=_slope,
    sample_gradient=lambda w, sign: _slope(w) + sign * RIPPLE * np.sin(math.pi * w / (2 * RIPPLE_RHO)),
    perturbed=1, smoothness=1.0, bound=(1 + RIPPLE) ** 2, least=0.0, start=(1.0,), rho=RIPPLE_RHO, h=1e-3)


def signs(steps: int, seeds: int = SEEDS, seed: int = 0) -> Array:
    """Which sample each step draws, (steps, seeds)."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=(steps, seeds))


def normalized(g: Array, rho: float, perturbed: int) -> Array:
    """eps of SAM-ON: rho g_N / ||g_N|| on the first coordinates, 0 on the others, and 0 where g_N is."""
    eps = np.zeros_like(g)
    norm = np.sqrt((g[:perturbed] ** 2).sum(0))
    eps[:perturbed] = rho * g[:perturbed] / np.where(norm > 0, norm, 1.0)
    return eps


def descend(problem: Problem, drawn: Array, ascent: Ascent | None = None, restore: bool | NDArray[np.bool_] = True,
            start: Array | None = None) -> tuple[Array, Array]:
    """Stochastic SAM-ON in float64, all seeds at once.

    Args:
        problem: What is minimised.
        drawn: Of :func:`signs`, (steps, seeds).
        ascent: From the gradient of a sample, (n, seeds), to eps; None: SAM-ON's.
        restore: Whether the step is taken at w, as it has to be, or at w + eps; one for all, or one a seed.
        start: (n, seeds); None: w_0.

    Returns:
        ``||grad f(w_t)||^2`` before each step, (steps, seeds), and all w_t, (steps, n, seeds).
    """
    seeds = drawn.shape[1]
    w = np.repeat(np.array(problem.start)[:, None], seeds, 1) if start is None else start.copy()
    points = np.empty((len(drawn), *w.shape))
    for t, sign in enumerate(drawn):
        points[t] = w
        g = problem.sample_gradient(w, sign)
        eps = normalized(g, problem.rho, problem.perturbed) if ascent is None else ascent(g)
        step = problem.h * problem.sample_gradient(w + eps, sign)
        w = np.where(restore, w, w + eps) - step
    squares = (problem.gradient(points.transpose(1, 0, 2)) ** 2).sum(0)
    return squares, points


def left_side(squares: Array, steps: int) -> tuple[float, float]:
    """Mean over the first steps and the seeds, and the standard error over the seeds."""
    means = squares[:steps].mean(0)
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))


def measure(problem: Problem, steps: int) -> list[tuple[int, float, float, float, float, float]]:
    """Both sides over T: T, left, its standard error, the three terms of the right."""
    squares, _ = descend(problem, signs(steps))
    counts = sorted({round(t) for t in np.geomspace(min(100, steps), steps, 60)})
    return [(t, *left_side(squares, t), *problem.right_side(t)) for t in counts]


def _draw_sides(axes: Any, rows: Sequence[tuple[int, float, float, float, float, float]], title: str) -> None:
    t, left, error, *terms = (np.array(column) for column in zip(*rows))
    below = np.zeros_like(left)
    for term, color, text in zip(terms, ("#dddddd", "#bbbbbb", "#999999"),
                                 ("2 (f(w_0) - f*) / (hT)", "2 L h M", "L^2 rho^2 (1 + Lh)")):
        axes.fill_between(t, below, below + term, color=color, label=text, linewidth=0)
        below = below + term
    axes.errorbar(t, left, 4 * error, color="#D55E00", errorevery=6, capsize=2, label="left side, 4 standard errors")
    axes.set(xscale="log", yscale="log", xlabel="T", title=title, ylim=(1e-2, 20))
    axes.legend(fontsize=7)


def run(out: str, steps: int) -> None:
    """Prints the table, writes CSV file and figure."""
    runs = [(tight(0.01), steps), (tight(0.002), 5 * steps), (COUNTEREXAMPLE, 5 * steps)]
    found = {problem.name: measure(problem, length) for problem, length in runs}
    rows = [(name, *row) for name, measured in found.items() for row in measured]
    table = [[name, str(t), f"{left:.4f} ± {4 * error:.4f}", f"{sum(terms):.4f}", f"{left / sum(terms):.3f}"]
             for name, measured in found.items() for t, left, error, *terms in measured[-1:]]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 4)
        for axes, (name, measured) in zip((*panels[:2], panels[3]), found.items()):
            _draw_sides(axes, measured, name)
        w = np.linspace(1 - 4 * RIPPLE_RHO, 1 + 4 * RIPPLE_RHO, 400)
        for sign, color in ((1.0, "#0072B2"), (-1.0, "#009E73")):
            panels[2].plot(w, COUNTEREXAMPLE.sample_gradient(w, np.array(sign)), color=color, linewidth=1,
                           label=f"f_{'+' if sign > 0 else '-'}'")
        panels[2].plot(w, _slope(w), color="black", label="f', slope at most L = 1")
        panels[2].set(xlabel="w", title="the gap: f is smooth, f_i are not", ylim=(-1.5, 3.5))
        panels[2].legend(fontsize=7)

    publish(out, "theorem_c5", ("run", "T", "left", "standard_error", "gap_term", "noise_term", "rho_term"), rows,
            f"Theorem C.5 of the SAM-ON paper: mean squared gradient (left) and bound (right), {SEEDS} seeds, float64. "
            "In the counterexample f is L-smooth, as C.1 asks, but its samples are not, as the proof needs.",
            (("run", "T", "left, 4 standard errors", "right", "left / right"), table), draw, (16, 4))


def build_parser() -> OptionParser:
    parser = OptionParser(prog="theorem_c5.py", description="Theorem C.5 of the SAM-ON paper beside runs.")
    add = parser.add_argument
    add("--out", default="output/theorem_c5", metavar="DIR", help="folder of the CSV file and the figure")
    add("--steps", type=int, default=20_000, metavar="T",
        help="steps of the run with h = 0.01; the two others have five times as many")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for a mistake."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.steps < 1:
            raise OptionError(f"--steps {args.steps} must be 1 or more")
        run(args.out, args.steps)
    except OptionError as e:
        report(parser.prog, e)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
