"""How a loss becomes gradients: weighed, scaled, by autograd or by a function of the loop that owns the call."""
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .store import Store

_NO_BACKWARD = "backward_fn: it was given the loss and did not call its backward()"


def asked(weigh: Any, scaler: Any, backward_fn: Any, create_graph: bool) -> "Backward":
    """What a loop asks, if it can be done.

    Args:
        weigh, scaler, backward_fn, create_graph: The attributes of :class:`Backward`.

    Raises:
        ValueError: One is something else.
    """
    for name, value, example in (("weigh", weigh, "weigh=lambda loss: loss / accumulation_steps"),
                                 ("backward_fn", backward_fn, "backward_fn=fabric.backward")):
        if value is not None and not callable(value):
            raise ValueError(f"{name} must be a function that takes the loss, not a {type(value).__name__}: {example}")
    if scaler is not None and not callable(getattr(scaler, "scale", None)):
        raise ValueError(f"scaler must be a torch.amp.GradScaler, not a {type(scaler).__name__}")
    return Backward(weigh, scaler, backward_fn, create_graph)


class Backward(NamedTuple):
    """What a loop asks of the backward passes of one (micro-)batch.

    Attributes:
        weigh: Applied to the loss at w + eps; None: nothing.
        scaler: Its loss scale is applied; None: none.
        function: Takes the place of ``loss.backward()``, and applies the loss scale itself.
        create_graph: Whether the gradient is differentiated again.
    """

    weigh: Callable[[Tensor], Tensor] | None
    scaler: torch.amp.GradScaler | None
    function: Callable[[Tensor], Any] | None
    create_graph: bool

    def scale(self, device: torch.device) -> Tensor | None:
        """The factor that gradients at w carry, 0-dim; None: nothing."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=device))

    def ascend(self, loss: Tensor, params: Sequence[nn.Parameter], store: Store) -> None:
        """The backward pass at w, to some parameters.

        Raises:
            ValueError: ``function`` ran no backward pass.
        """
        run = partial(store.backward, self._scaled(loss), params)
        if self.function is None:
            run()
        else:
            _inside(self.function, loss, run)

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def share(self, loss: Tensor) -> Tensor | None:
        """What the gradient at w + eps is multiplied by beside the loss scale; None: 1, or known after it only."""
        if self.weigh is None or self.function is not None:
            return None
        x = loss.detach().requires_grad_()
        return torch.autograd.grad(self.weigh(x), x)[0]

    def descend(self, loss: Tensor) -> Tensor | None:
        """The backward pass at w + eps.

        Returns:
            What ``function`` and ``weigh`` multiplied the gradient by, the scaler's scale divided out; None without
            ``function``.

        Raises:
            ValueError: ``function`` ran no backward pass, or cannot run one that is differentiated again.
        """
        weighed = loss if self.weigh is None else self.weigh(loss)
        if self.function is None:
            self._scaled(weighed).backward(create_graph=self.create_graph)
            return None
        if self.create_graph:
            raise ValueError("backward_fn: the base optimizer differentiates the gradient again, which needs "
                             "backward(create_graph=True); leave it out")
        factors: list[Tensor] = []
        with_hook = loss.register_hook(factors.append)
        try:
            self.function(weighed)
        finally:
            with_hook.remove()
        if not factors:
            raise ValueError(_NO_BACKWARD)
        scale = self.scale(loss.device)
        return factors[0].detach() if scale is None else factors[0].detach() / scale


class _StandIn(torch.autograd.Function):
    """A number whose backward pass is another one's."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, value: Tensor, run: Callable[[], None]) -> Tensor:
        ctx.run = run
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.run()
        return None, None, None


def _inside(function: Callable[[Tensor], Any], loss: Tensor, run: Callable[[], None]) -> None:
    """Runs a backward pass of ours while ``function`` runs the one that it is given.

    Trainers whose precision is mixed see to it that no backward pass goes by them. What they multiply the loss by does
    not reach ours.

    Raises:
        ValueError: ``function`` ran no backward pass.
    """
    ran: list[bool] = []

    def noted() -> None:
        ran.append(True)
        run()

    leaf = torch.zeros((), device=loss.device, requires_grad=True)
    function(_StandIn.apply(leaf, loss.detach(), noted))
    if not ran:
        raise ValueError(_NO_BACKWARD)
