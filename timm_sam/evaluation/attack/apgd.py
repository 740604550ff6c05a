"""APGD: maximises a loss over a bounded set, halving its step size by what the loss did (Auto-PGD).

Paper: F. Croce, M. Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020, https://arxiv.org/abs/2003.01690: Algorithm 1.

    z       = P(x_k + s d(g_k))                                        d: direction of steepest ascent
    x_{k+1} = P(x_k + a (z - x_k) + (1 - a) (x_k - x_{k-1}))           a = 0.75, but 1 at k = 0

At a checkpoint s is halved, and x_{k+1} becomes the best point so far, if the loss rose in at most 75% of the steps
since the last checkpoint, or if s was not halved there and the best loss has not changed since.

A point is a list of tensors that holds one or more samples; samples have losses and step sizes of their own and never
see each other. What the tensors are (a batch of images, all weights of a network as one sample) only the ``Space``
knows. Where the paper leaves it open, we do as its authors' code does: the loss of a step is compared with the one
evaluated before it, also after a restart from the best point, whose predecessor in the momentum term stays x_k; and
only the first of the two conditions counts at the first checkpoint.
"""
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Points = list[Tensor]

MOMENTUM = 0.75
ENOUGH_RISES = 0.75  # rho of Condition 1


class Space(Protocol):
    """What APGD has to know about the set that it searches. No method changes its arguments."""

    def project(self, points: Points) -> Points:
        """The points, moved into the set."""
        ...

    def direction(self, grads: Points) -> Points:
        """The ascent direction, of length 1; finite for every gradient, zero where that is zero."""
        ...

    def per_sample(self, values: Tensor) -> Points:
        """One value per sample, shape (n,), for every tensor of a point: each broadcasts against its tensor."""
        ...


@dataclass(frozen=True)
class Maximum:
    """Where APGD saw the largest loss.

    Attributes:
        points: Per sample the best of all points evaluated, the start included.
        loss: Its loss, (n,); -inf where no loss was finite.
    """

    points: Points
    loss: Tensor


def checkpoints(steps: int) -> tuple[int, ...]:
    """After how many of ``steps`` steps the step size is looked at: (22, 41, 57, 70, 80, 87, 93, 99) of 100.

    The first window is 22% of the steps long, each next one 3% shorter, none shorter than 6%, all rounded down and
    at least one step, as in AutoAttack's code: it matters below 34 steps.

    Raises:
        ValueError: ``steps`` is no integer >= 1.
    """
    _check_steps(steps)
    window, shrink, shortest = (max(share * steps // 100, 1) for share in (22, 3, 6))
    found, at = [], window
    while at <= steps:
        found.append(at)
        window = max(window - shrink, shortest)
        at += window
    return tuple(found)


@torch.no_grad()
def apgd(
        objective: Callable[[Points], tuple[Tensor, Points]],
        space: Space,
        start: Points,
        step: float,
        steps: int,
        schedule: Collection[int] | None = None,
        stop: Callable[[], bool] | None = None,
) -> Maximum:
    """Maximises ``objective`` over ``space``, each sample for itself.

    Calls ``objective`` once at the start and once per step; nothing here waits for the device.

    Args:
        objective: Gives the loss per sample, (n,), and the gradient of its sum, shaped like the points. A loss that is
            not finite never counts as the best.
        space: The set; the start lies in it.
        start: Where to start; is not changed.
        step: The first step size s; the paper's is twice the radius of the set.
        steps: Number of steps, >= 1.
        schedule: The checkpoints, as numbers of steps done; None takes :func:`checkpoints`.
        stop: Asked before every step; True ends the search.

    Returns:
        The best points and their losses.

    Raises:
        ValueError: ``steps`` is no integer >= 1, or a checkpoint lies outside 1..steps.
    """
    _check_steps(steps)
    schedule = frozenset(checkpoints(steps) if schedule is None else schedule)
    if not schedule <= frozenset(range(1, steps + 1)):
        raise ValueError(f"schedule={sorted(schedule)}: checkpoints must be integers from 1 to steps={steps}")

    points = previous = best = start
    loss, grads = _evaluate(objective, points)
    best_loss, best_grads = loss, grads
    size = torch.full_like(loss, step)
    rises = torch.zeros_like(loss, dtype=torch.int64)
    # as if halved at the start: the second condition needs a checkpoint to look back at
    halved = torch.ones_like(loss, dtype=torch.bool)
    best_loss_then, checked = best_loss, 0

    for k in range(steps):
        if stop is not None and stop():
            break
        a = MOMENTUM if k else 1.0
        ahead = space.project(
            [x + s * d for x, s, d in zip(points, space.per_sample(size), space.direction(grads))])
        moved = space.project(
            [x + a * (z - x) + (1 - a) * (x - old) for x, z, old in zip(points, ahead, previous)])
        previous, points = points, moved

        loss_before = loss
        loss, grads = _evaluate(objective, points)
        rises += loss > loss_before
        better = loss > best_loss
        best = _choose(space, better, points, best)
        best_grads = _choose(space, better, grads, best_grads)
        best_loss = torch.where(better, loss, best_loss)

        if k + 1 in schedule:
            few_rises = rises <= ENOUGH_RISES * (k + 1 - checked)
            halved = few_rises | (~halved & (best_loss == best_loss_then))
            size = torch.where(halved, size / 2, size)
            points = _choose(space, halved, best, points)
            grads = _choose(space, halved, best_grads, grads)
            best_loss_then, checked = best_loss, k + 1
            rises.zero_()
    return Maximum(best, best_loss)


def _evaluate(objective: Callable[[Points], tuple[Tensor, Points]], points: Points) -> tuple[Tensor, Points]:
    loss, grads = objective(points)
    return torch.where(torch.isfinite(loss), loss, -torch.inf), grads


def _choose(space: Space, first: Tensor, a: Points, b: Points) -> Points:
    """The samples of ``a`` where ``first`` (n,), those of ``b`` elsewhere."""
    return [torch.where(mask, x, y) for mask, x, y in zip(space.per_sample(first), a, b)]


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} must be an integer >= 1")
