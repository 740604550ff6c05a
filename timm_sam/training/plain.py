"""What SAM is to the loop, without SAM."""
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..group import Group
from ..methods.stages import Samples
from ..stats import Stats


class Update(Protocol):
    """Gradients of one update after the other: :class:`timm_sam.SAM`, or :class:`Plain`."""

    nonfinite: Tensor
    stats: Stats | None
    chooses_samples: bool

    @property
    def sharing(self) -> str | None: ...

    def begin(self, epoch: int, update: int, samples: Samples | None = None) -> None: ...

    def backward(self, loss_fn: Callable[..., Tensor], *, ascent_fn: Callable[[], Tensor] | None = None,
                 weigh: Callable[[Tensor], Tensor] | None = None, scaler: torch.amp.GradScaler | None = None,
                 last: bool = True) -> Tensor: ...

    def method_state_dict(self) -> dict[str, Any]: ...

    def load_method_state_dict(self, state: dict[str, Any]) -> None: ...


class Plain:
    """One backward pass a (micro-)batch, synchronized after the last one of an update.

    Args:
        optimizer: The base optimizer.
        module: The module that is trained, inside of DDP where there is one.
    """

    sharing = None
    chooses_samples = False

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        self.nonfinite = torch.zeros((), dtype=torch.int64)
        self.stats: Stats | None = None
        self._second_order = bool(getattr(optimizer, "is_second_order", False))
        self._group = Group(module)

    def begin(self, epoch: int, update: int, samples: Samples | None = None) -> None:
        pass

    def backward(self, loss_fn: Callable[..., Tensor], *, ascent_fn: Callable[[], Tensor] | None = None,
                 weigh: Callable[[Tensor], Tensor] | None = None, scaler: torch.amp.GradScaler | None = None,
                 last: bool = True) -> Tensor:
        """As that of SAM in an update that is not perturbed."""
        with nullcontext() if last else self._group.no_sync():
            loss = loss_fn()
            weighed = loss if weigh is None else weigh(loss)
            (weighed if scaler is None else scaler.scale(weighed)).backward(create_graph=self._second_order)
        self.stats = Stats(loss.detach())
        return self.stats.loss

    def method_state_dict(self) -> dict[str, Any]:
        return {}

    def load_method_state_dict(self, state: dict[str, Any]) -> None:
        pass
