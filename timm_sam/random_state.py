"""The random generators that a pass or an epoch may draw from, saved and set back."""
import _random
import ctypes
import functools
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

_NO_GENERATOR = ("cpu", "meta")  # the CPU's generator is always kept


class RandomState:
    """The present state of torch's generators (CPU and ``devices``), Python's and, if it is imported, NumPy's."""

    def __init__(self, devices: set[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = {d: torch.get_device_module(d).get_rng_state(d) for d in devices if d.type not in _NO_GENERATOR}
        self.python = _python().state()
        self.numpy = _numpy().state() if sys.modules.get("numpy") else None

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        if self.python is not _python().state():
            random.setstate(self.python)
        if self.numpy is not None and self.numpy is not _numpy().state():
            sys.modules["numpy"].random.set_state(self.numpy)

    def to_dict(self) -> dict[str, Any]:
        """The state as what ``torch.load(weights_only=True)`` reads: tensors, numbers and text."""
        version, python, gauss = self.python
        state: dict[str, Any] = dict(
            cpu=self.cpu, devices={str(d): s for d, s in self.devices.items()},
            python=[version, torch.tensor(python, dtype=torch.int64), gauss])
        if isinstance(self.numpy, tuple):
            name, keys, *rest = self.numpy
            state["numpy"] = [name, torch.tensor(keys.tolist(), dtype=torch.int64), *map(float, rest)]
        elif self.numpy is not None:  # of another generator than the usual one, with integers of up to 128 bits
            state["numpy"] = _without_arrays(self.numpy)
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
            if isinstance(state["numpy"], dict):
                self.numpy = state["numpy"]
                return self
            name, keys, pos, has_gauss, cached = state["numpy"]
            self.numpy = (name, numpy.array(keys.tolist(), dtype=numpy.uint32), int(pos), int(has_gauss), cached)
        return self


# Both copy 624 numbers one by one, which takes longer than an eps of a small network. Most passes draw nothing from
# them, and that shows in their memory.

_HEAD = object.__basicsize__  # counts references


def _bytes_at(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


class _Memory:
    """What makes up the state of a generator of CPython's, read again and again; empty where that is not known.

    Args:
        generator: ``random.Random`` or ``numpy.random.RandomState``; kept, so that its memory stays its own.
    """

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._is_python = isinstance(generator, _random.Random)
        kind = _random.Random if self._is_python else type(generator)
        self._object = _bytes_at(id(generator) + _HEAD, kind.__basicsize__ - _HEAD)
        self._bits: Any = None
        self._numbers: Any = None

    def read(self) -> tuple[Any, ...]:
        """The numbers, and half of a pair of normal ones."""
        if self._is_python:
            return self._object.raw, self._generator.gauss_next
        bits = self._generator._bit_generator  # may be another one by now
        if bits is not self._bits:
            known = type(bits).__name__ == "MT19937"
            self._bits, self._numbers = bits, _bytes_at(bits.ctypes.state_address, 625 * 4) if known else None
        return () if self._numbers is None else (self._object.raw, self._numbers.raw)


def _shows(kind: Callable[[int], Any], draws: Sequence[Callable[[Any], Any]]) -> bool:
    """Whether memory shows each draw, the second of a pair of normal numbers as well, and nothing else."""
    if sys.implementation.name != "cpython":
        return False
    try:
        generator = kind(0)
        memory = _Memory(generator)
        seen = [memory.read(), memory.read()]
        for draw in draws:
            draw(generator)
            seen.append(memory.read())
    except (AttributeError, TypeError):
        return False
    changed = all(a != b for i, a in enumerate(seen[1:]) for b in seen[i + 2:])
    return bool(seen[0]) and seen[0] == seen[1] and changed


class _Watched:
    """The state of a global generator, copied only when it has changed.

    Args:
        generator: It.
        copy: Copies its state.
        draws: Draw a number of such a generator: all must show.
    """

    def __init__(self, generator: Any, copy: Callable[[], Any], draws: Sequence[Callable[[Any], Any]]) -> None:
        self._memory = _Memory(generator) if _shows(type(generator), draws) else None
        self._copy = copy
        self._seen: tuple[Any, ...] = ()
        self._state: Any = None

    def state(self) -> Any:
        """The state; the same object as the last time, if nothing has been drawn since."""
        seen = () if self._memory is None else self._memory.read()
        if not seen or seen != self._seen:
            self._seen, self._state = seen, self._copy()
        return self._state


@functools.cache
def _python() -> _Watched:
    # not that of random.random, which tests put other functions in the place of
    generator = getattr(random.getstate, "__self__", None)
    return _Watched(generator, random.getstate,
                    [lambda g: g.random(), lambda g: g.gauss(0, 1), lambda g: g.gauss(0, 1)])


def _without_arrays(state: Any) -> Any:
    """The state with lists for arrays, which files of weights don't hold."""
    if isinstance(state, dict):
        return {name: _without_arrays(part) for name, part in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state


def _numpy_state() -> Any:
    """A tuple as NumPy has always given it; of another generator than MT19937 a dictionary."""
    state = sys.modules["numpy"].random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return state
    return "MT19937", state["state"]["key"], state["state"]["pos"], state["has_gauss"], state["gauss"]


@functools.cache
def _numpy() -> _Watched:
    numpy = sys.modules["numpy"]
    return _Watched(numpy.random.mtrand._rand, _numpy_state,
                    [lambda g: g.random_sample(), lambda g: g.standard_normal(), lambda g: g.standard_normal()])
