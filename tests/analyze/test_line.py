"""The loss along SAM's direction: parabolas, and the loss that SAM's own second pass sees."""
import copy

import numpy as np
import pytest
import reference_analysis as reference
import torch
from support.models import TinyNet, batch
from torch import nn

from timm_sam import SAM
from timm_sam.analyze.line import TIMES, Line, measure_line
from timm_sam.analyze.objective import batch_loss
from timm_sam.perturbation import VARIANTS
from timm_sam.selection import SELECTIONS, select_parameters


def test_quadratic_loss_along_sam_is_a_parabola():
    h, w, rho = reference.CURVATURES, reference.WEIGHTS, 0.3
    line = Line('sam', 'all', rho)
    weights = list(torch.tensor(w).split(2))
    h_tensor = torch.tensor(h)
    found = measure_line(lambda x: 0.5 * (h_tensor * torch.cat(x) ** 2).sum(), weights, ['a', 'b'], [line],
                         {'all': {'a', 'b'}})[line]
    assert TIMES[0] == -2 and TIMES[-1] == 2 and TIMES[10] == 0 and TIMES[15] == 1 and len(TIMES) == 21
    constant, slope, curvature = reference.parabola_along_sam(h, w, rho)
    expected = [constant + slope * t + curvature * t * t for t in TIMES]
    assert found['losses'] == pytest.approx(expected, abs=1e-12)
    assert found['grad_norm'] == pytest.approx(np.linalg.norm(h * w)) and found['non_finite'] == 0


def test_every_variant_and_selection_is_where_one_step_of_sam_is():
    model = TinyNet().double().eval()
    images, labels = batch(0)
    lines = [Line(variant, params, 0.4, 0.02 if VARIANTS[variant].eta is not None else None)
             for variant in VARIANTS for params in SELECTIONS]
    selected = {params: {name for name, _ in select_parameters(model, params)} for params in SELECTIONS}
    names = [name for name, _ in model.named_parameters()]
    weights = [p.detach() for _, p in model.named_parameters()]
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = measure_line(batch_loss(model, names, images, labels, False), weights, names, lines, selected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for line in lines:
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, variant=line.variant, params=line.params,
                  rho=line.rho, eta=line.eta)
        sam.minimize(lambda: nn.functional.cross_entropy(model(images), labels))
        losses = found[line]['losses']
        assert losses[15] == pytest.approx(float(sam.stats.loss_perturbed), abs=1e-12), str(line)
        assert losses[10] == pytest.approx(float(sam.stats.loss), abs=1e-12)
        assert found[line]['grad_norm'] == pytest.approx(float(sam.stats.grad_norm))
        assert losses[15] > losses[10]


def test_gradient_that_is_zero_has_no_direction():
    line = Line('sam', 'all', 0.1)
    found = measure_line(lambda x: (x[0] * 0).sum() + 1, [torch.ones(3)], ['a'], [line], {'all': {'a'}})[line]
    assert found['losses'] == [1.0] * 21 and found['grad_norm'] == 0


def test_losses_that_are_not_finite_are_counted():
    line = Line('sam', 'all', 1.0)
    found = measure_line(lambda x: -torch.log(2.5 - x[0]).sum(), [torch.ones(1)], ['a'], [line], {'all': {'a'}})[line]
    assert found['non_finite'] == sum(1 + t >= 2.5 for t in TIMES) > 0
