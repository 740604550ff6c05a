"""The loss of each pass: that of all samples, or at w + eps of those that a method chooses."""
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .methods.stages import Rows
from .passes import Passes
from .same_input import SameInput

LossFn = Callable[..., Tensor]


class Losses:
    """Calls loss functions.

    Args:
        rows: What chooses samples; None: the loss function returns the mean loss, and is simply called.
        name: Of the method that chooses.
        passes: Whose random state the choice must not move.
        model: Whose input is compared in the first update.
    """

    def __init__(self, rows: Rows | None, name: str, passes: Passes, model: nn.Module) -> None:
        self._rows = rows
        self._name = name
        self._passes = passes
        self._before: Tensor | None = None
        self.same_input = SameInput(model)

    def only(self, loss_fn: LossFn) -> Tensor:
        """The mean loss of all samples, in an update of one pass.

        Raises:
            ValueError: ``loss_fn`` is no function, or does not return a loss.
        """
        return self._mean(loss_fn) if self._rows is not None else as_loss(_function(loss_fn)())

    def at_w(self, loss_fn: LossFn) -> Tensor:
        """The mean loss of all samples, in the first of two passes.

        Raises:
            ValueError: The losses of the samples are needed, and ``loss_fn`` returns something else; or as above.
        """
        if self._rows is not None:
            return self._mean(loss_fn)
        return as_loss(self.same_input.at_w(_function(loss_fn)))

    def _mean(self, loss_fn: LossFn) -> Tensor:
        assert self._rows is not None
        losses = _function(loss_fn)(None)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            raise ValueError(f"loss_fn: {self._name} chooses samples, and needs a function that returns the loss of "
                             f"each, shape (m,), not {_kind(losses)}; or take all of them by {self._rows.all_by}")
        self._before = losses.detach()
        return losses.mean()

    def at_perturbed(self, loss_fn: LossFn, averaged: bool = False) -> Tensor:
        """The mean loss of the samples that count.

        Args:
            loss_fn: Computes it.
            averaged: Whether gradients are averaged in a backward pass of the trainer's own.
        """
        if self._rows is None:
            return as_loss(self.same_input.at_perturbed(loss_fn, averaged))
        assert self._before is not None
        with torch.no_grad():
            after = loss_fn(None)
        self._passes.rewind()
        torch.clear_autocast_cache()  # casts made there have no graph
        return loss_fn(self._rows(self._before, after)).mean()


def as_loss(value: Any, name: str = "loss_fn") -> Tensor:
    """What a function returned, if it is a loss; 0-dim.

    Args:
        value: It.
        name: Of the argument that the function was.

    Raises:
        ValueError: It is no tensor of one element.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return value if value.ndim == 0 else value.reshape(())
    raise ValueError(f"{name} returned {_kind(value)}: it must return the loss and nothing else, a 0-dim tensor")


def _function(loss_fn: LossFn) -> LossFn:
    if callable(loss_fn):
        return loss_fn
    raise ValueError(f"loss_fn must be a function that computes the loss, which is called twice, not "
                     f"{_kind(loss_fn)}: sam.minimize(lambda: criterion(model(x), y))")


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
