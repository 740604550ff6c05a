"""SAM late: plain training, then a tail with SAM.

Zhou et al., ICLR 2025, https://arxiv.org/abs/2410.10373: a few last epochs with SAM find minima about as flat as a
whole run with it. The ramp is ours: rho rises from 0 to its value as the rate falls from where the tail begins.

    rho_t = rho (lr_0 - lr_t) / (lr_0 - lr_min)        lr_0: the rate when the tail begins
"""
import math
from dataclasses import dataclass, field
from typing import Any

from .stages import At, Groups, Method, Timing, rate_of


@dataclass
class Ramp:
    """The radius of the tail; ``lr_start`` is the rate with which it began."""

    lr_min: float
    lr_start: float | None = field(default=None)

    def bind(self, rho: float, groups: Groups) -> None:
        """Nothing is known yet: the tail has not begun."""

    def __call__(self, at: At, rho: float, groups: Groups) -> float:
        lr = rate_of(groups)
        if self.lr_start is None:
            self.lr_start = lr
        if self.lr_start <= self.lr_min:
            return rho
        return rho * min(1.0, max(0.0, (self.lr_start - lr) / (self.lr_start - self.lr_min)))

    def state_dict(self) -> dict[str, Any]:
        return {"lr_start": self.lr_start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lr_start = state["lr_start"]


def late(start: float, ramp: bool = True, lr_min: float | None = None, total_updates: int | None = None) -> Method:
    """Plain training, then SAM (Zhou et al., ICLR 2025), for ``SAM(..., method=late(start=180, ramp=False))``.

    Args:
        start: Where SAM begins: an epoch >= 1, or a share of all updates, above 0 and below 1.
        ramp: Whether rho rises from 0 as the learning rate falls; else it is there at once.
        lr_min: The rate at which the schedule ends, where rho is reached; needed for the ramp.
        total_updates: Length of the run; needed for a share.

    Raises:
        ValueError: An argument is out of range, or one that is needed is missing.
    """
    number = isinstance(start, (int, float)) and not isinstance(start, bool) and math.isfinite(start)
    if not number or start <= 0 or start >= 1 and start != int(start):
        raise ValueError(f"late: start={start!r} must be an epoch >= 1, or a share above 0 and below 1")
    if ramp and (lr_min is None or not math.isfinite(lr_min) or lr_min < 0):
        raise ValueError(f"late: lr_min={lr_min!r}: the ramp needs the rate, >= 0, at which the schedule ends; give "
                         f"it, or ramp=False")
    if start >= 1:
        timing = Timing(epoch=int(start))
    elif total_updates is None:
        raise ValueError(f"late: start={start!r} is a share of total_updates: give that, or an epoch")
    else:
        timing = Timing(update=min(math.ceil(start * total_updates), total_updates - 1))  # the last one at least
    return Method(name=f"late(start={start:g}, ramp={ramp})", timing=timing,
                  radius=Ramp(lr_min) if ramp and lr_min is not None else None)
