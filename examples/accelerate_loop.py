#!/usr/bin/env python3
"""SAM in a loop of Accelerate, with gradient accumulation: `accelerate launch examples/accelerate_loop.py`.

`pip install accelerate`. The model is prepared first: SAM has to know what Accelerate wraps it in.
"""
from collections.abc import Iterable

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from timm_sam import SAM


def train(accelerator: Accelerator, net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """As many batches per update as ``Accelerator(gradient_accumulation_steps=)`` says."""
    model = accelerator.prepare(net)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.5)
    optimizer = accelerator.prepare(sam)
    for x, y in batches:
        with accelerator.accumulate(model):
            sam.backward(lambda x=x, y=y: F.cross_entropy(model(x), y), backward_fn=accelerator.backward,
                         scaler=accelerator.scaler)
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    torch.manual_seed(0)
    here = Accelerator(gradient_accumulation_steps=2)
    train(here, timm.create_model("test_resnet", num_classes=10), [
        (torch.randn(8, 3, 64, 64).to(here.device), torch.randint(10, (8,)).to(here.device)) for _ in range(4)])
