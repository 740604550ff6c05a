"""torch.compile region by region, so that the passes of SAM can share what lies below the first perturbed layer.

A model that is compiled as a whole is one graph: nothing in it can be left out of the second pass. Here every child is
a graph of its own; a sequence is taken apart where some of its blocks hold perturbed parameters and others do not.
"""
from typing import Any

import torch
from torch import nn

from .selection import select_parameters, unwrap

# Regions share code (every Sequential has the same forward), and each has its graphs for training, for the pass at w
# without weight gradients, and for evaluation. dynamo counts them per code and would go back to eager at 8.
_RECOMPILE_LIMIT = 256


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
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    return _compile_children(unwrap(model), chosen, options)


def _holds(module: nn.Module, chosen: set[int]) -> bool:
    return any(id(p) in chosen for p in module.parameters())


def _compile_children(module: nn.Module, chosen: set[int], options: dict[str, Any]) -> int:
    count = 0
    for child in module.children():
        container = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        inside = container or isinstance(child, nn.Sequential) and _holds(child, chosen)
        # in a sequence of blocks the boundary lies between two blocks
        if inside and (container or not all(_holds(c, chosen) for c in child.children())):
            count += _compile_children(child, chosen, options)
        elif any(True for _ in child.children()) or any(True for _ in child.parameters()):
            child.compile(**options)
            count += 1
    return count
