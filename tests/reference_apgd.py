"""APGD on one image, written down slowly: no batch, no masks, float by float where that is bearable.

A transcription of the specification for tests to compare with; imports nothing of `timm_sam`. A point is a flat numpy
array in float64. `loss_and_grad` maps it to a number and an array.
"""
import math

import numpy as np
import torch


def length(norm, v):
    if norm == 'linf':
        return max(abs(float(e)) for e in v)
    return math.sqrt(sum(float(e) ** 2 for e in v))


def into_ball_and_box(norm, radius, center, x):
    out = []
    shrink = 1.0
    if norm == 'l2':
        distance = length('l2', x - center)
        if distance > radius:
            shrink = radius / distance
    for x_i, c_i in zip(x, center):
        if norm == 'linf':
            x_i = min(max(x_i, c_i - radius), c_i + radius)
        else:
            x_i = c_i + shrink * (x_i - c_i)
        out.append(min(max(x_i, 0.0), 1.0))
    return np.array(out)


def direction(norm, g):
    if norm == 'linf':
        return np.array([0.0 if e == 0 else math.copysign(1.0, e) for e in g])
    total = length('l2', g)
    return g / total if total > 0 else np.zeros_like(g)


def apgd(loss_and_grad, norm, radius, center, start, steps, checkpoints):
    """Returns every evaluated point, their losses, the step size of every step, the best point and its loss."""
    x = [start]  # x[k], with restarts written over it
    loss, g = loss_and_grad(start)
    evaluated, losses, sizes = [start], [loss], []
    best, best_loss, best_g = start, loss, g
    s = 2 * radius
    best_loss_at_checkpoint, halved_at_checkpoint = None, None  # there was none yet
    last = 0
    for k in range(steps):
        a = 1.0 if k == 0 else 0.75
        sizes.append(s)
        z = into_ball_and_box(norm, radius, center, x[k] + s * direction(norm, g))
        moved = x[k] + a * (z - x[k])
        if k > 0:
            moved = moved + (1 - a) * (x[k] - x[k - 1])
        new = into_ball_and_box(norm, radius, center, moved)
        loss, g = loss_and_grad(new)
        evaluated.append(new)
        losses.append(loss)
        if loss > best_loss:
            best, best_loss, best_g = new, loss, g
        x.append(new)
        if k + 1 in checkpoints:
            rises = 0
            for i in range(last, k + 1):
                if losses[i + 1] > losses[i]:
                    rises += 1
            halve = rises <= 0.75 * (k + 1 - last)
            if halved_at_checkpoint is False and best_loss == best_loss_at_checkpoint:
                halve = True
            if halve:
                s = s / 2
                x[k + 1] = best
                g = best_g
            best_loss_at_checkpoint, halved_at_checkpoint, last = best_loss, halve, k + 1
    return evaluated, losses, sizes, best, best_loss


def cross_entropy(z, y):
    """Of one vector of logits."""
    return torch.log(sum(torch.exp(z_j) for z_j in z)) - z[y]


def targeted_dlr(z, y, t):
    ordered = sorted(z, key=lambda z_j: float(z_j.detach()), reverse=True)
    return -(z[y] - z[t]) / (ordered[0] - (ordered[2] + ordered[3]) / 2 + 1e-12)


def checkpoints(steps):
    """After which steps the authors' code looks at the step size: it counts down windows that shrink."""
    window, least, shrink = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    found, since = [], 0
    for k in range(1, steps + 1):
        since += 1
        if since == window:
            found.append(k)
            window, since = max(window - shrink, least), 0
    return tuple(found)
