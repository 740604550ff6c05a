"""The loss of one batch as a function of some of a model's weights, which themselves stay as they are.

Weights are w + T u: T = abs(w) elementwise, or 1. All of it is a function of u, so that the sets that are searched are
ordinary boxes and balls, nothing is divided by T, and a weight that is exactly 0 does not move under T = abs(w).
"""
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

Points = list[Tensor]
Loss = Callable[[Points], Tensor]  # some weights -> the mean loss of a batch, 0-dim


def normalized_logits(logits: Tensor) -> Tensor:
    """Logits without their mean and with Euclidean length 1, per sample; (B, K)."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True).clamp_min(1e-10)


def loss_range(classes: int) -> float:
    """Largest minus smallest cross entropy that normalized logits of so many classes, >= 2, can have."""
    share, rest = math.sqrt((classes - 1) / classes), 1 / math.sqrt(classes * (classes - 1))
    best = math.log(math.exp(share) + (classes - 1) * math.exp(-rest)) - share
    worst = math.log(math.exp(-share) + (classes - 1) * math.exp(rest)) + share
    return worst - best


def batch_loss(model: nn.Module, names: Sequence[str], images: Tensor, labels: Tensor, normalize: bool,
               reduce: Callable[[Tensor], Tensor] = lambda logits: logits) -> Loss:
    """Mean cross entropy of a batch as a function of the named parameters; the model's own are not written to.

    Args:
        model: In eval mode.
        names: Of the parameters, in the order in which the loss takes them.
        images: (B, C, H, W), as the model takes them.
        labels: (B,), of the label space.
        normalize: Whether logits are normalized first, see :func:`normalized_logits`.
        reduce: Logits -> those of the label space.
    """
    def loss(weights: Points) -> Tensor:
        logits = reduce(functional_call(model, dict(zip(names, weights)), (images,)))
        if logits.device.type != "mps":  # which has none; elsewhere small differences of losses are worth it
            logits = logits.double()
        return cross_entropy(normalized_logits(logits) if normalize else logits, labels)
    return loss


class Objective:
    """The loss and its gradient as functions of u; the value at u = 0 is computed once.

    Args:
        loss: Of weights shaped like ``weights``.
        weights: w, detached.

    Attributes:
        start_loss: The loss at w, (1,).
        start_grads: Its gradient by w, not by u.
        non_finite: How many losses were not finite since it was set to 0; 0-dim, on the device.
    """

    def __init__(self, loss: Loss, weights: Points) -> None:
        self.loss, self.weights = loss, weights
        self.non_finite = torch.zeros((), dtype=torch.int64, device=weights[0].device)
        self.start_loss, self.start_grads = self.at(weights)

    def at(self, weights: Points) -> tuple[Tensor, Points]:
        """The loss, (1,), and its gradient by the weights; zero for weights that it does not depend on."""
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in weights]
            loss = self.loss(leaves)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        self.non_finite += ~loss.detach().isfinite()
        return loss.detach().view(1), [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads)]

    def scales(self, adaptive: bool) -> Points | None:
        """T; None is 1."""
        return [w.abs() for w in self.weights] if adaptive else None

    def moved(self, scales: Points | None, u: Points) -> Points:
        """w + T u."""
        if scales is None:
            return [w + x for w, x in zip(self.weights, u)]
        return [w + t * x for w, t, x in zip(self.weights, scales, u)]

    def in_u(self, scales: Points | None) -> Callable[[Points], tuple[Tensor, Points]]:
        """What :func:`timm_sam.evaluation.attack.apgd.apgd` maximises; its first call is for u = 0."""
        first = True

        def objective(u: Points) -> tuple[Tensor, Points]:
            nonlocal first
            loss, grads = (self.start_loss, self.start_grads) if first else self.at(self.moved(scales, u))
            first = False
            return loss, grads if scales is None else [t * g for t, g in zip(scales, grads)]
        return objective
