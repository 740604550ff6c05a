"""The whole of AutoAttack: its ``standard`` version, by the package pyautoattack where that is installed.

APGD-CE, APGD-T, FAB-T and Square, each on what still stands (Croce & Hein, ICML 2020, https://arxiv.org/abs/2003.01690).
"""
import contextlib
import importlib.util
import sys

import torch
from torch import Tensor, nn

from ..precision import full_precision
from .attack import TARGETS, Attacked

PACKAGE = "pyautoattack"
ATTACKS = ("APGD-CE", "APGD-T", "FAB-T", "Square")
_NORMS = {"l2": "L2", "linf": "Linf"}


def is_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def standard(model: nn.Module, images: Tensor, labels: Tensor, norm: str, radius: float, seed: int) -> Attacked:
    """Attacks one batch.

    Random states and gradients are as before afterwards, and nothing is printed to stdout. The draws
    depend on the batch, not on its place in the data set.

    Args:
        model: Images in [0, 1], (B, C, H, W), to logits, (B, K), K >= 4; in evaluation mode and float32.
        images: (B, C, H, W), float32, in [0, 1].
        labels: (B,), int64, in 0..K-1.
        norm: "linf" or "l2".
        radius: Of the ball, > 0, in units of [0, 1].
        seed: Of each attack.

    Returns:
        Per sample, whether it is right clean, and under all attacks. ``no_gradient`` is not looked at: Square needs
        none.

    Raises:
        ValueError: There are fewer than four classes.
    """
    from pyautoattack import AutoAttack
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.inference_mode(False), full_precision(), torch.random.fork_rng(devices), contextlib.redirect_stdout(
            sys.stderr):
        images, labels = images.detach().clone(), labels.clone()
        with torch.no_grad():
            logits = model(images)
        classes = logits.shape[1]
        if classes < 4:
            raise ValueError(f"the model gives {classes} logits: targeted DLR needs 4 or more classes")
        finite = logits.isfinite().all(1)
        found = AutoAttack(model, norm=_NORMS[norm], eps=radius, seed=seed, version="standard", device=images.device)
        # the package's own nine would be more than there are
        found.apgd_targeted.n_target_classes = found.fab.n_target_classes = min(TARGETS, classes - 1)
        grads = [parameter.grad for parameter in model.parameters()]
        _, predicted = found.run_standard_evaluation(images, labels, batch_size=len(images))
        for parameter, grad in zip(model.parameters(), grads):
            parameter.grad = grad
        clean = finite & (logits.argmax(1) == labels)
        robust = clean & (predicted.to(labels.device) == labels)
        return Attacked(clean, robust, ~finite, torch.zeros_like(clean))
