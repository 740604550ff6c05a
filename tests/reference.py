"""The step of "Normalization Layers Are All That Sharpness-Aware Minimization Needs", written down slowly.

A transcription for tests to compare with: one tensor at a time, every formula under its number in the paper
(https://arxiv.org/abs/2306.04226), two complete forward and backward passes, nothing fused, cached or shared. It
imports torch and none of `timm_sam`. Which parameters are perturbed is decided by the caller, as a list of names.

Where the paper's text and its Table 9 disagree, biases of `elementwise_l2_orig` have T = 1 (Section 3.2).
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

ETA = {  # Table 9, last column; variants without an eta do not use it
    'sam': 0.0,
    'elementwise_l2': 0.0,
    'elementwise_l2_orig': 0.01,
    'elementwise_linf': 0.0,
    'layerwise_l2': 0.0,
    'fisher': 1.0,
}


def normalization(variant: str, name: str, w: Tensor, g: Tensor, eta: float) -> Tensor:
    """The diagonal of T_w for one parameter tensor, in its shape (Table 9)."""
    if variant == 'sam':
        return torch.ones_like(w)
    if variant in ('elementwise_l2', 'elementwise_linf'):
        return w.abs() + eta
    if variant == 'elementwise_l2_orig':
        is_weight = 'weight' in name.split('.')[-1]  # also in_proj_weight, weight_ih_l0
        return w.abs() + eta if is_weight else torch.ones_like(w)
    if variant == 'layerwise_l2':
        return torch.ones_like(w) * (w ** 2).sum().sqrt()
    if variant == 'fisher':
        return 1 / (1 + eta * g ** 2).sqrt()
    raise KeyError(variant)


def perturbation(
        variant: str,
        named_params: dict[str, Tensor],
        grads: dict[str, Tensor],
        rho: float,
        eta: float | None = None,
) -> dict[str, Tensor]:
    """eps of Eq. (5) for the parameters given, which are all that is perturbed."""
    eta = ETA[variant] if eta is None else eta
    zeros = {name: torch.zeros_like(w) for name, w in named_params.items()}
    for g in grads.values():
        if not torch.isfinite(g).all():
            return zeros
    T = {name: normalization(variant, name, w, grads[name], eta) for name, w in named_params.items()}

    if variant == 'elementwise_linf':  # p = infinity: rho T sign(g)
        return {name: rho * T[name] * torch.sign(grads[name]) for name in named_params}

    # p = 2: rho T^2 g / ||T g||_2
    sum_of_squares = 0.0
    for name in named_params:
        sum_of_squares += float(((T[name] * grads[name]) ** 2).sum())
    norm = sum_of_squares ** 0.5
    if norm == 0:
        return zeros
    return {name: rho * T[name] ** 2 * grads[name] / norm for name in named_params}


class Gradients(NamedTuple):
    """What the two passes over one batch gave."""
    loss: Tensor  # at w
    loss_perturbed: Tensor  # at w + eps
    ascent: dict[str, Tensor]  # g, of the selected parameters
    eps: dict[str, Tensor]
    descent: dict[str, Tensor]  # G, of all parameters


def loss_and_gradients(model: nn.Module, loss_fn: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """One ordinary forward and backward pass."""
    model.zero_grad(set_to_none=True)
    loss = loss_fn()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def sam_gradients(
        model: nn.Module,
        loss_fn: Callable[[], Tensor],
        selected: list[str],
        variant: str,
        rho: float,
        eta: float | None = None,
) -> Gradients:
    """Both passes of SAM over one batch: g at w, eps of Eq. (5), G at w + eps (Eq. (3)).

    The weights end as they began, the running statistics of BatchNorm as the pass at w left them, and both passes draw
    the same random numbers.
    """
    params = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in params.items()}

    random_state, of_gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    loss, grads = loss_and_gradients(model, loss_fn)
    clean_buffers = {name: b.clone() for name, b in model.named_buffers()}

    g = {name: grads[name] for name in selected}
    eps = perturbation(variant, {name: weights[name] for name in selected}, g, rho, eta)

    with torch.no_grad():
        for name in selected:
            params[name].copy_(weights[name] + eps[name])

    torch.set_rng_state(random_state)
    torch.cuda.set_rng_state_all(of_gpus)
    loss_perturbed, G = loss_and_gradients(model, loss_fn)

    with torch.no_grad():
        for name in selected:
            params[name].copy_(weights[name])
        for name, b in model.named_buffers():
            b.copy_(clean_buffers[name])
    return Gradients(loss, loss_perturbed, g, eps, G)


def base_step(model: nn.Module, optimizer: torch.optim.Optimizer, grads: dict[str, Tensor]) -> None:
    """Eq. (3) with any base optimizer: its step at w, given the gradient."""
    for name, p in model.named_parameters():
        p.grad = grads[name].clone() if name in grads else None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def sam_step(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[], Tensor],
        selected: list[str],
        variant: str,
        rho: float,
        eta: float | None = None,
) -> Gradients:
    """One update of SAM with any base optimizer."""
    result = sam_gradients(model, loss_fn, selected, variant, rho, eta)
    base_step(model, optimizer, result.descent)
    return result


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable[[], Tensor]) -> Tensor:
    """One update without SAM."""
    loss, grads = loss_and_gradients(model, loss_fn)
    base_step(model, optimizer, grads)
    return loss


def gsam_gradients(
        model: nn.Module,
        loss_fn: Callable[[], Tensor],
        selected: list[str],
        variant: str,
        rho: float,
        alpha: float,
        eta: float | None = None,
) -> Gradients:
    """Algorithm 1 of GSAM (https://arxiv.org/abs/2203.08065) over one batch; `descent` is the gradient of its step.

    g, G and their inner product are over all parameters, whatever is perturbed.
    """
    random_state = torch.get_rng_state()
    buffers_before = {name: b.clone() for name, b in model.named_buffers()}
    _, g = loss_and_gradients(model, loss_fn)  # of all parameters
    torch.set_rng_state(random_state)
    with torch.no_grad():
        for name, b in model.named_buffers():
            b.copy_(buffers_before[name])

    result = sam_gradients(model, loss_fn, selected, variant, rho, eta)
    G = result.descent

    product = sum(float((g[name] * G[name]).sum()) for name in G)
    square = sum(float((G[name] ** 2).sum()) for name in G)
    descent = {}
    for name in G:
        parallel = product / square * G[name]
        perpendicular = g[name] - parallel
        descent[name] = G[name] - alpha * perpendicular
    return result._replace(descent=descent)


def gsam_radius(rho: float, rho_min: float, lr: float, lr_max: float, lr_min: float) -> float:
    """rho_t of GSAM, for a learning rate within or outside of its range."""
    if lr_max == lr_min:
        return rho
    share = (lr - lr_min) / (lr_max - lr_min)
    return rho_min + (rho - rho_min) * min(max(share, 0.0), 1.0)
