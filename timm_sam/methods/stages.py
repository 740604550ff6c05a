"""The stages of an update that a method may change, and methods as what fills them.

    A  g   = dL/dw at w                       of the selected parameters S; of all of them where stage E needs it
    B  d   = direction(g)                     else d = g
    C  eps = radius * T^2 mask(d) / N         N = ||T d|| or ||T mask(d)||, or a share of it (normalization)
    D  G   = dL/dw at w + eps                 of the samples that rows chooses, else of all of the m-batch
    E  G'  = combine(g, G)                    else G' = G; correct acts once an update on the mean of G'
    w  <- base step with the mean of G' over m-batches and ranks

Where ``ahead`` is filled there is no stage A: d is known before any pass.

A slot that is empty costs nothing. What a slot is given are lists of tensors, one per parameter, float32 or wider, on
the model's devices; nothing in a slot may read the device, draw from torch's global generators or change what it is
given. State is made of values that are the same on all ranks (``observe`` and ``correct`` are given means), so it is
the same on all ranks; ``state_dict`` and ``load_state_dict`` put it into checkpoints.
"""
import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Tensors = list[Tensor]
Groups = Sequence[dict[str, Any]]
# ``samples(n)`` gives n functions, each of which computes the loss of one training sample
Samples = Callable[[int], Iterable[Callable[[], Tensor]]]


class At(NamedTuple):
    """Where training is: enough to seed every draw of a method.

    Attributes:
        epoch: From 0.
        update: Of all updates, from 0.
        m_batch: Of the update's m-batches, from 0.
        seed: Of the run.
        rank: Of this process; 0 where all ranks share one perturbation.
        ranks: How many processes have m-batches of their own.
    """

    epoch: int
    update: int
    m_batch: int
    seed: int
    rank: int
    ranks: int = 1

    @property
    def number(self) -> int:
        """Of the m-batch among those of all ranks: one process in N chunks counts as N ranks do."""
        return self.m_batch * self.ranks + self.rank


class Radius(Protocol):
    """The radius of an update."""

    def bind(self, rho: float, groups: Groups) -> None:
        """Looks at SAM's rho and the base optimizer's groups once, when SAM is built.

        Raises:
            ValueError: They do not fit.
        """

    def __call__(self, at: At, rho: float, groups: Groups) -> float:
        """The radius of this update.

        Args:
            at: Where training is.
            rho: SAM's.
            groups: The base optimizer's, with the learning rates of this update.
        """


class Normalization(Protocol):
    """How far eps is normalized by the length of the gradient."""

    def __call__(self, at: At) -> float:
        """lam of this update: eps = rho ((1 - lam) + lam / ||T d||) T^2 d; 1 is SAM, 0 does not normalize."""


