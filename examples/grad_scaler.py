#!/usr/bin/env python3
"""SAM with torch.amp.GradScaler, clipping and gradient accumulation: `python examples/grad_scaler.py`."""
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sam import SAM


def train(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], parts: int = 2, autocast: bool = True) -> None:
    """One update per ``parts`` batches; each batch has a perturbation of its own."""
    device = next(model.parameters()).device.type
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.5)
    scaler = torch.amp.GradScaler(device, init_scale=2.0 ** 8)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device, torch.float16, enabled=autocast):
            return F.cross_entropy(model(x), y)

    for i, (x, y) in enumerate(batches):
        last = (i + 1) % parts == 0
        sam.backward(lambda x=x, y=y: loss_of(x, y), weigh=lambda loss: loss / parts, scaler=scaler, last=last)
        if last:
            scaler.unscale_(sam)
            nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            scaler.step(sam)
            scaler.update()
            sam.zero_grad()


if __name__ == "__main__":
    torch.manual_seed(0)
    train(timm.create_model("test_resnet", num_classes=10),
          [(torch.randn(8, 3, 64, 64), torch.randint(10, (8,))) for _ in range(4)])
