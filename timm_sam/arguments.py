"""What SAM refuses to be built with."""
import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import nn

from .group import Group
from .methods.stages import Stages
from .passes import BN_STATS
from .perturbation import VARIANTS
from .selection import check_module
from .sharded.units import check_parts
from .split import WHOLE_GRAPHS_WORK, is_compiled_whole

Init = TypeVar("Init", bound=Callable[..., None])


def in_right_order(init: Init) -> Init:
    """A constructor that knows how other packages' SAM is called: SAM(model.parameters(), SGD, lr=..., rho=...)."""
    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        optimizer, model = [*args, None, None][:2]
        base = kwargs.get("base_optimizer", model)
        if isinstance(base, type) and issubclass(base, torch.optim.Optimizer):
            raise ValueError(f"optimizer: SAM takes a base optimizer that is built, and the model: "
                             f"SAM(torch.optim.{base.__name__}(model.parameters(), lr=...), model, rho=...)")
        if isinstance(optimizer, nn.Module) and isinstance(model, torch.optim.Optimizer):
            raise ValueError("optimizer: it comes first: SAM(optimizer, model, rho=...)")
        if len(args) > 1 or "model" in kwargs:
            check_module(kwargs.get("model", model))
        init(self, *args, **kwargs)

    return cast(Init, checked)


def check_arguments(variant: str, bn_stats: str, rho: float, eta: float | None) -> None:
    """Looks at single arguments of SAM.

    Raises:
        ValueError: One is out of range.
    """
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is unknown: use one of {', '.join(VARIANTS)}")
    if bn_stats not in BN_STATS:
        raise ValueError(f"bn_stats={bn_stats!r} is unknown: use one of {', '.join(BN_STATS)}")
    _check_number("rho", rho)
    if eta is not None:
        _check_number("eta", eta)
        if VARIANTS[variant].eta is None:
            raise ValueError(f"eta={eta}: variant {variant!r} has no eta; leave it out")


def _check_number(name: str, value: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} must be a finite number >= 0")


def check_model(model: nn.Module, group: Group) -> None:
    """Looks at what the model is wrapped in.

    Raises:
        ValueError: Its gradients, or the norms of them, would be wrong.
    """
    check_parts(model)
    if not WHOLE_GRAPHS_WORK and is_compiled_whole(model):
        refuse_whole_graph()
    if any(ddp.static_graph for ddp in group.ddp):
        raise ValueError("model: the first backward of DistributedDataParallel(static_graph=True) synchronizes, "
                         "which the pass at w must not do; build it without static_graph")


def refuse_whole_graph() -> NoReturn:
    """Says what to do where torch does not do it right.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"model: torch {torch.__version__} computes wrong gradients for SAM of a model compiled as a "
                     f"whole; compile it by timm_sam.compile_split(model), or use torch >= 2.12")


def check_variant(stages: Stages, names: str, variant: str) -> None:
    """Looks at methods beside the variant.

    Raises:
        ValueError: They do not go together.
    """
    if stages.normalization is not None and VARIANTS[variant].p != 2:
        raise ValueError(f"method: {names} with variant={variant!r}, whose eps has no norm in it; use another variant")


def check_ascent_fn(stages: Stages, names: str) -> None:
    """Looks at methods beside a loss of its own for the pass at w.

    Raises:
        ValueError: They do not go together.
    """
    if stages.ahead is not None:
        raise ValueError(f"ascent_fn: {names} has no pass at w; leave it out")
    if stages.whole_batch:
        raise ValueError(f"ascent_fn: {names} needs the gradient of the whole batch at w")


def check_methods(stages: Stages, names: str, variant: str, optimizer: torch.optim.Optimizer,
                  second_order: bool) -> None:
    """Looks at methods beside the variant and the base optimizer.

    Raises:
        ValueError: They do not go together.
    """
    check_variant(stages, names, variant)
    if second_order and (stages.full_ascent or stages.rows is not None):
        raise ValueError(f"method: {names} changes the gradient that {type(optimizer).__name__} differentiates again; "
                         f"use another base optimizer")
