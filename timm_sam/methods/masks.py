"""Sparse masks of the perturbation: random, and those of Sparse SAM.

Mi et al., NeurIPS 2022, https://arxiv.org/abs/2210.05177, https://github.com/Mi-Peng/Sparse-SAM.

    eps = rho T^2 (mask d) / N           N = ||T d|| (norm="full") or ||T (mask d)|| (norm="masked")

K = round((1 - sparsity) n) of the n elements of S are perturbed, one ranking over all tensors.

    random    K elements drawn by the seed, anew every so many epochs if asked to
    fisher    the K elements with the largest sum over samples of (d log p(true label) / dw)^2, every so many epochs
    dynamic   K at random at first; every so many epochs, at the mean gradient g of the first update, the n_d live
              elements with the smallest |g| are dropped, and n_d of those dead until then are drawn at random:
              n_d = min(round(r K), n - K),  r = drop (1 + cos(pi epoch / epochs)) / 2

Of fisher, the authors' code estimates after the first update of an epoch and starts from an empty mask, shifts the
running statistics, and squares gradients that are averaged over ranks; here the estimate comes before the update and
leaves nothing behind, and squares are summed over samples and ranks.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..multi_tensor import dense
from .stages import At, Method, Samples, Tensors, Timing, seed_of

NORMS = ("full", "masked")


class Sparse:
    """K of all elements of the selected parameters: those of a random mask.

    Args:
        sparsity: Share of the elements that are not perturbed.
        every: Epochs from one mask to the next; None: one mask for the whole run.
        norm: What eps is normalized by, of ``NORMS``.

    Attributes:
        method: Whose mask it is.
    """

    method = "random_mask"
    draws = False
    samples = 0

    def __init__(self, sparsity: float, every: int | None, norm: str) -> None:
        self.sparsity, self.every = sparsity, every
        self.full = norm == "full"
        self.mask: Tensors = []
        self.shapes: list[torch.Size] = []
        self.device = torch.device("cpu")
        self.drawn_for: int | None = None

    @property
    def observes(self) -> bool:
        return False

    def bind(self, params: Sequence[Tensor]) -> None:
        self.shapes = [p.shape for p in params]
        self.device = params[0].device
        self.size = sum(shape.numel() for shape in self.shapes)
        self.live = round((1 - self.sparsity) * self.size)
        if not self.live:
            raise ValueError(f"{self.method}: sparsity={self.sparsity!r} leaves none of {self.size:,} elements; choose "
                             f"at most {1 - 1 / self.size:.9g}")

    def period(self, epoch: int) -> int:
        """The epoch that the mask of an epoch is from."""
        return 0 if self.every is None else epoch - epoch % self.every

    def prepare(self, at: At, samples: Samples | None) -> None:
        if self.drawn_for != self.period(at.epoch):
            self.drawn_for = self.period(at.epoch)
            self.take(self.random(at.seed, self.drawn_for))

    def random(self, seed: int, epoch: int) -> Tensor:
        """K elements drawn at random, flat: a function of seed and epoch, the same on all ranks and devices."""
        generator = torch.Generator("cpu").manual_seed(seed_of(seed, epoch))
        mask = torch.zeros(self.size, dtype=torch.bool, device="cpu")  # the default device may be another one
        mask[torch.randperm(self.size, generator=generator, device="cpu")[:self.live]] = True
        return mask

    def take(self, flat: Tensor) -> None:
        """Makes a flat mask the one of now."""
        parts = flat.to(self.device).split([shape.numel() for shape in self.shapes])
        self.mask = [part.view(shape) for part, shape in zip(parts, self.shapes)]

    def flat(self) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self.mask])

    def draw(self, at: At, count: int) -> None:
        return None

    def apply(self, d: Tensors) -> Tensors:
        return list(torch._foreach_mul(d, self.mask))

    def observe(self, mean: Tensors, usable: Tensor) -> None:
        pass


class Kept(Sparse):
    """A mask that cannot be made again from the seed, so that checkpoints hold it."""

    def state_dict(self) -> dict[str, Any]:
        return {"mask": packed(self.flat()) if self.mask else None, "drawn_for": self.drawn_for}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["mask"] is not None:
            self.take(unpacked(state["mask"], self.size))
        self.drawn_for = state["drawn_for"]


class Dynamic(Kept):
    """The mask that forgets the elements with the smallest gradients, and tries others.

    Args:
        sparsity, every, norm: As for :class:`Sparse`.
        drop: Share of the live elements that are exchanged at first.
        epochs: Length of the run: at its end nothing is exchanged.
    """

    method = "ssam_dynamic"

    def __init__(self, sparsity: float, every: int, norm: str, drop: float, epochs: int) -> None:
        super().__init__(sparsity, every, norm)
        self.share, self.epochs = drop, epochs
        self.at: At | None = None  # where the mask is to change, with the gradient of the update to come

    def prepare(self, at: At, samples: Samples | None) -> None:
        if not self.mask:
            self.take(self.random(at.seed, 0))
        if self.drawn_for != self.period(at.epoch):
            self.drawn_for = self.period(at.epoch)
            self.at = at

    @property
    def observes(self) -> bool:
        return self.at is not None

    def exchanged(self, epoch: int) -> int:
        """n_d of an epoch."""
        r = self.share * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
        return min(round(r * self.live), self.size - self.live)

    def observe(self, mean: Tensors, usable: Tensor) -> None:
        if self.at is None:
            return
        at, self.at = self.at, None
        count = self.exchanged(at.epoch)
        if not count:
            return
        mask = self.flat()
        size = torch.cat([t.abs().reshape(-1) for t in mean])
        # of the live ones the smallest; the dead are behind them all
        smallest = torch.where(mask, size, torch.full_like(size, math.inf)).topk(count, largest=False).indices
        generator = torch.Generator("cpu").manual_seed(seed_of(at.seed, at.epoch, 1))
        chance = torch.rand(self.size, generator=generator, device="cpu").to(self.device)
        grown = torch.where(mask, torch.full_like(chance, -1), chance).topk(count).indices
        changed = mask.clone()
        changed[smallest] = False
        changed[grown] = True
        self.take(torch.where(usable, changed, mask))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "waiting": None if self.at is None else list(self.at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.at = None if state["waiting"] is None else At(*state["waiting"])


def packed(mask: Tensor) -> Tensor:
    """Eight elements a byte."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, device=mask.device, dtype=torch.uint8)).sum(1).to(torch.uint8)


