"""Sharded models whose perturbed parameters are few: g and eps of whole tensors, of each rank's own batch.

    g     taken off the gathered parameters as it arrives, so that nothing of it is communicated
    eps   written into the gathered parameters, each time they are there: before a forward, and before a backward
    w     what each rank keeps is never touched
"""
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..multi_tensor import copy_
from ..store import Store
from .units import Units


class Whole(Store):
    """Parameters that their units gather for each pass.

    Args:
        params: The selected parameters.
        group: Of the model.
        model: The model.
    """

    version = 0  # nothing is added to what each rank keeps

    def __init__(self, params: Sequence[nn.Parameter], group: Units, model: nn.Module) -> None:
        super().__init__(params, group)
        self._owners: list[tuple[nn.Module, str]] = []
        self._of_unit: dict[nn.Module, list[int]] = {}
        places = _places(model, set(group.units))
        for i, p in enumerate(self.params):
            owner, name, unit = places[p]
            self._owners.append((owner, name))
            self._of_unit.setdefault(unit, []).append(i)
        states = {unit: unit._get_fsdp_state() for unit in group.units}
        for unit in group.units:
            # units that were sharded in one call gather together, so that any of them may be the first or the last
            together = [i for other, found in self._of_unit.items() if states[other] is states[unit] for i in found]
            if together:
                unit.register_forward_pre_hook(functools.partial(_before, self, together))
                unit.register_forward_hook(functools.partial(_after, self, together))
        for state in dict.fromkeys(states.values()):
            together = [i for unit, found in self._of_unit.items() if states[unit] is state for i in found]
            if together:
                # what `register_fsdp_forward_method` made of other methods calls these two, and no hooks
                state._pre_forward = functools.partial(_entered, self, together, state._pre_forward)
                state._post_forward = functools.partial(_left, self, together, state._post_forward)
        self._at_w = False
        self._gathered: list[nn.Parameter | None] = []
        self._earlier: list[Tensor | None] = []  # gradients of earlier micro-batches that were not reduced yet
        self._taken: list[Tensor | None] = []
        self._handles: list[Any] = []
        self._looks: list[Callable[[], None]] = []
        self._values: list[Tensor] = []  # w + eps, inside the pass there

    @contextmanager
    def at_w(self) -> Iterator[None]:
        count = len(self.params)
        self._gathered, self._taken, self._earlier = [None] * count, [None] * count, [None] * count
        # what no unit gathers has no gradient, so that its value does not matter
        self.tensors = [torch.empty(0)] * count
        self._at_w = True
        try:
            with self._group.no_sync():
                yield
        finally:
            self._at_w = False
            for handle in self._handles:
                handle.remove()
            self._handles = []
            for u, grad in zip(self._gathered, self._earlier):
                if u is not None:
                    u.grad = grad
            self._earlier = []
        self.tensors = [torch.zeros(p.shape, dtype=p.dtype, device=p.device) if u is None else w
                        for p, u, w in zip(self.params, self._gathered, self.tensors)]

    def gather(self, i: int) -> None:
        """At w, when parameter i is there for the first time."""
        owner, name = self._owners[i]
        u = owner._parameters[name]
        assert u is not None
        self._gathered[i] = u
        self.tensors[i] = u.detach().clone()
        self._earlier[i], u.grad = u.grad, None
        if u.requires_grad:  # a layer may have been frozen since SAM was built
            self._handles.append(u.register_post_accumulate_grad_hook(functools.partial(self._take, i)))

    def _take(self, i: int, u: Tensor) -> None:
        grad, u.grad, before = u.grad, None, self._taken[i]
        assert grad is not None
        self._taken[i] = grad if before is None else before + grad
        for look in self._looks:
            look()

    def backward(self, loss: Tensor, wanted: Sequence[nn.Parameter]) -> None:
        loss.backward()

    def grads(self, wanted: Sequence[nn.Parameter]) -> list[Tensor | None]:
        if not self.arrived(None):
            return [None] * len(wanted)
        place = {id(p): i for i, p in enumerate(self.params)}
        found = [place[id(p)] for p in wanted]
        return [torch.zeros_like(self.tensors[i]) if (g := self._taken[i]) is None else g for i in found]

    def arrived(self, but: nn.Parameter | None) -> bool:
        return any(grad is not None for grad in self._taken)

    @contextmanager
    def watched(self, p: nn.Parameter, look: Callable[[nn.Parameter], None]) -> Iterator[None]:
        self._looks.append(functools.partial(look, p))
        try:
            yield
        finally:
            self._looks.clear()

    def save(self) -> None:
        pass  # that is what `tensors` are

    def add(self, eps: list[Tensor]) -> Tensor:
        self._values = [w.clone() for w in self.tensors]
        return self._rounding.add(self._values, eps, self.tensors)

    def write(self, which: Sequence[int], values: Sequence[Tensor]) -> None:
        """Puts values into parameters, where they are gathered."""
        there = [(u, values[i]) for i in which
                 if (u := self._gathered[i]) is not None and u.untyped_storage().size() > 0]
        with torch.no_grad():
            # their .data: the graph of the pass is still right, its backward reads them after they are written again
            copy_([u.data for u, _ in there], [value for _, value in there])

    def restore(self) -> None:
        self._values = []
        self.write(range(len(self.params)), self.tensors)
        self.tensors = []

    def arriving(self, which: Sequence[int]) -> None:
        """A unit is about to run its forward, with its parameters gathered."""
        if self._at_w:
            for i in which:
                if self._gathered[i] is None:
                    self.gather(i)
        elif self._values:
            self.write(which, self._values)

    def leaving(self, which: Sequence[int], output: Any) -> None:
        """A unit ran its forward: it may let its parameters go, and gather them anew before its backward."""
        if self._values:
            for t in tensors_of(output):
                if t.requires_grad:
                    t.register_hook(functools.partial(self._again, which))

    def _again(self, which: Sequence[int], grad: Tensor) -> None:
        if self._values:
            self.write(which, self._values)


@torch.compiler.disable
def _before(store: Whole, which: Sequence[int], unit: nn.Module, args: Any) -> None:
    store.arriving(which)


@torch.compiler.disable
def _after(store: Whole, which: Sequence[int], unit: nn.Module, args: Any, output: Any) -> None:
    store.leaving(which, output)


@torch.compiler.disable
def _entered(store: Whole, which: Sequence[int], enter: Callable[..., Any], *args: Any) -> Any:
    given = enter(*args)
    store.arriving(which)
    return given


@torch.compiler.disable
def _left(store: Whole, which: Sequence[int], leave: Callable[..., Any], *args: Any) -> Any:
    output = leave(*args)
    store.leaving(which, output)
    return output


def _places(model: nn.Module, units: set[nn.Module]) -> dict[nn.Parameter, tuple[nn.Module, str, nn.Module]]:
    """Of each parameter in a unit: a module that owns it, its name there, and the nearest unit around that."""
    found: dict[nn.Parameter, tuple[nn.Module, str, nn.Module]] = {}

    def visit(module: nn.Module, unit: nn.Module | None) -> None:
        unit = module if module in units else unit
        for name, p in module._parameters.items():
            if p is not None and unit is not None:
                found.setdefault(p, (module, name, unit))
        for child in module.children():
            visit(child, unit)

    visit(model, None)
    return found


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors of a module's output, whatever it is made of."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (list, tuple, set)):
        for value in output:
            yield from tensors_of(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors_of(getattr(output, field.name))
    else:  # of a class that torch was told how to take apart, as it does to gather the parameters for the backward
        yield from (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
