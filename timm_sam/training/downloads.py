"""Data sets that are downloaded: by one process at first, not by all of them into the same files."""
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch

from ..cli.device import Process

_LONGEST = timedelta(days=1)  # of a download: a collective would be given up after minutes
_KEY = "timm_sam/downloaded/{}"
_FIRST = "first"


@contextmanager
def one_at_first(process: Process, downloads: bool) -> Iterator[None]:
    """Lets rank 0 go first, then one process of each other machine, then all others.

    Where machines share the folder the first has brought everything there, and where they do not each has one that
    does. A rank that fails lets the others go as well: each says what is wrong for itself.

    Args:
        process: This one.
        downloads: Whether anything may be downloaded inside.
    """
    if not (downloads and process.distributed):
        yield
        return
    store = torch.distributed.distributed_c10d._get_default_store()
    machine = f"on {socket.gethostname()}"
    if not process.primary:
        store.wait([_KEY.format(machine if process.local_rank else _FIRST)], _LONGEST)
    try:
        yield
    finally:
        with suppress(RuntimeError):  # where the store is gone nobody waits any more
            if process.local_rank == 0:
                store.set(_KEY.format(machine), "1")
            if process.primary:
                store.set(_KEY.format(_FIRST), "1")
