"""Dropout on what normalization layers return, for ``--norm-drop``: in layers of the same names, types and state.

Not by hooks, which would keep the passes of SAM from sharing a forward, nor by modules in between, which would rename
parameters.
"""
import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.layers import FilterResponseNormAct2d
from torch import nn

from ..norms import is_norm


def drop_behind_norms(model: nn.Module, p: float) -> int:
    """Puts dropout behind each normalization layer, in place.

    timm's layers with an activation drop before it: they have a place for that. EvoNorm, FRN with its threshold and
    InplaceABN cannot be told apart from their activation, and drop behind it. Parts of a layer (of split batch
    normalization) are left to the whole.

    Args:
        model: Its layers have their last type.
        p: Probability; elements that stay are divided by 1 - p.

    Returns:
        How many layers there are.
    """
    count = 0
    parts: set[nn.Module] = set()
    for module in list(model.modules()):
        if not is_norm(module) or module in parts:
            continue
        count += 1
        parts.update(module.modules())
        earlier = getattr(module, "drop", None)
        if isinstance(earlier, nn.Module):
            module.drop = nn.Sequential(nn.Dropout(p), earlier).train(module.training)
        elif isinstance(module, FilterResponseNormAct2d):
            _become(module.act, _dropping_before, p)
        else:
            _become(module, _dropping_behind, p)
    return count


def _become(module: nn.Module, dropping: Callable[[Any], type[nn.Module]], p: float) -> None:
    base = type(module)
    cls = dropping(base)
    # the name stays, for logs; where it is defined does not: torch.compile takes torch's own layers for known
    cls.__name__, cls.__qualname__ = base.__name__, base.__qualname__
    module.__class__ = cls
    module._norm_drop = p  # type: ignore[assignment]


@functools.cache
def _dropping_behind(base: Any) -> type[nn.Module]:
    class Dropping(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return F.dropout(super().forward(*args, **kwargs), self._norm_drop, self.training)

    return Dropping


@functools.cache
def _dropping_before(base: Any) -> type[nn.Module]:
    class Dropping(base):
        def forward(self, x: Any) -> Any:
            return super().forward(F.dropout(x, self._norm_drop, self.training))

    return Dropping
