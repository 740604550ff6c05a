"""Sparse masks, and SAM in the last part of a run."""
import math

import pytest
import reference_methods as papers
import torch
from support.models import (
    ONLYNORM,
    OPTIMIZERS,
    SELECTIONS,
    BatchLoss,
    TinyNet,
    assert_identical,
    batch,
    one_step,
    sam_on,
    weights,
)

from timm_sam import methods
from timm_sam.methods.masks import Dynamic, Sparse
from timm_sam.methods.stages import At


def at(epoch=0, update=0, seed=0):
    return At(epoch, update, 0, seed, 0)


def params(selection='all'):
    return [p for name, p in TinyNet().named_parameters() if name in SELECTIONS[selection]]


MASKED = {  # the method, and what its eps is normalized by
    'random masked': (lambda: methods.random_mask(0.5, norm='masked'), 'masked'),
    'random full': (lambda: methods.random_mask(0.5, norm='full'), 'full'),
    'dynamic': (lambda: methods.ssam_dynamic(0.5, total_epochs=2), 'full'),
}


@pytest.mark.parametrize('name', MASKED)
@pytest.mark.parametrize('selection', SELECTIONS)
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_update_with_a_mask_is_that_of_the_transcription(optimizer, selection, name):
    model, twin = TinyNet().double(), TinyNet().double()
    make, norm = MASKED[name]
    method = make()
    sam, base = sam_on(model, optimizer, params=selection, method=method), OPTIMIZERS[optimizer](twin)
    names = [name for name, _ in sam.selected]
    for step in range(4):
        sam.begin(step // 2, step)
        mask = dict(zip(names, method.mask.mask))
        paper = papers.Masked(norm == 'full', lambda mask=mask: mask)
        seen = one_step('minimize', sam, model, step).weights_seen
        torch.manual_seed(step)
        paper.step(twin, base, BatchLoss(twin, batch(step)), SELECTIONS[selection], 'sam', 0.5)
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-11, atol=1e-13)
        moved = sum(int((seen[0][name] != seen[1][name]).sum()) for name in names)
        assert moved <= round(0.5 * sum(seen[0][name].numel() for name in names))
    if norm == 'masked':
        assert float(sam.stats.eps_norm) == pytest.approx(0.5, rel=1e-12)
    else:
        assert 0 < float(sam.stats.eps_norm) < 0.5


def test_mask_of_the_normalization_layers_is_sam_on_to_rounding():
    model, twin = TinyNet().double(), TinyNet().double()
    method = methods.random_mask(0.5)
    sam, sam_on_norms = sam_on(model, params='all', method=method), sam_on(twin, params='onlynorm')
    for step in range(4):
        sam.begin(0, step)
        method.mask.take(torch.cat([torch.full((p.numel(),), name in ONLYNORM) for name, p in sam.selected]))
        one_step('minimize', sam, model, step)
        one_step('minimize', sam_on_norms, twin, step)
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-11, atol=1e-13)


def test_full_norm_leaves_the_share_of_the_gradient_under_the_mask():
    model = TinyNet().double()
    method = methods.random_mask(0.5, norm='full')
    sam = sam_on(model, params='all', method=method)
    twin = TinyNet().double()
    torch.manual_seed(0)
    BatchLoss(twin, batch(0))().backward()
    one_step('minimize', sam, model)
    d = torch.cat([p.grad.flatten() for p in twin.parameters()])
    mask = torch.cat([part.flatten() for part in method.mask.mask])
    assert float(sam.stats.eps_norm) ** 2 == pytest.approx(
        0.25 * float((mask * d).square().sum() / d.square().sum()), rel=1e-10)


@pytest.mark.parametrize('sparsity', [0.0, 0.3, 0.5, 0.997])
def test_as_many_elements_are_live_as_the_sparsity_says(sparsity):
    mask = Sparse(sparsity, None, 'masked')
    mask.bind(params())
    mask.prepare(at(), None)
    assert int(mask.flat().sum()) == round((1 - sparsity) * 303)


@pytest.mark.parametrize('method', [
    methods.random_mask(0.9995), methods.ssam_dynamic(0.9995, total_epochs=4), methods.ssam_fisher(0.9995)])
def test_mask_that_leaves_nothing_is_refused(method):
    name = method.name.split('(')[0]
    with pytest.raises(ValueError, match=rf'^{name}: sparsity=0.9995 leaves none of \d+ elements.* at most 0.9'):
        sam_on(TinyNet(), params='all', method=method)


