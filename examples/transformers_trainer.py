#!/usr/bin/env python3
"""SAM in the Trainer of Transformers: `python examples/transformers_trainer.py`.

`pip install transformers accelerate`. The trainer steps; clipping, schedulers and logging stay as they are.
"""
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from timm_sam import SAM


class SAMTrainer(Trainer):
    """Builds SAM when the model is wrapped, and takes both passes where the trainer takes one."""

    sam: SAM | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        if self.sam is None or self.optimizer.optimizer is not self.sam:  # a search has another model in each trial
            self.sam = SAM(self.optimizer.optimizer, model, rho=0.5)
            # in its place: else Accelerate divides gradients by the loss scale once for each of the two
            self.accelerator._optimizers.remove(self.optimizer)
            self.optimizer = self.accelerator.prepare_optimizer(self.sam)
        self.optimizer.train()  # schedule-free ones, after an evaluation
        parts = self.current_gradient_accumulation_steps
        return self.sam.backward(lambda: self.compute_loss(model, inputs).mean(), weigh=lambda loss: loss / parts,
                                 backward_fn=self.accelerator.backward, scaler=self.accelerator.scaler) / parts


class Classifier(nn.Module):
    """A model that computes its loss, as the trainer expects it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


if __name__ == "__main__":
    torch.manual_seed(0)
    images = [{"x": torch.randn(3, 64, 64), "labels": int(torch.randint(10, ()))} for _ in range(32)]
    SAMTrainer(Classifier(timm.create_model("test_resnet", num_classes=10)), TrainingArguments(
        "output", max_steps=4, report_to=[], save_strategy="no", remove_unused_columns=False),
        train_dataset=images).train()
