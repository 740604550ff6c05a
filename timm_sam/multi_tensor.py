"""Operations on lists of tensors that are a few kernels for the whole list, not a few for each tensor.

On an accelerator a hundred small tensors cost what their kernels' launches cost. torch's ``_foreach`` operations take
one for all, but only where all tensors agree in device, type and strides, and a 0-dim factor with them in type. The
functions here see to that. Lists that are mixed still give the right result.
"""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

SMALL = 8192  # elements of a tensor, in the mean
PIECE = 32768  # elements, whose copy in float64 stays in the cache of a core
_HALVES = (torch.float16, torch.bfloat16)
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def widest(device: torch.device) -> torch.dtype:
    """float64, but float32 on devices that have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def dense(tensor: Tensor) -> Tensor:
    """The tensor with all its elements in memory as they are: itself, if it is not sparse, nor conjugated lazily."""
    return (tensor if tensor.layout is torch.strided else tensor.to_dense()).resolve_conj()


def as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Complex tensors as real ones in the same memory, of twice as many elements; the others as they are."""
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def by_factor(operation: Callable[..., Any], tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """``operation(tensors, factor)``, such as ``torch._foreach_div``, with a 0-dim factor of any type and device."""
    kinds = {(t.device, t.dtype) for t in tensors}
    factors = {kind: factor.to(*kind, non_blocking=True) for kind in kinds}
    if len(kinds) == 1:
        return list(operation(list(tensors), next(iter(factors.values()))))
    return [operation([t], factors[t.device, t.dtype])[0] for t in tensors]


def converted(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The tensors in these types; one that has its type already is given back itself."""
    result = list(tensors)
    others = [i for i, (t, dtype) in enumerate(zip(tensors, dtypes)) if t.dtype != dtype]
    for i in others:
        result[i] = torch.empty_like(tensors[i], dtype=dtypes[i])
    copy_([result[i] for i in others], [tensors[i] for i in others])
    return result


def is_half(tensors: Sequence[Tensor]) -> bool:
    """Whether any of them is of half precision."""
    return any(t.dtype in _HALVES for t in tensors)


def at_least_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """float16 and bfloat16 tensors as float32, the others as they are."""
    if not is_half(tensors):
        return list(tensors)
    return converted(tensors, [torch.float32 if t.dtype in _HALVES else t.dtype for t in tensors])


def add_(targets: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Adds to each target."""
    if targets:
        torch._foreach_add_(list(targets), list(others))


def _in_memory(t: Tensor) -> Tensor:
    """All elements of a tensor in one dimension, in the order that they have in memory if there are no gaps."""
    if t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last):
        return t.as_strided((t.numel(),), (1,))
    return t.reshape(-1)


def pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, large ones of float32 on the CPU cut up, for what sums over all of their elements in float64.

    To sum in another type than theirs, torch converts whole tensors first.
    """
    result: list[Tensor] = []
    for t in tensors:
        if t.numel() > PIECE and t.is_cpu and t.dtype is torch.float32:
            result += _in_memory(t).split(PIECE)
        else:
            result.append(t)
    return result


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """l2 norm over all elements of all tensors, as a 0-dim float64 tensor on the device of the first.

    Squares of float32 gradients leave float32's range long before the gradients do. Where there is no float64 (mps),
    the result is float32.
    """
    device = tensors[0].device
    if len(tensors) == 1 or together(tensors):
        return torch.linalg.vector_norm(tensors[0] if len(tensors) == 1 else flat(tensors), dtype=widest(device))
    norms = torch._foreach_norm(pieces(tensors), 2, widest(device))
    return torch.linalg.vector_norm(torch.stack([n.to(device, non_blocking=True) for n in norms]))


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product over all elements of all tensors, as a 0-dim tensor of the widest type.

    The products are taken in float32 or wider, the sum in float64 where there is one.
    """
    device = a[0].device
    if a is b:
        return global_norm(at_least_float32(a)).square()
    a, b = at_least_float32(a), at_least_float32(b)
    if all(x.is_cpu and x.dtype == y.dtype for x, y in zip(a, b)) and not together(a):
        in_order = [(x, y) if x.stride() == y.stride() else (x.contiguous(), y.contiguous()) for x, y in zip(a, b)]
        a, b = (pieces(tensors) for tensors in zip(*in_order))
        return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b)]).sum()
    products = torch._foreach_mul(a, b)
    flat = torch.cat([t.reshape(-1).to(device, non_blocking=True) for t in products])
    return flat.sum(dtype=widest(device))


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target."""
    if not targets:
        return
    groups: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources):
        kind = target.device, target.dtype, source.device, source.dtype
        pair = groups.setdefault(kind, ([], []))
        pair[0].append(target)
        pair[1].append(source)
    for pair in groups.values():
        torch._foreach_copy_(*pair)


def constants_like(values: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor one of its shape and strides that holds its 0-dim value everywhere."""
    groups: dict[tuple, list[int]] = {}
    for i, value in enumerate(values):
        groups.setdefault((value.device, value.dtype), []).append(i)
    result = list(tensors)
    for group in groups.values():
        flat = torch.cat([values[i].expand(tensors[i].numel()) for i in group])
        for i, part in zip(group, flat.split([tensors[i].numel() for i in group])):
            result[i] = _with_strides(part, tensors[i])
    return result


