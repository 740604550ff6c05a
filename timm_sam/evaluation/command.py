"""How a command that opens a session ends: mistakes in one line, failed ranks, exit codes."""
import argparse
from collections.abc import Callable

import torch

from ..cli.errors import OptionError, one_line, report
from ..cli.processes import end_failed_rank
from .options import Resolved
from .session import Session


def run(prog: str, args: argparse.Namespace, resolved: Resolved, work: Callable[[Session], None],
        short: Callable[[str, str], str], non_finite: Callable[[str], str], accepted: bool = False) -> int:
    """Does the work of a command in a session of its own.

    Args:
        prog: The command's name, before its errors.
        args: All options.
        resolved: What comes of them.
        work: What is done.
        short: Says that memory is short, of a device and torch's words.
        non_finite: Says what is NaN or infinite, of a list in words.
        accepted: Whether that is no failure.

    Returns:
        The exit code: 0, 2 for a mistake in the options or the data, 1 for what is NaN or infinite.
    """
    session = None
    try:
        session = Session.open(args, resolved)
        work(session)
    except (OptionError, torch.OutOfMemoryError) as e:
        report(prog, e if isinstance(e, OptionError) else short(
            str(session.device if session else args.device), one_line(e, 80)))
        end_failed_rank(2)
        return 2
    except BaseException:
        end_failed_rank(1)
        raise
    failed = session.primary and bool(session.non_finite) and not accepted
    if failed:
        report(prog, non_finite(", ".join(session.non_finite)))
    session.close()
    return int(failed)
