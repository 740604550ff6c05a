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
    grams: dict[str, Gram] = {}
    for columns in plan(n, dims, memory):
        kept: dict[str, Tensor] = {}

        def take(rows: Sequence[tuple[int, dict[str, Tensor]]], columns: Pass = columns,
                 kept: dict[str, Tensor] = kept) -> None:
            for start, found in rows:
                for name, part in found.items():
                    if dims[name] <= n:
                        if name not in grams:
                            grams[name] = Gram(n, dims[name], device)
                        grams[name].add(part)
                    else:
                        if name not in kept:
                            kept[name] = torch.empty(n, len(columns[name]))
                        kept[name][start:start + len(part)] = part

        _over_images(features, columns, memory, group, batches, sizes, take, tick)
        for name in columns:
            def add(name: str = name, kept: dict[str, Tensor] = kept) -> dict[str, Any] | None:
                if not group.primary:
                    return None
                if name in kept:
                    if name not in grams:
                        grams[name] = Gram(n, dims[name], device)
                    grams[name].add(kept.pop(name))
                if not grams[name].complete:
                    return None
                return _of(grams.pop(name), shares, name)

            value = group.run(add)[0]
            if value is not None:
                note(name, value)


def _over_images(features: Features, columns: Pass, memory: int, group: Ranks, batches: Callable[[], Any],
                 sizes: Sequence[int], take: Callable[[Sequence[tuple[int, dict[str, Tensor]]]], None],
                 tick: Callable[[], None]) -> None:
    """One pass: the first rank takes the columns of each batch, in order, with the place of its first row."""
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
            group.run(partial(_hand_over, together, take) if group.primary else lambda: None)


def _hand_over(together: Sequence[tuple[int, dict[str, Any]]],
               take: Callable[[Sequence[tuple[int, dict[str, Tensor]]]], None]) -> None:
    take([(start, {name: torch.from_numpy(rows) for name, rows in found.items()}) for start, found in together])


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
