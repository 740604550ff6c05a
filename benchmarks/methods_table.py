#!/usr/bin/env python3
"""The methods in small: each with two selections, 3 radii and 3 seeds, on few and noisy digits.

    python benchmarks/methods_table.py --out output/methods_table

trains the small ResNet of ``hparams/digits/table``, by the data, the recipe and the pool of ``digits_table.py``, and
then writes ``report/report.md`` with one figure: accuracy over counted cost. The cost is that of an update over a plain
one in FLOPs, counted on the same network by ``step_cost.py``; what a method computes once an epoch does not count.

It can be stopped and started again, as ``digits_table.py``.
"""
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import digits_table  # of this folder, as step_cost
import step_cost
import torch

from timm_sam.cli.parser import OptionParser
from timm_sam.cli.text import markdown, spread
from timm_sam.report.runs import FINISHED, read_run

MODEL = "resnet10t"
SELECTIONS = ("all", "onlynorm")
SAM = "sam"
# flags of each method beside its name; parameters are those of step_cost.py but for alpha, which is what others found
# best for SGD on CIFAR, and the samples of an estimate
FLAGS: dict[str, tuple[str, ...]] = {
    SAM: (), "usam": (), "msam": (), "friendly": (), "stable": (),
    "looksam": ("--sam-looksam-k", "5", "--sam-looksam-alpha", "0.1"),
    "gsam": ("--sam-gsam-alpha", "0.4"),
    "late": ("--sam-late-start", "0.9", "--no-sam-late-ramp"),
    "random_mask": ("--sam-random-mask-sparsity", "0.5"),
    "ssam_dynamic": ("--sam-ssam-dynamic-sparsity", "0.5"),
    "ssam_fisher": ("--sam-ssam-fisher-sparsity", "0.5", "--sam-ssam-fisher-samples", "16"),
    "esam": ("--sam-esam-beta", "0.6", "--sam-esam-gamma", "0.5"),
}
# Radii are those of SAM in the digits table times this. MSAM's is larger in its paper. USAM's eps is rho * g: the same
# length as SAM's at rho over a typical ||g||. Along SAM's own run at its middle radius (seed 0) the median over epochs
# of sam_grad_norm in summary.csv is 0.98 for all parameters, 0.33 for those of normalization layers.
FACTORS = {("msam", "all"): 10.0, ("msam", "onlynorm"): 10.0, ("usam", "onlynorm"): 3.0}


@dataclass(frozen=True)
class Job(digits_table.Job):
    """One run: plain without a variant, else of a method."""

    method: str = SAM

    @property
    def name(self) -> str:
        if self.variant is None:
            return f"{self.model}/plain-seed{self.seed}"
        return f"{self.model}/{self.method}-{self.selection}-{self.rho:g}-seed{self.seed}"

    @property
    def kind(self) -> tuple[str, str | None]:
        return self.method, self.selection

    def argv(self, out: str) -> list[str]:
        method = [] if self.variant is None or self.method == SAM else ["--sam-method", self.method]
        return [*super().argv(out), *method, *(FLAGS[self.method] if method else ())]


def radii(method: str, selection: str) -> list[float]:
    """The radii that a method is tried with."""
    return [FACTORS.get((method, selection), 1.0) * rho for rho in digits_table.RADII[MODEL][SAM, selection]]


