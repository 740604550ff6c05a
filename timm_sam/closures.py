"""Closures of PyTorch's convention: whether one zeroes gradients is seen, not believed."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def holding(params: Sequence[nn.Parameter]) -> nn.Parameter | None:
    """The smallest of those that hold a gradient; None if none does."""
    return min((p for p in params if p.grad is not None), key=lambda p: p.numel(), default=None)


@contextmanager
def zeroing(p: nn.Parameter | None) -> Iterator[None]:
    """Around a closure: sees whether it zeroes gradients before it adds to them.

    A gradient that the first backward pass inside finds as it was has been left over, from the last update or from
    batches that were accumulated without SAM. Told from its version, so that nothing is read from the device.

    Args:
        p: Whose gradient is looked at; it may have been put aside meanwhile. None: nothing can be left over.

    Raises:
        ValueError: The closure adds to what was there.
    """
    if p is None:
        yield
        return
    aside = p.grad is None
    held = torch.zeros_like(p) if aside else p.grad
    assert held is not None
    p.grad = held
    version, left_over = held._version, []

    def look(p: torch.Tensor) -> None:
        # adding in place is one version; in-place zeroing before it is another; else the gradient is a new tensor
        left_over.append(p.grad is held and held._version == version + 1)

    handle = p.register_post_accumulate_grad_hook(look)
    try:
        yield
    finally:
        handle.remove()
        if aside and p.grad is held and not left_over:
            p.grad = None  # nothing arrived
    if left_over and left_over[0]:
        raise ValueError(
            "closure: it adds to gradients that were there before. One that forgets them calls zero_grad() first; to "
            "accumulate over micro-batches, each with a perturbation of its own, call SAM.backward(loss_fn, "
            "weigh=..., last=...) for each and then SAM.step()")
