"""MSAM: Momentum-SAM, sharpness-aware training without a second pass.

Becker et al., NeurIPS 2025, https://arxiv.org/abs/2401.12033, https://github.com/MarlonBecker/MSAM.

    v   = the base optimizer's first moment before this update; none yet: a plain update
    eps = -rho T^2 v_S / ||T v_S||       note the minus
    G   = dL/dw at w + eps               the only pass
    w  <- base step with G, at w

The authors' SGD takes its weight decay at w + eps; here it is taken at w, as in every other method. torch's momentum
contains an L2 decay, so v does.
"""
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .stages import Method, Tensors, Timing

_KEYS = ("momentum_buffer", "exp_avg")


def _base(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """timm's Lookahead keeps the state in the optimizer inside of it."""
    return getattr(optimizer, "_base_optimizer", optimizer)


class Momentum:
    """The first moment of the base optimizer."""

    def __init__(self) -> None:
        self.written: int | None = None  # how often the weights were, when nothing was kept yet
        self.warned = False

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        group = _base(optimizer).param_groups[0]
        if not (group.get("momentum") or "betas" in group or group.get("beta1")):
            raise ValueError(f"msam: {type(optimizer).__name__} keeps no first moment of the gradient: give it "
                             f"momentum, or use another base optimizer")

    def __call__(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Tensors | None:
        state = _base(optimizer).state
        found, seen = [], False
        for p in params:
            kept = state.get(p) or {}
            seen = seen or bool(kept)
            found.append(next((kept[key] for key in _KEYS if kept.get(key) is not None), None))
        if all(v is None for v in found):
            if seen:
                raise ValueError(f"msam: {type(optimizer).__name__} keeps none of {', '.join(_KEYS)}; use another base "
                                 f"optimizer")
            self._look_for_steps(optimizer, params)
            return None
        return [torch.zeros_like(p) if v is None else v for p, v in zip(params, found)]

    def _look_for_steps(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> None:
        """Before its first step an optimizer keeps nothing; one that moves the weights and keeps nothing is another."""
        written = sum(p._version for p in params)
        if self.written not in (None, written) and not self.warned:
            self.warned = True
            warnings.warn(f"msam: {type(optimizer).__name__} has moved the perturbed parameters, and its state holds "
                          f"nothing of them (ZeroRedundancyOptimizer has it elsewhere): updates are plain, use another "
                          f"base optimizer", stacklevel=2)
        self.written = written


def msam() -> Method:
    """MSAM (Becker et al., NeurIPS 2025), for ``SAM(..., method=msam())``: one pass, the cost of plain training.

    The base optimizer has to keep a first moment: SGD with momentum, Adam's and Lion's kin. rho is larger than SAM's.
    Running statistics come from the one pass, at w + eps, and so does the loss. train.py begins after the warm-up
    where nothing else is said.
    """
    return Method(name="msam()", ahead=Momentum(), timing=Timing(after_warmup=True),
                  note="one pass an update; the loss is that at w + eps")
