#!/usr/bin/env python3
"""What SAM adds to an update beside its two passes, on a network so small that little else is measured.

    python benchmarks/overhead.py

Ten tensors, eager, one thread on the CPU. The two passes are written out: zeroing, forward and backward twice, the base
step. Both take turns; of each the median is printed, as time on the clock and as the thread's own time, which another
load of the machine changes less.
"""
import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sam import SAM


def network() -> nn.Module:
    """Ten tensors: three linear layers, two normalization layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(),
                         nn.Linear(16, 4))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator)


def forms() -> dict[str, Callable[[], object]]:
    """Name -> one update."""
    x, y = batch()

    def by_hand() -> Callable[[], object]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

        def update() -> None:
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
            optimizer.step()

        return update

    def by_sam(params: str, share: bool) -> Callable[[], object]:
        model = network()
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9), model, rho=0.05, params=params,
                  share_forward=share)
        return lambda: sam.minimize(lambda: F.cross_entropy(model(x), y))

    return {"two passes": by_hand(), "SAM, all": by_sam("all", True), "SAM, onlynorm": by_sam("onlynorm", True),
            "SAM, onlynorm, two forwards": by_sam("onlynorm", False)}


def measured(updates: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Name -> medians in ms: on the clock, and of the thread."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in updates}
    for turn in range(rounds + 20):
        for name, update in updates.items():
            clock, thread = time.perf_counter(), time.thread_time()
            update()
            taken = (time.perf_counter() - clock) * 1e3, (time.thread_time() - thread) * 1e3
            if turn >= 20:  # the first ones warm up, and look at more
                times[name].append(taken)
    return {name: (statistics.median(t[0] for t in found), statistics.median(t[1] for t in found))
            for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="updates of each (default: 1000)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measured(forms(), args.rounds)
    clock, thread = found["two passes"]
    print(f"{'':28} {'clock':>8} {'above':>8} {'thread':>8} {'above':>8}  ms")
    for name, (a, b) in found.items():
        print(f"{name:28} {a:8.3f} {a - clock:8.3f} {b:8.3f} {b - thread:8.3f}")


if __name__ == "__main__":
    main()
