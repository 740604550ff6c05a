"""Features of many images, pass by pass over them: no more at once than memory allows, shared by the ranks."""
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..evaluation.precision import full_precision
from ..evaluation.ranks import Ranks
from .features import Features
from .rank import CENTRINGS, SLAB, Gram, eigenvalues, ranks

_logger = logging.getLogger(__name__)
_BYTES = 4  # of a feature in float32
_WINDOWS = 8  # in which ranks hand over what memory holds

Pass = dict[str, range]  # layer -> its columns


def plan(n: int, dims: Mapping[str, int], memory: int) -> list[Pass]:
    """Which columns of which layers are taken in each pass over the images.

    Layers with no more features than images are taken as a whole in the first: their rows need not be kept. Of the
    others columns are kept until the end of the pass.

    Args:
        n: Number of images.
        dims: Layer -> number of features.
        memory: Bytes for what is kept.
    """
    room = max(memory // (_BYTES * n) // SLAB * SLAB, SLAB)
    passes: list[Pass] = [{name: range(d) for name, d in dims.items() if d <= n}]
    left = room
    for name, d in dims.items():
        start = 0
        while d > n and start < d:
            take = d - start if d - start <= left else left // SLAB * SLAB
            if take == 0:
                passes.append({})
                left = room
                continue
            passes[-1][name] = range(start, start + take)
            start, left = start + take, left - take
    return [columns for columns in passes if columns]


def measure_rank(features: Features, dims: Mapping[str, int], n: int, memory: int,
                 shares: Sequence[float], group: Ranks, device: torch.device, batches: Callable[[], Any],
                 sizes: Sequence[int], note: Callable[[str, dict[str, Any]], None],
                 tick: Callable[[], None] = lambda: None) -> None:
    """The ranks of several layers, from as few passes over the images as memory allows; all ranks together.

    The first rank has the sums, in the order of the batches: so numbers do not depend on how many ranks there are, nor
    on memory.

    Args:
        features: Of :func:`timm_sam.analyze.features.features_of`.
        dims: Layer -> number of features.
        n: Number of images.
        memory: Bytes for features that are kept on the first rank.
        shares: q, each in (0, 1).
        group: Who shares the work.
        device: Where products and eigenvalues are computed; one that has float64.
        batches: Gives this rank's batches of images (B, C, H, W) on the model's device, in order, anew each time.
        sizes: Of all batches.
        note: Is told of each layer when it is done, on every rank: see :func:`_of`.
        tick: Is called after each batch.
    """
    sums = _Sums(n, dims, device)
    for columns in plan(n, dims, memory):
        _over_images(features, columns, memory, group, batches, sizes, sums, tick)
        for name in columns:
            value = group.run(partial(sums.close, name, shares) if group.primary else _nothing)[0]
            if value is not None:
                note(name, value)


def _nothing() -> None:
    """What other ranks do where the first one computes."""


class _Sums:
    """What the first rank keeps: products of layers that are not complete, and columns until the end of a pass.

    Args:
        n: Number of images.
        dims: Layer -> number of features.
        device: Of the products.
    """

    def __init__(self, n: int, dims: Mapping[str, int], device: torch.device) -> None:
        self._n, self._dims, self._device = n, dims, device
        self._grams: dict[str, Gram] = {}
        self._columns: dict[str, Tensor] = {}

    def take(self, start: int, found: Mapping[str, Any]) -> None:
        """The next rows, of one batch, as arrays (b, c) by layer; ``start`` is the place of the first."""
        for name, part in found.items():
            rows = torch.from_numpy(part)
            if self._dims[name] <= self._n:
                self._gram(name).add(rows)
            else:
                if name not in self._columns:
                    self._columns[name] = torch.empty(self._n, rows.shape[1])
                self._columns[name][start:start + len(rows)] = rows

    def close(self, name: str, shares: Sequence[float]) -> dict[str, Any] | None:
        """At the end of a pass: what is known of a layer, if it is complete."""
        if name in self._columns:
            self._gram(name).add(self._columns.pop(name))
        return _of(self._grams.pop(name), shares, name) if self._gram(name).complete else None

    def _gram(self, name: str) -> Gram:
        if name not in self._grams:
            self._grams[name] = Gram(self._n, self._dims[name], self._device)
        return self._grams[name]


def _over_images(features: Features, columns: Pass, memory: int, group: Ranks, batches: Callable[[], Any],
                 sizes: Sequence[int], sums: _Sums, tick: Callable[[], None]) -> None:
    """One pass: the first rank takes the columns of each batch, in order."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    width = sum(map(len, columns.values()))
    fitting = memory // _WINDOWS // (_BYTES * width * max(sizes))
    window = max(fitting // group.count, 1) * group.count  # of batches, so that each rank has as many
    mine = group.share(range(len(sizes)))
    with full_precision():
        loaded = iter(batches())
        for first in range(0, len(sizes), window):
            wanted = [place for place in mine if first <= place < first + window]

            def share(wanted: Sequence[int] = wanted) -> list[tuple[int, dict[str, Any]]]:
                found = []
                for place in wanted:
                    rows = features(next(loaded))
                    found.append((starts[place], {
                        name: rows[name][:, part.start:part.stop].float().cpu().contiguous().numpy()
                        for name, part in columns.items()}))
                    tick()
                return found

            together = sorted((row for part in group.run(share) for row in part), key=lambda row: row[0])
            group.run(partial(_take, sums, together) if group.primary else _nothing)


def _take(sums: _Sums, together: Sequence[tuple[int, dict[str, Any]]]) -> None:
    for start, found in together:
        sums.take(start, found)


def _of(gram: Gram, shares: Sequence[float], name: str) -> dict[str, Any]:
    """What is known of a layer: n, d, for each centring the rank at each share; nothing of features not finite."""
    value: dict[str, Any] = dict(n=gram.n, d=gram.d, finite=gram.squares < float("inf"))
    if not value["finite"]:
        return dict(value, **{centring: [0] * len(shares) for centring in CENTRINGS})
    size = min(gram.n, gram.d)
    if size > SLAB:
        _logger.info(f"{name}: eigenvalues of {size:,} x {size:,} products")
    for centring in CENTRINGS:
        value[centring] = ranks(eigenvalues(gram, centring), shares)
    return value
