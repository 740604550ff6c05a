"""What an evaluation keeps of each image beside the scores of its batch."""
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

Kept = dict[str, np.ndarray]
# outputs (B, K), these in the label space (B, C), targets (B,) -> name -> (B, ...)
Look = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


class Collector:
    """Looks at batches as they come, and keeps what it sees.

    Args:
        look: What is kept of a batch.
        places: Place of each batch in the data set, in the order in which they come.
        every: Batches that wait on the device before they are brought to the CPU: nothing waits for the device sooner.
    """

    def __init__(self, look: Look, places: Sequence[int], every: int) -> None:
        self._look, self._places, self._every = look, places, every
        self._waiting: list[dict[str, Tensor]] = []
        self._kept: list[Kept] = []

    def __call__(self, outputs: Tensor, reduced: Tensor, targets: Tensor) -> None:
        self._waiting.append(self._look(outputs, reduced, targets))
        if len(self._waiting) >= self._every:
            self._fetch()

    def by_place(self) -> dict[int, Kept]:
        """What was kept of each batch, by its place in the data set."""
        self._fetch()
        return dict(zip(self._places, self._kept))

    def _fetch(self) -> None:
        with torch.inference_mode():
            self._kept += [{name: value.cpu().numpy() for name, value in batch.items()} for batch in self._waiting]
        self._waiting.clear()


def whole(parts: Iterable[dict[int, Kept]]) -> Kept:
    """The parts of all ranks as one: name -> (N, ...), in the order of the data set."""
    batches = {place: kept for part in parts for place, kept in part.items()}
    kept = [batches[place] for place in sorted(batches)]
    return {name: np.concatenate([batch[name] for batch in kept]) for name in (kept[0] if kept else ())}
