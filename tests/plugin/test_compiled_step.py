"""`torch.compile` of a whole step: SAM runs as it is, so the weights are those of a step that is not compiled."""
import pytest
import torch
import torch.nn.functional as F
from support.models import TinyNet, assert_identical, batch, sam_on, weights


def trained(way, compiled):
    torch.compiler.reset()
    model = TinyNet().double()
    sam = sam_on(model)

    def minimize(x, y):
        return sam.minimize(lambda: F.cross_entropy(model(x), y))

    def closure(x, y):
        def call():
            sam.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss
        return sam.step(call)

    step = {'minimize': minimize, 'closure': closure}[way]
    step = torch.compile(step, backend='eager') if compiled else step
    for seed in range(3):
        torch.manual_seed(seed)
        step(*batch(seed))
    return weights(model)


@pytest.mark.full
@pytest.mark.parametrize('way', ['minimize', 'closure'])
def test_whole_step_that_is_compiled_is_the_same_update(way):
    assert_identical(trained(way, True), trained(way, False))
