"""Values that are not finite while the first updates check what both passes share: counted as elsewhere."""
import math

import pytest
import torch
import torch.nn.functional as F
from support.sharing import DATA, Counted, late


def train(values, **options):
    torch.manual_seed(0)
    model = Counted().double()
    sam = late(model, **options)
    torch.manual_seed(1)
    for value in values:
        x = DATA[0].double()
        x[2, 1] = x[2, 1] if value is None else value
        kept = {name: p.detach().clone() for name, p in model.state_dict().items()}
        sam.minimize(lambda x=x: F.cross_entropy(model(x), DATA[1]))
        if value is not None:  # as the loss scaler leaves out such an update
            model.load_state_dict(kept)
            sam.state.clear()
    return model, sam


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('first', [1, 2, 4])
def test_batches_that_are_not_finite_at_the_start_are_counted_and_sharing_goes_on(value, first):
    values = [value] * first + [None] * 5
    model, sam = train(values)
    expected, unshared = train(values, share_forward=False)
    assert int(sam.nonfinite) == int(unshared.nonfinite) == first
    assert sam.sharing.startswith('one forward for both passes')
    for (name, a), b in zip(model.state_dict().items(), expected.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_mismatch_beside_a_value_that_is_not_finite_is_found(value):
    """An infinite tolerance would let anything pass."""
    torch.manual_seed(0)
    model = Counted().double()
    sam = late(model)
    calls, forward = [], model[0].forward

    def drifting(x):
        calls.append(1)
        return forward(x) + 0.1 * len(calls)

    model[0].forward = drifting
    x = DATA[0].double()
    x[2, 1] = value
    sam.minimize(lambda: F.cross_entropy(model(x), DATA[1]))
    assert sam.sharing.startswith('two full forwards per update')
