#!/usr/bin/env python3
"""What the normalization of the gradient does in SAM: four experiments after Dai, Ahn and Sra, NeurIPS 2023.

    python benchmarks/normalization.py quadratic --out output/normalization
    python benchmarks/normalization.py drift --out output/normalization
    python benchmarks/normalization.py sensing --out output/normalization
    python benchmarks/normalization.py networks --out output/normalization

Each writes a CSV file and a figure (extra ``report``), and prints a table. USAM is SAM without the normalization, so
eps is rho g. Paper: "The Crucial Role of Normalization in Sharpness-Aware Minimization",
https://arxiv.org/abs/2305.15287. The set-ups are after the paper; where its values were not at hand they are ours.
"""
import math
import sys
from collections.abc import Sequence
from typing import Any

import normalization_sensing as sensing  # of this folder, as the next two
import normalization_toys as toys
from experiment import COLORS, LINES, Clock, number, publish

from timm_sam.cli.errors import OptionError, report
from timm_sam.cli.parser import OptionParser
from timm_sam.cli.text import say

SHOWN = 1e6  # larger numbers are drawn there


def quadratic(out: str) -> None:
    """Stability: which radii USAM survives, and where SAM ends."""
    found = {method: toys.quadratic([(lr, rho) for lr in toys.LEARNING_RATES for rho in toys.radii(lr)], method)
             for method in toys.METHODS}
    rows = [(run.lr, run.rho, method, toys.threshold(run.lr), toys.cycle(run.lr, run.rho), run.norm, run.diverged)
            for method, runs in found.items() for run in runs]

    def end(method: str, lr: float, rho: float) -> str:
        (run,) = (run for run in found[method] if (run.lr, run.rho) == (lr, rho))
        return number(run.norm)

    table = [[f"{lr:g}", number(t), end("gd", lr, 0.125), end("usam", lr, 0.98 * t), end("usam", lr, 1.02 * t),
              end("sam", lr, 0.125), number(toys.cycle(lr, 0.125)), end("sam", lr, 8.0), number(toys.cycle(lr, 8.0))]
             for lr in toys.LEARNING_RATES for t in (toys.threshold(lr),)]

    def draw(figure: Any) -> None:
        for axes, lr in zip(figure.subplots(1, len(toys.LEARNING_RATES), sharey=True), toys.LEARNING_RATES):
            for method, runs in found.items():
                of_lr = [run for run in runs if run.lr == lr]
                axes.plot([run.rho for run in of_lr], [min(max(run.norm, 1e-12), SHOWN) for run in of_lr],
                          color=COLORS[method], linestyle=LINES[method], marker="o", markersize=3, label=method)
            axes.axvline(toys.threshold(lr), color="black", linewidth=0.8, label="(2 / lr - beta) / beta^2")
            axes.set(xscale="log", yscale="log", xlabel="rho", title=f"lr {lr:g}")
        figure.axes[0].set_ylabel(f"length of w after {toys.STEPS} steps (at most {SHOWN:g})")
        figure.axes[0].legend(fontsize=7)

    publish(out, "quadratic", ("lr", "rho", "method", "threshold", "cycle", "final_norm", "diverged"), rows,
            f"Quadratic with curvatures 1 and 0.1, from (1, 1), {toys.STEPS} steps, float64; after Section 3 of Dai et "
            "al. Length of w at the end: USAM diverges above the threshold, SAM ends in a cycle of two points.",
            (("lr", "threshold t", "gd", "usam, rho 0.98 t", "usam, rho 1.02 t", "sam, rho 0.125", "cycle by formula",
              "sam, rho 8", "cycle by formula"), table), draw, (12, 4))


def drift(out: str, steps: int) -> None:
    """Drift: how far each method goes along a curve of minima towards flat ones."""
    paths = {(neuron, method): neuron.path(method, steps) for neuron in toys.NEURONS for method in toys.METHODS}
    rows = [(neuron.loss, *neuron.start, neuron.lr, neuron.rho, method, t, x, y, y * y)
            for (neuron, method), path in paths.items() for t, (x, y) in enumerate(path.tolist())]
    table = [[neuron.name, *(number(neuron.bounds[m]) for m in ("gd", "usam")),
              *(f"{paths[neuron, m][-1, 1].item() ** 2:.4g}" for m in toys.METHODS)] for neuron in toys.NEURONS]

    def draw(figure: Any) -> None:
        panels = figure.subplots(2, len(toys.NEURONS))
        for neuron, above, below in zip(toys.NEURONS, *panels):
            for method in toys.METHODS:
                path = paths[neuron, method]
                style: dict[str, Any] = dict(color=COLORS[method], linestyle=LINES[method], label=method, linewidth=1)
                above.plot(path[:, 0], path[:, 1], **style)
                below.plot(path[:, 1].square(), **style)
            for method, bound in neuron.bounds.items():
                below.axhline(bound, color=COLORS[method], linewidth=0.6)
            above.set(xlabel="x", ylabel="y")
            above.set_title(neuron.name, fontsize=7)
            below.set(xlabel="step", ylabel="sharpness y^2", yscale="log", ylim=(1e-4, 100))
            above.legend(fontsize=7)

    publish(out, "drift", ("loss", "x0", "y0", "lr", "rho", "method", "step", "x", "y", "sharpness"), rows,
            f"Single neuron L(x, y) = l(xy), {steps} steps, float64; after Section 4 of Dai et al. The axes are "
            "minima, y^2 is the sharpness at (0, y); thin lines: where gradient descent and USAM may stop at most.",
            (("run", "bound gd", "bound usam", *(f"y^2 at the end, {m}" for m in toys.METHODS)), table), draw, (13, 7))


