"""Closures that do not zero gradients: harmless where none were there, an error where they would be added to."""
import copy

import pytest
import torch
from support.models import (
    BatchLoss,
    TinyNet,
    assert_identical,
    batch,
    by_closure,
    one_step,
    sam_on,
    weights,
    whole_graphs,
)
from torch import nn

from timm_sam import SAM, VARIANTS, methods

ZEROING = {
    'sam': lambda sam, model: sam.zero_grad(),
    'sam in place': lambda sam, model: sam.zero_grad(set_to_none=False),
    'base': lambda sam, model: sam.optimizer.zero_grad(),
    'base in place': lambda sam, model: sam.optimizer.zero_grad(set_to_none=False),
    'model': lambda sam, model: model.zero_grad(),
    'by hand': lambda sam, model: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
}
METHODS = {'sam': {}, 'gsam': {'method': methods.gsam(alpha=0.4, rho_min=0.1)}, 'msam': {'method': methods.msam()}}


def tiny():
    return TinyNet().double()


def closure_of(sam, model, seed, before=lambda: None, backwards=1):
    loss_fn = BatchLoss(model, batch(seed))

    def closure():
        before()
        loss = loss_fn()
        for _ in range(backwards):
            (loss / backwards).backward(retain_graph=True)
        return loss
    return closure


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('zeroing', ZEROING)
def test_every_way_of_zeroing_is_seen(zeroing, method):
    model, other = tiny(), tiny()
    sam, expected = sam_on(model, **METHODS[method]), sam_on(other, **METHODS[method])
    for seed in range(3):
        torch.manual_seed(seed)
        sam.step(closure_of(sam, model, seed, lambda: ZEROING[zeroing](sam, model)))
        one_step('closure', expected, other, seed)
    assert_identical(weights(model), weights(other))


@pytest.mark.parametrize('variant', VARIANTS)
def test_clipping_by_norm_in_a_closure_clips_g_and_changes_eps_of_fisher_only(variant):
    clipped, model = tiny(), tiny()
    sam, expected = sam_on(clipped, variant=variant), sam_on(model, variant=variant)

    def closure():
        sam.zero_grad()
        loss = BatchLoss(clipped, batch(0))()
        loss.backward()
        nn.utils.clip_grad_norm_(clipped.parameters(), 0.05)
        return loss

    torch.manual_seed(0)
    sam.step(closure)
    torch.manual_seed(0)
    expected.backward(BatchLoss(model, batch(0)))
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    expected.step()
    assert sam.stats.grad_norm == pytest.approx(0.05, rel=1e-4) and expected.stats.grad_norm > 0.1
    same = [torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(clipped.parameters(), model.parameters())]
    assert all(same) == (variant != 'fisher')


@pytest.mark.parametrize('backwards', [1, 2])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_gradients_of_an_earlier_batch_are_refused_and_kept(params, method, backwards):
    model = tiny()
    sam = sam_on(model, params=params, **METHODS[method])
    for seed in range(2):  # msam looks ahead from the second update on
        one_step('closure', sam, model, seed)
    sam.zero_grad()
    BatchLoss(model, batch(5))().backward()  # as a loop that accumulates runs the closure for all but the last batch
    held, before = {name: p.grad.clone() for name, p in model.named_parameters()}, weights(model)
    with pytest.raises(ValueError, match=r'^closure: it adds to gradients that were there before.*SAM\.backward\('):
        sam.step(closure_of(sam, model, 6, backwards=backwards))
    assert_identical(weights(model), before)
    if method != 'msam':  # there is no pass that adds to nothing
        assert_identical({name: p.grad for name, p in model.named_parameters()}, held)
    sam.zero_grad()
    one_step('closure', sam, model, 7)


def test_what_was_zeroed_outside_needs_no_zeroing_inside():
    model, other = tiny(), tiny()
    sam, expected = sam_on(model), sam_on(other)
    for seed in range(3):
        torch.manual_seed(seed)
        sam.zero_grad()
        sam.step(closure_of(sam, model, seed))
        one_step('closure', expected, other, seed)
    assert_identical(weights(model), weights(other))


@pytest.mark.filterwarnings('ignore:.*not in the optimizer:UserWarning')
def test_what_the_optimizer_does_not_have_is_none_of_a_closures_to_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.LayerNorm(3)).double()
    other, x = copy.deepcopy(model), torch.randn(8, 4, dtype=torch.float64)
    for net, way in ((model, 'closure'), (other, 'minimize')):
        sam = SAM(torch.optim.SGD(net[:2].parameters(), lr=0.1), net, rho=0.5)
        for _ in range(3):
            def closure(sam=sam, net=net):
                sam.zero_grad()
                loss = net(x).pow(3).mean()
                loss.backward()
                return loss

            sam.step(closure) if way == 'closure' else sam.minimize(lambda net=net: net(x).pow(3).mean())
    assert_identical(weights(model), weights(other))
    assert model[3].weight.grad is not None


def test_plain_updates_accumulate_as_those_of_any_optimizer():
    model, other = tiny(), tiny()
    sam, base = sam_on(model, start=1), sam_on(other).optimizer
    for optimizer, net in ((sam, model), (base, other)):
        torch.manual_seed(0)
        if optimizer is sam:
            sam.begin(0, 0)
        BatchLoss(net, batch(0))().backward()
        optimizer.step(closure_of(optimizer, net, 1))
    assert_identical(weights(model), weights(other))


def test_gradient_that_does_not_arrive_this_time_is_none_of_this_batch():
    class Detour(TinyNet):
        used = True

        def forward(self, x):
            return super().forward(x) if self.used else self.head(self.norm(x.mean(dim=(2, 3)).repeat(1, 2)[:, :4]))

    model, other = Detour().double(), Detour().double()
    for net, set_to_none in ((model, True), (other, False)):
        sam = sam_on(net)
        by_closure(sam, BatchLoss(net, batch(0)))
        net.used = False
        torch.manual_seed(1)
        sam.step(closure_of(sam, net, 1, lambda s=sam, n=set_to_none: s.zero_grad(n)))
        assert sam.stats.grad_norm > 0
    for name, p in model.named_parameters():
        if name.startswith('gn.'):
            assert p.grad is None


@pytest.mark.full
@whole_graphs
def test_compiled_model_is_not_compiled_again():
    model = tiny()
    compiled = torch.compile(model, backend='aot_eager')
    sam = sam_on(compiled)
    graphs = []
    for seed in range(4):
        torch._dynamo.utils.counters.clear() if seed == 2 else None
        torch.manual_seed(seed)
        sam.step(closure_of(sam, compiled, seed, sam.zero_grad))
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs[-1] == 0
    BatchLoss(compiled, batch(5))().backward()
    with pytest.raises(ValueError, match='closure'):
        sam.step(closure_of(sam, compiled, 6))
