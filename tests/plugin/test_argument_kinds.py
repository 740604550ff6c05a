"""Arguments of another kind than those of the plugin: one line that names them, and nothing has changed."""
import pytest
import torch
import torch.nn.functional as F
from support.models import TinyNet, assert_identical, batch, weights

from timm_sam import SAM, compile_split, select_parameters


def of(net):
    return torch.optim.SGD(net.parameters(), lr=0.1)


@pytest.mark.parametrize('given', [
    lambda net: net.parameters(), lambda net: [net], lambda net: None, lambda net: net.forward,
], ids=['parameters', 'list', 'nothing', 'function'])
@pytest.mark.parametrize('call', [
    lambda net, model: SAM(of(net), model, rho=0.5), lambda net, model: SAM(of(net), model=model, rho=0.5),
    lambda net, model: select_parameters(model), lambda net, model: compile_split(model),
], ids=['SAM', 'SAM by name', 'select_parameters', 'compile_split'])
def test_what_is_no_module_is_no_model(call, given):
    net = TinyNet()
    with pytest.raises(ValueError, match='^model must be the torch.nn.Module that is trained, got [a-zA-Z]+$'):
        call(net, given(net))


def test_variant_of_another_kind_is_answered_with_all_variants():
    net = TinyNet()
    with pytest.raises(ValueError, match=r"variant=\['sam'\] is unknown: use one of sam, "):
        SAM(of(net), net, rho=0.5, variant=['sam'])


@pytest.mark.parametrize('name, value, says', [
    ('weigh', 0.5, 'weigh must be a function that takes the loss, not a float'),
    ('backward_fn', 3, 'backward_fn must be a function that takes the loss, not a int'),
    ('scaler', 256.0, 'scaler must be a torch.amp.GradScaler, not a float'),
    ('closure', 3, 'closure must be a function that computes the loss and its gradients, not a int'),
])
def test_what_is_no_function_is_named_before_anything_is_computed(name, value, says):
    net = TinyNet().double()
    sam = SAM(of(net), net, rho=0.5)
    x, y = batch(0)
    before, calls = weights(net), []

    def loss_fn():
        calls.append(None)
        return F.cross_entropy(net(x), y)

    with pytest.raises(ValueError) as caught:
        sam.step(value) if name == 'closure' else sam.backward(loss_fn, **{name: value})
    assert str(caught.value).startswith(says) and '\n' not in str(caught.value)
    assert not calls
    assert_identical(weights(net), before)
    sam.minimize(loss_fn)
