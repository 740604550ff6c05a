"""``python -m timm_sam.analyze sharpness --checkpoint ... --data-dir ... --out DIR``: what trained weights are like."""
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..cli.errors import OptionError
from ..cli.escape import setup_logging
from ..cli.parser import OptionParser
from ..cli.text import say, write_text
from ..evaluation import results, tables
from ..evaluation.command import run
from ..evaluation.evaluated import read_evaluations
from ..evaluation.session import Session
from ..evaluation.subject import Subject
from ..evaluation.tables import Measure
from ..random_state import RandomState
from . import options
from .card import Card
from .card_pages import Pages
from .hessian_rows import Hessian
from .inputs import prepare
from .line_rows import Lines
from .norms import collect, norms_csv, norms_json, norms_markdown, summaries, tensors_csv
from .protocol import Analysis, Opened, analyze
from .rank_rows import Rank
from .sharpness_rows import Sharpness

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an analysis; returns the exit code: 0, 2 for a mistake in the options or the data, 1 for losses that are NaN
    or infinite."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = OptionParser(
        prog=options.prog(), description="What trained weights are like. --help after a name says more.")
    first.add_argument("command", choices=options.COMMANDS, help="; ".join(
        f"{name}: {command.help}" for name, command in options.COMMANDS.items()))
    command = first.parse_args(arguments[:1]).command
    args, resolved = options.parse(command, arguments[1:])
    setup_logging()

    def analyze(session: Session) -> None:
        before = RandomState({session.device})
        try:
            _RUN[command](session)
        finally:
            before.restore()

    return run(f"{options.prog()} {command}", args, resolved, analyze,
               lambda device, words: f"the memory of {device} is too small ({words}); "
                                      f"{options.COMMANDS[command].remedy}",
               lambda found: f"NaN or infinite losses: {found}; give other checkpoints")


def _table(session: Session, name: str, build: Callable[[Opened, Subject], Analysis],
           draw: Callable[[Any, list[Measure], dict[str, Any], str], None],
           ) -> tuple[list[Measure], list[str], dict[str, Any]] | None:
    """The table on stdout, and its files in ``--out``.

    Args:
        session: The options, and what is open.
        name: Of the analysis, and of its files.
        build: Makes the analysis, see :func:`analyze`.
        draw: Draws the figure: the module ``plots``, the rows, the protocol, the file.

    Returns:
        The rows, the checkpoints' names and the protocol, on the first rank.
    """
    args = session.args
    beside = os.path.join(args.out, name)
    files, picture = results.result_files(beside, None), f"{beside}.png"
    measures, names, protocol = analyze(session, name, build, files, [picture])
    if not session.primary:
        return None
    try:
        say(tables.as_text(measures, names))
    finally:  # where nobody listens, the files are still wanted
        results.write(files, measures, names, protocol, f"--out {args.out}")
    _draw(args.out, [picture], lambda plots: draw(plots, measures, protocol, picture))
    _logger.info(f"Wrote {', '.join(files.values())}")
    return measures, names, protocol


def _sharpness(session: Session) -> None:
    _table(session, "sharpness", Sharpness, lambda plots, measures, protocol, path: plots.draw_sharpness(
        measures, session.args.measure, protocol["labels"], path))


def _rank(session: Session) -> None:
    _table(session, "rank", Rank, lambda plots, measures, protocol, path: plots.draw_ranks(
        measures, protocol["labels"], path))


def _line(session: Session) -> None:
    _table(session, "line", Lines, lambda plots, measures, protocol, path: plots.draw_lines(
        measures, protocol["labels"], path))


def _hessian(session: Session) -> None:
    _table(session, "hessian", Hessian, lambda plots, measures, protocol, path: plots.draw_points(
        measures, protocol["labels"], path))


def _card(session: Session) -> None:
    out = session.args.out
    evaluations = session.ranks.each(lambda: read_evaluations(session.args.evaluations))
    table = _table(session, "card", Card, lambda plots, measures, protocol, path: plots.draw_points(
        measures, protocol["labels"], path))
    if table is None:
        return
    pages = Pages(out, *table, evaluations)
    pages.draw(lambda picture, draw: _draw(out, [picture], draw))
    _logger.info(f"Wrote {', '.join(pages.write())}")


def _norms(session: Session) -> None:
    """The table on stdout, and all files in ``--out``."""
    args = session.args
    text, tensors, content, signed, sizes = (
        os.path.join(args.out, f"norms{ending}") for ending in (".csv", "-tensors.csv", ".json", "-a.png", "-b.png"))
    page = os.path.join(args.out, "norms.md")
    session.ranks.each(lambda: prepare(args, [page, text, tensors, content, signed, sizes]))
    found, protocol = collect(session)
    if not session.primary:
        return
    rows = summaries(found)
    try:
        say(norms_markdown(rows))
    finally:
        for path, written in ((page, norms_markdown(rows)), (text, norms_csv(rows)), (tensors, tensors_csv(found)),
                              (content, norms_json(rows, protocol))):
            write_text(path, written, f"--out {args.out}")
    _draw(args.out, [signed, sizes], lambda plots: plots.draw_norms(found, signed, sizes))
    _logger.info(f"Wrote {', '.join((page, text, tensors, content))}")


def _draw(out: str, paths: Sequence[str], draw: Callable[[Any], None]) -> bool:
    """Pictures, where matplotlib is there; whether it is."""
    try:
        from . import plots
    except ImportError as e:
        _logger.info(f"No figure: {e.name} is missing; pip install 'timm_sam[report]'")
        return False
    try:
        draw(plots)
    except OSError as e:
        raise OptionError(
            f"--out {out}: no figure can be written ({e.strerror}); make room, or name another folder") from None
    _logger.info(f"Wrote {', '.join(paths)}")
    return True


_RUN: dict[str, Callable[[Session], None]] = {
    "sharpness": _sharpness, "rank": _rank, "norms": _norms, "line": _line, "hessian": _hessian,
    "card": _card}

if __name__ == "__main__":
    sys.exit(main())
