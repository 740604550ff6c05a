"""Float32 arithmetic without shortcuts."""
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """TF32 and reduced-precision float32 off in cuBLAS, cuDNN and oneDNN; restored after.

    cuDNN's algorithms are deterministic, and not chosen by their speed of the moment, which each process would do for
    itself: numbers do not depend on how many there are. PyTorch has two interfaces to the same settings, and reading
    the old one raises where the new one was used: each is saved if it can be read.
    """
    b = torch.backends
    libraries = ((b.cuda, ("matmul",)), (b.cudnn, ("conv", "rnn")), (b.mkldnn, ("matmul", "conv", "rnn")))
    # older releases have the old interface only
    owners: list[Any] = [getattr(library, op, None) for library, ops in libraries for op in ops]
    owners = [owner for owner in owners if hasattr(owner, "fp32_precision")]
    precisions = [o.fp32_precision for o in owners]
    matmul, cudnn = _readable(torch.get_float32_matmul_precision), _readable(lambda: b.cudnn.allow_tf32)
    cudnn_before = b.cudnn.benchmark, b.cudnn.deterministic
    try:
        b.cudnn.benchmark, b.cudnn.deterministic = False, True
        torch.set_float32_matmul_precision("highest")
        b.cudnn.allow_tf32 = False
        for owner in owners:
            if owner.fp32_precision not in ("ieee", "none"):
                owner.fp32_precision = "ieee"
        yield
    finally:
        b.cudnn.benchmark, b.cudnn.deterministic = cudnn_before
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            b.cudnn.allow_tf32 = cudnn
        for owner, precision in zip(owners, precisions):
            if owner.fp32_precision != precision:
                owner.fp32_precision = precision


def _readable(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None
