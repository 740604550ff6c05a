"""``python -m timm_sam.sweep -c RECIPE --grid sam_rho=0.05,0.1 --seeds 3 --out DIR``: a grid of runs and its report."""
import os
import sys
from collections.abc import Sequence

from ..cli.errors import OptionError, report
from ..cli.parser import OptionParser, positive_int, program
from ..jobs.job import Job
from ..jobs.table import run_table
from ..report.__main__ import main as write_report
from .grid import Cell, cells, check


def build_parser() -> OptionParser:
    parser = OptionParser(
        prog=program("timm_sam.sweep"),
        description="Trains all combinations of some flags of train.py and writes the report. What is not "
                    "among the flags below goes to train.py, -c RECIPE as well.")
    add = parser.add_argument
    add("--grid", nargs="+", required=True, metavar="KEY=VALUE,...",
        help="flags of train.py and their values: sam_rho=0.05,0.1 sam_params=all,onlynorm; of switches true and false")
    add("--plain", action="store_true", help="also train without SAM, as what the others are compared with")
    add("--seeds", type=positive_int, default=1, metavar="N", help="seeds 0 to N - 1 of each cell")
    add("--out", required=True, metavar="DIR",
        help="where runs and report are written; started again, it goes on there")
    add("--devices", type=positive_int, default=1, metavar="N",
        help="runs at the same time: one per GPU, or one per thread of the CPU where there is none")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing and writes the report; returns 0, 1 if a run failed, 2 for a mistake, 130 for Ctrl-C."""
    parser = build_parser()
    args, flags = parser.parse_known_args(argv)
    try:
        found = cells(args.grid, args.plain)
        check(found, flags, parser.prog)
    except OptionError as e:
        report(parser.prog, e)
        return 2
    return run_table(
        parser.prog, lambda: jobs(found, flags, args.seeds, args.out), args.out, args.devices,
        lambda: write_report([os.path.join(args.out, "runs"), "--out", os.path.join(args.out, "report"),
                              "--running-minutes", "0"]))  # what is not finished has failed


def jobs(found: Sequence[Cell], flags: Sequence[str], seeds: int, out: str) -> list[Job]:
    """All runs; seed by seed, so that the whole grid is there early, though with fewer seeds."""
    runs = os.path.join(out, "runs")
    made = []
    for seed in range(seeds):
        for cell in found:
            name = f"{cell.name}/seed{seed}"
            # whoever asks for more checkpoints does so behind it
            argv = ["--checkpoint-hist", "1", *flags, *cell.flags, "--seed", str(seed), "--output", runs,
                    "--experiment", name, "--resume", "auto"]
            made.append(Job(name, cell.name, os.path.join(runs, name), tuple(argv), keep=True))
    return made


if __name__ == "__main__":
    sys.exit(main())
