"""torch.compile in two graphs, so that the passes of SAM can share what lies below the first perturbed parameter.

A model that is compiled as a whole is one graph: nothing in it can be left out of the second pass. Here each graph that
dynamo finds is cut in front of the first operation that reads a perturbed parameter, and the two parts are compiled
separately. ``sharing.py`` keeps what the lower part returned in the first pass for the second.
"""
import copy
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from .random_state import RandomState
from .selection import check_module, unwrap

# before, dynamo may run the second pass with the graph of the first, which has no gradients of what is not perturbed
WHOLE_GRAPHS_WORK = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)

Compiler = Callable[[GraphModule, list[Any]], Callable]
Around = Callable[[nn.Module, Callable], Callable]


def compile_split(model: nn.Module, backend: str | Compiler = "inductor", mode: str | None = None) -> None:
    """Compiles a model in place, so that SAM can share the forward below the first perturbed parameter.

    Args:
        model: The model, inside or outside of DDP; its forward and the names of its parameters stay as they are. Which
            parameters are perturbed is learned from the SAM that is built with it afterwards.
        backend: As for ``torch.compile``.
        mode: As for ``torch.compile``, but without CUDA graphs: they would write over what is kept from one pass to
            the next.
    """
    check_module(model)
    module = unwrap(model)
    call = module._call_impl

    def region(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    # dynamo keeps graphs by code object, and gives up on one that has many: so each model has one of its own
    region.__code__ = region.__code__.replace(co_name=f"call_{type(module).__name__}")
    splitter = Splitter(_compiler(backend, mode))
    compiled: Any = torch.compile(region, backend=splitter)
    compiled.splitter = splitter
    module._compiled_call_impl = compiled


def _compiler(backend: str | Compiler, mode: str | None) -> Compiler:
    options = {} if mode in (None, "default") else {"mode": mode}
    if backend == "inductor":
        patches = {**torch._inductor.list_mode_options(mode or "default"), "triton.cudagraphs": False}
        return lambda gm, inputs: torch._inductor.compile(gm, inputs, patches)
    return partial(torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend, **options)


def is_compiled_whole(model: nn.Module) -> bool:
    """Whether ``torch.compile`` has made one graph of it, or of a part of it."""
    return any(hasattr(m, "_orig_mod") or m.__dict__.get("_compiled_call_impl") is not None and splitter_of(m) is None
               for m in model.modules())


def splitter_of(module: nn.Module) -> "Splitter | None":
    """What :func:`compile_split` left in a module."""
    return getattr(module.__dict__.get("_compiled_call_impl"), "splitter", None)


def _plainly(part: nn.Module, forward: Callable) -> Callable:
    return forward


class Splitter:
    """A backend for torch.compile that compiles the two parts of each graph with another backend.

    Attributes:
        chosen: The ids of the perturbed parameters. Replace the set, do not change it.
        around_lower: What a part in front of the first perturbed parameter is wrapped in when it is called.
        around_upper: The same for a part behind it.
    """

    def __init__(self, compiler: Compiler) -> None:
        self.compiler = compiler
        self.chosen: frozenset[int] = frozenset()
        self.around_lower: Around = _plainly
        self.around_upper: Around = _plainly

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Callable:
        return _Graph(gm, self)


class _Graph:
    """One graph of dynamo's. It is cut when it is first called: only then its inputs are the parameters themselves."""

    def __init__(self, gm: GraphModule, splitter: Splitter) -> None:
        self.gm = gm
        self.splitter = splitter
        self.whole = Part(gm, splitter, lower=False)
        self.chosen: frozenset[int] | None = None
        self.cuts: dict[tuple[bool, ...], nn.Module] = {}

    def __call__(self, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.whole.run(*args)
        if self.chosen is not self.splitter.chosen:
            self.chosen = self.splitter.chosen
            self.cuts.clear()
        # modules of the same shape may have one graph, and not all of them perturbed parameters
        is_chosen = tuple(id(a) in self.chosen for a in args)
        if is_chosen not in self.cuts:
            self.cuts[is_chosen] = self._cut(is_chosen)
        return self.cuts[is_chosen](*args)

    def _cut(self, is_chosen: tuple[bool, ...]) -> nn.Module:
        nodes = list(self.gm.graph.nodes)
        perturbed = {n for n, chosen in zip(self.gm.graph.find_nodes(op="placeholder"), is_chosen) if chosen}
        if not perturbed:
            return Part(self.gm, self.splitter, lower=True)
        readers = [i for i, n in enumerate(nodes) if perturbed & set(n.all_input_nodes)]
        below = set(nodes[:_outside_contexts(nodes, readers[0])]) if readers else set()
        if (not any(n.op.startswith("call") for n in below) or nodes[readers[0]].op == "output"
                or _share_memory(n for n in below if not below.issuperset(n.users))):
            return self.whole
        # in order: what changes a buffer and what reads it are not connected in the graph
        parts = split_module(self.gm, self.gm, lambda node: 0 if node in below else 1, keep_original_order=True)
        parts.submod_0 = Part(parts.submod_0, self.splitter, lower=True)
        parts.submod_1 = Part(parts.submod_1, self.splitter, lower=False)
        return parts


def _outside_contexts(nodes: list[Node], cut: int) -> int:
    """The last place up to ``cut`` where no autocast region is open and gradients are on."""
    place, open_regions, grad = 0, 0, True
    for i, node in enumerate(nodes[:cut + 1]):
        if open_regions == 0 and grad:
            place = i
        if node.target is torch.amp.autocast_mode._enter_autocast:
            open_regions += 1
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            open_regions -= 1
        elif node.target is torch._C._set_grad_enabled:
            grad = bool(node.args[0])
    return place


def _share_memory(nodes: Iterable[Node]) -> bool:
    """Whether any two results do: if one is changed in place, AOTAutograd must have both in one graph."""
    storages = [value.untyped_storage()._cdata for n in nodes
                if n.op != "placeholder" and isinstance(value := n.meta.get("example_value"), Tensor)]
    return len(set(storages)) < len(storages)


class Part(nn.Module):
    """A graph, compiled anew for each combination of sizes and of inputs that require gradients.

    Dynamo looks at them at the start of a whole graph only: what is detached between the parts, it does not see.
    """

    def __init__(self, gm: GraphModule, splitter: Splitter, lower: bool) -> None:
        super().__init__()
        output = next(iter(gm.graph.find_nodes(op="output")))
        self.single = not isinstance(output.args[0], (tuple, list))
        if self.single:
            output.args = ((output.args[0],),)
            gm.recompile()
        self.gm = gm
        self.splitter = splitter
        self.lower = lower
        self.weights: nn.ParameterList | None = None
        self.compiled: dict[Any, Callable] = {}

    def forward(self, *args: Any) -> Any:
        around = self.splitter.around_lower if self.lower else self.splitter.around_upper
        return around(self, self.run)(*args)

    def run(self, *args: Any) -> Any:
        """The part itself."""
        key = torch.is_grad_enabled(), *map(_kind, args)
        compiled = self.compiled.get(key)
        if compiled is None:
            if self.weights is None:
                self.weights = nn.ParameterList([a for a in args if isinstance(a, nn.Parameter)])
            graph = GraphModule(self.gm, copy.deepcopy(self.gm.graph))  # compilers may change it
            compiled = self.compiled[key] = self.splitter.compiler(graph, [_as_leaf(a) for a in args])
        output = compiled(*args)
        return output[0] if self.single else output

    def repeat(self, *args: Any) -> Any:
        """The part again, on copies of inputs that it may change.

        With a graph, or it would be compiled anew; where the memory does not suffice for a second graph, without.
        """
        def again() -> Any:
            return self.run(*(a.clone() if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) else a
                              for a in args))

        state = RandomState({a.device for a in args if isinstance(a, Tensor)})
        with suppress(torch.OutOfMemoryError), torch.enable_grad():
            return again()
        state.restore()
        with torch.no_grad():
            return again()


def _as_leaf(value: Any) -> Any:
    """An input without a history: compilers look at the ``.grad`` of inputs, which a later tensor does not have."""
    is_inner = isinstance(value, Tensor) and not value.is_leaf
    return value.detach().requires_grad_(value.requires_grad) if is_inner else value


def _kind(value: Any) -> Any:
    """What a compiled part takes for granted of an input."""
    if isinstance(value, nn.Parameter):
        return value.requires_grad
    if isinstance(value, Tensor):
        return value.requires_grad, value.shape, value.stride()
    return value
