#!/usr/bin/env python3
"""Does flatness tell? The table and the figure of stored runs, without their checkpoints.

    python benchmarks/flatness.py benchmarks/results/flatness_runs.csv --figure flatness.png

takes the ``flatness_runs.csv`` that ``python -m timm_sam.report --cards`` writes, and computes Kendall's tau between
each measure and each target again, with its bootstrap interval over runs.
"""
import csv
import os
import sys
from collections.abc import Sequence

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from timm_sam.cli.document import table_markdown  # noqa: E402
from timm_sam.cli.errors import OptionError, report  # noqa: E402
from timm_sam.cli.parser import OptionParser  # noqa: E402
from timm_sam.report.flatness import ACCURACY, GAP, Values, taus, taus_table  # noqa: E402
from timm_sam.report.run_tables import IDENTITY  # noqa: E402


def read(path: str) -> dict[str, Values]:
    """Title of each table -> what is known of its runs.

    Raises:
        OptionError: The file is no such table.
    """
    found: dict[str, tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]] = {}
    try:
        with open(path, encoding="utf-8", newline="") as f:
            for line in csv.DictReader(f):
                kinds = found.setdefault(line["table"], ({}, {}))
                for name, value in line.items():
                    if value and name not in ("table", *IDENTITY):
                        is_target = name == GAP or name.endswith(ACCURACY)
                        kinds[is_target].setdefault(name, {})[line["path"]] = float(value)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as e:
        raise OptionError(f"{path} is no flatness_runs.csv of python -m timm_sam.report --cards "
                          f"({type(e).__name__}): name one") from e
    if not any(measures and targets for measures, targets in found.values()):
        raise OptionError(f"{path} has no measure of a run: give the flatness_runs.csv of runs that have cards")
    return {title: Values(*kinds) for title, kinds in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables, and draws the first one; returns 0, or 2 for a mistake."""
    parser = OptionParser(prog="flatness.py", description="Does flatness tell? Of stored runs.")
    parser.add_argument("runs", metavar="FILE", help="flatness_runs.csv of python -m timm_sam.report --cards")
    parser.add_argument("--figure", default=None, metavar="FILE.png", help="draw the first table, over what is there")
    args = parser.parse_args(argv)
    try:
        found = {title: taus(values) for title, values in read(args.runs).items()}
        for title, several in found.items():
            print(f"{title}\n\n{table_markdown(taus_table(several))}\n")
        if args.figure is not None:
            title, several = next(iter(found.items()))
            _draw(title, several, args.figure)
    except OptionError as e:
        report(parser.prog, e)
        return 2
    return 0


def _draw(title: str, several: Sequence, path: str) -> None:
    try:
        from timm_sam.report.plots import draw_flatness
    except ImportError as e:
        raise OptionError(f"--figure {path}: {e.name} is missing; pip install 'timm_sam[report]'") from e
    try:
        draw_flatness(title, several, path)
    except (OSError, ValueError) as e:
        raise OptionError(f"--figure {path} cannot be written ({e}): name another file") from e


if __name__ == "__main__":
    sys.exit(main())