def drawn(every=None, seed=0, epochs=(0,)):
    mask, seen = Sparse(0.5, every, 'masked'), []
    mask.bind(params())
    for epoch in epochs:
        mask.prepare(at(epoch, seed=seed), None)
        seen.append(mask.flat())
    return seen


def test_random_mask_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first, = drawn()
    torch.manual_seed(2)
    assert torch.equal(first, drawn()[0]) and not torch.equal(first, drawn(seed=1)[0])


def test_random_mask_is_drawn_again_every_so_many_epochs_and_after_a_restart_is_the_same():
    one, two, three, four, five = drawn(every=2, epochs=range(5))
    assert torch.equal(one, two) and torch.equal(three, four)
    assert not torch.equal(one, three) and not torch.equal(three, five)
    assert torch.equal(drawn(every=2, epochs=[3])[0], three)


def test_masks_that_change_by_the_epoch_need_to_know_it():
    model = TinyNet()
    for method in (methods.random_mask(0.5, every=1), methods.ssam_dynamic(0.5, total_epochs=3)):
        with pytest.raises(ValueError, match=r'method: it needs the epoch.*call SAM.begin'):
            one_step('minimize', sam_on(model, method=method), model)


# Dynamic

def dynamic(drop=0.5, sparsity=0.5, epochs=4, every=1):
    mask = Dynamic(sparsity, every, 'full', drop, epochs)
    mask.bind(params())
    return mask


def gradients(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in params()]


YES, NO = torch.tensor(True), torch.tensor(False)


def test_the_live_elements_with_the_smallest_gradients_are_dropped_and_none_grows_back_at_once():
    mask = dynamic()
    mask.prepare(at(), None)
    before, mean = mask.flat(), gradients()
    mask.observe(mean, YES)
    after, size = mask.flat(), torch.cat([t.abs().flatten() for t in mean])
    dropped, grown, count = before & ~after, after & ~before, mask.exchanged(0)
    assert int(dropped.sum()) == int(grown.sum()) == count == round(0.5 * 152)
    kept = before & after
    assert float(size[dropped].max()) <= float(size[kept].min())
    assert int(after.sum()) == int(before.sum()) == 152


@pytest.mark.parametrize('sparsity', [0.1, 0.2, 0.5, 0.95])
def test_as_many_are_live_after_every_exchange(sparsity):
    mask = dynamic(sparsity=sparsity, drop=1.0)
    for epoch in range(4):
        mask.prepare(at(epoch), None)
        mask.observe(gradients(epoch), YES)
        assert int(mask.flat().sum()) == round((1 - sparsity) * 303)


def test_share_that_is_exchanged_falls_to_nothing_at_the_end():
    mask = dynamic(epochs=4)
    assert [mask.exchanged(epoch) for epoch in range(5)] == [
        round(0.5 * (1 + math.cos(math.pi * epoch / 4)) / 2 * 152) for epoch in range(5)]
    assert mask.exchanged(4) == 0


def test_only_the_first_update_of_an_epoch_exchanges_and_the_next_m_batch_has_the_new_mask():
    model = TinyNet()
    method = methods.ssam_dynamic(0.5, total_epochs=3)
    sam, masks = sam_on(model, params='all', method=method), []
    for epoch in range(2):
        for k in range(3):
            sam.begin(epoch, 3 * epoch + k)
            masks.append(method.mask.flat())
            one_step('minimize', sam, model, k)
    same = [torch.equal(a, b) for a, b in zip(masks, masks[1:])]
    assert same == [False, True, True, False, True]


def test_gradient_that_is_not_finite_exchanges_nothing():
    mask = dynamic()
    mask.prepare(at(), None)
    before = mask.flat()
    mask.observe([t * math.nan for t in gradients()], NO)
    assert torch.equal(before, mask.flat())


def test_mean_gradient_is_asked_for_at_the_first_update_of_an_epoch_only():
    mask = dynamic()
    mask.prepare(at(), None)
    asked = [mask.observes]
    mask.observe(gradients(), YES)
    asked.append(mask.observes)
    mask.prepare(at(1), None)
    assert [*asked, mask.observes] == [True, False, True]
    assert not Sparse(0.5, 1, 'masked').observes


