"""The random generators that a pass or an epoch may draw from, saved and set back."""
import random
import sys
from typing import Any

import torch

_NO_GENERATOR = ("cpu", "meta")  # the CPU's generator is always kept


class RandomState:
    """The present state of torch's generators (CPU and ``devices``), Python's and, if it is imported, NumPy's."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = {d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type not in _NO_GENERATOR}
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def to_dict(self) -> dict[str, Any]:
        """The state as what ``torch.load(weights_only=True)`` reads: tensors, numbers and text."""
        version, python, gauss = self.python
        state: dict[str, Any] = dict(
            cpu=self.cpu, devices={str(d): s for d, s in self.devices.items()},
            python=[version, torch.tensor(python, dtype=torch.int64), gauss])
        if self.numpy is not None:
            name, keys, *rest = self.numpy
            state["numpy"] = [name, torch.tensor(keys.tolist(), dtype=torch.int64), *map(float, rest)]
        return state

    @classmethod
    def from_dict(cls, state: dict[str, Any], device: torch.device | None = None) -> "RandomState":
        """What :meth:`to_dict` made.

        Args:
            state: It.
            device: Takes the state of the one device of its type that there is: a process may go on with another
                device than it had. States of other types are left out.
        """
        self = cls.__new__(cls)
        self.cpu = state["cpu"]
        saved = {torch.device(d).type: s for d, s in state["devices"].items()}
        self.devices = {device: saved[device.type]} if device is not None and device.type in saved else {}
        version, python, gauss = state["python"]
        self.python = (version, tuple(python.tolist()), gauss)
        self.numpy = None
        if "numpy" in state:
            import numpy
            name, keys, pos, has_gauss, cached = state["numpy"]
            self.numpy = (name, numpy.array(keys.tolist(), dtype=numpy.uint32), int(pos), int(has_gauss), cached)
        return self
