"""``python -m timm_sam.report RUNS... --out DIR``: tables and figures of any number of runs."""
import argparse
import glob
import os
import sys
from collections.abc import Callable, Sequence

from ..cli.errors import OptionError, one_line, report
from ..cli.escape import printable
from ..cli.parser import OptionParser
from ..cli.text import replace_file, why_not_writable
from . import markdown
from .runs import find_runs, read_run
from .tables import Table, build_tables

PICTURES = ("rho", "time", "loss")


def build_parser() -> OptionParser:
    parser = OptionParser(prog="python -m timm_sam.report",
                          description="Puts runs into the paper's tables and figures.")
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders of runs, or folders that hold them")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help=f"folder for {', '.join(markdown.FILES)} and PNG files")
    parser.add_argument("--epoch", choices=("last", "best"), default="last",
                        help="whose accuracy counts; best is chosen on the validation images it is then reported for, "
                             "which flatters noisy runs")
    parser.add_argument("--running-minutes", type=float, default=60, metavar="N",
                        help="an unfinished run that wrote a file within N minutes is called running, not stopped")
    parser.add_argument("--no-plots", action="store_true", help="tables only, which need no matplotlib")
    parser.add_argument("--overwrite", action="store_true",
                        help="write over files in DIR of the names used here, though no earlier report wrote them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report and prints its text; returns 0, or 2 for a mistake in the options."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        make_report(args)
    except OptionError as e:
        report(parser.prog, e)
        return 2
    return 0


def make_report(args: argparse.Namespace) -> None:
    """Reads the runs, writes ``args.out``, prints the tables.

    Raises:
        OptionError: No runs there, or the folder cannot be written or holds something else under our names.
    """
    folders = find_runs(args.runs)
    tables, runs = build_tables([read_run(folder, args.running_minutes) for folder in folders], args.epoch)
    draw, note = (None, "") if args.no_plots else _drawing()
    pictures = {f"table{i}-{kind}.png": (kind, table) for i, table in enumerate(tables, 1) for kind in PICTURES}
    names = [*markdown.FILES, *(pictures if draw else ())]
    try:
        _prepare(args.out, names, args.overwrite)
        drawn, notes = [], [note] if note else []
        for name, (kind, table) in pictures.items() if draw else ():
            try:
                if draw and draw(kind, table, args.epoch, os.path.join(args.out, name)):
                    drawn.append(name)
            except OSError:
                raise
            except Exception as e:  # numbers that no axis can hold: the tables are still wanted
                notes.append(f"{name} is not drawn: {type(e).__name__}: {one_line(e, 150)}")
        text = markdown.report_text(tables, runs, args.epoch, drawn)
        contents = (text, markdown.grid_csv(tables), markdown.runs_csv(runs, args.epoch))
        for name, content in zip(markdown.FILES, contents):
            replace_file(os.path.join(args.out, name), content)
    except OSError as e:
        raise OptionError(f"--out {args.out} cannot be written ({e.strerror or e}): name another folder") from e
    print(text.removeprefix(markdown.MARK).strip())
    for line in [*notes, f"Wrote {', '.join(os.path.join(args.out, name) for name in [*markdown.FILES, *drawn])}"]:
        print(printable(line))


def _drawing() -> tuple[Callable[[str, Table, str, str], bool] | None, str]:
    """What draws pictures, or None and a note of why nothing does."""
    try:
        from .plots import draw
    except ImportError as e:
        return None, f"No pictures: {e.name} is missing; pip install 'timm_sam[report]', or give --no-plots."
    return draw, ""


def _prepare(out: str, names: Sequence[str], overwrite: bool) -> None:
    """Makes the folder and marks it as ours; removes an earlier report's pictures: there may be fewer tables now.

    Raises:
        OptionError: Something that no report wrote stands where a file goes, or what is no file.
        OSError: The folder cannot be made or written.
    """
    os.makedirs(out, exist_ok=True)
    for name in names:
        if (reason := why_not_writable(os.path.join(out, name))) is not None:
            raise OptionError(f"--out {out}: {name} cannot be written: {reason}; name another folder")
    ours = False
    try:
        with open(os.path.join(out, markdown.FILES[0]), encoding="utf-8") as f:
            ours = f.readline().strip() == markdown.MARK
    except (FileNotFoundError, UnicodeDecodeError, IsADirectoryError):
        pass
    there = [name for name in names if os.path.lexists(os.path.join(out, name))]
    if there and not ours and not overwrite:
        raise OptionError(
            f"--out {out} holds {there[0]}, which no report wrote: name another folder, or add --overwrite")
    # first of all, so that an interrupted report is taken for one
    replace_file(os.path.join(out, markdown.FILES[0]), f"{markdown.MARK}\n")
    if ours:
        for kind in PICTURES:
            for path in glob.glob(os.path.join(glob.escape(out), f"table[0-9]*-{kind}.png")):
                os.remove(path)


if __name__ == "__main__":
    sys.exit(main())
