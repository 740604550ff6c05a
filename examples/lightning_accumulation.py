#!/usr/bin/env python3
"""SAM in Lightning, with gradient accumulation: `python examples/lightning_accumulation.py`.

`pip install lightning`. Manual optimization: each batch has a perturbation of its own, and `manual_backward`
synchronizes under DDP. With `precision="16-mixed"`, give `backward` also
`scaler=self.trainer.precision_plugin.scaler`.
"""
import lightning
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sam import SAM


class Classifier(lightning.LightningModule):
    """One update per ``parts`` batches."""

    def __init__(self, net: nn.Module, parts: int = 2) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.parts = parts

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        sam = self.optimizers()
        last = (index + 1) % self.parts == 0
        sam.backward(lambda: F.cross_entropy(self.net(x), y), weigh=lambda loss: loss / self.parts,
                     backward_fn=self.manual_backward, last=last)
        if last:
            sam.step()
            sam.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return SAM(sgd, self.trainer.strategy.model, rho=0.5)


if __name__ == "__main__":
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 64, 64), torch.randint(10, (8,))) for _ in range(4)]
    lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(
        Classifier(timm.create_model("test_resnet", num_classes=10)),
        torch.utils.data.DataLoader(batches, batch_size=None))
