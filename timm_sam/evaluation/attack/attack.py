"""Robust accuracy under APGD-CE, then APGD-T: the two white-box APGD attacks of AutoAttack.

Paper: F. Croce, M. Hein, ICML 2020, https://arxiv.org/abs/2003.01690. Each attack starts once, at a random point of the
ball around the clean image; APGD-T runs against the classes ranked next by the clean logits, and only on the samples
that still stand. A sample is broken as soon as one evaluated point in its ball is misclassified.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..precision import full_precision
from .apgd import Points, apgd
from .ball import NORMS, Ball, noise, vector_length

STEPS, TARGETS = 100, 9  # of each attack, and target classes of APGD-T, as in AutoAttack

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Normalized(nn.Module):
    """``model`` as a function of images in [0, 1]: in float32, normalized inside.

    Attributes:
        model: Takes normalized images; its mode (training or not) is also this module's at construction.
        reduce: Maps its logits to those of a label space, (B, K') -> (B, K); None leaves them.
    """

    mean: Tensor
    std: Tensor

    def __init__(
            self,
            model: nn.Module,
            mean: Sequence[float],
            std: Sequence[float],
            reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean={mean}, std={std}: one number per channel each, std > 0")
        self.model, self.reduce = model, reduce
        weight = next(model.parameters(), None)
        device = None if weight is None else weight.device
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1))
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model((images.float() - self.mean) / self.std)
        return logits if self.reduce is None else self.reduce(logits)


@dataclass(frozen=True)
class Attacked:
    """What the attack found, per sample; all on the device of the images.

    Attributes:
        clean: (B,) bool, the clean image is classified correctly. Logits that are not finite classify nothing.
        robust: (B,) bool, and so was every point that was tried; False wherever ``clean`` is.
        non_finite: (B,) bool, logits or gradients were not finite somewhere. They break no sample, but they may hide
            that it can be broken.
        no_gradient: (B,) bool, was attacked, stands, and its gradient was zero or not finite at every point: nothing
            but the random starts was tried.
    """

    clean: Tensor
    robust: Tensor
    non_finite: Tensor
    no_gradient: Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE per sample, (n, K) and (n,) -> (n,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """-(z_y - z_t) / (z1 - (z3 + z4) / 2 + 1e-12) per sample, z1 >= z2 >= ... the sorted logits.

    Shapes (n, K), (n,), (n,) -> (n,); K >= 4. Positive where the target beats the label.
    """
    z1, _, z3, z4 = logits.topk(4, dim=1).values.unbind(1)
    z_y, z_t = logits.gather(1, torch.stack([labels, targets], 1)).unbind(1)
    return -(z_y - z_t) / (z1 - (z3 + z4) / 2 + 1e-12)


class _Objective:
    """Loss and gradient for APGD, which also sees which samples are misclassified on the way.

    Broken samples are left out of the passes from then on. Finding them waits for the device, so it is done after 1,
    2, 4, 8, ... evaluations: at most half of the passes of a sample are wasted.
    """

    def __init__(self, model: Model, loss: Loss, labels: Tensor) -> None:
        self.model, self.loss, self.labels = model, loss, labels
        self.rows = torch.arange(len(labels), device=labels.device)
        self.broken = torch.zeros_like(labels, dtype=torch.bool)
        self.non_finite = torch.zeros_like(self.broken)
        self.moved = torch.zeros_like(self.broken)
        self.evaluations = 0

    def __call__(self, points: Points) -> tuple[Tensor, Points]:
        rows = self.rows
        images = points[0][rows].requires_grad_()
        with torch.enable_grad():
            logits = _logits(self.model, images)
            losses = self.loss(logits, rows)
            if not losses.requires_grad:
                raise ValueError(_NO_GRAPH)
            grad, = torch.autograd.grad(losses.sum(), images, allow_unused=True)
        if grad is None:
            raise ValueError(_NO_GRAPH)
        losses = losses.detach()

        peak = vector_length(grad, torch.inf).flatten()
        wrong = logits.isfinite().all(1) & losses.isfinite() & (logits.argmax(1) != self.labels[rows])
        self.broken[rows] |= wrong
        self.non_finite[rows] |= ~(logits.isfinite().all(1) & peak.isfinite())
        self.moved[rows] |= peak > 0

        all_losses = losses.new_full(self.labels.shape, -torch.inf)
        all_losses[rows] = losses
        all_grads = torch.zeros_like(points[0])
        all_grads[rows] = grad
        self.evaluations += 1
        if self.evaluations & (self.evaluations - 1) == 0:
            self.rows = (~self.broken).nonzero().squeeze(1)
        return all_losses, [all_grads]

    def done(self) -> bool:
        return self.rows.numel() == 0


def attack(
        model: Model,
        images: Tensor,
        labels: Tensor,
        indices: Sequence[int] | Tensor,
        norm: str,
        radius: float,
        *,
        steps: int = STEPS,
        n_targets: int = TARGETS,
        seed: int = 0,
) -> Attacked:
    """Attacks one batch with APGD-CE and then APGD-T.

    Leaves parameters, their ``requires_grad`` and ``grad``, and all random states alone; TF32 and cudnn.benchmark are
    off meanwhile. Batches given to ``model`` shrink as samples break.

    Args:
        model: Images in [0, 1], (B, C, H, W), to logits, (B, K): a :class:`Normalized`, or any callable. In evaluation
            mode and float32; of a callable that is no module this cannot be checked.
        images: (B, C, H, W), float32, in [0, 1].
        labels: (B,), int64, in 0..K-1.
        indices: Each sample's index in the data set, >= 0: seeds its random starts.
        norm: "linf" or "l2".
        radius: Radius of the ball, > 0, in units of [0, 1].
        steps: Steps per attack and target.
        n_targets: Targets of APGD-T: the classes after the label, by clean logits; at most K-1 of them.
        seed: Seed of the random starts, >= 0.

    Returns:
        Per sample, whether it is classified correctly clean and under attack.

    Raises:
        ValueError: An argument is not as above, the model or a part of it is in training mode, autocast is on, K < 4,
            or the logits do not depend on the images.
    """
    indices = indices.tolist() if isinstance(indices, Tensor) else [int(i) for i in indices]
    _check(model, images, labels, indices, norm, radius, n_targets, seed)
    # gradients need ordinary tensors, also when called under no_grad() or inference_mode()
    with torch.inference_mode(False), torch.no_grad(), full_precision():
        images = images.detach().clone()
        labels = labels.to(images.device, copy=True)
        logits = _logits(model, images)
        classes = logits.shape[1]
        if classes < 4:
            raise ValueError(f"the model gives {classes} logits: targeted DLR needs 4 or more classes")
        if labels.amin() < 0 or labels.amax() >= classes:
            raise ValueError(f"labels lie outside 0..{classes - 1}: the model's logits are of another label space")
        finite = logits.isfinite().all(1)
        clean = finite & (logits.argmax(1) == labels)
        others = logits.scatter(1, labels[:, None], -torch.inf)
        targets = others.topk(min(n_targets, classes - 1), dim=1).indices

        robust, non_finite, moved = clean.clone(), ~finite, torch.zeros_like(clean)
        for stage in range(1 + targets.shape[1]):  # stage 0 is APGD-CE, stage t the t-th target
            rows = robust.nonzero().squeeze(1)
            if rows.numel() == 0:
                break
            ball = Ball(images[rows], norm, radius)
            loss = _loss(labels[rows], targets[rows, stage - 1] if stage else None)
            objective = _Objective(model, loss, labels[rows])
            start = noise(norm, images.shape[1:], seed, [indices[i] for i in rows.tolist()], stage)
            apgd(objective, ball, ball.surface(start.to(images.device)), 2 * radius, steps, stop=objective.done)
            robust[rows] = ~objective.broken
            non_finite[rows] |= objective.non_finite
            moved[rows] |= objective.moved
        return Attacked(clean, robust, non_finite, robust & ~moved)


def _loss(labels: Tensor, targets: Tensor | None) -> Loss:
    if targets is None:
        return lambda logits, rows: cross_entropy(logits, labels[rows])
    return lambda logits, rows: targeted_dlr(logits, labels[rows], targets[rows])


_NO_GRAPH = ("the logits do not depend on the images: nothing could be attacked; remove no_grad(), detach() or "
             "inference_mode() from the model's forward")


def _logits(model: Model, images: Tensor) -> Tensor:
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model gives {shape} for {len(images)} images: it must give logits (B, K)")
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the model gives {logits.dtype} logits: run it in float32, without autocast inside")
    return logits


def _check(
        model: Model, images: Tensor, labels: Tensor, indices: list[int], norm: str, radius: float, n_targets: int,
        seed: int) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown: use one of {', '.join(NORMS)}")
    if not 0 < radius < float("inf"):
        raise ValueError(f"radius={radius} must be a finite number > 0")
    if n_targets < 1 or seed < 0:
        raise ValueError(f"n_targets={n_targets} must be >= 1 and seed={seed} >= 0")
    if images.ndim != 4 or images.dtype != torch.float32 or images.numel() == 0:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: they must be float32 (B, C, H, W), B > 0")
    lowest, highest = (float(v) for v in images.aminmax())
    if not (lowest >= 0 and highest <= 1):  # also catches nan
        raise ValueError(f"images lie in [{lowest:g}, {highest:g}]: they must lie in [0, 1], before normalization")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or len(indices) != len(images):
        raise ValueError(f"labels ({labels.dtype} {tuple(labels.shape)}) and indices ({len(indices)}): there must be "
                         f"one int64 label and one index for each of the {len(images)} images")
    if min(indices) < 0:
        raise ValueError(f"indices hold {min(indices)}: they must be >= 0, the samples' places in the data set")
    for device in {"cpu", "cuda", images.device.type}:
        if torch.is_autocast_enabled(device):
            raise ValueError(f"autocast is on for {device}: attack outside of it, in float32")
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError("the model is wrapped in DistributedDataParallel, whose ranks would wait for each other: "
                             "attack the module inside (timm_sam.selection.unwrap)")
        if module.training:
            raise ValueError(f"{f'{name} of the model' if name else 'the model'} ({type(module).__name__}) is in "
                             f"training mode: call model.eval() first")
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} of the model is {weight.dtype}: call model.float() first")
