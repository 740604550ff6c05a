"""SAM around any optimizer: ascent to w + eps, descent with the gradient found there.

    g  = dL/dw_S at w                          only the selected parameters S, usually the normalization layers
    G  = dL/dw   at w with w_S + eps(g)        all parameters
    w <- base optimizer's step with G, at the unperturbed w

Papers: SAM, Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412; SAM-ON, Mueller et al., NeurIPS 2023,
https://arxiv.org/abs/2306.04226. The perturbations are in ``perturbation.py``, the choice of S in ``selection.py``.

What goes wrong around SAM, and is handled here: BatchNorm statistics (from the pass at w only), dropout masks (the
same in both passes), exact restoration (copied back), gradient synchronisation (none in the ascent), loss scales (out
of g before eps), accumulated gradients (never part of g).
"""
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .group import in_group
from .multi_tensor import Backup, at_least_float32, by_factor, converted
from .perturbation import VARIANTS, global_norm, perturbation
from .random_state import RandomState
from .selection import is_norm, select_parameters, unwrap
from .sharing import Recording, SharedForward, is_checkpointed, obstacle
from .split import WHOLE_GRAPHS_WORK, is_compiled_whole

BN_STATS = ("clean", "both")
LossFn = Callable[[], Tensor]


class Stats(NamedTuple):
    """What the last two passes measured, as 0-dim tensors on the device of the model (reading one synchronises).

    Attributes:
        loss: Loss at w.
        loss_perturbed: Loss at w + eps.
        grad_norm: l2 norm of g over the selected parameters, loss scale divided out.
        eps_norm: l2 norm of eps.
    """

    loss: Tensor
    loss_perturbed: Tensor
    grad_norm: Tensor
    eps_norm: Tensor


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around a base optimizer.

    Args:
        optimizer: The base optimizer, any ``torch.optim.Optimizer``. ``param_groups``, ``state`` and ``state_dict``
            are its own, so learning-rate schedulers and checkpoints need not know of SAM.
        model: The module that is trained. Pass the DistributedDataParallel module where there is one (the ascent
            must not synchronise gradients), or what ``torch.compile`` returned. Build SAM after the model
            is on its device and wrapped.
        variant: A key of ``VARIANTS`` (Table 9 of the SAM-ON paper): ``sam``, ``elementwise_l2``,
            ``elementwise_l2_orig`` (ASAM), ``elementwise_linf``, ``layerwise_l2``, ``fisher``.
        params: ``onlynorm`` (SAM-ON), ``all`` (SAM) or ``nonorm``; see :func:`select_parameters`.
        rho: Radius of the perturbation, >= 0.
        eta: eta of Table 9; None takes the variant's default.
        filter: Regular expression that keeps only matching parameter names.
        share_forward: Whether :meth:`minimize` and :meth:`backward` compute what lies below the first perturbed layer
            once for both passes, where that is possible; :attr:`sharing` says after the first update.
        sync: Whether g is averaged over all ranks of the process group before eps: m-sharpness with m = global batch,
            for one more collective of the size of the selection. By default each rank has its own eps.
        bn_stats: ``clean``: running statistics of normalization layers come from the pass at w only; ``both``: both
            passes update them, as the reference implementations do.

    Raises:
        ValueError: An argument is out of range, or nothing is selected.

    Example:
        >>> sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.5)
        >>> for x, y in loader:
        ...     loss = sam.minimize(lambda: criterion(model(x), y))

    Notes:
        Random state: torch's generators (CPU and the parameters' devices), Python's and NumPy's are set back between
        the passes, so that both see the same masks; afterwards they are where one pass leaves them.
        DDP: each rank perturbs by the gradient of its own batch; only the descent synchronises, once.
        A gradient that is not finite gives eps = 0 for that batch, counted in :attr:`nonfinite`.
    """

    def __init__(
            self,
            optimizer: torch.optim.Optimizer,
            model: nn.Module,
            *,
            variant: str = "sam",
            params: str = "onlynorm",
            rho: float,
            eta: float | None = None,
            filter: str | None = None,
            bn_stats: str = "clean",
            share_forward: bool = True,
            sync: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} (--sam-variant) is unknown: use one of {', '.join(VARIANTS)}")
        if bn_stats not in BN_STATS:
            raise ValueError(f"bn_stats={bn_stats!r} (--sam-bn-stats) is unknown: use one of {', '.join(BN_STATS)}")
        _check_number("rho", rho)
        if eta is not None:
            _check_number("eta", eta)
            if VARIANTS[variant].eta is None:
                raise ValueError(f"eta={eta} (--sam-eta): variant {variant!r} has no eta; leave it out")
        # Optimizer.__init__ is not called: groups, state and defaults are the base optimizer's. This sets up the rest
        # (hooks, profiling names) as unpickling does.
        self.optimizer = optimizer
        super().__setstate__({})

        self.variant = variant
        self.params = params
        self.rho = float(rho)
        self.eta = VARIANTS[variant].eta if eta is None else float(eta)
        self.bn_stats = bn_stats
        self.selected = select_parameters(model, params, filter)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=self.selected[0][1].device)
        self.stats: Stats | None = None

        chosen = {id(p) for _, p in self.selected}
        self._model = model
        self._outside = [p for p in model.parameters() if id(p) not in chosen]
        self._checkpointed = is_checkpointed(model)
        # AdaHessian differentiates the gradient again in its step
        self._second_order = bool(getattr(optimizer, "is_second_order", False))
        self._is_weight = [name.rsplit(".", 1)[-1] == "weight" for name, _ in self.selected]
        self._ddp = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self.sync = sync
        self.sharing: str | None = None
        self._shared: SharedForward | None = None
        self._checks = 3  # how many are left
        if not share_forward:
            self.sharing = "two full forwards per update: sharing is off"
        elif bn_stats == "both":
            self.sharing = "two full forwards per update: both passes update running statistics"
        elif (reason := obstacle(model)) is not None:
            self.sharing = f"two full forwards per update: {reason}"
        else:
            self._shared = SharedForward(model, [p for _, p in self.selected])
        if not WHOLE_GRAPHS_WORK and is_compiled_whole(model):
            raise ValueError(f"model: torch {torch.__version__} computes wrong gradients for SAM of a model compiled "
                             "as a whole; compile it by timm_sam.compile_split(model), or use torch >= 2.12")
        if any(m.static_graph for m in self._ddp):
            raise ValueError("model: the first backward of DistributedDataParallel(static_graph=True) synchronizes, "
                             "which the pass at w must not do; build it without static_graph")
        self._eps: list[Tensor] | None = None
        self._norms: tuple[Tensor, Tensor] | None = None
        self._rng: RandomState | None = None
        self._weights = Backup()
        self._statistics = Backup()
        self._norm_layers = [m for m in model.modules() if is_norm(m)]
        self._stepped = True

    # What a torch optimizer has, all of it the base optimizer's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups, also after its ``load_state_dict`` replaced the list."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the base optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state: SAM itself keeps nothing from one update to the next."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer. What is perturbed was fixed at construction and does not change."""
        self.optimizer.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # Optimizer's own leaves out all but groups, state and defaults. Schedulers put a step around the original's.
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def __repr__(self) -> str:
        return f"SAM({self.describe()}; {self.optimizer!r})"

    def describe(self) -> str:
        """One line: variant, rho, eta, and how many tensors and parameters of how many are perturbed."""
        parameters = list(unwrap(self._model).parameters())
        eta = "" if self.eta is None else f", eta={self.eta:g}"
        return (
            f"{self.variant}, rho={self.rho:g}{eta}, params={self.params}: perturbs {len(self.selected)} of "
            f"{len(parameters)} tensors, {sum(p.numel() for _, p in self.selected):,} of "
            f"{sum(p.numel() for p in parameters):,} parameters")

    # The step, in the three forms that loops need.

    def minimize(self, loss_fn: LossFn, *, ascent_fn: LossFn | None = None) -> Tensor:
        """One update: zeroes gradients, both passes, base step.

        Args:
            loss_fn: Computes the mean loss of the batch, a 0-dim tensor, and nothing else. It is called twice.
            ascent_fn: Computes the loss that g is taken of, where that is another one, as of a part of the batch.

        Returns:
            The loss at w (of ``ascent_fn``, if given), detached.

        Raises:
            ValueError: The loss does not depend on any selected parameter.
        """
        self.zero_grad()
        loss = self.backward(loss_fn, ascent_fn=ascent_fn)
        self.step()
        return loss

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One update by PyTorch's convention, or the base step that follows :meth:`backward`.

        Args:
            closure: Zeroes gradients, computes the loss, calls ``backward()``, returns the loss; it is called twice.
                None takes the base optimizer's step with the gradients that :meth:`backward` left.

        Returns:
            The loss at w, detached (without a closure: that of the last :meth:`backward`).

        Raises:
            ValueError: There is no closure and :meth:`backward` did not run since the last step, or the closure
                leaves no gradient in any selected parameter.
        """
        if closure is not None:
            with torch.enable_grad():
                with self.ascent():
                    loss = closure()
                with self.perturbed():
                    loss_perturbed = closure()
            self._record(loss, loss_perturbed)
        elif self._stepped:
            raise ValueError(
                "SAM.step() without a closure would be a plain step: pass a closure, or call SAM.backward(loss_fn) "
                "before it, or use SAM.minimize(loss_fn)")
        self.optimizer.step()
        self._stepped = True
        assert self.stats is not None
        return self.stats.loss

    def backward(
            self,
            loss_fn: LossFn,
            *,
            ascent_fn: LossFn | None = None,
            weigh: Callable[[Tensor], Tensor] | None = None,
            scaler: torch.amp.GradScaler | None = None,
    ) -> Tensor:
        """Both passes of one (micro-)batch: what ``loss_fn().backward()`` is in a plain loop.

        Adds G to ``.grad`` and leaves the weights as they were, so clipping, GradScaler and gradient accumulation go
        on from there as without SAM. Under accumulation each call has its own eps (mSAM); wrap all but the last call
        in ``ddp.no_sync()`` as usual.

        Args:
            loss_fn: Computes the mean loss of the batch, a 0-dim tensor. It is called twice.
            ascent_fn: Computes the loss that g is taken of, where that is another one, as of a part of the batch; then
                ``loss_fn`` is called once, and nothing is shared between the passes.
            weigh: Applied to the loss at w + eps before its backward, e.g. ``lambda loss: loss / accumulation_steps``.
                The ascent uses the loss as it is: eps does not depend on such factors.
            scaler: Its loss scale is applied in both passes and divided out of g.

        Returns:
            The loss at w (of ``ascent_fn``, if given), detached, not weighed.

        Raises:
            ValueError: The loss does not depend on any selected parameter.
        """
        devices = {p.device for _, p in self.selected}
        if not self._checkpointed and is_checkpointed(self._model):  # since SAM was built
            self._checkpointed, self._shared = True, None
            self.sharing = "two full forwards per update: gradient checkpointing computes the forward again"
        recording = None if self._shared is None or ascent_fn is not None else Recording(self._shared, devices)
        with torch.enable_grad():
            loss = self._ascend(ascent_fn or loss_fn, scaler, recording)
            with self.perturbed():
                loss_perturbed = self._second_forward(loss_fn, recording)
                del recording
                weighed = loss_perturbed if weigh is None else weigh(loss_perturbed)
                (weighed if scaler is None else scaler.scale(weighed)).backward(create_graph=self._second_order)
        return self._record(loss, loss_perturbed)

    def _ascend(self, loss_fn: LossFn, scaler: torch.amp.GradScaler | None, recording: Recording | None) -> Tensor:
        # in a function of its own, so that nothing of the first graph but what is shared is alive in the second forward
        scale = None if scaler is None else scaler.scale(torch.ones((), device=self.selected[0][1].device))
        with self._ascent(scale, recording):
            with nullcontext() if recording is None else recording.record():
                loss = loss_fn()
            if not loss.requires_grad:
                raise ValueError(
                    f"the loss does not depend on any of the {len(self.selected)} perturbed parameters "
                    f"({self.selected[0][0]}, ...): select others by params (--sam-params) or filter (--sam-filter)")
            scaled = loss if scaler is None else scaler.scale(loss)
            if self._checkpointed:  # reentrant checkpoints know backward() only
                scaled.backward()
            else:  # leaves the graph of the shared part alone, and DDP's hooks on the parameters asleep
                params = [p for _, p in self.selected if p.requires_grad]
                for p, grad in zip(params, torch.autograd.grad(scaled, params, allow_unused=True)):
                    p.grad = grad
        return loss.detach()

    def _second_forward(self, loss_fn: LossFn, recording: Recording | None) -> Tensor:
        """The loss at w + eps, with what the first pass has computed already."""
        if recording is None:
            return loss_fn()
        reason = recording.why_not()
        if not reason and self._checks and recording.uses_perturbed():
            reason, self._shared = "perturbed parameters are used below the module that owns them", None
        if reason:
            if self._checks:
                self.sharing = f"two full forwards per update: {reason}"
            if not recording.outputs:  # nor will there be any next time
                self._shared = None
            recording.clear()
            return loss_fn()
        check = self._checks > 0
        state = RandomState(recording.devices) if check else None
        with recording.replay(check):
            loss = loss_fn()
        mismatch = ""
        if state is not None:
            assert self._norms is not None
            # without a perturbation, one update proves little
            mismatch, last_check = self._on_all_ranks(recording.mismatch, bool(self._norms[1] > 0))
            self._checks = 0 if last_check else self._checks - 1
        if state is not None and mismatch:
            self._shared = None
            self.sharing = f"two full forwards per update: {mismatch}"
            del loss
            recording.clear()
            state.restore()
            torch.clear_autocast_cache()  # casts that were made for the check have no graph
            for ddp in self._ddp:  # it shares buffers between two forwards, which other ranks may not have to repeat
                ddp.require_forward_param_sync = False
            return loss_fn()
        if check:
            total = sum(p.numel() for p in self._model.parameters())
            self.sharing = (f"one forward for both passes through {recording.describe()}, "
                            f"{recording.parameters():,} of {total:,} parameters")
        return loss

    def _on_all_ranks(self, mismatch: str, perturbed: bool) -> tuple[str, bool]:
        """A mismatch on any rank, and whether all had a perturbation: layers that synchronize need the same calls."""
        if not in_group() or not any(isinstance(m, nn.SyncBatchNorm) for m in self._norm_layers):
            return mismatch, perturbed
        found = torch.tensor([bool(mismatch), not perturbed], dtype=torch.int32, device=self.selected[0][1].device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self._group())
        other, unperturbed = found.tolist()
        return mismatch or ("a module on another rank does not repeat its output" if other else ""), not unperturbed

    def _group(self) -> Any:
        return self._ddp[0].process_group if self._ddp else None

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        with ExitStack() as stack:
            for ddp in self._ddp:
                stack.enter_context(ddp.no_sync())
            yield

    def _record(self, loss: Tensor, loss_perturbed: Tensor) -> Tensor:
        assert self._norms is not None
        self.stats = Stats(loss.detach(), loss_perturbed.detach(), *self._norms)
        self._stepped = False
        return self.stats.loss

    # The two halves.

    def ascent(self, grad_scale: None | float | Tensor = None) -> AbstractContextManager[None]:
        """The pass at w: run the loss's forward and backward inside; on the way out eps is computed.

        Inside, parameters outside S do not require gradients, gradients are not synchronised, and the selected
        parameters' ``.grad`` starts empty; all three are as before afterwards.

        Args:
            grad_scale: Factor that the gradient carries (a loss scale), divided out of g.

        Raises:
            ValueError: No gradient arrived in any selected parameter.
        """
        return self._ascent(grad_scale, None)

    @contextmanager
    def _ascent(self, grad_scale: None | float | Tensor, recording: Recording | None) -> Iterator[None]:
        params = [p for _, p in self.selected]
        # what the base optimizer has beside the model's parameters, as a scale in the loss, is not perturbed either
        others = {p for group in self.param_groups for p in group["params"]}.difference(params)
        frozen = [p for p in others.union(self._outside) if p.requires_grad]
        accumulated = [p.grad for p in params]
        self._eps = None
        self._rng = RandomState({p.device for p in params})
        for p in params:
            p.grad = None
        if recording is None:
            _set_requires_grad(frozen, False)
        else:  # what is shared needs the graph to its own weights
            recording.on_perturbed = lambda: _set_requires_grad(frozen, False)
        try:
            with self._no_sync():
                yield
            self._compute_eps(params, grad_scale)
        finally:
            _set_requires_grad(frozen, True)
            for p, grad in zip(params, accumulated):
                p.grad = grad
            # weights cast inside an autocast region around both passes are stale in the second
            torch.clear_autocast_cache()

    @torch.no_grad()
    def _compute_eps(self, params: list[nn.Parameter], grad_scale: None | float | Tensor) -> None:
        grads = [p.grad for p in params]
        if all(g is None for g in grads):
            raise ValueError(
                f"no gradient reached any of the {len(params)} perturbed parameters ({self.selected[0][0]}, ...): the "
                f"closure must call backward(), on a loss that depends on them")
        dense = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]
        if grad_scale is not None:
            inverse = torch.as_tensor(1.0 / grad_scale)
            dense = by_factor(torch._foreach_mul, at_least_float32(dense), inverse)
        if self.sync:
            dense = self._averaged(dense)
        eps, grad_norm = perturbation(self.variant, params, dense, self.rho, self.eta, self._is_weight)
        self.nonfinite = self.nonfinite.to(grad_norm.device) + ~torch.isfinite(grad_norm)
        self._norms = grad_norm, global_norm(eps)
        self._eps = eps

    def _averaged(self, grads: list[Tensor]) -> list[Tensor]:
        """The mean over all ranks, by one collective; the gradients themselves without a process group."""
        if not in_group():
            return grads
        group = self._group()
        flat = torch.cat([g.reshape(-1) for g in grads])
        torch.distributed.all_reduce(flat, group=group)
        flat /= torch.distributed.get_world_size(group)
        return [part.view_as(g).to(g.dtype) for part, g in zip(flat.split([g.numel() for g in grads]), grads)]

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """The pass at w + eps: run the loss's forward and backward inside; w is copied back on the way out.

        Raises:
            ValueError: :meth:`ascent` did not run before.
        """
        eps, rng = self._eps, self._rng
        if eps is None or rng is None:
            raise ValueError("SAM.perturbed() needs an eps: run the loss and its backward() inside SAM.ascent() first")
        self._eps = self._rng = None
        params = [p for _, p in self.selected]
        buffers = []
        if self.bn_stats == "clean":  # the running statistics, to be put back after the pass
            buffers = [b for m in self._norm_layers if m.training for b in m.buffers(recurse=False)]
        self._weights.save(params)
        self._statistics.save(buffers)
        try:
            with torch.no_grad():
                torch._foreach_add_(params, converted(eps, [p.dtype for p in params]))
            del eps
            rng.restore()
            with _keep_graph_valid([*params, *buffers]) if self._second_order else nullcontext():
                yield
        finally:
            self._weights.restore()
            self._statistics.restore()
            torch.clear_autocast_cache()


def _keep_graph_valid(tensors: list[Tensor]) -> AbstractContextManager:
    """Makes the graph of the pass inside keep copies of ``tensors``, which are about to change back."""
    storages = {t.untyped_storage().data_ptr() for t in tensors}

    def pack(saved: Tensor) -> Tensor:
        return saved.clone() if saved.untyped_storage().data_ptr() in storages else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved)


def _set_requires_grad(params: list[nn.Parameter], value: bool) -> None:
    for p in params:
        p.requires_grad_(value)


def _check_number(name: str, value: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value!r} (--sam-{name}) must be a finite number >= 0")
