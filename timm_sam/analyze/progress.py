"""How far an analysis is, in log lines: after each batch, and within one that takes long."""
import logging
import time
from typing import Any

import torch

from .objective import Loss, Points

_logger = logging.getLogger(__name__)

GRADIENT = 3  # forward passes that a forward and backward pass takes as long as
_EVERY = 15.0  # seconds between two lines within a batch


class Progress:
    """Work done and work ahead, in forward passes of one batch.

    Args:
        verbose: Whether this process logs.
    """

    def __init__(self, verbose: bool) -> None:
        self.verbose, self.title, self.place = verbose, "", ""
        self._done, self._ahead = 0.0, 0.0
        self._started = self._said = time.monotonic()

    def begin(self, what: str, name: str, number: int, count: int) -> None:
        """Says what is measured, of which checkpoint, the ``number``-th from 0 of so many."""
        self.title = f"{what}: {name} ({number + 1} of {count})"

    def expect(self, ahead: float, place: str) -> None:
        """Says how much is ahead from now on, and where in it we are."""
        self._ahead, self.place = ahead, place

    def tick(self, passes: float = 1.0) -> None:
        """Something is done; now and then that is logged."""
        self._done += passes
        self._ahead -= passes
        if time.monotonic() - self._said >= _EVERY:
            self.say()

    def counting(self, loss: Loss) -> Loss:
        """The loss, of which each evaluation counts."""
        def counted(weights: Points) -> Any:
            value = loss(weights)
            self.tick(GRADIENT if torch.is_grad_enabled() else 1)
            return value
        return counted

    def say(self) -> None:
        """Logs how far it is."""
        self._said = time.monotonic()
        if self.verbose:
            ahead = max(0.0, self._ahead)
            left = (self._said - self._started) / max(self._done, 1.0) * ahead
            _logger.info(f"{self.title}  {self.place}  {100 * self._done / max(self._done + ahead, 1.0):>3.0f} %  "
                         f"Left: {left:.0f}s")
