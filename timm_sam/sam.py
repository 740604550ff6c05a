"""SAM around any optimizer: ascent to w + eps, descent with the gradient found there.

    A  g   = dL/dw at w                       of the selected parameters S only, usually the normalization layers
    B  d   = direction(g)                     g itself, unless a method says otherwise
    C  eps = rho T^2 d / ||T d||              ``perturbation.py``
    D  G   = dL/dw at w with w_S + eps        all parameters
    E  G'  = combine(g, G)                    G itself, unless a method says otherwise
    w  <- base optimizer's step with G', at the unperturbed w

Papers: SAM, Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412; SAM-ON, Mueller et al., NeurIPS 2023,
https://arxiv.org/abs/2306.04226. S is chosen in ``selection.py``, what surrounds the passes is in ``passes.py``, what
they share in ``sharing.py``, the slots of methods in ``methods/stages.py``.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_arguments, check_ascent_fn, check_methods, check_model, in_right_order
from .ascent import Ascent, Scale
from .backward import Backward, asked
from .closures import check_idle, first_call, holding, loss_of, plain_call, step_of_nothing, updating
from .descent import Descent
from .facade import Facade, on_itself
from .first_update import FirstUpdate
from .losses import Losses, LossFn
from .methods.stages import At, Method, Samples, merged, of_one_sam, when
from .norms import NormTypes, checked_types
from .passes import Passes
from .perturbation import VARIANTS
from .recording import Recording
from .selection import select_parameters, share_of
from .sharded import group_of, store_of
from .sharing import Sharing, ruled_out
from .stats import UNKNOWN, NonFinite, Stats
from .when import When


class SAM(Facade):
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
        norm_types: Classes that are normalization layers beside those that are known.
        share_forward: Whether :meth:`minimize` and :meth:`backward` compute what lies below the first perturbed layer
            once for both passes, where that is possible; :attr:`sharing` says after the first update.
        sync: Whether g is averaged over all ranks of the process group before eps: m-sharpness with m = global batch,
            for one more collective of the size of the selection. By default each rank has its own eps.
        bn_stats: ``clean``: running statistics of normalization layers come from the pass at w only; ``both``: both
            passes update them, as the reference implementations do.
        method: One of ``timm_sam.methods``, or several that change different stages of an update.
        every: Perturb every so many updates, starting with the first; the others are plain.
        start: First epoch that is perturbed.
        end: First epoch that is not perturbed again; None: never.
        seed: Of a method's random draws.

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

    @in_right_order
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
            norm_types: NormTypes | None = None,
            bn_stats: str = "clean",
            share_forward: bool = True,
            sync: bool = False,
            method: Method | Sequence[Method] | None = None,
            every: int = 1,
            start: int = 0,
            end: int | None = None,
            seed: int = 0,
    ) -> None:
        super().__init__(optimizer)
        check_arguments(variant, bn_stats, rho, eta)
        self._group = group_of(model, params)
        check_model(model, self._group)
        self.variant = variant
        self.params = params
        self.rho = float(rho)
        self.eta = VARIANTS[variant].eta if eta is None else float(eta)
        self.bn_stats = bn_stats
        self.sync = sync
        self.methods = of_one_sam(method)
        self.selected = select_parameters(model, params, filter, norm_types)
        self._nonfinite = NonFinite(self.selected[0][1].device)
        self.stats: Stats | None = None

        self._model = model
        self._names = " and ".join(method.name for method in self.methods)
        self._stages = merged(self.methods)
        self._stages.bind(self.rho, optimizer)
        self.chooses_samples = self._stages.rows is not None  # then loss functions return the losses of samples
        every, start, first = when(self.methods, every, start)
        self._when = When(every, start, end, seed, first)
        self._when.by_epoch |= any(method.timing.by_epoch for method in self.methods)
        self._store = store_of(
            model, self.selected, self._group, params, sync, self._stages, self._names, optimizer)
        self._ascent = Ascent(self.selected, self._stages, self._group, self._store)
        self._params = self._ascent.params
        self._passes = Passes(optimizer, model, self._store, bn_stats, self._group, checked_types(norm_types))
        self._descent = Descent(self._stages, self._passes, self._group, sync)
        self._losses = Losses(self._stages.rows, self._names, self._passes, model)
        self._sharing = Sharing(
            model, self._params, ruled_out(
                share_forward=share_forward, bn_stats=bn_stats, full_ascent=self._stages.whole_pass,
                one_pass=self._stages.ahead is not None, sharded=self._group.sharded),
            self._group, any(isinstance(m, nn.SyncBatchNorm) for m in self._passes.norm_layers))
        check_methods(self._stages, self._names, variant, optimizer, self._passes.second_order)
        self._first = FirstUpdate(optimizer, model, self._group, self.selected,
                                  partial(select_parameters, model, params, filter, norm_types))
        self._eps: list[Tensor] | None = None
        self._norms: tuple[Tensor, ...] = ()  # of g and of eps
        self._weight: Tensor | None = None
        self._stepped = True

    def __repr__(self) -> str:
        return f"SAM({self.describe()}; {self.optimizer!r})"

    def describe(self) -> str:
        """One line: variant, rho, eta, methods, and how many tensors and parameters of how many are perturbed."""
        eta = "" if self.eta is None else f", eta={self.eta:g}"
        methods = f", {self._names}" if self.methods else ""
        return (f"{self.variant}, rho={self.rho:g}{eta}, params={self.params}{methods}: perturbs "
                f"{share_of(self._params, self._model)}")

    @property
    def sharing(self) -> str | None:
        """Whether both passes share a part of the forward, or why not, in words; None before it is known."""
        return self._sharing.said

    @property
    def nonfinite(self) -> Tensor:
        """How many gradients at w were not finite so far, 0-dim."""
        return self._nonfinite.count()

    # When, and what is kept from one update to the next.

    def begin(self, epoch: int, update: int, samples: Samples | None = None) -> None:
        """Says where training is, before the first (micro-)batch of an update.

        A loop may leave it out: SAM counts updates itself, but knows no epochs then.

        Args:
            epoch: From 0.
            update: Of all updates, from 0.
            samples: Gives functions that compute the loss of single training samples, for methods that need them.
        """
        self._when.begin(epoch, update)
        self._descent.reset()
        if self._when.active:
            self._ascent.prepare(self.at, samples, self._passes)

    @property
    def at(self) -> At:
        """Where training is."""
        return self._when.at(*(0, 1) if self.sync else self._group.place)

    @property
    def perturbs(self) -> bool:
        """Whether this update is perturbed, or plain.

        Raises:
            ValueError: It depends on the epoch, and :meth:`begin` was not called.
        """
        return self._when.perturbs

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of the base optimizer's parameters, and what an update that was begun has measured."""
        super().zero_grad(set_to_none)
        self._descent.drop()
        self._when.m_batch = 0

    def method_state_dict(self) -> dict[str, Any]:
        """What the methods keep from one update to the next, by stage; empty for SAM itself."""
        return self._stages.state_dict()

    def load_method_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`method_state_dict` gave. What it lacks starts as new."""
        self._stages.load_state_dict(state, self._params[0].device)

    # The step, in the three forms that loops need.

    @torch.compiler.disable
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

    @on_itself
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update by PyTorch's convention, or the base step that follows :meth:`backward`.

        Args:
            closure: Zeroes gradients, computes the loss, calls ``backward()``, returns the loss; it is called twice.
                None takes the base optimizer's step with the gradients that :meth:`backward` or :meth:`perturbed`
                left; then a closure that returns None, as trainers pass it, is called once and counts as None.

        Returns:
            The loss at w, detached (without a closure: that of the last :meth:`backward`; nan after
            :meth:`perturbed`). None if a closure zeroed gradients and returned None: then nothing is updated.

        Raises:
            ValueError: There is no closure and :meth:`backward` did not run since the last step, or the closure
                leaves no gradient in any selected parameter, or adds to gradients of earlier batches.
        """
        if closure is None and self._stepped:
            return step_of_nothing(self.optimizer)
        if closure is not None and not self._by_closure(closure):
            return None
        self.optimizer.step()
        self._stepped = True
        self._when.end_of_update()
        self._descent.reset()
        assert self.stats is not None
        return self.stats.loss

    @updating
    def _by_closure(self, closure: Callable[[], Any]) -> None:
        if not self._stepped:
            check_idle(closure())
            return
        if self._stages.rows is not None:
            raise ValueError(f"closure: {self._names} chooses samples, which a closure cannot; use "
                             f"SAM.minimize(loss_fn)")
        if not self.perturbs or self._stages.ahead is not None and not self._look_ahead():
            loss = plain_call(closure, self._params)
            self._finish_plain(True)
            self._record(loss)
            return
        held, begun = holding(self._passes.zeroed()), self.stats is not None
        if self._stages.ahead is not None:
            with self._perturbed(True, accumulate=False):
                loss = first_call(closure, self._store, held, begun)
            self._record(loss, loss)
            return
        with self.ascent():
            loss = first_call(partial(self._losses.same_input.at_w, closure), self._store, held, begun)
        with self._perturbed(True, accumulate=False):
            loss_perturbed = loss_of(self._losses.same_input.at_perturbed(closure))
        self._record(loss, loss_perturbed)

    @on_itself
    def backward(
            self,
            loss_fn: LossFn,
            *,
            ascent_fn: LossFn | None = None,
            weigh: Callable[[Tensor], Tensor] | None = None,
            scaler: torch.amp.GradScaler | None = None,
            backward_fn: Callable[[Tensor], Any] | None = None,
            last: bool = True,
    ) -> Tensor:
        """Both passes of one (micro-)batch: what ``loss_fn().backward()`` is in a plain loop.

        Adds G to ``.grad`` and leaves the weights as they were, so clipping, GradScaler and gradient accumulation go
        on from there as without SAM. Under accumulation each call has its own eps (mSAM). In an update that is not
        perturbed (``every``, ``start``, ``end``) it is one plain backward pass.

        Args:
            loss_fn: Computes the mean loss of the batch, a 0-dim tensor. It is called twice. Where a method chooses
                samples: takes their positions or None, and returns the losses of those samples or of all, (m,).
            ascent_fn: Computes the loss that g is taken of, where that is another one, as of a part of the batch; then
                ``loss_fn`` is called once, and nothing is shared between the passes.
            weigh: Applied to the loss at w + eps before its backward, e.g. ``lambda loss: loss / accumulation_steps``.
                The ascent uses the loss as it is: eps does not depend on such factors.
            scaler: Its loss scale is applied in both passes and divided out of g.
            backward_fn: Takes the place of ``loss.backward()``, for loops whose trainer owns that call
                (``fabric.backward``, ``accelerator.backward``). It applies a loss scale itself at w + eps; at w it is
                given a stand-in, inside whose backward pass ours runs: ``scaler`` is for that one, and for methods that
                need to know the scale.
            last: Whether this is the last micro-batch of the update. False synchronizes nothing, like
                ``ddp.no_sync()`` around the call.

        Returns:
            The loss at w (of ``ascent_fn``, if given), detached, not weighed.

        Raises:
            ValueError: The loss does not depend on any selected parameter, a method does not go with ``ascent_fn``, or
                the base optimizer not with ``backward_fn`` (it differentiates the gradient again).
        """
        if ascent_fn is not None:
            check_ascent_fn(self._stages, self._names)
        how = asked(weigh, scaler, backward_fn, self._passes.second_order)
        with torch.enable_grad(), nullcontext() if last else self._group.no_sync():
            if not self.perturbs or self._stages.ahead is not None and not self._look_ahead():
                loss = self._losses.only(loss_fn)
                how.descend(loss)
                self._finish_plain(last and self._group.synchronizes)
                return self._record(loss.detach())
            if self._stages.ahead is not None:
                with self._perturbed(last, accumulate=True):
                    loss = self._losses.only(loss_fn)
                    how.descend(loss)
                return self._record(loss.detach(), loss.detach())
            recording = None if ascent_fn is not None else self._sharing.record(self._passes)
            loss = self._ascend(ascent_fn or loss_fn, how, recording)
            with self._perturbed(last, accumulate=True):
                loss_perturbed = self._sharing.answer(
                    lambda: self._losses.at_perturbed(loss_fn, backward_fn is not None), recording, self._norms[1])
                del recording
                self._descent.weigh(how.descend(loss_perturbed))
        return self._record(loss, loss_perturbed.detach())

    def _ascend(self, loss_fn: LossFn, how: Backward, recording: Recording | None) -> Tensor:
        # in a function of its own, so that nothing of the first graph but what is shared is alive in the second forward
        with self._at_w(how.scale(self._params[0].device), recording) as wanted:
            with nullcontext() if recording is None else recording.record():
                loss = self._losses.at_w(loss_fn)
            self._ascent.check(loss)
            how.ascend(loss, wanted, self._store)
            self._weight = how.share(loss) if self._descent.needs_g else None
        return loss.detach()

    def _record(self, loss: Tensor, loss_perturbed: Tensor | None = None) -> Tensor:
        self.stats = Stats(loss) if loss_perturbed is None else Stats(loss, loss_perturbed, *self._norms)
        self._stepped = False
        return loss

    # The two halves.

    @on_itself
    @contextmanager
    def ascent(self, grad_scale: None | float | Tensor = None) -> Iterator[None]:
        """The pass at w: run the loss's forward and backward inside; on the way out eps is computed.

        Inside, parameters whose gradient is not needed do not require gradients, gradients are not synchronised, and
        the ``.grad`` of the others starts empty; all three are as before afterwards.

        Args:
            grad_scale: Factor that the gradient carries (a loss scale), divided out of g.

        Raises:
            ValueError: No gradient arrived in any selected parameter.
        """
        if self._stages.ahead is not None:
            raise ValueError(f"{self._names} has no pass at w: use SAM.minimize, SAM.backward or SAM.step")
        with self._at_w(grad_scale, None):
            yield

    @contextmanager
    def _at_w(self, grad_scale: Scale, recording: Recording | None) -> Iterator[Sequence[nn.Parameter]]:
        self._eps = self._weight = None
        at = self.at
        self._ascent.prepare(at, None, self._passes)
        drawn = self._ascent.draw(at)
        wanted = self._passes.trainable() if self._stages.full_ascent else drawn
        with self._first.around(), self._passes.at_w(wanted, recording) as grads:  # A
            yield wanted
        found = self._ascent.of_selected(wanted, grads)
        if self._descent.needs_g:
            kept = (wanted, grads) if self._stages.full_ascent else (self._params, found)
            self._descent.keep(*kept, grad_scale, self._weight)
        with torch.no_grad():
            self._perturb(self._ascent.true(found, grad_scale, self.sync), at)  # B, C

    def _perturb(self, g: list[Tensor], at: At, away: bool = False) -> None:
        """eps along g, or away from it."""
        self._eps, norm = self._ascent.eps(self.variant, g, self.rho, self.param_groups, self.eta, at, away)
        self._nonfinite.add(norm)
        self._norms = norm,

    @torch.no_grad()
    def _look_ahead(self) -> bool:
        """eps of an update that has one pass; False where it is not known yet."""
        assert self._stages.ahead is not None
        self._first.look()
        v = self._stages.ahead(self.optimizer, self._params)
        if v is not None:
            self._perturb(v, self.at, away=True)
        return v is not None

    def _finish_plain(self, last: bool) -> None:
        if self._when.active:
            self._descent.finish_plain(self.at, last)
        self._when.m_batch += 1

    @on_itself
    @contextmanager
    def perturbed(self, *, last: bool = True) -> Iterator[None]:
        """The pass at w + eps: run the loss's forward and backward inside; w is copied back on the way out.

        Args:
            last: As for :meth:`backward`, for methods; gradients synchronize as the loop says.

        Raises:
            ValueError: :meth:`ascent` did not run before.
        """
        with self._perturbed(last, accumulate=True):
            yield
        self._record(UNKNOWN, UNKNOWN)

    @contextmanager
    def _perturbed(self, last: bool, accumulate: bool) -> Iterator[None]:
        eps, last = self._eps, last and self._group.synchronizes
        if eps is None:
            raise ValueError("SAM.perturbed() needs an eps: run the loss and its backward() inside SAM.ascent() first")
        self._eps = None
        only = self._stages.ahead is not None
        with self._descent.alone(accumulate), self._passes.at_perturbed(eps, only) as norm:  # E, around D
            self._norms = self._norms[0], norm
            yield
        self._descent.finish(self.at, last)
        self._when.m_batch += 1
