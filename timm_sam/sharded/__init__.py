"""SAM of models that ``torch.distributed.fsdp.fully_shard`` left each rank a part of: two ways, by what is perturbed.

``onlynorm``: ``whole.py``. g and eps are of whole tensors and, as under DDP, of each rank's own batch; they are small.
``all``, ``nonorm``: ``shards.py``. g and eps are in parts as the parameters are, and the same for all ranks.

What both have in common, and what is refused, is in ``units.py``. Nothing of ``torch.distributed.fsdp`` is imported
here: where it has not been, no model is sharded.
"""
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..group import Group
from ..methods.stages import Stages
from ..store import Store
from .shards import Shards
from .units import Units, is_part, units_of
from .whole import Whole


def group_of(model: nn.Module, params: str) -> Group:
    """The ranks that train a model, with the model as it was built: no unit of it is unsharded afterwards."""
    units = units_of(model)
    return Units(model, units, averages_at_w=params != "onlynorm") if units else Group(model)


def store_of(model: nn.Module, selected: Sequence[tuple[str, nn.Parameter]], group: Group, params: str, sync: bool,
             stages: Stages, methods: str, optimizer: torch.optim.Optimizer) -> Store:
    """Where the selected parameters are.

    Args:
        model: The model.
        selected: Their names, and they.
        group: Of :func:`group_of`.
        params: Which selection it is.
        sync: Whether all ranks have one perturbation.
        stages: The slots of methods.
        methods: What those are called.
        optimizer: The base optimizer.

    Raises:
        ValueError: Each rank keeps a part of the selected parameters, and an argument needs more than that.

    Warns:
        UserWarning: Nothing averages the gradients of the selected parameters.
    """
    chosen = [p for _, p in selected]
    if not isinstance(group, Units):
        return Store(chosen, group)
    whole = [name for name, p in selected if not is_part(p)]
    if whole and len(whole) < len(selected):
        raise ValueError(f"model: fully_shard was called on modules with {len(selected) - len(whole)} of the perturbed "
                         f"parameters, and not on those of {whole[0]}: call it on the whole model as well, or choose "
                         f"either by filter")
    _check(group, sync, stages, methods, optimizer, whole=bool(whole) or not group.averages_at_w)
    if whole:
        warnings.warn(f"model: fully_shard was not called on the modules of the perturbed parameters ({whole[0]}, "
                      f"...): nothing averages their gradients over the ranks, unless the loop does", stacklevel=2)
        return Store(chosen, group)
    if not group.averages_at_w:
        return Whole(chosen, group, model)
    if not sync:
        raise ValueError(f"sync=False: params={params!r} of a model that fully_shard left each rank a part of needs "
                         f"one perturbation for all ranks, since one of each would be as large as the model: use "
                         f"sync=True, or params='onlynorm'")
    return Shards(chosen, group)


def _check(group: Units, sync: bool, stages: Stages, methods: str, optimizer: torch.optim.Optimizer,
           whole: bool) -> None:
    if group.offloads:
        raise ValueError("model: fully_shard keeps its parameters on the CPU, which SAM was never tried with; leave "
                         "CPUOffloadPolicy out")
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"optimizer: {type(optimizer).__name__} differentiates the gradient again, which fully_shard "
                         f"does not allow; use another base optimizer")
    mask = stages.mask
    never = stages.full_ascent or stages.ahead is not None or mask is not None and bool(mask.samples)
    if never or not whole and (stages.direction is not None or mask is not None or stages.rows is not None):
        raise ValueError(
            f"method: {methods} needs whole tensors, of which fully_shard leaves each rank a part; leave it out, or "
            f"use DistributedDataParallel{'' if never else ', or params=' + repr('onlynorm')}")
