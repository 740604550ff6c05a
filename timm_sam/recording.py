"""Recording the first pass and answering in the second: what lies below the first perturbed layer is computed once.

The passes of SAM differ only in the selected parameters. Everything that a network computes before it first calls a
module that owns one of them is the same in both, so the first pass keeps the outputs of such modules, with their graph,
and the second answers with them. No model needs to know: modules without a perturbed parameter below them are taken in
the order in which they are called, and anything between modules is simply computed again. Of a model that
``compile_split`` compiled, the parts of its graphs are taken as such modules.

What makes this safe, update by update: recording ends with the first call of a module that owns a perturbed parameter;
outputs are used in the second pass of the same batch only; if a perturbed module was never called (its parameters are
used in some other way) or a kept output was changed in place by something else than a recorded module, nothing is
shared. The first time, the modules compute their outputs again all the same, and must find what was kept.
"""
import copy
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .random_state import RandomState
from .split import Around, Part, Splitter, splitter_of

_LISTS = (nn.ModuleList, nn.ModuleDict)


class SharedForward:
    """The modules of a model whose calls can be shared, and those that end sharing.

    Args:
        model: The model, inside or outside of DDP.
        selected: The perturbed parameters.
    """

    def __init__(self, model: nn.Module, selected: list[nn.Parameter]) -> None:
        self.selected = selected
        self.chosen = set(map(id, selected))
        self.owners: list[nn.Module] = []
        self.free: list[nn.Module] = []
        self.splitters: list[Splitter] = []
        self.compiled: set[int] = set()
        self._collect(model, below_free=False)
        for splitter in self.splitters:
            splitter.chosen = frozenset(self.chosen)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.chosen = set(map(id, self.selected))  # a copy has parameters of its own

    def _collect(self, module: nn.Module, below_free: bool) -> None:
        if (splitter := splitter_of(module)) is not None:
            self.splitters.append(splitter)
            self.compiled |= self.chosen & {id(p) for p in module.parameters()}
            return
        holds = any(id(p) in self.chosen for p in module.parameters())
        compiled = _call_attribute(module) != "forward"  # one graph: nothing inside can be told apart
        if holds and (compiled or any(id(p) in self.chosen for p in module.parameters(recurse=False))):
            self.owners.append(module)
        elif not holds and not isinstance(module, _LISTS):
            self.free.append(module)
            # the largest parts without perturbed parameters; but a Sequential may be called or iterated over
            below_free = not isinstance(module, nn.Sequential)
        if not compiled and not below_free:
            for child in module.children():
                self._collect(child, below_free)


class _Kept(NamedTuple):
    """The output of one call, the random state after it, and its tensors with their versions at that time."""

    output: Any
    random_state: RandomState
    versions: list[tuple[Tensor, int]]


