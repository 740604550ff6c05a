"""The loss of each pass: that of all samples, or at w + eps of those that a method chooses."""
from collections.abc import Callable

import torch
from torch import Tensor

from .methods.stages import Rows
from .passes import Passes

LossFn = Callable[..., Tensor]


class Losses:
    """Calls loss functions.

    Args:
        rows: What chooses samples; None: the loss function returns the mean loss, and is simply called.
        name: Of the method that chooses.
        passes: Whose random state the choice must not move.
    """

    def __init__(self, rows: Rows | None, name: str, passes: Passes) -> None:
        self._rows = rows
        self._name = name
        self._passes = passes
        self._before: Tensor | None = None

    def at_w(self, loss_fn: LossFn) -> Tensor:
        """The mean loss of all samples.

        Raises:
            ValueError: The losses of the samples are needed, and ``loss_fn`` returns something else.
        """
        if self._rows is None:
            return loss_fn()
        losses = loss_fn(None)
        if losses.ndim != 1:
            raise ValueError(f"loss_fn: {self._name} chooses samples, and needs a function that returns the loss of "
                             f"each, shape (m,), not {tuple(losses.shape)}")
        self._before = losses.detach()
        return losses.mean()

    def at_perturbed(self, loss_fn: LossFn) -> Tensor:
        """The mean loss of the samples that count."""
        if self._rows is None:
            return loss_fn()
        assert self._before is not None
        with torch.no_grad():
            after = loss_fn(None)
        self._passes.rewind()
        return loss_fn(self._rows(self._before, after)).mean()


def slope(weigh: Callable[[Tensor], Tensor], loss: Tensor) -> Tensor:
    """What ``weigh`` multiplies gradients by, at a loss."""
    x = loss.detach().requires_grad_()
    return torch.autograd.grad(weigh(x), x)[0]