def matrix_sensing(out: str, d: int, r: int) -> None:
    """Stability on a problem that is not convex; the start and the shape of U decide."""
    clock, problem = Clock(), sensing.Sensing(d, r)
    found = {}
    for setting in sensing.SETTINGS:
        for method, rho in setting.runs:
            found[setting, method, rho] = sensing.losses(problem, setting, method, rho)
            say(f"{setting.name}, {method}{'' if method == 'gd' else f' rho {rho:g}'}: loss "
                f"{found[setting, method, rho][0][-1]:.3g} ({clock})")
    rows = [(f"d x {'d' if setting.wide else 'r'}", setting.start, setting.lr_gd if method == "gd" else setting.lr,
             method, rho, t, loss)
            for (setting, method, rho), (losses, _) in found.items() for t, loss in enumerate(losses)]
    table = [[setting.name, f"{norm:.2g}", method, "" if method == "gd" else f"{rho:g}", number(losses[-1]),
              str(len(losses) - 1)]
             for (setting, method, rho), (losses, norm) in found.items()]

    def draw(figure: Any) -> None:
        for axes, setting in zip(figure.subplots(1, len(sensing.SETTINGS)), sensing.SETTINGS):
            for method, rho in setting.runs:
                losses = [min(loss, SHOWN) if math.isfinite(loss) else SHOWN for loss in found[setting, method, rho][0]]
                axes.plot(losses, color=COLORS[method], linestyle=LINES[method], linewidth=0.8,
                          alpha=1 if method == "gd" else (1 + setting.radii.index(rho)) / len(setting.radii),
                          label=method if method == "gd" else f"{method} {rho:g}")
            axes.set(yscale="log", xlabel="step", ylim=(1e-2, 2 * SHOWN))
            axes.set_title(setting.name.replace(", lr", "\nlr"), fontsize=8)
            axes.legend(fontsize=6)
        figure.axes[0].set_ylabel(f"loss (at most {SHOWN:g})")

    publish(out, "sensing", ("shape", "start", "lr", "method", "rho", "step", "loss"), rows,
            f"Matrix sensing, d = {d}, r = {r}, m = {5 * d * r}, full batch, float32; after Section 1 of Dai et al. "
            "Shape of U, start and learning rate differ and are named. USAM's eps is rho times the length of the "
            "gradient, so that length at the start decides which of the two is the unstable one at equal rho.",
            (("setting", "length of g at the start", "method", "rho", "last loss", "steps"), table), draw, (14, 4))


def build_parser() -> OptionParser:
    parser = OptionParser(prog="normalization.py",
                          description="What the normalization of the gradient does in SAM.")
    experiments = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, text in (("quadratic", "which radii USAM survives"), ("drift", "how far methods go along minima"),
                       ("sensing", "matrix sensing"), ("networks", "a small ResNet on digits: 78 runs")):
        add = experiments.add_parser(name, help=text, description=text).add_argument
        add("--out", default="output/normalization", metavar="DIR", help="folder of the CSV file and the figure")
        if name == "drift":
            add("--steps", type=int, default=1000, metavar="N", help="updates of each run")
        if name == "sensing":
            add("--side", type=int, default=100, metavar="D", help="rows and columns of the matrix that is sought")
            add("--rank", type=int, default=5, metavar="R", help="its rank")
        if name == "networks":
            add("--jobs", type=int, default=2, metavar="N", help="processes that train at the same time")
            add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="seeds of each point")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        for name in ("steps", "side", "rank"):
            if getattr(args, name, 1) < 1:
                raise OptionError(f"--{name} {getattr(args, name)} must be 1 or more")
        if args.experiment == "quadratic":
            quadratic(args.out)
        elif args.experiment == "drift":
            drift(args.out, args.steps)
        elif args.experiment == "sensing":
            matrix_sensing(args.out, args.side, args.rank)
        else:
            import normalization_networks  # of this folder; it loads what trains

            return normalization_networks.run(parser.prog, args.out, args.jobs, args.seeds)
    except OptionError as e:
        report(parser.prog, e)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