class Recording:
    """The outputs of one first pass.

    Args:
        shared: Which modules take part.
        devices: Where random numbers may be drawn.

    Attributes:
        on_perturbed: Called once, just before the first perturbed module runs.
        modules: Those whose outputs are kept.
    """

    def __init__(self, shared: SharedForward, devices: set[torch.device]) -> None:
        self.shared = shared
        self.devices = devices
        self.on_perturbed: Callable[[], None] = lambda: None
        self.outputs: dict[int, deque[_Kept]] = {}
        self.modules: list[nn.Module] = []
        self.depth = 0
        self.ended = False
        self.uncalled = {id(m) for m in shared.owners} | shared.compiled
        self.mismatch = ""
        self.obstacle = ""
        self.kept: dict[int, Tensor] = {}
        self.version = 0
        self.changed_between = False
        self.versions: list[tuple[Tensor, int]] = []

    @contextmanager
    def record(self) -> Iterator[None]:
        """The first pass runs inside."""
        with (_patched(self.shared.owners, self._ending), _patched(self.shared.free, self._recording),
              _around(self.shared.splitters, self._recording, self._ending)):
            yield
        self._end()

    @contextmanager
    def replay(self, check: bool = False) -> Iterator[None]:
        """The second pass runs inside.

        Args:
            check: Compute the outputs as well, without a graph, and set :attr:`mismatch` to what is wrong with a
                module that finds another one than was kept, or works on more than its output. Reads the device.
        """
        queues = {key: deque(outputs) for key, outputs in self.outputs.items()}
        self.depth = 0
        # an activation in place changes what the module before it returned: that is not what it returns again
        changed = {id(t) for outputs in self.outputs.values() for kept in outputs for t, v in kept.versions
                   if t._version != v}

        def replaying(module: nn.Module, forward: Callable) -> Callable:
            def answer(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                    return forward(*args, **kwargs)
                queue = queues.get(id(module))
                if self.depth == 0 and queue:
                    kept = queue.popleft()
                    if check:
                        self._check(module, forward, args, kwargs, kept, changed)
                    kept.random_state.restore()
                    return kept.output
                return self._nested(forward, args, kwargs)

            return answer

        modules = [m for m in self.modules if not isinstance(m, Part)]
        with _patched(modules, replaying), _around(self.shared.splitters, replaying, lambda part, forward: forward):
            yield

    @torch.no_grad()
    def _check(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any], kept: "_Kept",
               changed: set[int]) -> None:
        inputs, outputs = _tensors([args, kwargs]), _tensors(kept.output)
        if inputs is None or outputs is None or any(id(t) in changed for t in (*inputs, *outputs)):
            return
        if isinstance(module, Part):
            again = module.repeat(*args)
        else:
            copies = [t.clone() for t in inputs]  # it may work in place
            attributes = _attributes(module)
            again = self._nested(forward, *_replaced((args, kwargs), iter(copies)))
            torch.clear_autocast_cache()  # its casts have no graph
            if not self.mismatch and attributes != _attributes(module):
                self.mismatch = f"{type(module).__name__} changes its attributes"
        if not _close(outputs, _tensors(again) or []):
            self.mismatch = f"{type(module).__name__} does not repeat its output"

    def _recording(self, module: nn.Module, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            # compiling: a compiled module around the model that SAM was given
            if torch.compiler.is_compiling() or self.ended or self.depth or not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if isinstance(module, Part) and any(
                    id(a) in self.shared.chosen or _is_derived(a) and id(a) not in self.kept for a in args):
                self._end()  # an operation outside of the graphs, with parameters that nothing is known of
                return forward(*args, **kwargs)
            if not isinstance(module, Part) and (reason := self._obstacle(module, args, kwargs)):
                self.obstacle = reason
                self._end()
                return forward(*args, **kwargs)
            self._notice_changes()
            output = self._nested(forward, args, kwargs)
            tensors = _tensors(output)
            if tensors is not None and any(t.is_inference() for t in tensors):
                self.obstacle = "a module gives tensors of inference mode"  # which do not tell if they change
                tensors = None
            if tensors is None or self.ended:
                self._end()  # nothing that is known to be safe to keep
                return output
            if id(module) not in self.outputs:
                self.outputs[id(module)] = deque()
                self.modules.append(module)
            # of its own lists and dictionaries: what is above may take out of them, or put something in
            kept = _Kept(_copied(output), RandomState(self.devices), [(t, t._version) for t in tensors])
            self.outputs[id(module)].append(kept)
            self.kept.update((id(t), t) for t in tensors)
            self.version = self._version()
            return output

        return call

    def _ending(self, module: nn.Module, forward: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return forward(*args, **kwargs)
            self.uncalled.discard(id(module))
            self.uncalled.difference_update(map(id, args))  # the parts of a graph are given their parameters
            if isinstance(module, Part) and not self.ended:
                # its backward is one operation, and would compute gradients for the parts below, too
                args = tuple(a.detach() if id(a) in self.kept else a for a in args)
            self._end()
            return forward(*args, **kwargs)

        return call

    def _obstacle(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str:
        """Why the output of a call cannot stand in for the call; empty if it can."""
        if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module):
            return "a module below the first perturbed layer has hooks"
        for value in _tensors([args, kwargs]) or []:
            is_new = value.is_leaf or not self.kept
            if value.requires_grad and is_new and not isinstance(value, nn.Parameter):
                return "what the model is given requires gradients"
        return ""

    def _nested(self, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self.depth -= 1

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._notice_changes()
            self.versions = [
                (t, t._version) for outputs in self.outputs.values() for kept in outputs for t, _ in kept.versions]
            self.on_perturbed()

    def _version(self) -> int:
        return sum(t._version for t in self.kept.values())

    def _notice_changes(self) -> None:
        # a recorded module that works in place is not run again; what is done between modules is
        self.changed_between |= self._version() != self.version

    def give_up(self, reason: str) -> None:
        """Shares nothing of this update, for something that was seen in the first pass."""
        self.obstacle = reason
        self.clear()
        self._end()

    def clear(self) -> None:
        """Lets go of all outputs, and with them of the graph of the first pass."""
        self.outputs, self.kept, self.versions = {}, {}, []

    def why_not(self) -> str:
        """Why the second pass may not be answered from this recording; empty if it may."""
        if not self.outputs:
            return self.obstacle or "the first layer is perturbed"
        if self.uncalled:
            return "perturbed parameters are used without calling the module that owns them"
        if self.changed_between:
            return "an output is changed in place between two modules"
        if any(t._version != v for t, v in self.versions):
            return "what lies below the first perturbed layer is changed in place above it"
        return ""

    def uses_perturbed(self) -> bool:
        """Whether anything that was kept depends on a perturbed parameter: so it does if it is used without a call."""
        seen: set[Any] = set()
        nodes = [t.grad_fn for outputs in self.outputs.values() for kept in outputs for t, _ in kept.versions]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(getattr(node, "variable", None)) in self.shared.chosen:
                return True
            nodes += [following for following, _ in node.next_functions]
        return False

    def describe(self) -> str:
        """What was recorded, in a few words."""
        graphs = sum(isinstance(m, Part) for m in self.modules)
        counts = {"module": len(self.modules) - graphs, "compiled graph": graphs}
        return " and ".join(f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)

    def parameters(self) -> int:
        """Number of parameters of the modules that were recorded."""
        return sum(p.numel() for p in {p for m in self.modules for p in m.parameters()})


@contextmanager
def _patched(modules: list[nn.Module], wrap: Callable[[nn.Module, Callable], Callable]) -> Iterator[None]:
    """Replaces what a call of each module runs, while inside."""
    earlier = []
    for module in modules:
        name = _call_attribute(module)
        earlier.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = wrap(module, getattr(module, name))
    try:
        yield
    finally:
        for module, name, value in reversed(earlier):
            if value is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value


@contextmanager
def _around(splitters: list[Splitter], lower: Around, upper: Around) -> Iterator[None]:
    """The same for the parts of compiled models."""
    earlier = [(s.around_lower, s.around_upper) for s in splitters]
    try:
        for splitter in splitters:
            splitter.around_lower, splitter.around_upper = lower, upper
        yield
    finally:
        for splitter, around in zip(splitters, earlier):
            splitter.around_lower, splitter.around_upper = around


def _call_attribute(module: nn.Module) -> str:
    """Where a module keeps what its call runs; ``module.compile()`` moves it."""
    compiled = module.__dict__.get("_compiled_call_impl")
    return "forward" if compiled is None else "_compiled_call_impl"


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two outputs are the same but for the choice of kernels, which may depend on whether there is a graph."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b):
        exact = x.dtype == torch.float64 or x.dtype == torch.float32 and x.device.type == "cpu"
        tolerance = 1e-4 if exact else 1e-2  # elsewhere float32 may have been computed with the digits of float16
        scale = float(x.detach().abs().amax()) if x.numel() and x.is_floating_point() else 0.0
        if not math.isfinite(scale):  # an overflow or nan in one place says nothing of the size of the others
            scale = float(x.detach().nan_to_num(0.0, 0.0, 0.0).abs().amax())
        if x.shape != y.shape or not torch.allclose(x, y, rtol=tolerance, atol=tolerance * scale, equal_nan=True):
            return False
    return True


def _attributes(module: nn.Module) -> list[tuple[str, int, int]]:
    """What the attributes of a module and of those in it refer to, with the lengths of collections."""
    return [(name, id(value), len(value) if isinstance(value, (list, dict, set)) else 0)
            for m in module.modules() for name, value in vars(m).items()]


def _is_derived(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)


def _replaced(nested: Any, tensors: Iterator[Tensor]) -> Any:
    """``nested`` with its tensors replaced in the order of :func:`_tensors`."""
    if isinstance(nested, Tensor):
        return next(tensors)
    if isinstance(nested, dict):
        return {key: _replaced(value, tensors) for key, value in nested.items()}
    if isinstance(nested, (list, tuple)):
        items = [_replaced(item, tensors) for item in nested]
        return type(nested)(*items) if hasattr(nested, "_fields") else type(nested)(items)
    return nested


def _copied(nested: Any) -> Any:
    """``nested`` with lists and dictionaries of its own, and the tensors as they are."""
    if not isinstance(nested, (dict, list, tuple)):
        return nested
    new: Any = nested if isinstance(nested, tuple) else copy.copy(nested)
    places = list(nested.items() if isinstance(nested, dict) else enumerate(nested))
    changed = {place: inner for place, item in places if (inner := _copied(item)) is not item}
    if not changed:
        return new
    if isinstance(nested, tuple):
        items = [changed.get(place, item) for place, item in places]
        return type(nested)(*items) if hasattr(nested, "_fields") else type(nested)(items)
    for place, inner in changed.items():
        new[place] = inner
    return new


def _tensors(output: Any) -> list[Tensor] | None:
    """All tensors in nested lists, tuples and dictionaries; None if there is anything else that may hold one."""
    if isinstance(output, Tensor):
        return [output]
    if output is None or isinstance(output, (bool, int, float, str)):
        return []
    if isinstance(output, dict):
        output = list(output.values())
    if not isinstance(output, (list, tuple)):
        return None
    found: list[Tensor] = []
    for item in output:
        inner = _tensors(item)
        if inner is None:
            return None
        found += inner
    return found
