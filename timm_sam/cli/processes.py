"""The process group of a script's ranks."""
import gc
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from ..group import in_group
from .errors import OptionError

# numbers that launchers set, as timm reads them
_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID",
            "SLURM_LOCALID")
_LOOPBACK = ("lo", "lo0")  # names of the interface: Linux, BSD and macOS


def check_launcher() -> None:
    """Looks whether what a launcher has set in the environment is enough to find the other processes.

    Raises:
        OptionError: It is not.
    """
    for name in _NUMBERS:
        if not os.environ.get(name, "0").isdecimal():
            raise OptionError(f"{name}={os.environ[name]} in the environment is no number: unset it, or start the "
                              f"processes by torchrun")
    said_by = next((name for name in ("WORLD_SIZE", "SLURM_NTASKS") if name in os.environ), None)
    count = int(os.environ[said_by]) if said_by else 1
    if count < 2:
        return
    needed = ["MASTER_ADDR", "MASTER_PORT"]
    if "SLURM_PROCID" not in os.environ:
        needed += ["RANK", "WORLD_SIZE"]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise OptionError(
            f"{said_by}={count} in the environment says that this is one of {count} processes, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: start them by torchrun, or by srun "
            f"with MASTER_ADDR (a name of the first machine) and MASTER_PORT; for a single process unset {said_by}")
    numbered_by = "RANK" if "RANK" in os.environ else "SLURM_PROCID"
    rank, port = int(os.environ[numbered_by]), int(os.environ["MASTER_PORT"])
    if rank >= count:  # torch waits for a rank that never comes
        raise OptionError(f"{numbered_by}={rank} in the environment is no rank of {count} processes ({said_by}), which "
                          f"are counted from 0: set it to 0 to {count - 1}, or start the processes by torchrun")
    if not 1 <= port <= 65535:
        raise OptionError(f"MASTER_PORT={port} in the environment is no port: set it to one from 1 to 65535 that is "
                          f"free on the first machine")


def stay_on_machine() -> None:
    """Lets gloo listen on the loopback interface only, where all processes are on one machine.

    Otherwise it listens on the address of the machine's name, which other machines may reach. What the environment
    says of it already stays.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is None or local != os.environ.get("WORLD_SIZE"):  # of torchrun: it knows how many are here
        return
    names = {name for _, name in socket.if_nameindex()} if hasattr(socket, "if_nameindex") else set()
    for name in _LOOPBACK:
        if name in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


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
