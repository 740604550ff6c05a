"""How many gradients were not finite: counted when asked, however many updates went by."""
import pytest
import torch
from torch import nn

from timm_sam import SAM
from timm_sam.stats import NonFinite


@pytest.mark.parametrize('asked', [1, 7, 1000])
def test_count_does_not_depend_on_when_it_is_asked_for(asked):
    counter, expected = NonFinite(torch.device('cpu')), 0
    for i in range(300):
        value = {3: float('inf'), 7: float('nan')}.get(i % 10, float(i))
        counter.add(torch.tensor(value, dtype=torch.float64))
        expected += i % 10 in (3, 7)
        if i % asked == 0:
            assert counter.count() == expected
    assert counter.count() == expected == 60 and counter.count().dtype == torch.int64


def test_updates_with_a_gradient_that_is_not_finite_are_counted():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.1)
    for i in range(70):
        scale = float('inf') if i % 10 == 0 else 1.0
        sam.backward(lambda scale=scale: (model(torch.ones(2, 3)) * scale).square().sum())
        sam.zero_grad()  # inf times a learning rate of 0 is nan
        sam.step()
    assert sam.nonfinite == 7