class Ahead(Protocol):
    """What eps points away from, known before any pass; the pass at w + eps is the only one."""

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        """Looks at the base optimizer once, when SAM is built.

        Raises:
            ValueError: It has nothing that could be taken.
        """

    def __call__(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Tensors | None:
        """v of the selected parameters, eps = -rho T^2 v / ||T v||; None: not yet, the update is plain."""


class Direction(Protocol):
    """What eps points along."""

    def __call__(self, g: Tensors) -> Tensors:
        """d of an m-batch from its g over the selected parameters, true to scale. g has to stay as it is."""

    def observe(self, mean: Tensors, usable: Tensor) -> None:
        """After each perturbed update, with the mean of g over its m-batches and all ranks.

        Args:
            mean: Of the selected parameters.
            usable: 0-dim, whether all of it is finite; else state must stay as it is.
        """


class Mask(Protocol):
    """Which elements of the selected parameters are perturbed.

    Attributes:
        full: Whether eps is normalized by ||T d||, so that it gets shorter by the mask; else by ||T mask(d)||.
        draws: Whether ``draw`` leaves tensors out, of whose gradients at w then nothing is known.
        samples: How many training samples ``prepare`` asks for, over all ranks.
        observes: Whether it wants to see the mean of g of this update.
    """

    full: bool
    draws: bool
    samples: int

    @property
    def observes(self) -> bool: ...

    def bind(self, params: Sequence[Tensor]) -> None:
        """Looks at the selected parameters once, when SAM is built."""

    def prepare(self, at: At, samples: Samples | None) -> None:
        """Before the first update of each epoch.

        Args:
            at: Where training is.
            samples: Of the training set, where the loop offers them. What their losses do to random numbers and
                running statistics is undone.
        """

    def draw(self, at: At, count: int) -> Sequence[bool] | None:
        """Which of the ``count`` selected tensors take part in an m-batch at all; None: all of them.

        No gradient at w is computed of the others.
        """

    def apply(self, d: Tensors) -> Tensors:
        """d with zeros where nothing is perturbed."""

    def observe(self, mean: Tensors, usable: Tensor) -> None:
        """As that of :class:`Direction`."""


class Rows(Protocol):
    """Which samples of an m-batch the pass at w + eps takes.

    Attributes:
        all_by: The method's argument that has it take all of them, as ``gamma=1``.
    """

    all_by: str

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        """Positions of samples, 1-dim and int64, from the losses (m,) at w and at w + eps."""


class Combine(Protocol):
    """The gradient of an m-batch from those of both passes, over all trained parameters."""

    def __call__(self, g: Tensors, G: Tensors) -> Tensors:
        """G', homogeneous of degree 1 in (g, G): both carry the same factor, such as a loss scale.

        Where g or G is not finite, it is G itself.
        """


class Correct(Protocol):
    """What is done to the mean gradient of an update, plain updates included, before unscaling and clipping."""

    def __call__(self, at: At, mean: Tensors | None, grads: Tensors) -> None:
        """Changes ``grads`` in place.

        Args:
            at: Where training is.
            mean: Of g, over m-batches and ranks and all trained parameters; None after a plain update.
            grads: The gradients that the base optimizer is about to get, with the loss scale, if there is one; zero
                where a parameter has none.
        """

    def restart(self) -> None:
        """Other parameters are trained from now on than before: what was kept is of no use."""


@runtime_checkable
class Stateful(Protocol):
    """A slot that keeps something from one update to the next."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Stages:
    """The slots, each empty or filled."""

    radius: Radius | None = None
    normalization: Normalization | None = None
    ahead: Ahead | None = None
    direction: Direction | None = None
    mask: Mask | None = None
    rows: Rows | None = None
    combine: Combine | None = None
    correct: Correct | None = None

    @property
    def full_ascent(self) -> bool:
        """Whether g has to be that of all trained parameters, not only of the selected ones."""
        return self.combine is not None or self.correct is not None

    @property
    def whole_pass(self) -> bool:
        """Whether the pass at w computes more than gradients of the selected parameters by the mean loss."""
        return self.full_ascent or self.rows is not None

    @property
    def observers(self) -> list[Direction | Mask]:
        """What looks at the mean of g after this update."""
        mask = None if self.mask is None or not self.mask.observes else self.mask
        return [slot for slot in (self.direction, mask) if slot is not None]

    @property
    def whole_batch(self) -> bool:
        """Whether g has to be that of all samples, since more than eps comes of it."""
        return self.full_ascent or self.direction is not None or self.rows is not None or isinstance(
            self.mask, Stateful)

    def bind(self, rho: float, optimizer: torch.optim.Optimizer) -> None:
        """Has the slots look at SAM's rho and the base optimizer, once.

        Raises:
            ValueError: They do not fit.
        """
        if self.radius is not None:
            self.radius.bind(rho, optimizer.param_groups)
        if self.ahead is not None:
            self.ahead.bind(optimizer)

    def filled(self) -> dict[str, Any]:
        """Name -> slot, of those that are not empty."""
        slots = {f.name: getattr(self, f.name) for f in fields(Stages)}
        return {name: slot for name, slot in slots.items() if slot is not None}

    def state_dict(self) -> dict[str, Any]:
        """What the slots keep, by slot; empty if they keep nothing."""
        return {name: slot.state_dict() for name, slot in self.filled().items() if isinstance(slot, Stateful)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Gives the slots what they kept, on a device; one of which there is nothing starts as new."""
        for name, slot in self.filled().items():
            if isinstance(slot, Stateful) and name in state:
                slot.load_state_dict(_copied(state[name], device))


def seed_of(*parts: int) -> int:
    """A seed for a draw: the same on every machine and in every process."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


def rate_of(groups: Groups) -> float:
    """The learning rate that the schedule gives, without timm's factors for layers.

    Of a group with the largest factor, 1 where rates decay by the layer: before the first step of timm's schedule, and
    under the schedules of others, rates are there without the factors.
    """
    group = max(groups, key=_factor)
    return float(group["lr"]) / _factor(group)


def first_rate_of(groups: Groups) -> float:
    """The rate that the schedule begins with, of the same group; there timm's factors are not in it."""
    group = max(groups, key=_factor)
    return float(group["initial_lr"] if "initial_lr" in group else group["lr"])


def _factor(group: dict[str, Any]) -> float:
    return float(group.get("lr_scale", 1.0))


def _copied(state: Any, device: torch.device) -> Any:
    """State with tensors of its own on the device: those of a checkpoint may lie in its file."""
    if isinstance(state, Tensor):
        return state.to(device, copy=True)
    if isinstance(state, dict):
        return {key: _copied(value, device) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_copied(value, device) for value in state]
    return state


@dataclass(frozen=True)
class Timing:
    """When a method wants to act.

    Attributes:
        every: It perturbs every so many updates; None: it does not mind.
        epoch: First epoch that it perturbs.
        update: First update that it perturbs.
        after_warmup: Whether a loop that knows of a warm-up is to begin after it.
        by_epoch: Whether it has to know the epoch.
    """

    every: int | None = None
    epoch: int = 0
    update: int = 0
    after_warmup: bool = False
    by_epoch: bool = False


@dataclass(frozen=True)
class Method(Stages):
    """A method: the slots that it fills, when it acts, and what it is called.

    Attributes:
        name: Of the method, and its parameters, as in ``gsam(alpha=0.4, rho_min=0)``.
        note: What a user should know when it begins, as that rho has another unit.
        timing: When it acts.
        unused: The slots as they were before a SAM had them.
    """

    name: str = ""
    note: str = ""
    timing: Timing = Timing()
    unused: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


def of_one_sam(methods: Method | Sequence[Method] | None) -> list[Method]:
    """The methods for a SAM that is built; another SAM gets slots of its own, which know nothing of what this one saw.

    Raises:
        ValueError: Something else is among them.
    """
    given: Sequence[Any] = [] if methods is None else methods if isinstance(methods, (list, tuple)) else [methods]
    found = []
    for method in given:
        if not isinstance(method, Method):
            raise ValueError(f"method: {method!r} is none: call one of timm_sam.methods, as methods.gsam(alpha=0.4)")
        if method.unused:
            method = replace(method, **_each_copied(method.unused))
        else:
            method.unused.update(_each_copied(method.filled()))
        found.append(method)
    return found


def _each_copied(slots: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.copy(slot) for name, slot in slots.items()}


def merged(methods: Sequence[Method]) -> Stages:
    """All slots that some methods fill.

    Raises:
        ValueError: Two of them fill the same one, or one needs what another does away with.
    """
    slots: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for method in methods:
        for name, slot in method.filled().items():
            if name in slots:
                raise ValueError(f"method: {owners[name]} and {method.name} both decide the {name} of an update; "
                                 f"leave one of them out")
            slots[name], owners[name] = slot, method.name
    if "combine" in slots and "correct" in slots:
        raise ValueError(f"method: {owners['combine']} and {owners['correct']} both change the gradient of the step; "
                         f"leave one of them out")
    if "direction" in slots and "mask" in slots and slots["mask"].draws:
        raise ValueError(f"method: {owners['direction']} needs the gradients of all perturbed tensors, of which "
                         f"{owners['mask']} draws some; leave one of them out")
    need_g = [name for name in ("direction", "mask", "rows", "combine", "correct") if name in slots]
    if "ahead" in slots and need_g:
        raise ValueError(f"method: {owners['ahead']} has no pass at w, which {owners[need_g[0]]} needs; leave one of "
                         f"them out")
    return Stages(**slots)


def when(methods: Sequence[Method], every: int, start: int) -> tuple[int, int, int]:
    """``every``, first epoch and first update, of SAM's arguments and of methods.

    Raises:
        ValueError: Both decide the same.
    """
    update = 0
    for method in methods:
        timing = method.timing
        if timing.every is not None:
            if every != 1:
                raise ValueError(f"every={every}: {method.name} decides how often it perturbs; leave it out")
            every = timing.every
        if timing.epoch or timing.update:
            if start:
                raise ValueError(f"start={start}: {method.name} decides when it begins; leave it out")
            start, update = timing.epoch, timing.update
    return every, start, update
