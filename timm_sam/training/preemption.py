"""Stopping on SIGTERM, all ranks after the same update."""
import signal
import threading
from collections import deque
from typing import Any

import torch

from ..cli.device import Process

EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped by SIGTERM with a checkpoint written, resume it


class Preempted(Exception):
    """The run was asked to stop, and has written a checkpoint."""


class Preemption:
    """Notices SIGTERM, and lets all ranks stop after the same update.

    The signal may reach the ranks at different moments, or some of them only. Who notices it says so in the process
    group's store; the first rank writes there, after its update u, that all stop after u + 3. All read the store after
    each update n, when their device has finished n - 2: gradients are synchronized in every update, so the first rank
    has taken part in n - 2, and all that it wrote before, for stops after n or earlier, is there. (On an accelerator
    the host runs ahead of the device, and without that wait also of the first rank.)

    Args:
        process: This one.
    """

    _WANTED, _AFTER = "timm_sam/stop", "timm_sam/stop_after"
    _AHEAD = 2  # updates that the host may be ahead of the device

    def __init__(self, process: Process) -> None:
        self.noticed = False
        self.stop_after: int | None = None
        self.store: Any = None
        if process.distributed:
            from torch.distributed.distributed_c10d import _get_default_store
            self.store = _get_default_store()
        self.primary = process.primary
        self.accelerator = None if process.device.type == "cpu" else torch.get_device_module(process.device)
        self.updates_under_way: deque[Any] = deque()
        self.handles = threading.current_thread() is threading.main_thread()  # Python lets no other set a handler
        self.earlier = signal.signal(signal.SIGTERM, self._notice) if self.handles else None

    def _notice(self, number: int, frame: Any) -> None:
        self.noticed = True

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """SIGTERM does again what it did before."""
        if self.handles:
            signal.signal(signal.SIGTERM, self.earlier)

    def together(self) -> None:
        """Waits for all ranks: torchrun ends the others when the first one does."""
        if self.store is not None:
            torch.distributed.barrier()

    def should_stop(self, update: int) -> bool:
        """Whether the run ends now, after the ``update``-th update of all."""
        if self.store is None:
            return self.noticed
        if self.accelerator is not None:
            self.updates_under_way.append(self.accelerator.Event())
            self.updates_under_way[-1].record()
            if len(self.updates_under_way) > self._AHEAD:
                self.updates_under_way.popleft().synchronize()
        if self.stop_after is None:
            if self.noticed:
                self.store.set(self._WANTED, "1")
            if self.primary and (self.noticed or self.store.check([self._WANTED])):
                self.stop_after = update + self._AHEAD + 1
                self.store.set(self._AFTER, str(self.stop_after))
            elif not self.primary and self.store.check([self._AFTER]):
                self.stop_after = int(self.store.get(self._AFTER))
        return self.stop_after is not None and update >= self.stop_after
