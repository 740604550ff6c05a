"""torch.compile region by region, so that the passes of SAM can share what lies below the first perturbed layer.

A model that is compiled as a whole is one graph: nothing in it can be left out of the second pass. Here every child is
a graph of its own; a sequence is taken apart where some of its blocks hold perturbed parameters and others do not.
"""
from types import CodeType
from typing import Any

import torch
from torch import nn

from .selection import select_parameters, unwrap


def compile_regions(model: nn.Module, params: str = "onlynorm", filter: str | None = None, **options: Any) -> int:
    """Compiles the parts of a model in place.

    Args:
        model: The model; its forward and the names of its parameters stay as they are.
        params: As in :func:`select_parameters`.
        filter: As in :func:`select_parameters`.
        **options: For ``torch.compile``.

    Returns:
        The number of regions.

    Raises:
        ValueError: Nothing is selected.
    """
    chosen = {id(p) for _, p in select_parameters(model, params, filter)}
    return _compile_children(unwrap(model), chosen, options, {})


def _holds(module: nn.Module, chosen: set[int]) -> bool:
    return any(id(p) in chosen for p in module.parameters())


def _compile_children(module: nn.Module, chosen: set[int], options: dict[str, Any], codes: dict[Any, CodeType]) -> int:
    count = 0
    for child in module.children():
        container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        inside = container or isinstance(child, nn.Sequential) and _holds(child, chosen)
        # in a sequence of blocks the boundary lies between two blocks
        if inside and (container or not all(_holds(c, chosen) for c in child.children())):
            count += _compile_children(child, chosen, options, codes)
        elif any(True for _ in child.children()) or any(True for _ in child.parameters()):
            _compile(child, options, codes)
            count += 1
    return count


def _compile(module: nn.Module, options: dict[str, Any], codes: dict[Any, CodeType]) -> None:
    """Makes the module one graph, where ``module.compile()`` would make graphs of the frames that it finds inside.

    dynamo keeps graphs by code, and takes a size that differs between two calls of the same code for a dynamic one, for
    which it makes slower kernels. So only regions of the same shapes share code, and with it their graphs.
    """
    call = module._call_impl

    def region(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    key = (type(module), *((name, p.shape) for name, p in module.named_parameters()))
    region.__code__ = codes.setdefault(key, region.__code__.replace(co_name=f"region_{len(codes)}"))
    module._compiled_call_impl = torch.compile(region, **options)
