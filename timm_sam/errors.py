"""Mistakes of the user: what they are raised as, and how the scripts report them."""
import os
import sys
import time


class OptionError(ValueError):
    """A mistake that the user can mend: one line with flag, value and remedy. The scripts exit with code 2."""


def report(prog: str, message: object) -> None:
    """Prints the one line of an error, once per machine where every rank finds the same mistake."""
    who = ""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(3)  # the launcher stops all ranks when one is gone: who is still there then was alone with it
        who = f" (rank {os.environ.get('RANK')})"
    print(f"{prog}: error{who}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error without line breaks, cut at ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit - 3] + "..."
