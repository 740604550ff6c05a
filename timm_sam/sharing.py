"""Whether the passes share the forward below the first perturbed layer: decided here, and nowhere else.

How it is done is in ``recording.py``. The first updates check that what is kept is what would be computed again; what
shows that it is not, or cannot be, switches sharing off for good, with a reason in words.
"""
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .checkpoints import REASON
from .group import Group, in_group
from .passes import Passes
from .random_state import RandomState
from .recording import Recording, SharedForward

_CHECKED_UPDATES = 3
_TWO_FORWARDS = "two full forwards per update: "
_ONE_PASS = "one forward per update: the method has no pass at w"


def ruled_out(*, share_forward: bool = True, bn_stats: str = "clean", full_ascent: bool = False,
              one_pass: bool = False, whole_batch: bool = True, sharded: bool = False) -> str | None:
    """Why settings of SAM exclude sharing, in a few words, or None if they do not.

    Args:
        share_forward: Whether it is wanted.
        bn_stats: Which passes update running statistics.
        full_ascent: Whether the pass at w computes the gradients of all parameters, or another loss than the mean.
        one_pass: Whether there is no pass at w.
        whole_batch: Whether both passes take the same samples.
        sharded: Whether ranks keep parts of the model.
    """
    if one_pass:
        return _ONE_PASS
    if not share_forward:
        return "sharing is off"
    if sharded:
        return "the model is sharded"
    if bn_stats == "both":
        return "both passes update running statistics"
    if full_ascent:
        return "the method needs a whole pass at w"
    if not whole_batch:
        return "the pass at w takes a part of the batch"
    return None


def obstacle(model: nn.Module) -> str | None:
    """Why the forward of ``model`` cannot be shared, in a few words, or None if it can."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return "the model is scripted"
        if hasattr(module, "_orig_mod"):
            return "the model is compiled as a whole"
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            return "DataParallel runs copies of its modules"
    if is_checkpointed(model.modules()):
        return REASON
    return None


def is_checkpointed(modules: Iterable[nn.Module]) -> bool:
    """Whether ``set_grad_checkpointing`` of timm's models is on in any of the modules."""
    return any(getattr(m, "grad_checkpointing", False) is True for m in modules)


class Sharing:
    """What one SAM has found out about sharing, update by update.

    Args:
        model: The model.
        params: The selected parameters.
        reason: Why settings exclude it (:func:`ruled_out`), or None.
        group: Ranks that may have to agree.
        synchronizes: Whether layers of the model communicate in the forward, so that ranks need the same calls.

    Attributes:
        said: What was decided and why, in words; None before it is known.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], reason: str | None, group: Group,
                 synchronizes: bool) -> None:
        self.said: str | None = None
        self._model = model
        self._params = params
        self._group = group
        self._synchronizes = synchronizes
        self._checks = _CHECKED_UPDATES  # how many are left
        self._switched = [m for m in model.modules() if hasattr(m, "grad_checkpointing")]
        reason = reason or obstacle(model)
        self._shared = None if reason else SharedForward(model, list(params))
        if reason:
            self._say(reason)

    def _say(self, reason: str) -> None:
        self.said = reason if reason == _ONE_PASS else _TWO_FORWARDS + reason

    def _end(self, reason: str) -> None:
        self._shared = None
        self._say(reason)

    def record(self, passes: Passes) -> Recording | None:
        """What keeps the first pass of an update for the second, or None if nothing is shared.

        Args:
            passes: Which know where random numbers may be drawn.
        """
        if self._shared is not None and is_checkpointed(self._switched):  # since SAM was built
            self._end(REASON)
        return None if self._shared is None else Recording(self._shared, passes.devices)

    def answer(self, loss_fn: Callable[[], Tensor], recording: Recording | None, eps_norm: Tensor) -> Tensor:
        """The loss at w + eps, with what the first pass has computed already.

        Args:
            loss_fn: Computes it.
            recording: Of the first pass.
            eps_norm: Norm of the perturbation: without one, an update proves little.
        """
        if recording is None:
            return loss_fn()
        if self._reason_against(recording):
            recording.clear()
            return loss_fn()
        if not self._checks:
            with recording.replay():
                return loss_fn()
        state = RandomState(recording.devices)
        with recording.replay(check=True):
            loss = loss_fn()
        mismatch, last_check = self._agree(recording.mismatch, bool(eps_norm > 0))
        self._checks = 0 if last_check else self._checks - 1
        if mismatch:
            self._end(mismatch)
            del loss
            recording.clear()
            state.restore()
            torch.clear_autocast_cache()  # casts that were made for the check have no graph
            for ddp in self._group.ddp:  # it shares buffers between two forwards, which others may not have to repeat
                ddp.require_forward_param_sync = False
            return loss_fn()
        total = sum(p.numel() for p in self._model.parameters())
        self.said = (f"one forward for both passes through {recording.describe()}, {recording.parameters():,} of "
                     f"{total:,} parameters")
        return loss

    def _reason_against(self, recording: Recording) -> str:
        reason = recording.why_not()
        if not reason and self._checks and recording.uses_perturbed():
            reason, self._shared = "perturbed parameters are used below the module that owns them", None
        if reason:
            if self._checks or not recording.outputs:
                self._say(reason)
            if not recording.outputs:  # nor will there be any next time
                self._shared = None
        return reason

    def _agree(self, mismatch: str, perturbed: bool) -> tuple[str, bool]:
        """A mismatch on any rank, and whether all had a perturbation: layers that synchronize need the same calls."""
        if not (self._synchronizes and in_group()):
            return mismatch, perturbed
        other, unperturbed = self._group.any_of([bool(mismatch), not perturbed], self._params[0].device)
        return mismatch or ("a module on another rank does not repeat its output" if other else ""), not unperturbed
