"""SSAM-F: the mask of the largest Fisher information, and samples that leave nothing behind."""
import functools

import pytest
import reference_methods as papers
import torch
import torch.nn.functional as F
from support.models import (
    OPTIMIZERS,
    SELECTIONS,
    BatchLoss,
    TinyNet,
    assert_identical,
    batch,
    buffers,
    one_step,
    sam_on,
    weights,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_sam import SAM, methods

ROWS = 9


def samples_of(model, seed=0, asked=None):
    """Losses of single samples of a batch, as a loop offers them."""
    x, y = batch(seed, ROWS, model.head.weight.dtype)

    def loss(k):
        return F.cross_entropy(model(x[k:k + 1]), y[k:k + 1])

    def samples(n):
        if asked is not None:
            asked.append(n)
        return (functools.partial(loss, k % ROWS) for k in range(n))

    return samples


def fisher(sparsity=0.5, samples=ROWS, **more):
    return methods.ssam_fisher(sparsity, samples=samples, **more)


def by_hand(model, selected, sparsity, n=ROWS, seed=0):
    """The mask by name: the K largest sums of squared gradients of single samples, each of a model of its own."""
    twin, total = TinyNet().double(), {}
    random_state = torch.get_rng_state()
    for loss in samples_of(twin, seed)(n):
        twin.load_state_dict(model.state_dict())
        twin.zero_grad()
        loss().backward()
        for name in selected:
            total[name] = total.get(name, 0) + twin.get_parameter(name).grad ** 2
    torch.set_rng_state(random_state)
    flat = torch.cat([t.flatten() for t in total.values()])
    kept = flat.argsort(descending=True)[:round((1 - sparsity) * len(flat))]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[kept] = True
    parts = mask.split([t.numel() for t in total.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(total.items(), parts)}


@pytest.mark.parametrize('norm', ['full', 'masked'])
@pytest.mark.parametrize('selection', SELECTIONS)
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_update_is_that_of_the_transcription_with_the_mask_by_hand(optimizer, selection, norm):
    model, twin = TinyNet().double(), TinyNet().double()
    sam, base = sam_on(model, optimizer, params=selection, method=fisher(norm=norm)), OPTIMIZERS[optimizer](twin)
    names = SELECTIONS[selection]
    for step in range(4):
        epoch = step // 2
        torch.manual_seed(100 + step)
        if step % 2 == 0:
            mask = by_hand(model, names, 0.5)
        sam.begin(epoch, step, samples_of(model))
        assert all(torch.equal(mask[name], part) for (name, _), part in zip(sam.selected, sam.methods[0].mask.mask))
        one_step('minimize', sam, model, step)
        torch.manual_seed(step)
        paper = papers.Masked(norm == 'full', lambda mask=mask: mask)
        paper.step(twin, base, BatchLoss(twin, batch(step)), names, 'sam', 0.5)
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(buffers(model), buffers(twin), rtol=1e-11, atol=1e-13)


def test_estimate_leaves_random_numbers_statistics_and_gradients_as_they_were():
    model = TinyNet()
    sam = sam_on(model, params='all', method=fisher())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.manual_seed(3)
    kept, state = buffers(model), torch.get_rng_state()
    sam.begin(0, 0, samples_of(model))
    assert_identical(buffers(model), kept)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@pytest.mark.parametrize('sparsity', [0.0, 0.3, 0.996])
def test_as_many_elements_are_live_as_the_sparsity_says(sparsity):
    model = TinyNet()
    sam = sam_on(model, params='all', method=fisher(sparsity))
    sam.begin(0, 0, samples_of(model))
    assert int(sam.methods[0].mask.flat().sum()) == round((1 - sparsity) * 303)


def test_mask_is_estimated_once_in_so_many_epochs_and_only_where_updates_are_perturbed():
    model, asked = TinyNet(), []
    sam = sam_on(model, params='all', start=1, method=fisher(samples=4, every=2))
    for epoch in range(5):
        for update in range(2):
            sam.begin(epoch, 2 * epoch + update, samples_of(model, asked=asked))
            one_step('minimize', sam, model, update)
        assert len(asked) == (0, 1, 2, 2, 3)[epoch]
    assert asked == [4, 4, 4]


def test_sample_without_finite_gradients_is_no_reason_to_keep_an_element():
    model = TinyNet()
    sam = sam_on(model, params='all', method=fisher())
    sam.begin(0, 0, lambda n: [lambda: samples_of(model)(1).__next__()() * torch.nan])
    assert int(sam.methods[0].mask.flat().sum()) == 152


def test_loop_that_offers_no_samples_is_told_how():
    model = TinyNet()
    sam = sam_on(model, method=fisher())
    with pytest.raises(ValueError, match=r'ssam_fisher: it estimates .* call SAM.begin\(epoch, update, samples\)'):
        sam.begin(0, 0)
    with pytest.raises(ValueError, match='it needs the epoch'):
        one_step('minimize', sam_on(model, method=fisher()), model)


def test_state_is_a_bit_an_element_and_training_goes_on_within_an_epoch_without_an_estimate():
    def train(sam, model, steps):
        for step in steps:
            torch.manual_seed(step)  # dropout in the samples
            sam.begin(step // 3, step, samples_of(model, step // 3))
            one_step('minimize', sam, model, step)

    model, again = TinyNet(), TinyNet()
    whole = sam_on(model, params='all', method=fisher())
    train(whole, model, range(7))
    first = sam_on(again, params='all', method=fisher())
    train(first, again, range(4))
    state = first.method_state_dict()
    assert state['mask']['mask'].dtype == torch.uint8 and state['mask']['mask'].numel() == -(-303 // 8)
    second = sam_on(again, params='all', method=fisher())
    second.load_state_dict(first.state_dict())
    second.load_method_state_dict(state)
    asked = []
    second.begin(1, 4, samples_of(again, asked=asked))
    assert asked == []
    train(second, again, range(4, 7))
    assert_identical(weights(model), weights(again))


def test_overflow_leaves_the_mask_alone():
    model = TinyNet()
    sam = sam_on(model, params='all', method=fisher())
    sam.begin(0, 0, samples_of(model))
    before = sam.methods[0].mask.flat()
    one_step('backward', sam, model, on_call={1: lambda loss: loss * torch.inf})
    assert int(sam.nonfinite) == 1 and torch.equal(before, sam.methods[0].mask.flat())


@pytest.mark.parametrize('make, message', [
    (lambda: methods.ssam_fisher(1), 'ssam_fisher: sparsity=1 must'),
    (lambda: methods.ssam_fisher(0.5, samples=0), 'ssam_fisher: samples=0'),
    (lambda: methods.ssam_fisher(0.5, samples=1.5), 'ssam_fisher: samples=1.5'),
    (lambda: methods.ssam_fisher(0.5, every=0), 'ssam_fisher: every=0'),
    (lambda: methods.ssam_fisher(0.5, norm='l2'), "ssam_fisher: norm='l2'")])
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_buffers_of_layers_are_put_back_too():
    """Spectral normalization keeps a vector that each forward in training mode moves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(108, 3)), nn.LayerNorm(3))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.1, method=fisher(samples=2))
    before = buffers(model)
    x, y = batch(0, dtype=torch.float32)
    sam.begin(0, 0, lambda n: [lambda: F.cross_entropy(model(x[:1]), y[:1])] * n)
    assert_identical(buffers(model), before)


class Checkpointed(TinyNet):
    """Its head behind a checkpoint of the kind that knows no backward pass to chosen parameters."""

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


def test_estimate_of_a_model_with_reentrant_checkpoints_is_that_of_one_without():
    masks = []
    for model in (TinyNet().double(), Checkpointed().double()):
        sam = sam_on(model, params='all', method=fisher())
        torch.manual_seed(0)
        sam.begin(0, 0, samples_of(model))
        masks.append(sam.methods[0].mask.flat())
    assert torch.equal(*masks)


def test_parameters_that_are_frozen_by_now_are_none_that_a_mask_keeps():
    model = TinyNet().double()
    sam = sam_on(model, params='all', method=fisher())
    model.conv.requires_grad_(False)
    sam.begin(0, 0, samples_of(model))
    live = dict(zip((name for name, _ in sam.selected), sam.methods[0].mask.mask))
    assert int(live['conv.weight'].sum()) == 0 < int(live['head.weight'].sum())
