"""The package pytorch-optimizer beside ours: where it has the formula, both give the same weights in float64.

LookSAM is the exception: there the peer decomposes each tensor by itself, so ours is compared with the transcription.
"""
from types import SimpleNamespace

import pytest
import reference_methods as papers
import torch
import torch.nn.functional as F
from support.models import batch, weights
from torch import nn

from timm_sam import SAM, methods

peers = pytest.importorskip('pytorch_optimizer')

RHO, LR = 0.3, 0.1
BASE = dict(lr=LR, momentum=0.9, weight_decay=0.01)
STEPS = 8
ROUNDING = 1e-7  # the peer keeps the norm of the gradient in float32


def net():
    """Without dropout and running statistics, whose handling is another matter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).double()


def loss_of(model, step):
    x, y = batch(step)
    return F.cross_entropy(model(x), y)


def ours(method, variant='sam'):
    model = net()
    sam = SAM(torch.optim.SGD(model.parameters(), **BASE), model, variant=variant, params='all', rho=RHO, method=method)
    for step in range(STEPS):
        sam.minimize(lambda step=step: loss_of(model, step))
    return weights(model)


def by_peer(build):
    """Weights after as many updates, each by a gradient at w and a closure, as the peer's documentation has it."""
    model = net()
    optimizer = build(model)
    for step in range(STEPS):
        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    return weights(model)


def furthest(a, b):
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize('variant, adaptive', [('sam', False), ('elementwise_l2', True)])
def test_base_sam_is_that_of_the_peer(variant, adaptive):
    theirs = by_peer(lambda model: peers.SAM(model.parameters(), torch.optim.SGD, rho=RHO, adaptive=adaptive, **BASE))
    assert furthest(ours(None, variant), theirs) < ROUNDING


@pytest.mark.parametrize('sigma, lam', [(1.0, 0.9), (0.5, 0.6)])
def test_friendly_is_that_of_the_peer(sigma, lam):
    theirs = by_peer(lambda model: peers.FriendlySAM(
        model.parameters(), torch.optim.SGD, rho=RHO, sigma=sigma, lmbda=lam, **BASE))
    assert furthest(ours(methods.friendly(sigma=sigma, lam=lam)), theirs) < ROUNDING
    assert furthest(ours(None), theirs) > 1e-3


@pytest.mark.parametrize('alpha', [0.1, 0.4])
def test_gsam_is_that_of_the_peer(alpha):
    model = net()
    base = torch.optim.SGD(model.parameters(), **BASE)
    optimizer = peers.GSAM(model.parameters(), base_optimizer=base, model=model, alpha=alpha,
                           rho_scheduler=SimpleNamespace(step=lambda: RHO))
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.set_closure(F.cross_entropy, x, y)
        optimizer.step()
    assert furthest(ours(methods.gsam(alpha=alpha, rho_min=RHO)), weights(model)) < ROUNDING
    assert furthest(ours(None), weights(model)) > 1e-3


def test_looksam_of_the_peer_is_another_method_and_ours_that_of_the_formula():
    k, alpha = 3, 0.7
    theirs = by_peer(lambda model: peers.LookSAM(
        model.parameters(), torch.optim.SGD, rho=RHO, k=k, alpha=alpha, **BASE))
    model = net()
    paper, base = papers.Looksam(k, alpha), torch.optim.SGD(model.parameters(), **BASE)
    for step in range(STEPS):
        paper.step(model, base, lambda step=step: loss_of(model, step), list(weights(model)), 'sam', RHO)
    mine = ours(methods.looksam(k=k, alpha=alpha))
    assert furthest(mine, weights(model)) < 1e-11
    assert furthest(mine, theirs) > 1e-3
