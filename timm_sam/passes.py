"""The two passes of SAM over one m-batch, and all that must be as before after each of them.

What goes wrong around SAM, and is handled here: gradients of parameters that are not perturbed (not computed at w),
accumulated gradients (never part of g), BatchNorm's statistics and what other layers keep (from the pass at w only),
dropout masks (the same in both passes), exact restoration (w copied back), stale casts of autocast, checkpoints that
see no gradient because what feeds them is frozen.
"""
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from .checkpoints import without_reentrance
from .group import Group
from .multi_tensor import Backup
from .norms import is_norm
from .random_state import RandomState
from .recording import Recording
from .store import Store

BN_STATS = ("clean", "both")
_State = tuple[nn.Module, str, Tensor]  # a buffer, and where it is


class Passes:
    """What surrounds the forward and backward passes of one model.

    Args:
        optimizer: The base optimizer.
        model: The model.
        store: Where the selected parameters w_S are.
        bn_stats: Which passes update running statistics, of ``BN_STATS``.
        group: The ranks.
        norm_types: What is a normalization layer beside the known ones.

    Attributes:
        second_order: Whether the base optimizer differentiates the gradient again in its step (AdaHessian).
        norm_layers: The normalization layers of the model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, store: Store,
                 bn_stats: str, group: Group, norm_types: tuple[type[nn.Module], ...] = ()) -> None:
        self.optimizer = optimizer
        self.params = store.params
        self.store = store
        chosen = {id(p) for p in self.params}
        self._outside = [p for p in model.parameters() if id(p) not in chosen]
        self._theirs: list[int] = []  # of the optimizer, when ``_found`` was made
        self._found: list[nn.Parameter] = self._outside
        self._zeroed: list[nn.Parameter] = []
        self.second_order = bool(getattr(optimizer, "is_second_order", False))
        self.norm_layers = [m for m in model.modules() if is_norm(m, norm_types)]
        self.bn_stats = bn_stats
        self.group = group
        self._statistics = Backup()
        self._written: list[nn.Parameter] = []  # frozen ones that the forward itself moves
        self._random_state: RandomState | None = None
        norms = {id(m) for m in self.norm_layers}
        # the state of other layers, as spectral normalization's vectors, the averages of a codebook, or counters; not
        # their tables of indices, which may be large and do not change
        self._states = [
            (m, name) for m in model.modules() if id(m) not in norms for name, b in m.named_buffers(recurse=False)
            if b.is_floating_point() or b.is_complex() or b.numel() == 1]

    @property
    def devices(self) -> set[torch.device]:
        """Where the model is: where a pass may draw random numbers."""
        return {p.device for p in (*self.params, *self._outside)}

    def trainable(self) -> list[nn.Parameter]:
        """The selected parameters, then all others that are trained: the model's, and what else the optimizer has."""
        return [*self.params, *(p for p in self._others() if p.requires_grad)]

    def _others(self) -> list[nn.Parameter]:
        """All parameters but the selected ones: the model's, and what else the optimizer has by now."""
        theirs = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        if theirs != self._theirs:
            found = {id(p): p for p in self._outside}
            found.update((id(p), p) for group in self.optimizer.param_groups for p in group["params"])
            for p in self.params:
                found.pop(id(p), None)
            self._theirs, self._found = theirs, list(found.values())
            ids = set(theirs)
            self._zeroed = [p for p in self.params if id(p) in ids]
        return self._found

    def zeroed(self) -> list[nn.Parameter]:
        """The selected parameters that the optimizer has, and zeroes: others may keep gradients from before."""
        self._others()
        return self._zeroed

    @contextmanager
    def at_w(self, wanted: Sequence[nn.Parameter], recording: Recording | None = None) -> Iterator[list[Tensor | None]]:
        """The pass at w: run forward and backward inside.

        Inside, nothing but ``wanted`` and the selected parameters requires gradients, no gradient is synchronized, and
        their ``.grad`` is empty at first; all three are as before afterwards.

        Args:
            wanted: Whose gradients are asked for.
            recording: What keeps the part below the first perturbed layer, whose own graph is needed later.

        Yields:
            A list that holds the gradients of ``wanted`` afterwards, None where none arrived.
        """
        # selected ones that are not wanted this time stay as they are: a compiled graph would be compiled anew
        touched = self.params if wanted is self.params else list(dict.fromkeys([*self.params, *wanted]))
        asked = set(map(id, touched))
        # what the base optimizer has beside the model's parameters, as a scale in the loss, is not perturbed either
        frozen = [p for p in self._others() if p.requires_grad and id(p) not in asked]
        accumulated = [p.grad for p in touched]
        still = [] if self.group.sharded else [(p, _mark(p)) for p in self._others() if not p.requires_grad]
        self._written = []
        self._random_state = RandomState(self.devices if recording is None else recording.devices)
        grads: list[Tensor | None] = []
        with self.group.settled():
            for p in touched:
                p.grad = None
            if recording is None:
                _set_requires_grad(frozen, False)
            else:  # what is shared needs the graph to its own weights
                recording.on_perturbed = lambda: _set_requires_grad(frozen, False)
            try:
                with self.store.at_w(), without_reentrance(_nothing if recording is None else recording.give_up):
                    yield grads
                grads += self.store.grads(wanted)
                # as a momentum encoder, that follows the trained one in each forward
                self._written = [p for p, mark in still if _mark(p) != mark]
            finally:
                _set_requires_grad(frozen, True)
                for p, grad in zip(touched, accumulated):
                    p.grad = grad
                # weights cast inside an autocast region around both passes are stale in the second
                torch.clear_autocast_cache()

    @contextmanager
    def at_perturbed(self, eps: list[Tensor], only: bool = False) -> Iterator[Tensor]:
        """The pass at w + eps: run forward and backward inside; w is copied back on the way out.

        Args:
            eps: One tensor per selected parameter; emptied, so that its memory is free during the pass.
            only: Whether there was no pass at w: then random numbers and running statistics are those of this one.

        Yields:
            The l2 norm of what the weights changed by, which is not that of eps where they are rounded.
        """
        states: list[_State] = []
        if self.bn_stats == "clean" and not only:
            states = self._layer_states(m for m in self.norm_layers if m.training)
        buffers = [b for _, _, b in states if _is_writable(b)]
        if self.bn_stats == "clean" and not only:
            buffers += self._written
        with torch.no_grad():
            self.store.save()
            self._statistics.save(buffers)
        with self.group.settled():
            try:
                with torch.no_grad():
                    norm = self.store.add(eps)
                if not only:
                    self.rewind()
                with _keep_graph_valid([*self.params, *buffers]) if self.second_order else nullcontext():
                    yield norm
            finally:
                self._random_state = None
                with torch.no_grad():
                    self.store.restore()
                    self._statistics.restore()
                _put_back(states)
                torch.clear_autocast_cache()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Passes that leave nothing behind: random numbers and what layers keep are put back, nothing synchronizes."""
        random_state = RandomState(self.devices)
        states, kept = self._layer_states(self.norm_layers), Backup()
        with torch.no_grad():
            kept.save([b for _, _, b in states if _is_writable(b)])
        try:
            with self.group.no_sync(), without_reentrance(_nothing):
                yield
        finally:
            with torch.no_grad():
                kept.restore()
            _put_back(states)
            random_state.restore()
            torch.clear_autocast_cache()

    def _layer_states(self, norm_layers: Iterable[nn.Module]) -> list[_State]:
        """What layers keep from pass to pass: of some normalization layers, and of all others.

        All of it: which part a forward writes cannot be told without reading it, if it writes to its .data.
        """
        found = [(m, name, b) for m in norm_layers for name, b in m._buffers.items() if b is not None]
        found += [(m, name, b) for m, name in self._states
                  if name in m._buffers and (b := m._buffers[name]) is not None]
        return found

    def rewind(self) -> None:
        """Sets the random generators to where the pass at w began."""
        assert self._random_state is not None
        self._random_state.restore()


def _mark(p: nn.Parameter) -> tuple[int, int] | None:
    """What tells that a parameter was written to, or given other data; nothing is read from the device."""
    try:
        return p._version, p.data_ptr()
    except RuntimeError:  # of inference mode, or without memory of its own
        return None


def _is_writable(b: Tensor) -> bool:
    """Whether anything may have been written to a tensor: else torch refuses that, to a forward and to us."""
    if b.is_inference():
        return False
    if b.layout is not torch.strided or b.is_contiguous():
        return True
    return not any(stride == 0 and size > 1 for size, stride in zip(b.shape, b.stride()))  # one number in many places


def _put_back(states: Sequence[_State]) -> None:
    for m, name, b in states:
        if name not in m._buffers or m._buffers[name] is not b:  # a forward has put another tensor there
            m._buffers[name] = b


def _keep_graph_valid(tensors: Sequence[Tensor]) -> AbstractContextManager:
    """Makes the graph of the pass inside keep copies of ``tensors``, which are about to change back."""
    storages = {t.untyped_storage().data_ptr() for t in tensors}

    def pack(saved: Tensor) -> Tensor:
        return saved.clone() if saved.untyped_storage().data_ptr() in storages else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)


def _nothing(reason: str) -> None:
    pass


def _set_requires_grad(params: Sequence[nn.Parameter], value: bool) -> None:
    for p in params:
        p.requires_grad_(value)
