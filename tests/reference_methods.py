"""The other SAM methods, written down slowly: one class a paper, one obvious function for its update.

Transcriptions for tests to compare with, like `reference.py`, whose step they extend; nothing of ours is imported.
Each has `step(model, optimizer, loss_fn, selected, variant, rho)`, which makes one update and returns the loss.
"""
import copy
import math

import torch
from reference import ETA, base_step, loss_and_gradients, normalization, perturbation


def lengths(tensors):
    """The l2 norm over all tensors together."""
    return sum(float((t ** 2).sum()) for t in tensors) ** 0.5


def product(a, b):
    return sum(float((a[name] * b[name]).sum()) for name in a)


def gradient_at(model, loss_fn, eps):
    """The gradient of all parameters at w + eps; weights and statistics end as they began, random numbers too."""
    params, random_state = dict(model.named_parameters()), torch.get_rng_state()
    weights = {name: p.detach().clone() for name, p in params.items()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        for name, e in eps.items():
            params[name].copy_(weights[name] + e)
    loss, gradient = loss_and_gradients(model, loss_fn)
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(weights[name])
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    torch.set_rng_state(random_state)
    return loss, gradient


def losses_at(model, loss_fn, eps):
    """The losses of all samples at w + eps; everything ends as it began."""
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        for name, e in eps.items():
            model.get_parameter(name).add_(e)
        losses = loss_fn(None)
        model.load_state_dict(state)
    torch.set_rng_state(random_state)
    return losses.tolist()


def leave_statistics(model, loss_fn, eps):
    """What a pass at w + eps leaves of running statistics and random numbers."""
    params = dict(model.named_parameters())
    weights = {name: p.detach().clone() for name, p in params.items()}
    with torch.no_grad():
        for name, e in eps.items():
            params[name].add_(e)
        loss_fn()
        for name, p in params.items():
            p.copy_(weights[name])


def T_of(model, selected, variant, g):
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {name: normalization(variant, name, weights[name], g[name], ETA[variant]) for name in selected}


def along(model, selected, variant, g, d, rho):
    """eps = rho T^2 d / ||T d||, T that of g."""
    T = T_of(model, selected, variant, g)
    norm = lengths(T[name] * d[name] for name in selected)
    return {name: rho * T[name] ** 2 * d[name] / norm for name in selected}


class Method:
    def step(self, model, optimizer, loss_fn, selected, variant, rho):
        loss, g = gradient_at(model, loss_fn, {})
        eps = self.eps(model, selected, variant, g, rho)
        _, G = gradient_at(model, loss_fn, eps)
        leave_statistics(model, loss_fn, {})
        gradient = self.combined(g, G)
        self.after(g, G, selected)
        base_step(model, optimizer, gradient)
        return loss

    def eps(self, model, selected, variant, g, rho):
        weights = {name: p.detach() for name, p in model.named_parameters() if name in selected}
        return perturbation(variant, weights, {name: g[name] for name in selected}, rho)

    def combined(self, g, G):
        return G

    def after(self, g, G, selected):
        pass


class Usam(Method):
    """eps = rho s T^2 g, s = 1 - lam + lam / ||T g||."""

    def __init__(self, lam):
        self.lam, self.t = lam, 0

    def eps(self, model, selected, variant, g, rho):
        self.t += 1
        lam = 1 - 1 / self.t if self.lam == '1-1/t' else self.lam
        T = T_of(model, selected, variant, g)
        s = 1 - lam + lam / lengths(T[name] * g[name] for name in selected)
        return {name: rho * s * T[name] ** 2 * g[name] for name in selected}


class Friendly(Method):
    """d = g - sigma m; afterwards m <- lam m + (1 - lam) g."""

    def __init__(self, sigma, lam):
        self.sigma, self.lam, self.m = sigma, lam, None

    def eps(self, model, selected, variant, g, rho):
        d = {name: g[name] - (0 if self.m is None else self.sigma * self.m[name]) for name in selected}
        return along(model, selected, variant, g, d, rho)

    def after(self, g, G, selected):
        if self.m is None:
            self.m = {name: g[name] for name in selected}
        else:
            self.m = {name: self.lam * self.m[name] + (1 - self.lam) * g[name] for name in selected}


class Stable(Method):
    """G' = ||g|| / ||G|| G."""

    def combined(self, g, G):
        c = lengths(g.values()) / lengths(G.values())
        return {name: c * G[name] for name in G}


class Looksam(Method):
    """SAM every k-th update; else the plain gradient g, and alpha ||g|| u."""

    def __init__(self, k, alpha):
        self.k, self.alpha, self.t, self.u = k, alpha, 0, None

    def step(self, model, optimizer, loss_fn, selected, variant, rho):
        t, self.t = self.t, self.t + 1
        if t % self.k == 0:
            return super().step(model, optimizer, loss_fn, selected, variant, rho)
        loss, g = loss_and_gradients(model, loss_fn)
        size = lengths(g.values())
        base_step(model, optimizer, {name: g[name] + self.alpha * size * self.u[name] for name in g})
        return loss

    def after(self, g, G, selected):
        v = {name: G[name] - product(G, g) / product(g, g) * g[name] for name in G}
        self.u = {name: v[name] / lengths(v.values()) for name in v}


class Msam(Method):
    """eps = -rho T^2 v / ||T v||, v the optimizer's first moment; one pass."""

    def step(self, model, optimizer, loss_fn, selected, variant, rho):
        params = dict(model.named_parameters())
        v = {name: optimizer.state[params[name]].get('momentum_buffer', optimizer.state[params[name]].get('exp_avg'))
             for name in selected if optimizer.state[params[name]]}
        eps = {}
        if v:
            eps = {name: -e for name, e in along(model, selected, variant, v, v, rho).items()}
        loss, G = gradient_at(model, loss_fn, eps)
        leave_statistics(model, loss_fn, eps)
        base_step(model, optimizer, G)
        return loss


class Masked(Method):
    """eps = rho T^2 (mask d) / N, N = ||T d|| (full) or ||T (mask d)||; `mask()` says which elements."""

    def __init__(self, full, mask):
        self.full, self.mask = full, mask

    def eps(self, model, selected, variant, g, rho):
        T, mask = T_of(model, selected, variant, g), self.mask()
        masked = {name: mask[name] * g[name] for name in selected}
        norm = lengths(T[name] * (g if self.full else masked)[name] for name in selected)
        return {name: rho * T[name] ** 2 * masked[name] / norm for name in selected}


class Esam(Method):
    """eps = rho / beta T^2 g / ||T g|| of the tensors that `drawn()` names; the step is that of the gamma of the
    samples whose losses rise most. `loss_fn` takes positions or None, and returns losses."""

    def __init__(self, beta, gamma, drawn):
        self.beta, self.gamma, self.drawn = beta, gamma, drawn

    def step(self, model, optimizer, loss_fn, selected, variant, rho):
        loss, g = gradient_at(model, lambda: loss_fn(None).mean(), {})
        names = self.drawn()
        eps = along(model, names, variant, g, g, rho / self.beta)
        before, after = losses_at(model, loss_fn, {}), losses_at(model, loss_fn, eps)
        best_first = sorted(range(len(before)), key=lambda i: (before[i] - after[i], i))
        rows = torch.tensor(sorted(best_first[:max(1, math.floor(self.gamma * len(before)))]))
        _, G = gradient_at(model, lambda: loss_fn(rows).mean(), eps)
        leave_statistics(model, lambda: loss_fn(None), {})
        base_step(model, optimizer, G)
        return loss
