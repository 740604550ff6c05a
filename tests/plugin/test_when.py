"""When SAM acts: every so many updates, from and to an epoch, and plain updates in between."""
import copy

import pytest
import torch
from support.models import (
    OPTIMIZERS,
    WAYS,
    BatchLoss,
    TinyNet,
    assert_identical,
    batch,
    buffers,
    one_plain_step,
    one_step,
    sam_on,
    weights,
)

BY_METHODS = [way for way in WAYS if way != 'primitives']  # ascent() and perturbed() do what they are asked to


@pytest.mark.parametrize('way', BY_METHODS)
def test_updates_in_between_are_plain_bit_for_bit(way):
    model = TinyNet()
    sam = sam_on(model, every=3)
    for step in range(5):
        twin = copy.deepcopy(model)
        alone = OPTIMIZERS['sgd'](twin)
        alone.load_state_dict(copy.deepcopy(sam.state_dict()))
        seen = one_step(way, sam, model, step).weights_seen
        assert len(seen) == (1 if step % 3 else 2)
        assert (sam.stats.eps_norm is None) == bool(step % 3)
        if step % 3:
            torch.manual_seed(step)
            BatchLoss(twin, batch(step, dtype=torch.float32))().backward()
            alone.step()
            assert_identical(weights(model), weights(twin))
            assert_identical(buffers(model), buffers(twin))


def test_epochs_bound_what_is_perturbed():
    model = TinyNet()
    sam = sam_on(model, start=1, end=3)
    perturbed = []
    for epoch in range(4):
        for update in range(2):
            sam.begin(epoch, 2 * epoch + update)
            perturbed.append(len(one_step('minimize', sam, model, update).weights_seen) == 2)
    assert perturbed == [False, False, True, True, True, True, False, False]


def test_count_goes_on_from_the_update_that_begin_names():
    model = TinyNet()
    sam = sam_on(model, every=4)
    sam.begin(0, 7)
    calls = [len(one_step('minimize', sam, model, step).weights_seen) for step in range(3)]
    assert calls == [1, 2, 1]


@pytest.mark.parametrize('way', BY_METHODS)
@pytest.mark.parametrize('options', [dict(start=1), dict(end=5)])
def test_epochs_that_nobody_names_are_an_error(way, options):
    model = TinyNet()
    before = weights(model)
    with pytest.raises(ValueError, match=r'are epochs, which SAM does not know: call SAM.begin\(epoch, update\)'):
        one_step(way, sam_on(model, **options), model)
    assert_identical(weights(model), before)


@pytest.mark.parametrize('options, message', [
    (dict(every=0), 'every=0 must be an integer >= 1'), (dict(every=1.5), 'every=1.5 must be'),
    (dict(every=True), 'every=True must be'), (dict(start=-1), 'start=-1 must be an integer >= 0'),
    (dict(start=2, end=2), 'end=2 is not after start=2'), (dict(end=-3), 'end=-3 must be'),
    (dict(end=0), 'end=0 is not after start=0')])
def test_bounds_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sam_on(TinyNet(), **options)


def test_plain_update_before_any_perturbed_one_leaves_statistics_of_a_plain_step():
    model, twin = TinyNet(), TinyNet()
    sam = sam_on(model, start=1)
    sam.begin(0, 0)
    one_step('minimize', sam, model)
    one_plain_step(twin)
    assert_identical(weights(model), weights(twin))
    assert_identical(buffers(model), buffers(twin))