def grid(methods: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All runs; seed by seed, so that the whole table is there early, though with fewer seeds."""
    jobs = []
    for seed in dict.fromkeys(seeds):
        jobs.append(Job(MODEL, None, None, None, seed))
        jobs += [Job(MODEL, "sam", selection, rho, seed, method) for method in dict.fromkeys(methods)
                 for selection in SELECTIONS for rho in radii(method, selection)]
    return jobs


def costs(methods: Sequence[str]) -> dict[tuple[str, str], float]:
    """FLOPs of an update over those of a plain one, by method and selection; ("plain", "") is 1."""
    names = [name for name in methods if name != SAM]
    args = step_cost.build_parser().parse_args(["--model", MODEL, "--img-size", "32", "--late", "layer4"])
    random_state = torch.get_rng_state()
    cpu = torch.device("cpu")
    plain, sam, sam_on, *_ = step_cost.build_forms(args, cpu, compiled=False)
    unit = step_cost.count(plain)
    found = {("plain", ""): 1.0}
    if SAM in methods:
        found.update({(SAM, "all"): step_cost.count(sam) / unit, (SAM, "onlynorm"): step_cost.count(sam_on) / unit})
    for name in names:
        _, *forms = step_cost.build_forms(args, cpu, compiled=False, method=name)
        found.update({(name, form.params): step_cost.count(form) / unit for form in forms})
    torch.set_rng_state(random_state)
    return found


@dataclass(frozen=True)
class Point:
    """What became of a method with a selection.

    Attributes:
        method, selection: Which; ``plain`` has no selection.
        cost: Of an update, over a plain one.
        rho: The radius with the highest mean; None: plain.
        edge: Whether that is the least or the greatest radius that was tried.
        accuracies: Of the last epoch in %, one a seed.
        unfinished: Runs of the cell, whatever their radius, that have no accuracy.
    """

    method: str
    selection: str
    cost: float
    rho: float | None
    edge: bool
    accuracies: tuple[float, ...]
    unfinished: int

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def points(jobs: Sequence[Job], out: str, cost: dict[tuple[str, str], float]) -> list[Point]:
    """Of each cell the radius with the highest mean among those with most seeds; cells without a run are left out."""
    cells: dict[tuple[str, str], dict[float | None, list[float]]] = {}
    unfinished: dict[tuple[str, str], int] = {}
    for job in jobs:
        cell = ("plain", "") if job.variant is None else (job.method, str(job.selection))
        run = read_run(os.path.join(out, "runs", job.name))
        tried = cells.setdefault(cell, {}).setdefault(job.rho, [])
        if run.status == FINISHED:
            tried.append(run.accuracy())
        else:
            unfinished[cell] = unfinished.get(cell, 0) + 1
    found = []
    for cell, tried in cells.items():
        rho, best = max(tried.items(), key=lambda item: (len(item[1]), statistics.fmean(item[1]) if item[1] else 0.0))
        if best:
            edge = rho is not None and rho in (min(tried, key=float), max(tried, key=float))  # type: ignore[arg-type]
            found.append(Point(*cell, cost[cell], rho, edge, tuple(best), unfinished.get(cell, 0)))
    return found


def report_text(found: Sequence[Point], command: str) -> str:
    """The report in Markdown."""
    size, noise = digits_table.DATA[MODEL]
    rows = [[point.method, point.selection, f"{point.cost:.2f}",
             "" if point.rho is None else f"{point.rho:g}{'†' if point.edge else ''}",
             spread(point.mean, point.std), str(len(point.accuracies)), str(point.unfinished or "")]
            for point in sorted(found, key=lambda point: (point.cost, point.method))]
    return "\n\n".join([
        "# Methods on few and noisy digits",
        f"`{MODEL}`, {size} training images, {noise:.0%} of them under a wrong digit. Validation accuracy of the last "
        f"epoch in %: mean ± sample standard deviation over seeds, at the radius with the highest mean. The radius is "
        f"chosen on the same images, so every number but that of plain training is a little lucky; †: it is at the "
        f"edge of those tried. Cost: FLOPs of an update over those of a plain one, counted.",
        markdown(["method", "perturbs", "cost", "rho", "accuracy", "seeds", "runs without one"], rows),
        "![accuracy over cost](accuracy_over_cost.png)",
        "Methods beside SAM have these parameters: " + "; ".join(
            f"`{name}` {' '.join(f'`{flag}`' for flag in FLAGS[name]) or 'its defaults'}"
            for name in dict.fromkeys(point.method for point in found) if name in FLAGS and name != SAM) + ".",
        f"Written by `{command}`."]) + "\n"


def alike(found: Sequence[Point]) -> list[list[Point]]:
    """Groups of points of about the same cost; in each they rise."""
    groups: list[list[Point]] = []
    for point in sorted(found, key=lambda point: point.cost):
        if not groups or point.cost - groups[-1][0].cost > 0.1:
            groups.append([])
        groups[-1].append(point)
    return [sorted(group, key=lambda point: point.mean) for group in groups]


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights, moved so that none is nearer to the next than the gap; their mean stays what it was."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    shift = (sum(moved) - sum(heights)) / len(heights)
    return [height - shift for height in moved]


def draw(found: Sequence[Point], path: str) -> None:
    """Accuracy over counted cost; the seeds' standard deviation as error bars."""
    import matplotlib
    from matplotlib.figure import Figure

    from timm_sam.cli.figures import SETTINGS, label
    from timm_sam.report.plots import PLAIN, SELECTION_FILL, SELECTION_STYLE

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes = figure.subplots()
        span = max(point.mean for point in found) - min(point.mean for point in found) or 1.0
        for group in alike(found):
            # points of one cost stand side by side, and their names beside all of them, one below the other
            beside = max(point.cost for point in group) + 0.045
            heights = apart([point.mean for point in group], span / 24)
            for number, (point, height) in enumerate(zip(group, heights)):
                color, marker, _ = SELECTION_STYLE.get(point.selection, (PLAIN, "*", "-"))
                x = point.cost + 0.012 * (number % 5 - 2)
                axes.errorbar(x, point.mean, yerr=point.std, color=color, marker=marker, capsize=3,
                              fillstyle=SELECTION_FILL.get(point.selection, "full"), linestyle="none")
                axes.annotate(label(point.method), (x, point.mean), xytext=(beside, height), va="center", fontsize=8,
                              color=color,
                              arrowprops=dict(arrowstyle="-", color=color, linewidth=0.5, shrinkA=0, shrinkB=3))
        axes.margins(x=0.12)
        for selection in SELECTIONS:
            color, marker, _ = SELECTION_STYLE[selection]
            axes.plot([], [], color=color, marker=marker, linestyle="none", label=selection,
                      fillstyle=SELECTION_FILL[selection])
        figure.legend(title="perturbs", loc="outside lower center", ncols=len(SELECTIONS), frameon=False)
        axes.set_xlabel("FLOPs of an update over a plain one (moved a little apart)")
        axes.set_ylabel("validation accuracy in %, mean and standard deviation over seeds")
        figure.savefig(path, dpi=130)


def build_parser() -> OptionParser:
    parser = OptionParser(prog="methods_table.py", description="Trains every method on few and noisy digits.")
    add = parser.add_argument
    add("--out", default=os.path.join("output", "methods_table"), metavar="DIR",
        help="where data, runs and report are written; started again, it goes on there")
    add("--jobs", type=int, default=2, metavar="N", help="processes that train at the same time, one thread each")
    add("--methods", nargs="+", choices=tuple(FLAGS), default=list(FLAGS), metavar="NAME",
        help=f"methods beside plain training, of {', '.join(FLAGS)}")
    add("--seeds", nargs="+", type=int, default=list(digits_table.SEEDS), metavar="N", help="seeds of each cell")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing and writes the report; returns as that of ``digits_table.py``."""
    parser = build_parser()
    args = parser.parse_args(argv)
    jobs = grid(args.methods, args.seeds)

    def write() -> int:
        folder = os.path.join(args.out, "report")
        os.makedirs(folder, exist_ok=True)
        found = points(jobs, args.out, costs(args.methods))
        draw(found, os.path.join(folder, "accuracy_over_cost.png"))
        given = sys.argv[1:] if argv is None else argv
        with open(os.path.join(folder, "report.md"), "w", encoding="utf-8") as f:
            f.write(report_text(found, " ".join(["python benchmarks/methods_table.py", *given])))
        print(f"{len(found)} cells of {len(jobs)} runs in {os.path.join(folder, 'report.md')}", flush=True)
        return 0

    return digits_table.run_grid(parser.prog, jobs, args.out, args.jobs, write)


if __name__ == "__main__":
    sys.exit(main())
