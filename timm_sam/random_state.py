"""The random generators that a forward pass may draw from, saved and set back."""
import random
import sys

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
