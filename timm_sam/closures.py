"""Closures of PyTorch's convention: whether one zeroes gradients, or does anything, is seen, not believed."""
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .losses import as_loss
from .multi_tensor import dense
from .store import Store, version_of

PLAIN = ("SAM.step() without a closure would be a plain step: pass a closure, or call SAM.backward(loss_fn) before it, "
         "or use SAM.minimize(loss_fn)")


def step_of_nothing(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """``step()`` where SAM computed no gradient: an error, unless nothing can move.

    That is how torch.distributed.checkpoint has an optimizer make its state.

    Raises:
        ValueError: A learning rate is not 0.
    """
    if any(group.get("lr") != 0 for group in optimizer.param_groups):
        raise ValueError(PLAIN)
    optimizer.step()
    return None


class NoLoss(Exception):
    """A closure left no gradient, on purpose: there is nothing to update with."""


def loss_of(value: Any) -> Tensor:
    """The loss that a closure returned, detached; numbers are losses, too.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(value, (int, float)):
        return torch.tensor(float(value))
    return as_loss(value, "closure").detach()


def updating(method: Callable[[Any, Callable[[], Any]], None]) -> Callable[[Any, Callable[[], Any]], bool]:
    """A method that calls a closure, with gradients on; made to return whether there is anything to step with."""
    @functools.wraps(method)
    def call(self: Any, closure: Callable[[], Any]) -> bool:
        if not callable(closure):
            raise ValueError(f"closure must be a function that computes the loss and its gradients, not a "
                             f"{type(closure).__name__}")
        try:
            with torch.enable_grad():
                method(self, closure)
        except NoLoss:
            return False
        return True

    return call


def check_idle(value: Any) -> None:
    """Looks at what a closure returned that was called when gradients were there already.

    Raises:
        ValueError: It computed a loss.
    """
    if value is not None:
        raise ValueError("closure: SAM.backward() or SAM.perturbed() ran since the last step, so that there is nothing "
                         "for it to compute; call step() without it")


def plain_call(closure: Callable[[], Any], params: Sequence[nn.Parameter]) -> Tensor:
    """The closure's call of an update that is not perturbed.

    Returns:
        The loss, detached; nan if it returned None and gradients are there.

    Raises:
        NoLoss: It returned None, and none are, or nothing but zeros.
        ValueError: It returned no loss.
    """
    value = closure()
    if value is None and all(p.grad is None or _is_zero(p.grad) for p in params):
        raise NoLoss
    return torch.full((), torch.nan) if value is None else loss_of(value)


def _is_zero(grad: Tensor) -> bool:
    """Whether a gradient is zero, as ``zero_grad(set_to_none=False)`` leaves it.

    Of a sharded one no rank can tell: its own part may be empty.
    """
    return not hasattr(grad, "_local_tensor") and not bool(dense(grad).any())


def first_call(closure: Callable[[], Any], store: Store, held: nn.Parameter | None, begun: bool) -> Tensor:
    """The closure's first call of an update.

    Args:
        closure: It.
        store: Of the perturbed parameters.
        held: Of those, one that has a gradient from before.
        begun: Whether there has been an update.

    Returns:
        The loss, detached.

    Raises:
        NoLoss: It returned None after it zeroed gradients, as Lightning's does for a batch that is left out; or ran no
            backward pass after updates that had one, as its averaging of weights does for running statistics.
        ValueError: It returned no loss, added to what was there, or did nothing at all (wrappers of trainers pass a
            closure that does nothing).
    """
    with zeroing(held, store) as seen:
        value = closure()
        if value is None and held is not None and seen.untouched():
            raise ValueError(PLAIN)
        if (value is None or begun) and not seen.arrived and not store.arrived(held):
            raise NoLoss
        return loss_of(value)


class _Seen:
    """What a closure has done to the gradient of one parameter."""

    def __init__(self) -> None:
        self.arrived: list[bool] = []  # per backward pass, whether it added to what was there before
        self.untouched: Callable[[], bool] = lambda: False


def holding(params: Sequence[nn.Parameter]) -> nn.Parameter | None:
    """The smallest of those that hold a gradient; None if none does."""
    return min((p for p in params if p.grad is not None), key=lambda p: p.numel(), default=None)


@contextmanager
def zeroing(p: nn.Parameter | None, store: Store) -> Iterator[_Seen]:
    """Around a closure: sees whether it zeroes gradients before it adds to them.

    A gradient that the first backward pass inside finds as it was has been left over, from the last update or from
    batches that were accumulated without SAM. Told from its version, so that nothing is read from the device.

    Args:
        p: Whose gradient is looked at; it may have been put aside meanwhile. None: nothing can be left over.
        store: Of the perturbed parameters.

    Raises:
        ValueError: The closure adds to what was there.
    """
    seen = _Seen()
    if p is None:
        yield seen
        return
    aside = p.grad is None
    held = torch.zeros_like(p) if aside else p.grad
    assert held is not None
    p.grad = held
    version = version_of(held)
    seen.untouched = lambda: p.grad is held and version_of(held) == version

    def look(p: torch.Tensor) -> None:
        # adding in place is one version; in-place zeroing before it is another; else the gradient is a new tensor
        seen.arrived.append(p.grad is held and version_of(held) == version + store.version)

    try:
        with store.watched(p, look):
            yield seen
    finally:
        if aside and p.grad is held and not seen.arrived:
            p.grad = None  # nothing arrived
    if seen.arrived and seen.arrived[0]:
        raise ValueError(
            "closure: it adds to gradients that were there before. One that forgets them calls zero_grad() first; to "
            "accumulate over micro-batches, each with a perturbation of its own, call SAM.backward(loss_fn, "
            "weigh=..., last=...) for each and then SAM.step()")
