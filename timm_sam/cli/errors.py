"""Mistakes of the user: what they are raised as, and how the scripts report them."""
import os
import reprlib
import sys
import time
from typing import Any

import torch

from ..group import in_group
from .escape import printable


class OptionError(ValueError):
    """A mistake that the user can mend: one line with flag, value and remedy. The scripts exit with code 2."""


class WorkerError(OptionError):
    """A mistake that may be found in a worker process of a loader. ``str()`` is one line in the main process too.

    A worker hands over only the class and a text that ends with the traceback; torch builds the exception anew from
    that text, and the line is taken out of it here.
    """

    def __init__(self, message: str) -> None:
        _, found, line = message.rpartition(f"{type(self).__name__}: ")
        super().__init__(" ".join((line if found else message).split()))


def report(prog: str, message: object) -> None:
    """Prints the one line of an error, once per machine where every rank finds the same mistake."""
    who, key = "", f"timm_sam/error/{os.environ.get('GROUP_RANK')}"
    store = torch.distributed.distributed_c10d._get_default_store() if in_group() else None
    try:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            who = f" (rank {os.environ.get('RANK')})"
            time.sleep(3)  # the launcher stops all ranks when one is gone: leave the first one the time to speak
            if store is None or store.check([key]):
                return
        elif store is not None:
            store.set(key, "1")
    except RuntimeError:  # without torchrun the store is the first rank's, and has gone with it: say it once more
        pass
    print(f"{prog}: error{who}: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)


class _Short(reprlib.Repr):
    """Values as a message shows them: a file may hold numbers of a million digits, and lists in lists in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 8, 8, 4
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 128 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()


def shown(value: Any) -> str:
    """A value as Python writes it, but short, whatever it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def host_is_full(error: BaseException) -> bool:
    """Whether torch found no memory on the host: it has a class of its own for devices only."""
    return "DefaultCPUAllocator" in str(error)


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error without line breaks, cut at ``limit`` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit - 3] + "..."
