"""Weights of few bits: rounded to nearest, symmetric, one scale per output channel.

What is said to make flat minima worth having: weights that move by up to half a step each should cost them less. Only
weights are rounded, those of linear and convolutional layers; products and activations stay as they are.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

SCHEME = "round to nearest, symmetric, per output channel, linear and convolutional weights"


def quantize(weight: Tensor, bits: int, dim: int = 0) -> Tensor:
    """The nearest weights that so many bits can hold.

    Args:
        weight: Of a layer, (..., channels, ...).
        bits: 2 or more; the whole numbers are -(2^(bits - 1) - 1) to 2^(bits - 1) - 1.
        dim: Of the output channels: each has its largest absolute weight as the largest number.

    Returns:
        A tensor like ``weight``; half steps go to the even number, and channels of zeros stay.

    Raises:
        ValueError: ``bits`` is below 2.
    """
    if bits < 2:
        raise ValueError(f"bits={bits} must be >= 2")
    most = 2 ** (bits - 1) - 1
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    others = [d for d in range(weight.ndim) if d != dim]
    scale = exact.abs().amax(dim=others, keepdim=True) / most
    # a channel of zeros has no scale
    steps = (exact / torch.where(scale > 0, scale, 1)).round().clamp(-most, most)
    return (steps * scale).to(weight.dtype)


def quantizable(model: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """The weights that are rounded, each once, with the dimension of their output channels."""
    seen: set[int] = set()
    for module in model.modules():
        found: list[tuple[Tensor | None, int]] = []
        if isinstance(module, _ConvTransposeNd):
            found = [(module.weight, 1)]
        elif isinstance(module, (nn.Linear, _ConvNd)):
            found = [(module.weight, 0)]
        elif isinstance(module, nn.MultiheadAttention):
            found = [(getattr(module, name), 0) for name in (
                "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")]
        for weight, dim in found:
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                yield weight, dim


@contextmanager
def quantized(model: nn.Module, bits: int) -> Iterator[None]:
    """A model whose weights are rounded inside of the context, and what they were behind it."""
    weights = list(quantizable(model))
    before = [weight.detach().clone() for weight, _ in weights]
    try:
        with torch.no_grad():
            for weight, dim in weights:
                weight.copy_(quantize(weight, bits, dim))
        yield
    finally:
        with torch.no_grad():
            for (weight, _), old in zip(weights, before):
                weight.copy_(old)
