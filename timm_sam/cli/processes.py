"""The process group of a script's ranks."""
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from ..group import in_group


def rendezvous_url() -> str:
    """Where the ranks find each other, for ``init_process_group``.

    torchrun gives the ranks that it starts again (``--max-restarts``) the store of those before, with the addresses of
    processes that are gone: some then wait for them, or are refused. So every start but the first has names of its own
    there. Between nodes the count of restarts is not the same, and torch's own way is all there is.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return "env://"

    def handler(url: str, **kwargs: Any) -> Iterator[tuple[Any, int, int]]:
        for store, rank, world_size in torch.distributed.rendezvous("env://", **kwargs):
            yield torch.distributed.PrefixStore(f"restart_{restarts}", store), rank, world_size

    torch.distributed.register_rendezvous_handler("restarted", handler)
    return "restarted://"


def settle() -> None:
    """Gives gloo's threads the moment they need after a collective. To be called before processes are forked.

    A thread that lets go of a collective's tensors makes itself known to Python for that, under a lock of the
    interpreter. Python < 3.12 does not hold this lock when it forks, and if the thread does, the child waits for it for
    ever: of a loader's workers one in a hundred or so hangs before its first line.
    """
    if _uses_gloo():
        time.sleep(0.1)


def leave_process_group() -> None:
    """Ends this rank's part in the process group, if there is one.

    gloo's destructor joins its threads while it holds Python's lock. A thread that has just finished the last
    collective may need that lock to let go of its tensors, and then both wait for ever (seen with timm's script on two
    CPU ranks): so whatever holds the group goes first, and the threads get a moment without the lock.
    """
    if in_group():
        gc.collect()
        settle()
        torch.distributed.destroy_process_group()


def end_failed_rank(code: int) -> None:
    """Ends this process at once, if it is one of several; with code 1, after the traceback of what went wrong.

    The launcher then stops the others. Ending the process group instead waits for them, and they wait for this rank: in
    a collective, or for nccl to end its communicators together.
    """
    if not in_group():
        return
    try:
        if code == 1:
            traceback.print_exc()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _uses_gloo() -> bool:
    return in_group() and "gloo" in torch.distributed.get_backend()
