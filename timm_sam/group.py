"""The ranks that train one model together: what they synchronize, and when they must not."""
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .multi_tensor import as_real


def in_group() -> bool:
    """Whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Group:
    """The ranks of a model's DistributedDataParallel modules; without any, those of the default process group.

    Args:
        model: The model that is trained.

    Attributes:
        sharded: Whether the ranks keep parts of the parameters.
    """

    sharded = False

    def __init__(self, model: nn.Module) -> None:
        self.ddp = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]

    @property
    def process_group(self) -> Any:
        return self.ddp[0].process_group if self.ddp else None

    @property
    def process_groups(self) -> list[Any]:
        """Those that together reach all ranks, one after the other."""
        return [self.process_group]

    @property
    def lends_gradients(self) -> bool:
        """Whether a gradient may lie in a bucket of DDP, where the next synchronizing pass writes over it.

        One that is there when DDP makes its buckets anew, in the second update, is put into them.
        """
        return any(ddp.gradient_as_bucket_view for ddp in self.ddp)

    @property
    def averages(self) -> bool:
        """Whether the gradients of the ranks are averaged for the step."""
        return bool(self.ddp)

    def settle(self) -> None:
        """Has the model show the parameters that it was built with."""

    def settled(self) -> AbstractContextManager[None]:
        """Around a pass: what it leaves in the model is what was there before."""
        return nullcontext()

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank(self.process_group) if in_group() else 0

    @property
    def place(self) -> tuple[int, int]:
        """This rank, and how many there are."""
        return self.rank, torch.distributed.get_world_size(self.process_group) if in_group() else 1

    @property
    def synchronizes(self) -> bool:
        """Whether the next backward pass is to synchronize gradients: it is not inside of ``ddp.no_sync()``."""
        return all(ddp.require_backward_grad_sync for ddp in self.ddp)

    def no_sync(self) -> AbstractContextManager[None]:
        """Nothing synchronizes gradients inside."""
        return _without_sync(self.ddp) if self.ddp else nullcontext()

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over all ranks, by one collective (a process group); the tensors themselves without any."""
        if not in_group():
            return list(tensors)
        flat = torch.cat([t.reshape(-1) for t in tensors])
        for group in self.process_groups:
            torch.distributed.all_reduce(flat, group=group)
            flat /= torch.distributed.get_world_size(group)
        return [part.view_as(t).to(t.dtype) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]

    def average_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Makes ``.grad`` the mean over all ranks, as DDP's backward would have, by one collective after it.

        Without DDP nothing happens: then nothing else averages gradients either.

        Raises:
            ValueError: A parameter has no gradient here, and DDP was not told that this may be.
        """
        if not self.ddp:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        missing = [i for i, p in enumerate(params) if p.grad is None]
        if missing and not any(ddp.find_unused_parameters for ddp in self.ddp):
            raise ValueError(f"{len(missing)} parameters got no gradient on rank {self.rank}: build "
                             f"DistributedDataParallel with find_unused_parameters=True")
        unused = torch.tensor([p.grad is None for p in params], dtype=torch.float32, device=grads[0].device)
        some_unused = any(ddp.find_unused_parameters for ddp in self.ddp)
        with torch.no_grad():
            real = as_real(grads)
            means = self.mean([*real, unused] if some_unused else real)
            torch._foreach_copy_(real, means[:len(real)])
        if missing:  # a parameter that no rank used keeps having no gradient
            everywhere = means[-1].tolist()
            for i in missing:
                params[i].grad = None if everywhere[i] == 1 else grads[i]

    def end_of_backward(self) -> None:
        """As after a backward pass that synchronized: the next forward shares the buffers."""
        for ddp in self.ddp:
            ddp.require_forward_param_sync = True

    def any_of(self, flags: Sequence[bool], device: torch.device) -> list[bool]:
        """Per flag, whether it is set on any rank. Reads the device, which has to be the group's."""
        found = torch.tensor(flags, dtype=torch.int32, device=device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.process_group)
        return [bool(flag) for flag in found.tolist()]


@contextmanager
def _without_sync(modules: Sequence[DistributedDataParallel]) -> Iterator[None]:
    with ExitStack() as stack:
        for ddp in modules:
            stack.enter_context(ddp.no_sync())
        yield
