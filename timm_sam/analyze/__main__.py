"""``python -m timm_sam.analyze sharpness --checkpoint ... --data-dir ... --out DIR``: what trained weights are like."""
import logging
import os
import sys
from collections.abc import Sequence

import torch

from ..cli.errors import OptionError, one_line, report
from ..cli.escape import setup_logging
from ..cli.parser import OptionParser
from ..cli.processes import end_failed_rank
from ..cli.text import say
from ..evaluation import results, tables
from ..evaluation.session import Session
from ..random_state import RandomState
from . import options
from .protocol import analyze_sharpness

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an analysis; returns the exit code: 0, 2 for a mistake in the options or the data, 1 for losses that are NaN
    or infinite."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = OptionParser(prog=options.PROG, description="What trained weights are like. --help after a name says more.")
    first.add_argument("command", choices=options.COMMANDS, help="; ".join(
        f"{name}: {text}" for name, text in options.COMMANDS.items()))
    parser = options.build_parser(first.parse_args(arguments[:1]).command)
    args, resolved = options.parse(parser, arguments[1:])
    setup_logging()
    session = None
    try:
        session = Session.open(args, resolved)
        before = RandomState({session.device})
        try:
            _sharpness(session)
        finally:
            before.restore()
    except (OptionError, torch.OutOfMemoryError) as e:
        message = str(e) if isinstance(e, OptionError) else (
            f"--m {args.m} is too large for the memory of {session.device if session else args.device} "
            f"({one_line(e, 80)}); use a smaller one")
        report(parser.prog, message)
        end_failed_rank(2)
        return 2
    except BaseException:
        end_failed_rank(1)
        raise
    failed = session.primary and bool(session.non_finite)
    if failed:
        report(parser.prog, f"NaN or infinite losses: {', '.join(session.non_finite)}; give other checkpoints")
    session.close()
    return int(failed)


def _sharpness(session: Session) -> None:
    """The table on stdout, and all files in ``--out``."""
    args = session.args
    beside = os.path.join(args.out, "sharpness")
    files, picture = results.result_files(beside, None), f"{beside}.png"
    measures, names, protocol = analyze_sharpness(session, files, [picture])
    if not session.primary:
        return
    try:
        say(tables.as_text(measures, names))
    finally:  # where nobody listens, the files are still wanted
        results.write(files, measures, names, protocol, f"--out {args.out}")
    try:
        from . import plots
    except ImportError as e:
        _logger.info(f"No figure: {e.name} is missing; pip install 'timm_sam[report]'")
    else:
        try:
            plots.draw_sharpness(measures, args.measure, args.labels or names, picture)
        except OSError as e:
            raise OptionError(f"--out {args.out}: {picture} cannot be written ({e.strerror}); make room, or name "
                              f"another folder") from None
        files = {**files, "png": picture}
    for path in files.values():
        _logger.info(f"Wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
