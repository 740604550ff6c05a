#!/usr/bin/env python3
"""SAM in a loop of Lightning Fabric: `python examples/fabric_loop.py`.

`pip install lightning`. The model is set up first: SAM has to know what Fabric wraps it in.
"""
from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from timm_sam import SAM


def train(fabric: Fabric, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """One update per batch."""
    model = fabric.setup_module(net)
    sam = fabric.setup_optimizers(SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.5))
    for x, y in batches:
        sam.zero_grad()
        sam.backward(lambda x=x, y=y: F.cross_entropy(model(x), y), backward_fn=fabric.backward)
        sam.step()


if __name__ == "__main__":
    torch.manual_seed(0)
    here = Fabric(devices=1)
    train(here, timm.create_model("test_resnet", num_classes=10), [
        (here.to_device(torch.randn(8, 3, 64, 64)), here.to_device(torch.randint(10, (8,)))) for _ in range(4)])
