"""A run whose loss or weights stop being finite ends, before it writes them over those that were."""
import argparse
import math
from typing import Any

import torch
from torch import nn

from ..cli.device import Process
from ..norms import is_norm

EXIT_DIVERGED = 1
_FALLEN = 1e-6  # a loss scale of which nothing is left: every update for a long time has overflowed


class Diverged(Exception):
    """Loss or weights are not finite any more; all ranks raise it together. The message is for the user."""

    def __init__(self, message: str, primary: bool) -> None:
        super().__init__(message)
        self.primary = primary


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what train.py has beside timm's flags and SAM's."""
    parser.add_argument_group("Run").add_argument(
        "--allow-nonfinite", action="store_true",
        help="go on when the loss or the weights are not finite any more, as timm's script does")


def are_finite(module: nn.Module) -> bool:
    """Whether all parameters and running statistics are; waits for the device once.

    Other buffers may be infinite on purpose, as masks are.
    """
    tensors = [p.detach() for p in module.parameters()]
    tensors += [b for m in module.modules() if is_norm(m) for b in m.buffers(recurse=False) if b.is_floating_point()]
    if not tensors:
        return True
    device = tensors[0].device
    return bool(torch.stack([t.isfinite().all().to(device) for t in tensors]).all())


class Watch:
    """Ends a run that has diverged.

    Args:
        args: ``allow_nonfinite`` counts.
        process: This one. Ranks decide together: their running statistics differ.
        module: The one that is trained.
        scaler: Of the loss, or None. One leaves out the updates that overflow, so that one loss says nothing.
    """

    def __init__(self, args: argparse.Namespace, process: Process, module: nn.Module, scaler: Any) -> None:
        self._on = not args.allow_nonfinite
        self._process, self._module, self._scaler = process, module, scaler

    def loss(self, epoch: int, update: int, value: float) -> None:
        """To be called with the average loss of the epoch so far, over all ranks.

        Raises:
            Diverged: It is not finite, and no loss scaler makes up for that.
        """
        if not self._on or math.isfinite(value):
            return
        if self._scaler is None or self._scaler.get_scale() < _FALLEN:
            raise self._diverged("the training loss is", epoch, update)
        self.weights(epoch, update)

    def weights(self, epoch: int, update: int) -> None:
        """To be called before they are saved. Every rank has to call it.

        Raises:
            Diverged: They are not finite, on this rank or another one.
        """
        if self._on and self._process.mean(float(are_finite(self._module))) < 1:
            raise self._diverged("weights or running statistics are", epoch, update)

    def _diverged(self, what: str, epoch: int, update: int) -> Diverged:
        return Diverged(
            f"{what} not finite any more, in epoch {epoch}, at update {update} of the run; what was saved before is "
            f"kept. Look for images or targets that are not finite, lower --lr or add --clip-grad; "
            f"--allow-nonfinite goes on all the same", self._process.primary)
