"""The random generators that a pass or an epoch may draw from, saved and set back."""
import ctypes
import functools
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
        self.numpy = None if numpy is None else _numpy_state()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None and self.numpy is not _numpy_state():
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


# NumPy copies its 624 numbers one by one, which takes longer than an eps of a small network. Most passes draw nothing
# from it, and that shows in its memory.

_last: tuple[bytes, Any] = b"", None


def _numpy_state() -> Any:
    """NumPy's state; the same object as the last time, if nothing has been drawn since."""
    global _last
    numpy = sys.modules["numpy"]
    if not _shows():
        return numpy.random.get_state()
    memory = _memory(numpy.random.mtrand._rand)
    if not memory or memory != _last[0]:
        _last = memory, numpy.random.get_state()
    return _last[1]


def _memory(generator: Any) -> bytes:
    """All that makes up a generator's state: the numbers, and in the object itself half of a pair of normal ones."""
    bits = generator._bit_generator
    if type(bits).__name__ != "MT19937":
        return b""
    head = object.__basicsize__  # counts references
    return (ctypes.string_at(bits.ctypes.state_address, 625 * 4)
            + ctypes.string_at(id(generator) + head, type(generator).__basicsize__ - head))


@functools.cache
def _shows() -> bool:
    """Whether this NumPy's memory shows each draw, the second of a pair of normal numbers as well, and nothing else."""
    if sys.implementation.name != "cpython":
        return False
    generator = sys.modules["numpy"].random.RandomState(0)
    try:
        seen = [_memory(generator), _memory(generator)]
        for draw in (generator.random_sample, generator.standard_normal, generator.standard_normal):
            draw()
            seen.append(_memory(generator))
    except (AttributeError, TypeError):
        return False
    return bool(seen[0]) and seen[0] == seen[1] and len(set(seen)) == 4
