#!/usr/bin/env python3
"""SAM in a plain loop: `python examples/plain_loop.py`. Loops of trainers with one batch an update do the same."""
from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sam import SAM


def train(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """One update per batch."""
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.5)
    for x, y in batches:
        sam.minimize(lambda x=x, y=y: F.cross_entropy(model(x), y))


if __name__ == "__main__":
    torch.manual_seed(0)
    train(timm.create_model("test_resnet", num_classes=10),
          [(torch.randn(8, 3, 64, 64), torch.randint(10, (8,))) for _ in range(4)])
