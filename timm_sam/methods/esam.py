"""ESAM: Efficient Sharpness-aware Minimization for Improved Training of Neural Networks.

Du et al., ICLR 2022, https://arxiv.org/abs/2110.03141, https://github.com/dydjw9/Efficient_SAM.

    M     = each tensor of S with probability beta; if none, one at random
    g_M   = gradient at w, of the drawn tensors only
    eps_M = (rho / beta) T^2 g_M / ||T g_M||,  0 elsewhere             stochastic weight perturbation
    K     = the max(1, floor(gamma m)) samples with the largest l(w + eps) - l(w)
    G     = gradient of the mean loss of K at w + eps                  sharpness-sensitive data selection

Whole tensors are drawn, and the norm is over those: so has it the authors' code, and only so anything is saved. The
paper draws elements and normalizes before. The radius is rho / beta, always. The code takes the samples strictly above
the k-th largest rise, one fewer than asked for and none on ties; here there are exactly k, ties by their position.
"""
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from .stages import At, Groups, Method, Samples, Tensors, seed_of


class DrawnTensors:
    """Perturbs each tensor with probability ``beta``: a function of the run's seed and of where training is."""

    full = False
    draws = True
    samples = 0
    observes = False

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def bind(self, params: Sequence[Tensor]) -> None:
        pass

    def prepare(self, at: At, samples: Samples | None) -> None:
        pass

    def draw(self, at: At, count: int) -> list[bool]:
        generator = random.Random(seed_of(at.seed, at.update, at.number))
        drawn = [generator.random() < self.beta for _ in range(count)]
        if not any(drawn):
            drawn[generator.randrange(count)] = True
        return drawn

    def apply(self, d: Tensors) -> Tensors:
        return d  # there is no gradient of the others

    def observe(self, mean: Tensors, usable: Tensor) -> None:
        pass


class WiderRadius:
    """rho / beta: as many tensors as are left out, so much farther the others go."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def bind(self, rho: float, groups: Groups) -> None:
        pass

    def __call__(self, at: At, rho: float, groups: Groups) -> float:
        return rho / self.beta


class MostSensitive:
    """The ``gamma`` of the samples whose loss rises most, in the order of the batch."""

    all_by = "gamma=1"

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        count = max(1, math.floor(self.gamma * len(before) + 1e-9))  # 0.29 * 100 is below 29
        order = torch.sort(after - before, descending=True, stable=True).indices
        return order[:count].sort().values


def esam(beta: float, gamma: float) -> Method:
    """ESAM (Du et al., ICLR 2022), for ``SAM(..., params="all", method=esam(beta=0.6, gamma=0.5))``.

    With gamma < 1 loss functions take positions of samples, or None for all, and return the loss of each, (m,).

    Args:
        beta: Probability that a tensor is perturbed, > 0 and <= 1; eps has length rho / beta.
        gamma: Share of the samples that the step is made of, those whose loss rises most, > 0 and <= 1.

    Raises:
        ValueError: An argument is out of range.
    """
    for name, value in {"beta": beta, "gamma": gamma}.items():
        if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value <= 1):
            raise ValueError(f"esam: {name}={value!r} must be a number > 0 and <= 1")
    return Method(name=f"esam(beta={beta:g}, gamma={gamma:g})",
                  note=f"eps has length rho / beta, {1 / beta:g} rho" if beta < 1 else "",
                  radius=WiderRadius(beta) if beta < 1 else None, mask=DrawnTensors(beta) if beta < 1 else None,
                  rows=MostSensitive(gamma) if gamma < 1 else None)
