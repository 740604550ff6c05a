#!/usr/bin/env python3
"""The paper's table in small: every variant and selection, 3 radii, 3 seeds, on few and noisy digits.

    python benchmarks/digits_table.py --out output/digits_table

trains the small ResNet and the small ViT of ``hparams/digits/table`` 129 times each, on as many processes as asked for,
and then writes the report (``python -m timm_sam.report``). The whole of scikit-learn's digits leaves nothing to gain (a
small ResNet reaches 99 %), so training has a few hundred images, of which many are filed under a wrong digit;
validation images are all there and true.

It can be stopped and started again: a run whose folder is finished is not run again, any other starts anew. A run that
fails is listed, and does not stop the others.
"""
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from timm_sam.cli.parser import OptionParser  # noqa: E402
from timm_sam.jobs.job import Job as PoolJob  # noqa: E402
from timm_sam.jobs.table import run_table  # noqa: E402
from timm_sam.paper.small import digits_folder, export_digits  # noqa: E402
from timm_sam.paper.small_settings import DATA, RADII  # noqa: E402
from timm_sam.report.__main__ import main as write_report  # noqa: E402

SEEDS = (0, 1, 2)
VARIANTS = tuple(dict.fromkeys(variant for variant, _ in RADII["resnet10t"]))


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    model: str
    variant: str | None
    selection: str | None
    rho: float | None
    seed: int

    @property
    def name(self) -> str:
        sam = "plain" if self.variant is None else f"{self.variant}-{self.selection}-{self.rho:g}"
        return f"{self.model}/{sam}-seed{self.seed}"

    @property
    def data(self) -> str:
        """Name of the folder of images."""
        return digits_folder(self.model)

    @property
    def kind(self) -> tuple[str, str | None]:
        """Runs of one kind take the same time."""
        return self.model, "all" if self.selection == "nonorm" else self.selection

    def argv(self, out: str) -> list[str]:
        """The command line of train.py."""
        sam = [] if self.variant is None else [
            "--sam-variant", self.variant, "--sam-params", str(self.selection), "--sam-rho", f"{self.rho:g}"]
        return ["-c", os.path.join(ROOT, "hparams", "digits", "table", f"{self.model}.yaml"),
                "--data-dir", os.path.join(out, self.data), "--output", os.path.join(out, "runs"),
                "--experiment", self.name, "--seed", str(self.seed), *sam]


def build_parser() -> OptionParser:
    parser = OptionParser(prog="digits_table.py", description="Trains the paper's grid on few and noisy digits.")
    add = parser.add_argument
    add("--out", default=os.path.join("output", "digits_table"), metavar="DIR",
        help="where data, runs and report are written; started again, it goes on there")
    add("--jobs", type=int, default=2, metavar="N", help="processes that train at the same time, one thread each")
    add("--models", nargs="+", choices=tuple(RADII), default=list(RADII), metavar="NAME",
        help=f"recipes, of {', '.join(RADII)}")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
        help=f"variants beside plain training, of {', '.join(VARIANTS)}")
    add("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="N", help="seeds of each cell")
    return parser


def grid(models: Sequence[str], variants: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """All runs; seed by seed, so that the whole table is there early, though with fewer seeds."""
    jobs = []
    for seed in dict.fromkeys(seeds):
        for model in dict.fromkeys(models):
            jobs.append(Job(model, None, None, None, seed))
            jobs += [Job(model, variant, selection, rho, seed)
                     for (variant, selection), radii in RADII[model].items() if variant in variants for rho in radii]
    return jobs


def run_grid(prog: str, jobs: Sequence[Job], out: str, processes: int, write: Callable[[], int]) -> int:
    """Writes the images, trains what is missing, then writes what is made of it; returns as :func:`main`.

    Args:
        prog: Name of the command.
        jobs: All runs.
        out: The folder of data and runs.
        processes: How many train at the same time.
        write: Writes the report, and returns 0 if that went well.
    """
    def prepare() -> list[PoolJob]:
        export(jobs, out)
        return [pool_job(job, out) for job in jobs]

    return run_table(prog, prepare, out, processes, write, "--jobs")


def export(jobs: Sequence[Job], out: str) -> None:
    """Writes the images that the jobs train on, if they are not there."""
    for data, model in {job.data: job.model for job in jobs}.items():
        size, noise = DATA[model]
        if not os.path.isdir(os.path.join(out, data)):
            export_digits(os.path.join(out, data), model)
        print(f"{model}: {size} training images, {noise:.0%} of them under a wrong digit, in {data}", flush=True)


def pool_job(job: Job, out: str, keep: bool = False, after: PoolJob | None = None) -> PoolJob:
    """The job as a pool takes it; ``keep`` and ``after`` as there."""
    return PoolJob(job.name, job.kind, os.path.join(out, "runs", job.name), tuple(job.argv(out)), keep=keep,
                   after=after)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing and writes the report; returns 0, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return run_grid(
        parser.prog, grid(args.models, args.variants, args.seeds), args.out, args.jobs,
        lambda: write_report([os.path.join(args.out, "runs"), "--out", os.path.join(args.out, "report")]))


if __name__ == "__main__":
    sys.exit(main())
