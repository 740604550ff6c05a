#!/usr/bin/env python3
"""SAM in Lightning, with automatic optimization: `python examples/lightning_module.py`.

`pip install lightning`. SAM is given what the strategy trains: that is the DistributedDataParallel where there is one.
With `precision="16-mixed"` Lightning runs the closure itself, and with `accumulate_grad_batches` for all batches but
the last: for both, optimize manually (lightning_accumulation.py).
"""
import lightning
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_sam import SAM


class Classifier(lightning.LightningModule):
    """Any training step; only the optimizer is another one."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return SAM(sgd, self.trainer.strategy.model, rho=0.5)


if __name__ == "__main__":
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 64, 64), torch.randint(10, (8,))) for _ in range(4)]
    lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(
        Classifier(timm.create_model("test_resnet", num_classes=10)),
        torch.utils.data.DataLoader(batches, batch_size=None))
