"""SAM and USAM over the radius on a small ResNet, and on from a minimum of SGD: on few and noisy digits.

After the networks of Dai, Ahn and Sra, NeurIPS 2023, https://arxiv.org/abs/2305.15287, who trained others on other
data. Recipe, data and pool are those of ``digits_table.py``.
"""
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import digits_table  # of this folder, as methods_table
import methods_table
from experiment import COLORS, LINES, publish

from timm_sam.cli.text import sample_std, say, spread
from timm_sam.jobs.job import Job as PoolJob
from timm_sam.jobs.table import run_table
from timm_sam.report.runs import FINISHED, read_run
from timm_sam.runs import files

OVER_RADIUS = "over_radius"
RADII = tuple(2.0 ** k for k in range(-8, 3))
METHODS = ("sam", "usam")
# from a minimum: at the radius that suits SAM in the digits table
DRIFT_RHO = 0.1
DRIFT_EPOCHS = 20
DRIFT_LR = 0.05


def plain(seed: int) -> methods_table.Job:
    """Plain training; what it leaves is the minimum that runs go on from."""
    return methods_table.Job(methods_table.MODEL, None, None, None, seed)


@dataclass(frozen=True)
class OnFromMinimum(methods_table.Job):
    """A run that begins where plain training ended, with a constant learning rate."""

    @property
    def name(self) -> str:
        return f"from_minimum/{'plain' if self.variant is None else self.method}-seed{self.seed}"

    @property
    def kind(self) -> tuple[str, str | None]:
        return f"from minimum, {self.method}", self.selection

    def argv(self, out: str) -> list[str]:
        weights = os.path.join(out, "runs", plain(self.seed).name, files.LAST)
        return [*super().argv(out), "--initial-checkpoint", weights, "--lr", f"{DRIFT_LR:g}", "--sched", "none",
                "--epochs", str(DRIFT_EPOCHS), "--warmup-epochs", "0", "--val-interval", "1"]


def over_radius(seeds: Sequence[int]) -> list[methods_table.Job]:
    """Plain training, and both methods with every radius."""
    jobs = []
    for seed in dict.fromkeys(seeds):
        jobs.append(plain(seed))
        jobs += [methods_table.Job(methods_table.MODEL, "sam", "all", rho, seed, method)
                 for method in METHODS for rho in RADII]
    return jobs


def from_minimum(seeds: Sequence[int]) -> list[methods_table.Job]:
    """Plain training and both methods, on from a minimum for each seed."""
    return [OnFromMinimum(methods_table.MODEL, None if method == "plain" else "sam",
                          None if method == "plain" else "all", None if method == "plain" else DRIFT_RHO, seed, method)
            for seed in dict.fromkeys(seeds) for method in ("plain", *METHODS)]


@dataclass(frozen=True)
class Row:
    """An epoch of a run: what is in the CSV file.

    Attributes:
        part: ``over_radius`` (last epochs only) or ``from_minimum``.
        method, rho, seed, epoch: Which; plain training has radius 0.
        top1: Validation accuracy in %.
        perturbed_loss: Training loss at w + eps; plain training has none.
    """

    part: str
    method: str
    rho: float
    seed: int
    epoch: int
    top1: float
    perturbed_loss: float


def read(part: str, jobs: Sequence[methods_table.Job], out: str) -> tuple[list[Row], list[str]]:
    """What the runs have left, and the names of those that have no accuracy in the end."""
    rows, without = [], []
    for job in jobs:
        run = read_run(os.path.join(out, "runs", job.name))
        method = "plain" if job.variant is None else job.method
        if run.status != FINISHED:
            without.append(job.name)
            continue
        rows += [Row(part, method, job.rho or 0.0, job.seed, int(row["epoch"]), row["eval_top1"],
                     row.get("train_sam_loss", math.nan)) for row in run.rows[-1 if part == OVER_RADIUS else 0:]]
    return rows, without


def curve(rows: Sequence[Row], method: str, at: str, what: str) -> list[tuple[float, float, float | None]]:
    """Places (``rho`` or ``epoch``), means over seeds and sample standard deviations."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if row.method == method and math.isfinite(getattr(row, what)):
            values.setdefault(getattr(row, at), []).append(getattr(row, what))
    return [(x, statistics.fmean(found), sample_std(found)) for x, found in sorted(values.items())]


def run(prog: str, out: str, processes: int, seeds: Sequence[int]) -> int:
    """Trains what is missing and writes table, CSV file and figure.

    Args:
        prog: Name of the command.
        out: Folder of runs and results.
        processes: How many train at the same time.
        seeds: Of each point.

    Returns:
        0, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C.
    """
    grid, onward = over_radius(seeds), from_minimum(seeds)

    def prepare() -> list[PoolJob]:
        digits_table.export(grid, out)
        jobs = [digits_table.pool_job(job, out, keep=job.variant is None) for job in grid]
        minima = {job.seed: found for job, found in zip(grid, jobs) if job.variant is None}
        return [*jobs, *(digits_table.pool_job(job, out, after=minima[job.seed]) for job in onward)]

    def write() -> int:
        write_results(grid, onward, out)
        return 0

    return run_table(prog, prepare, out, processes, write, "--jobs")


def write_results(grid: Sequence[methods_table.Job], onward: Sequence[methods_table.Job], out: str) -> None:
    """Prints the table, writes the CSV file and the figure."""
    over, without = read(OVER_RADIUS, grid, out)
    further, also_without = read("from_minimum", onward, out)
    found = {method: {rho: spread(mean, std) for rho, mean, std in curve(over, method, "rho", "top1")}
             for method in ("plain", *METHODS)}
    seeds = len({row.seed for row in over})

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 3)
        for axes, (rows, at, what) in zip(panels, ((over, "rho", "top1"), (further, "epoch", "top1"),
                                                   (further, "epoch", "perturbed_loss"))):
            for method in ("plain", *METHODS):
                points = curve(rows, method, at, what)
                if at == "rho" and method == "plain":
                    for _, mean, std in points:
                        axes.axhspan(mean - (std or 0), mean + (std or 0), color=COLORS[method], alpha=0.3)
                elif points:
                    x, means, stds = zip(*points)
                    axes.errorbar(x, means, [std or 0.0 for std in stds], color=COLORS[method],
                                  linestyle=LINES[method], marker="o", markersize=3, capsize=2, label=method)
            axes.set_xlabel("rho" if at == "rho" else f"epochs on from a minimum of SGD, rho {DRIFT_RHO:g}")
            axes.set_ylabel("validation accuracy in %" if what == "top1" else "training loss at w + eps")
            axes.legend(fontsize=8)
        panels[0].set_xscale("log")
        panels[2].set_yscale("log")

    publish(out, "networks", [column.name for column in fields(Row)], [astuple(row) for row in (*over, *further)],
            f"{methods_table.MODEL} on few and noisy digits, {seeds} seeds; after Dai et al., whose networks and data "
            "were others. Validation accuracy of the last epoch in %, mean ± standard deviation over seeds. Plain "
            f"training (grey): {found['plain'].get(0.0, 'none')}.",
            (("rho", *METHODS), [[f"{rho:g}", *(found[method].get(rho, "") for method in METHODS)] for rho in RADII]),
            draw, (13, 4))
    for method in ("plain", *METHODS):
        points = curve(further, method, "epoch", "top1")
        if points:
            say(f"On from a minimum, {method}: {spread(*points[0][1:])} after one epoch, {spread(*points[-1][1:])} "
                f"after {len(points)}")
    for name in (*without, *also_without):
        say(f"no accuracy: {name}")
