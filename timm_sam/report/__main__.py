"""``python -m timm_sam.report RUNS... --out DIR``: tables and figures of any number of runs, and their evaluations."""
import argparse
import glob
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..cli import page
from ..cli.document import Document, Figure, as_markdown
from ..cli.errors import OptionError, one_line, report
from ..cli.escape import printable
from ..cli.parser import OptionParser, program
from ..cli.text import replace_file, say, why_not_writable
from ..evaluation.evaluated import read_cards, read_evaluations
from . import evaluation_tables, flatness, run_tables
from .differences import PLAIN, Difference, check_baseline, differences
from .evaluations import Joined, join
from .flatness import FLATNESS, Tau, taus, values_of
from .links import Links
from .runs import Run, find_runs, read_run
from .tables import Table, build_tables

MARK = "<!-- written by python -m timm_sam.report, which writes over it -->"
MARKDOWN, PAGE = "report.md", "report.html"
PICTURES = {"rho": "Accuracy over the radius", "time": "Accuracy over training time",
            "loss": "Training loss over epochs"}
RELIABILITY = "reliability"  # a picture of evaluations


def build_parser() -> OptionParser:
    parser = OptionParser(prog=program("timm_sam.report"),
                          description="Puts runs into the paper's tables and figures.")
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders of runs, or folders that hold them")
    names = (MARKDOWN, PAGE, *run_tables.CSV_FILES, *evaluation_tables.FILES, flatness.FILE, flatness.RUNS_FILE)
    parser.add_argument("--out", required=True, metavar="DIR", help=f"folder for {', '.join(names)} and PNG files")
    parser.add_argument("--evaluations", nargs="+", default=[], metavar="RESULTS.json",
                        help="results of validate.py with --eval, joined with the runs by the checkpoints' hashes")
    parser.add_argument("--cards", nargs="+", default=[], metavar="CARD.json",
                        help="tables of python -m timm_sam.analyze card (or another analysis), joined likewise: do "
                             "their measures put runs in the order of their accuracy?")
    parser.add_argument("--baseline", default=PLAIN, metavar="NAME",
                        help="what others are compared with: plain, or VARIANT:SELECTION, such as sam:all")
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
        OptionError: No runs there, or the folder cannot be written or holds something else under our names, or stdout
            cannot be written.
    """
    folders = find_runs(args.runs)
    evaluations, cards = read_evaluations(args.evaluations), read_cards(args.cards)
    tables, runs = build_tables([read_run(folder, args.running_minutes) for folder in folders], args.epoch)
    check_baseline(tables, args.baseline)
    joined = join(runs, evaluations, args.epoch) if evaluations else None
    flat = join(runs, cards, args.epoch) if cards else None
    odd: list[str] = [] if joined is None else joined.notes
    compared = {i: differences(table, args.baseline, joined, odd) for i, table in enumerate(tables, 1)}
    known = {} if flat is None else {
        i: found for i, table in enumerate(tables, 1)
        if (found := values_of(table, flat, joined, args.epoch)).measures}
    orders = {i: taus(values) for i, values in known.items()}
    draw, note = (None, "") if args.no_plots else _drawing(tables, joined, orders, args.epoch)
    kinds = [*PICTURES, *([RELIABILITY] if joined is not None else []), *([FLATNESS] if orders else [])]
    pictures = {f"table{i}-{kind}.png": (kind, i) for i in range(1, len(tables) + 1) for kind in kinds}
    texts = dict(zip(run_tables.CSV_FILES, (run_tables.grid_csv(tables), run_tables.runs_csv(runs, args.epoch))))
    if joined is not None:
        texts[evaluation_tables.FILES[0]] = evaluation_tables.evaluations_csv(tables, joined)
    if orders:
        texts[flatness.FILE] = flatness.flatness_csv(tables, orders)
        texts[flatness.RUNS_FILE] = flatness.flatness_runs_csv(tables, known)
    if any(compared.values()):
        texts[evaluation_tables.FILES[1]] = evaluation_tables.differences_csv(args.baseline, compared)
    try:
        _prepare(args.out, [MARKDOWN, PAGE, *texts, *(pictures if draw else ())], args.overwrite)
        drawn, notes = [], [note] if note else []
        for name, (kind, number) in pictures.items() if draw else ():
            try:
                if draw and draw(kind, number, os.path.join(args.out, name)):
                    drawn.append(name)
            except OSError:
                raise
            except Exception as e:  # numbers that no axis can hold: the tables are still wanted
                notes.append(f"{name} is not drawn: {type(e).__name__}: {one_line(e, 150)}")
        links = Links(tables, runs)
        said = _document(tables, runs, args, [(name, *pictures[name]) for name in drawn], joined, compared, links)
        if flat is not None:
            said = replace(said, sections=[*said.sections, *flatness.flatness_sections(tables, orders, flat, drawn)])
        shown = as_markdown(said)
        # the page has all runs, so that its numbers can lead to them
        whole = replace(said, sections=[*said.sections, links.section(args.epoch)])
        texts = {MARKDOWN: f"{MARK}\n\n{shown}", PAGE: page.as_html(whole, args.out), **texts}
        for name, text in texts.items():
            replace_file(os.path.join(args.out, name), text)
    except OSError as e:
        raise OptionError(f"--out {args.out} cannot be written ({e.strerror or e}): name another folder") from e
    wrote = f"Wrote {', '.join(os.path.join(args.out, name) for name in [*texts, *drawn])}"
    say("\n".join([shown.strip(), *map(printable, [*notes, wrote])]))


def _document(tables: Sequence[Table], runs: Sequence[Run], args: argparse.Namespace,
              drawn: Sequence[tuple[str, str, int]], joined: Joined | None,
              compared: Mapping[int, Sequence[Difference]], links: Links) -> Document:
    """All that the report says; ``drawn`` are name, kind and table of each picture."""
    of_runs: dict[int, list[Figure]] = {}
    of_evaluations: dict[int, list[Figure]] = {}
    for name, kind, i in drawn:
        if kind == FLATNESS:  # the section of cards has it
            continue
        if kind == RELIABILITY:
            of_evaluations.setdefault(i, []).append(Figure(name, f"Accuracy over confidence: {tables[i - 1].title}"))
        else:
            of_runs.setdefault(i, []).append(Figure(name, f"{PICTURES[kind]}: {tables[i - 1].title}"))
    more = {i: evaluation_tables.difference_blocks(table, args.baseline, compared[i], joined, links)
            for i, table in enumerate(tables, 1)}
    evaluated = [] if joined is None else evaluation_tables.evaluation_sections(
        tables, joined, of_evaluations, compared, links)
    return run_tables.report_document(tables, runs, args.epoch, of_runs, more, evaluated, links)


def _drawing(tables: Sequence[Table], joined: Joined | None, orders: Mapping[int, Sequence[Tau]],
             epoch: str) -> tuple[Callable[[str, int, str], bool] | None, str]:
    """What draws pictures, or None and a note of why nothing does."""
    try:
        from . import plots, reliability
    except ImportError as e:
        return None, f"No pictures: {e.name} is missing; pip install 'timm_sam[report]', or give --no-plots."

    def draw(kind: str, number: int, path: str) -> bool:
        table = tables[number - 1]
        if kind == RELIABILITY:
            return joined is not None and reliability.draw(table, joined, path)
        if kind == FLATNESS:
            return plots.draw_flatness(table.title, orders.get(number, ()), path)
        return plots.draw(kind, table, epoch, path)
    return draw, ""


def _prepare(out: str, names: Sequence[str], overwrite: bool) -> None:
    """Makes the folder and marks it as ours; removes what an earlier report left and this one may not write.

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
        with open(os.path.join(out, MARKDOWN), encoding="utf-8") as f:
            ours = f.readline().strip() == MARK
    except (FileNotFoundError, UnicodeDecodeError, IsADirectoryError):
        pass
    there = [name for name in names if os.path.lexists(os.path.join(out, name))]
    if there and not ours and not overwrite:
        raise OptionError(
            f"--out {out} holds {there[0]}, which no report wrote: name another folder, or add --overwrite")
    # first of all, so that an interrupted report is taken for one
    replace_file(os.path.join(out, MARKDOWN), f"{MARK}\n")
    if ours:
        for kind in (*PICTURES, RELIABILITY, FLATNESS):
            for path in glob.glob(os.path.join(glob.escape(out), f"table[0-9]*-{kind}.png")):
                os.remove(path)
        for name in {*evaluation_tables.FILES, flatness.FILE, flatness.RUNS_FILE} & {*os.listdir(out)} - {*names}:
            os.remove(os.path.join(out, name))


if __name__ == "__main__":
    sys.exit(main())