@pytest.mark.parametrize('waiting', [True, False])
def test_state_is_a_bit_for_each_element_and_goes_on(waiting):
    mask, again = dynamic(), dynamic()
    mask.prepare(at(), None)
    mask.observe(gradients(), YES)
    mask.prepare(at(1, 5), None)
    if not waiting:
        mask.observe(gradients(1), YES)
    state = mask.state_dict()
    assert state['mask'].dtype == torch.uint8 and state['mask'].numel() == math.ceil(303 / 8)
    again.load_state_dict(state)
    assert torch.equal(again.flat(), mask.flat())
    for one in (mask, again):
        one.prepare(at(1, 6), None)
        one.observe(gradients(2), YES)
        one.prepare(at(2, 9), None)
        one.observe(gradients(3), YES)
    assert torch.equal(again.flat(), mask.flat())


# Late

def tail(start, every=2, lrs=(1.0, 1.0, 0.75, 0.5, 0.25, 0.0), **more):
    """Lengths of eps of each update of three epochs, None where it is plain."""
    model = TinyNet()
    sam, norms = sam_on(model, method=methods.late(start=start, **more)), []
    for update, lr in enumerate(lrs):
        sam.param_groups[0]['lr'] = lr
        sam.begin(update // every, update)
        one_step('minimize', sam, model, update)
        norms.append(None if sam.stats.eps_norm is None else float(sam.stats.eps_norm))
    return norms


def test_tail_begins_with_an_epoch_and_its_radius_rises_as_the_rate_falls():
    assert tail(1, lr_min=0.0)[:2] == [None, None]
    assert tail(1, lr_min=0.0)[2:] == pytest.approx([0, 0.5 / 3, 1 / 3, 0.5], rel=1e-5)


def test_tail_may_begin_at_a_share_of_all_updates():
    norms = tail(0.5, lr_min=0.25, total_updates=6)
    assert norms[:3] == [None] * 3 and norms[3:] == pytest.approx([0, 0.5, 0.5], rel=1e-5)


def test_tail_has_the_last_update_at_least():
    assert tail(0.999, ramp=False, total_updates=6) == [None] * 5 + [pytest.approx(0.5, rel=1e-5)]


def test_tail_without_a_ramp_has_the_whole_radius_at_once():
    norms = tail(2, ramp=False)
    assert norms[:4] == [None] * 4 and norms[4:] == pytest.approx([0.5, 0.5], rel=1e-5)


def test_schedule_that_has_ended_when_the_tail_begins_gives_the_whole_radius():
    assert tail(1, lrs=(1.0, 1.0, 0.1, 0.1), lr_min=0.1)[2:] == pytest.approx([0.5, 0.5], rel=1e-5)


def test_rate_at_the_beginning_of_the_tail_is_kept_over_a_restart():
    model = TinyNet()
    sam = sam_on(model, method=methods.late(start=1, lr_min=0.0))
    sam.begin(1, 5)
    one_step('minimize', sam, model)
    state = sam.method_state_dict()
    assert state == {'radius': {'lr_start': 0.1}}
    other = TinyNet()
    again = sam_on(other, method=methods.late(start=1, lr_min=0.0))
    again.load_method_state_dict(state)
    again.param_groups[0]['lr'] = 0.05
    again.begin(1, 6)
    one_step('minimize', again, other)
    assert float(again.stats.eps_norm) == pytest.approx(0.25, rel=1e-5)


def test_start_of_a_method_and_of_sam_exclude_each_other():
    with pytest.raises(ValueError, match='start=2: late.* decides when it begins'):
        sam_on(TinyNet(), start=2, method=methods.late(start=3, ramp=False))
    with pytest.raises(ValueError, match='every=2: looksam.* decides how often'):
        sam_on(TinyNet(), every=2, method=methods.looksam(k=3, alpha=0.1))


def test_tail_is_plain_before_it_bit_for_bit():
    model, twin = TinyNet(), TinyNet()
    sam, alone = sam_on(model, method=methods.late(start=1, ramp=False)), OPTIMIZERS['sgd'](twin)
    for step in range(2):
        sam.begin(0, step)
        one_step('minimize', sam, model, step)
        torch.manual_seed(step)
        alone.zero_grad()
        BatchLoss(twin, batch(step, dtype=torch.float32))().backward()
        alone.step()
    assert_identical(weights(model), weights(twin))
