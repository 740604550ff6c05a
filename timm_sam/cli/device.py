"""The device of this process: its set-up, and how batches come to it."""
import os
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import set_fast_norm
from timm.utils import reduce_tensor, set_jit_fuser
from timm.utils.distributed import init_distributed_device_so
from torch import Tensor

from .errors import OptionError, one_line
from .processes import check_launcher, rendezvous_url, stay_on_machine


@dataclass(frozen=True)
class Process:
    """This process among those that were started together, and where it computes.

    Attributes:
        device: Of this process, with its index where it is one of several.
        rank: Of this process among all, from 0.
        local_rank: The same on this machine.
        world_size: Number of processes.
        distributed: Whether there is a process group.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    distributed: bool = False

    @property
    def primary(self) -> bool:
        """Whether this is the one process that writes and logs."""
        return self.rank == 0

    def gather(self, mine: Any) -> list[Any]:
        """What all ranks have, by rank. Every rank has to call it."""
        ranks: list[Any] = [mine]
        if self.distributed:
            ranks = [None] * self.world_size
            torch.distributed.all_gather_object(ranks, mine)
        return ranks

    def from_primary(self, mine: Any) -> Any:
        """What the first rank has. Every rank has to call it."""
        found = [mine]
        if self.distributed:
            torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def mean(self, value: float) -> float:
        """The mean over all ranks, in float32. Every rank has to call it."""
        if not self.distributed:
            return value
        tensor = torch.tensor([value], device=self.device, dtype=torch.float32)
        return reduce_tensor(tensor, self.world_size).item()


def set_up(device: str, fuser: str = "", fast_norm: bool = False) -> Process:
    """Device and process group of this process, and the settings that timm's scripts make for the process.

    These are TF32 and cuDNN's search for the fastest algorithms where there is CUDA, the fuser of torchscript, and
    normalization in low precision under autocast.

    Args:
        device: As given on the command line: ``cuda``, ``cuda:1``, ``cpu``, ...; of several processes each takes the
            index of its local rank.
        fuser: ``te``, ``old`` or ``nvfuser``; empty: torch's own.
        fast_norm: Normalization layers in low precision under autocast.

    Raises:
        OptionError: The environment names other processes, but not where they are, or they are not found there.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    check_launcher()
    stay_on_machine()
    try:
        found = init_distributed_device_so(device, dist_url=rendezvous_url())
    except torch.distributed.DistError as e:  # a port that is taken, a name that nobody knows, a rank that never came
        where = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} and MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise OptionError(f"{where} in the environment: the processes do not find each other there ({one_line(e)}); "
                          f"name the first machine and a port that is free on it, and start all ranks at the same "
                          f"time") from e
    if fuser:
        set_jit_fuser(fuser)
    set_fast_norm(fast_norm)  # both ways: a process may run one command after another
    return Process(torch.device(found["device"]), found["global_rank"], found["local_rank"], found["world_size"],
                 found["distributed"])


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Brings a batch to the device.

    Args:
        batch: A tensor, or a NaFlex dictionary of tensors and what describes them.
        device: Where to.
        dtype: Of its floating point tensors then; None: as they are.
    """
    if isinstance(batch, dict):
        return {name: to_device(value, device, dtype) for name, value in batch.items()}
    if not isinstance(batch, Tensor):  # NaFlex batches name their sequence length
        return batch
    return batch.to(device=device, dtype=dtype if batch.is_floating_point() else None)