def _with_strides(part: Tensor, like: Tensor) -> Tensor:
    # all elements are the same, so any order of them will do
    reach = sum((size - 1) * stride for size, stride in zip(like.shape, like.stride())) + 1
    if reach > part.numel() or not part.numel():
        return part.view(like.shape)
    return part.as_strided(like.shape, like.stride(), part.storage_offset())


def zero_unless_(condition: Tensor, tensors: Sequence[Tensor]) -> None:
    """Sets float32 or float64 tensors to zero where the 0-dim condition is false, whatever they hold.

    Zero times inf or nan is nan; zero times the integer with their bits is zero, and one times it leaves each bit.
    """
    times_([t.view(_INTEGERS[t.dtype]) for t in tensors], condition)


def times_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies each by a 0-dim factor of any type and device."""
    by_factor(_times_, tensors, factor)


def _times_(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    torch._foreach_mul_(tensors, factor)
    return tensors


def together(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors are better computed with as one.

    On the CPU an operation on many tensors is one for each, which takes longer than to copy small ones.
    """
    size, dtype = 0, tensors[0].dtype
    for t in tensors:
        if not t.is_cpu or t.dtype is not dtype or t.layout is not torch.strided:
            return False
        size += t.numel()
    return len(tensors) > 1 and size <= SMALL * len(tensors)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements one after the other, in a copy."""
    return _flatten_dense_tensors(tensors)


def parts(whole: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of what :func:`flat` gave, or was computed of it, in the shapes of ``like``."""
    return list(_unflatten_dense_tensors(whole, like))


class Backup:
    """Values of tensors, to be put back: the memory for them is taken once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.values: list[Tensor] = []
        self._kinds: list[tuple[Any, ...]] = []
        self._copy: Callable[[list[Tensor], list[Tensor]], Any] = copy_

    def save(self, tensors: Sequence[Tensor]) -> None:
        """Copies what ``tensors`` hold; without gradients, as :meth:`restore`."""
        self.tensors = list(tensors)
        kinds = [(t.dtype, t.device, t.shape) for t in self.tensors]
        if kinds != self._kinds:
            self.values = [torch.empty_like(t) for t in self.tensors]
            self._kinds = kinds
            self._copy = torch._foreach_copy_ if len({kind[:2] for kind in kinds}) == 1 else copy_
        self._copy(self.values, self.tensors)

    def restore(self) -> None:
        """Copies it back."""
        self._copy(self.tensors, self.values)
