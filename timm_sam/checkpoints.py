"""``torch.utils.checkpoint`` inside a model: noticed, and right also where the pass at w freezes what feeds it.

A reentrant checkpoint gives no gradients at all if none of its inputs requires one, and that is so in the pass at w
where the layers below it are frozen. It also knows no backward pass to chosen parameters. The other kind computes the
same and has neither limit, so it stands in for the reentrant one during that pass.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint as torchs

REASON = "gradient checkpointing computes the forward again"

# what `torch.utils.checkpoint.checkpoint` looks up when it is called, however a model has imported it
_REENTRANT = "CheckpointFunction"
_OTHERS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")  # from 2.15 on


@contextmanager
def without_reentrance(notice: Callable[[str], None]) -> Iterator[None]:
    """Inside, every checkpoint is of the kind that is not reentrant.

    Args:
        notice: Called before the forward of each, with ``REASON``.
    """
    earlier = {name: getattr(torchs, name) for name in (_REENTRANT, *_OTHERS) if hasattr(torchs, name)}

    def noticed(generator: Callable[..., Any]) -> Callable[..., Any]:
        def other(*args: Any, **kwargs: Any) -> Any:
            notice(REASON)
            return generator(*args, **kwargs)
        return other

    try:
        for name, value in earlier.items():
            setattr(torchs, name, _Instead if name == _REENTRANT else noticed(value))
        yield
    finally:
        for name, value in earlier.items():
            setattr(torchs, name, value)


class _Instead:
    """Stands for the autograd function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return torchs.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
