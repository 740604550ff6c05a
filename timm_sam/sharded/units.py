"""The modules that ``fully_shard`` was called on: which there are, and what they must not keep from pass to pass.

A unit gathers its parameters before its forward and its backward, as tensors of their own that are put in the place of
the model's, and lets them go afterwards; in some settings it keeps them for a while. What is done to the parameters in
between, as freezing them, is seen by the next gathering only.
"""
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..group import Group

SHARDED_LATE = ("model: fully_shard was called after SAM was built; call it first, then build the optimizer and SAM "
                "with the model")
_REMEDY = "of which SAM would take the norms; use fully_shard or DistributedDataParallel instead"


def units_of(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on, those outside first. What was not imported, nobody has called."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return [] if kind is None else [m for m in model.modules() if isinstance(m, kind)]


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is one of which each rank may have a part."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def check_parts(model: nn.Module) -> None:
    """Refuses parameters that are parts of tensors in other ways than that of ``fully_shard``.

    Raises:
        ValueError: There are some.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and (
            any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())
            or any(getattr(p, "_fsdp_flattened", False) for p in model.parameters())):
        raise ValueError(f"model: FullyShardedDataParallel leaves each rank a part of every parameter, {_REMEDY}")
    inside = {id(p) for unit in units_of(model) for p in unit.parameters()}
    for p in model.parameters():
        if is_part(p) and not (id(p) in inside and _is_sharded(p)):
            raise ValueError(f"model: tensor parallelism leaves each rank a part of some parameters, {_REMEDY}")


def _is_sharded(p: Any) -> bool:
    """Whether a tensor is placed as ``fully_shard`` does it, on a mesh of one dimension, or beside replicas."""
    *others, last = p.placements
    return last.is_shard() and len(others) <= 1 and all(placement.is_replicate() for placement in others)


class Units(Group):
    """The ranks of a model with units.

    Args:
        model: The model.
        units: Its units.
        averages_at_w: Whether the gradients at w are averaged over the ranks, as all others.

    Raises:
        ValueError: The units are on several meshes, or something else leaves ranks parts of parameters as well.
    """

    sharded = True

    def __init__(self, model: nn.Module, units: list[Any], averages_at_w: bool) -> None:
        super().__init__(model)
        check_parts(model)
        self.units = units
        self.averages_at_w = averages_at_w
        self._states = list(dict.fromkeys(unit._get_fsdp_state() for unit in units))  # several units may have one
        self._begun = False
        self.settle()
        meshes = list(dict.fromkeys(p.device_mesh for unit in units for p in unit.parameters() if is_part(p)))
        if len(meshes) != 1:
            raise ValueError(f"model: fully_shard was called with {len(meshes)} meshes, SAM takes one")
        self._mesh = meshes[0]
        self._place = self._mesh.mesh.flatten().tolist().index(torch.distributed.get_rank()), self._mesh.size()

    @property
    def process_group(self) -> Any:
        """That of the ranks whose parts make up one copy of the model."""
        return self._mesh.get_group(self._mesh.ndim - 1)

    @property
    def process_groups(self) -> list[Any]:
        return [self._mesh.get_group(i) for i in range(self._mesh.ndim)]

    @property
    def place(self) -> tuple[int, int]:
        return self._place

    @property
    def averages(self) -> bool:
        return True

    @property
    def offloads(self) -> bool:
        """Whether the parts are kept in another memory than that of the device that computes."""
        return any(type(one.offload_policy).__name__ == "CPUOffloadPolicy" for one in self._communicators())

    def _communicators(self) -> list[Any]:
        found: list[Any] = []
        for state in self._states:
            several = getattr(state, "_fsdp_param_groups", None)
            found += [state._fsdp_param_group] if several is None else several
        return [one for one in found if one is not None]

    @property
    def synchronizes(self) -> bool:
        return all(one.reduce_grads for one in self._communicators())

    @property
    def synchronizes_all(self) -> bool:
        """Whether the gradients of a backward pass become the mean over all ranks, replicas included."""
        return all(one.reduce_grads and one.all_reduce_grads for one in self._communicators())

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Nothing synchronizes gradients inside, unless the pass at w has to: then those before it do so as well."""
        if self.averages_at_w:
            yield
            return
        before = [(one, one.reduce_grads, one.all_reduce_grads) for one in self._communicators()]
        try:
            for one, _, _ in before:
                one.reduce_grads = one.all_reduce_grads = False
            yield
        finally:
            for one, reduces, reduces_all in before:
                one.reduce_grads, one.all_reduce_grads = reduces, reduces_all

    def settle(self) -> None:
        """Lets what was gathered go; without communication, and usually nothing is left."""
        for unit in self.units:
            unit.reshard()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Around a pass: nothing that is gathered before it is used in it, and nothing of it is used afterwards."""
        self.settle()
        try:
            yield
        except BaseException:
            self._abandon()
            raise
        self.settle()
        if not self._begun:
            # torch's first forward takes what type gradients are reduced in from those parameters that are not frozen,
            # and the pass at w froze most: this has it look again
            for unit in self.units:
                unit.unshard()
            self.settle()
            self._begun = True

    def _abandon(self) -> None:
        """As after a whole pass, where one broke off: units inside of which it was would keep what they gathered."""
        for state in self._states:
            idle = type(state._training_state).IDLE
            state._training_state = idle
            state._modules_to_run_forward.clear()
            state._state_ctx.iter_forward_root = None
            state._state_ctx.post_backward_final_callback_queued = False
            getattr(state._comm_ctx, "post_forward_order", []).clear()  # the first forward makes it
        for one in self._communicators():
            one.wait_for_unshard()
            one._training_state = idle
            one._post_forward_indices.clear()
        self.settle()
