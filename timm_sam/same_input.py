"""Whether both passes of the first update work on the same batch, and call what averages the ranks' gradients."""
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

MESSAGE = (
    "loss_fn: its second call gave the model another input than the first; both passes need the same batch, so draw it "
    "before: x, y = next(batches), then sam.minimize(lambda: criterion(model(x), y))")
BYPASSED = (
    "loss_fn: it does not call the DistributedDataParallel that SAM was given, so that nothing averages gradients over "
    "the ranks; call it and not the module inside, or, where a trainer's backward averages, give that as backward_fn=")


class SameInput:
    """Compares what the model is given in the two passes, once. Later updates read and copy nothing.

    Args:
        model: The model. One that is compiled or scripted is not looked at: a hook would have it compiled again.
    """

    def __init__(self, model: nn.Module) -> None:
        whole = any(isinstance(m, torch.jit.ScriptModule) or hasattr(m, "_orig_mod")
                    or m.__dict__.get("_compiled_call_impl") is not None for m in model.modules())
        # where the loss calls parts of the model itself, they stand for it
        self._modules = [] if whole else [model, *model.children()]
        self._first: tuple[Callable, list[Tensor]] | None = None
        self._called: list[nn.Module] = []

    def at_w(self, loss_fn: Callable[..., Any]) -> Any:
        """Calls the loss function of the pass at w."""
        if not self._modules:
            return loss_fn()
        value, inputs = self._watched(loss_fn)
        self._first = loss_fn, inputs
        return value

    def at_perturbed(self, loss_fn: Callable[..., Any], averaged: bool = False) -> Any:
        """Calls that of the pass at w + eps. Another function may take another batch.

        Args:
            loss_fn: The function.
            averaged: Whether gradients are averaged in a backward pass of the trainer's own.
        """
        if self._first is None:
            return loss_fn()
        (other, before), self._first = self._first, None
        value, after = self._watched(loss_fn)
        wrappers = [m for m in self._modules if isinstance(m, DistributedDataParallel)]
        if wrappers and not averaged and not any(m in self._called for m in wrappers):
            warnings.warn(BYPASSED, stacklevel=2)
        self._modules = []
        if other is loss_fn and not _equal(before, after):
            warnings.warn(MESSAGE, stacklevel=2)
        return value

    def _watched(self, loss_fn: Callable[..., Any]) -> tuple[Any, list[Tensor]]:
        inputs: list[Tensor] = []
        called = self._called = []

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not called:  # later inputs may follow from earlier outputs
                inputs.extend(t.detach().clone() for t in tree_leaves((args, kwargs)) if _is_given(t))
            called.append(module)

        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
            return loss_fn(), inputs


def _is_given(value: Any) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is None and value.layout is torch.strided and not value.is_nested


def _equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        and bool(((a == b) | (a != a) & (b != b)).all()) for a, b in zip(before, after))
