"""The perturbations as pure functions, at the edges of floating point."""
import math

import pytest
import torch

from timm_sam import multi_tensor
from timm_sam.multi_tensor import global_norm
from timm_sam.perturbation import VARIANTS, perturbation, with_length

SHAPES = ((4, 3), (4,), (1, 1, 5))


@pytest.fixture(autouse=True, params=['as one tensor', 'each by itself'])
def way(request, monkeypatch):
    """Small tensors on the CPU are computed with as one; all others are not."""
    if request.param != 'as one tensor':
        monkeypatch.setattr(multi_tensor, 'SMALL', 0)


def params_and_grads(scale: float, dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(2, *shape, generator=generator) for shape in SHAPES]
    return [d[0].to(dtype) for d in draw], [(d[1] * scale).to(dtype) for d in draw]


@pytest.mark.parametrize('scale', [1e-35, 1e-25, 1e-10, 1.0, 1e10, 1e25, 1e35])
def test_norm_of_eps_is_rho_for_gradients_of_any_float32_size(scale):
    params, grads = params_and_grads(scale)
    eps, grad_norm = perturbation('sam', params, grads, 0.5)
    assert float(global_norm(eps)) == pytest.approx(0.5, rel=1e-6)
    assert float(grad_norm) == pytest.approx(float(torch.cat([g.double().flatten() for g in grads]).norm()), rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('variant', VARIANTS)
def test_half_precision_is_computed_in_float32(variant, dtype):
    params, grads = params_and_grads(1e-4, dtype)
    eps, _ = perturbation(variant, params, grads, 0.5)
    wide, _ = perturbation(variant, [p.float() for p in params], [g.float() for g in grads], 0.5)
    assert all(e.dtype == torch.float32 for e in eps)
    assert all(torch.equal(e, w) for e, w in zip(eps, wide))


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('bad', [float('inf'), float('-inf'), float('nan')])
def test_one_bad_entry_makes_every_eps_zero(variant, bad):
    params, grads = params_and_grads(1.0)
    grads[1][2] = bad
    eps, grad_norm = perturbation(variant, params, grads, 0.5)
    assert not torch.isfinite(grad_norm)
    assert all(torch.equal(e, torch.zeros_like(e)) for e in eps)


@pytest.mark.parametrize('variant', VARIANTS)
def test_arguments_are_left_alone(variant):
    params, grads = params_and_grads(1.0)
    kept = [t.clone() for t in (*params, *grads)]
    perturbation(variant, params, grads, 0.5)
    assert all(torch.equal(t, k) for t, k in zip((*params, *grads), kept))


@pytest.mark.parametrize('variant', ['elementwise_l2', 'elementwise_linf', 'layerwise_l2'])
def test_zero_weights_are_not_perturbed_by_adaptive_variants(variant):
    params, grads = params_and_grads(1.0)
    params[0].zero_()
    eps, _ = perturbation(variant, params, grads, 0.5)
    assert torch.equal(eps[0], torch.zeros_like(eps[0]))
    assert eps[1].abs().sum() > 0


@pytest.mark.parametrize('variant', ['elementwise_l2', 'layerwise_l2'])
def test_all_weights_zero_gives_zero_eps_without_nan(variant):
    params, grads = params_and_grads(1.0)
    eps, _ = perturbation(variant, [torch.zeros_like(p) for p in params], grads, 0.5)
    assert all(torch.equal(e, torch.zeros_like(e)) for e in eps)


def test_only_weights_are_scaled_by_the_original_asam():
    params, grads = params_and_grads(1.0)
    eps, _ = perturbation('elementwise_l2_orig', params, grads, 0.5, eta=0.25, is_weight=[True, False, False])
    t = [params[0].abs() + 0.25, torch.ones_like(params[1]), torch.ones_like(params[2])]
    norm = torch.cat([(a * g).flatten() for a, g in zip(t, grads)]).norm()
    for e, a, g in zip(eps, t, grads):
        torch.testing.assert_close(e, 0.5 * a ** 2 * g / norm)


@pytest.mark.parametrize('scale', [0.0, 1e-200])  # whose squares are all zero
@pytest.mark.parametrize('variant', [name for name, v in VARIANTS.items() if v.p == 2])
def test_norm_of_zero_makes_every_eps_zero(variant, scale):
    params, grads = params_and_grads(scale, torch.float64)
    eps, grad_norm = perturbation(variant, params, grads, 0.5)
    assert grad_norm == 0 and all(torch.equal(e, torch.zeros_like(e)) for e in eps)


@pytest.mark.parametrize('kind', ['g', 'direction', 'masked', 'not finite', 'zero'])
@pytest.mark.parametrize('variant, normalized', [
    (name, lam) for name, variant in VARIANTS.items() for lam in ((0.0, 0.3, 1.0) if variant.p == 2 else (1.0,))])
def test_length_that_is_known_without_a_norm_is_the_norm_of_eps(variant, kind, normalized):
    torch.manual_seed(0)
    params, grads, other = ([torch.randn(n, dtype=torch.float64) for n in (5, 3)] for _ in range(3))
    if kind in ('not finite', 'zero'):
        grads = [g * (math.inf if kind == 'not finite' else 0) for g in grads]
    direction = other if kind == 'direction' else None
    masked = [g * (g > 0) for g in grads] if kind == 'masked' else None
    eps, _, length = with_length(variant, params, grads, 0.3, None, [True, True], direction, masked, True, normalized)
    assert (length is not None) == (variant == 'sam' and kind != 'masked')
    opposite, *_, other = with_length(variant, params, grads, -0.3, None, [True, True], direction, masked, True,
                                      normalized)
    assert all(torch.equal(a, -b) for a, b in zip(opposite, eps))
    assert other is length is None or torch.equal(other, length)
    if length is not None:
        assert float(length) == pytest.approx(float(torch.cat(eps).norm()), rel=1e-14, abs=0)
        assert (float(length) == 0) == (kind in ('not finite', 'zero'))