def unpacked(packed: Tensor, size: int) -> Tensor:
    bits = (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return bits.reshape(-1)[:size].to(torch.bool)


def check_mask(name: str, sparsity: float, every: int | None, norm: str) -> None:
    if isinstance(sparsity, bool) or not (isinstance(sparsity, (int, float)) and 0 <= sparsity < 1):
        raise ValueError(f"{name}: sparsity={sparsity!r} must be a number >= 0 and < 1")
    if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
        raise ValueError(f"{name}: every={every!r} must be an integer >= 1")
    if norm not in NORMS:
        raise ValueError(f"{name}: norm={norm!r} is unknown: use one of {', '.join(NORMS)}")


def random_mask(sparsity: float, every: int | None = None, norm: str = "masked") -> Method:
    """A random mask, for ``SAM(..., params="all", method=random_mask(sparsity=0.5))``.

    Args:
        sparsity: Share of the elements that are not perturbed, >= 0 and < 1; 0 is SAM.
        every: Draw another mask every so many epochs; None: one for the whole run.
        norm: masked: eps has length rho; full: SAM's eps with zeros, which is shorter.

    Raises:
        ValueError: An argument is out of range.
    """
    check_mask("random_mask", sparsity, every, norm)
    return Method(name=f"random_mask(sparsity={sparsity:g}, every={every}, norm={norm})",
                  mask=Sparse(sparsity, every, norm), timing=Timing(by_epoch=every is not None))


def ssam_dynamic(sparsity: float, every: int = 1, drop: float = 0.5, norm: str = "full",
                 total_epochs: int | None = None) -> Method:
    """SSAM-D (Mi et al., NeurIPS 2022), for ``SAM(..., params="all", method=ssam_dynamic(0.5, total_epochs=200))``.

    One byte an element of S is kept.

    Args:
        sparsity: Share of the elements that are not perturbed, >= 0 and < 1.
        every: Change the mask every so many epochs.
        drop: Share of the live elements that are exchanged at first, 0 to 1; it falls to 0 at the end of the run.
        norm: full: SAM's eps with zeros, as the authors have it; masked: eps has length rho.
        total_epochs: Length of the run.

    Raises:
        ValueError: An argument is out of range, or total_epochs is missing.
    """
    check_mask("ssam_dynamic", sparsity, every, norm)
    if isinstance(drop, bool) or not (isinstance(drop, (int, float)) and 0 <= drop <= 1):
        raise ValueError(f"ssam_dynamic: drop={drop!r} must be a number from 0 to 1")
    if total_epochs is None or total_epochs < 1:
        raise ValueError(f"ssam_dynamic: total_epochs={total_epochs!r} must be the length of the run, >= 1")
    return Method(name=f"ssam_dynamic(sparsity={sparsity:g}, every={every}, drop={drop:g}, norm={norm})",
                  mask=Dynamic(sparsity, every, norm, drop, total_epochs), timing=Timing(by_epoch=True))


class Fisher(Kept):
    """The mask of the K elements with the largest sum of squared gradients of single samples.

    Args:
        sparsity, every, norm: As for :class:`Sparse`.
        samples: How many, over all ranks.
    """

    method = "ssam_fisher"

    def __init__(self, sparsity: float, every: int, samples: int, norm: str) -> None:
        super().__init__(sparsity, every, norm)
        self.samples = samples

    def bind(self, params: Sequence[Tensor]) -> None:
        super().bind(params)
        self.params = list(params)

    def prepare(self, at: At, samples: Samples | None) -> None:
        if self.drawn_for == self.period(at.epoch):
            return
        if samples is None:
            raise ValueError("ssam_fisher: it estimates on training samples: call SAM.begin(epoch, update, samples) "
                             "before each update; samples(n) gives n functions, each computes the loss of one sample")
        squares = self.squares(samples)
        flat = torch.zeros(self.size, dtype=torch.bool, device=squares.device)
        flat[squares.topk(self.live).indices] = True
        self.take(flat)
        self.drawn_for = self.period(at.epoch)

    def squares(self, samples: Samples) -> Tensor:
        """The sum over samples and ranks of squared gradients, flat; an element that is not finite counts as zero."""
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        ranks = torch.distributed.get_world_size() if several else 1
        dtype = torch.promote_types(self.params[0].dtype, torch.float32)
        total = torch.zeros(self.size, device=self.device, dtype=dtype)
        with torch.enable_grad():
            for loss in samples(math.ceil(self.samples / ranks)):
                live = [p for p in self.params if p.requires_grad]
                grads = dict(zip(map(id, live), torch.autograd.grad(loss(), live, allow_unused=True)))
                total += torch.cat([
                    (torch.zeros_like(p) if (grad := grads.get(id(p))) is None else dense(grad)).reshape(-1).to(dtype)
                    for p in self.params]).square()
        if several:
            torch.distributed.all_reduce(total)
        return torch.where(torch.isfinite(total), total, torch.zeros_like(total))


def ssam_fisher(sparsity: float, every: int = 1, samples: int = 128, norm: str = "full") -> Method:
    """SSAM-F (Mi et al., NeurIPS 2022), for ``SAM(..., params="all", method=ssam_fisher(sparsity=0.5))``.

    The loop has to call ``sam.begin(epoch, update, samples)``. One byte an element of S is kept.

    Args:
        sparsity: Share of the elements that are not perturbed, >= 0 and < 1; 0 is SAM.
        every: Estimate the mask every so many epochs.
        samples: Training samples of an estimate, over all ranks, each a forward and a backward pass.
        norm: full: SAM's eps with zeros, as the authors have it; masked: eps has length rho.

    Raises:
        ValueError: An argument is out of range.
    """
    check_mask("ssam_fisher", sparsity, every, norm)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"ssam_fisher: samples={samples!r} must be an integer >= 1")
    return Method(name=f"ssam_fisher(sparsity={sparsity:g}, every={every}, samples={samples}, norm={norm})",
                  mask=Fisher(sparsity, every, samples, norm), timing=Timing(by_epoch=True))
