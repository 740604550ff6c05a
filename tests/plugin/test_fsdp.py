"""Models under `fully_shard`, on two ranks: the updates, norms and perturbations are those of DDP, and so are errors.

Whole norm layers (`onlynorm`) are perturbed on each rank by its own batch; parts (`all`, `nonorm`) by that of all.
"""
from collections import Counter

import pytest
import torch
from support.fsdp_models import network
from support.fsdp_pitfalls import BETWEEN, PARTS
from support.fsdp_ranks import (
    BREAKS,
    CORE,
    COUNTED,
    FSDP_WAYS,
    MATRIX,
    METHODS,
    NETS,
    REFUSED,
    SHARDS_TAKE,
    UNITS,
    is_always,
)
from support.models import TinyNet
from support.processes import RANKS
from support.scenarios import of_both_ranks
from torch.utils._pytree import register_pytree_node

from timm_sam import select_parameters
from timm_sam.sharded.whole import tensors_of

pytestmark = pytest.mark.full
TOLERANCE = 1e-12  # of float64
WEIGHTS = 1e-9  # AdamW divides gradients that are zero up to rounding, as those of the biases of keys
SELECTIONS = ['onlynorm', 'all']
NAMES = {name for name, _ in TinyNet().named_parameters()}


@pytest.fixture(scope='module')
def always(tmp_path_factory):
    return of_both_ranks('support.fsdp_ranks', tmp_path_factory.mktemp('always'), 'always')


@pytest.fixture(scope='module')
def others(tmp_path_factory):
    return of_both_ranks('support.fsdp_ranks', tmp_path_factory.mktemp('others'), 'others', timeout=3600)  # slow tests


@pytest.fixture
def scenario(request):
    """What both ranks found; what slow tests need besides takes minutes, in a start of its own."""
    return lambda name: request.getfixturevalue('always' if is_always(name) else 'others')(name)


def cases(names):
    """Names of scenarios; those that are not in `CORE` are slow."""
    return [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in names]


def of_both(names):
    return cases(f'{name} {params}' for name in names for params in SELECTIONS)


def assert_weights(ranks, expected):
    for rank, other in zip(ranks, expected, strict=True):
        assert rank['weights'].keys() == other['weights'].keys()
        for name, w in rank['weights'].items():
            torch.testing.assert_close(w, other['weights'][name], rtol=0, atol=WEIGHTS, msg=name)
    for name, w in ranks[0]['weights'].items():
        assert torch.equal(w, ranks[1]['weights'][name]), name


def assert_same(ranks, expected):
    assert_weights(ranks, expected)
    for rank, other in zip(ranks, expected):
        assert len(rank['norms']) == len(other['norms']) > 0
        for found, wanted in zip(rank['norms'], other['norms']):
            assert found == pytest.approx(wanted, rel=TOLERANCE)


# Updates

@pytest.mark.parametrize('name', cases(' '.join(case) for case in MATRIX))
def test_updates_and_norms_are_those_of_ddp(scenario, name):
    assert_same(scenario(f'fsdp {name}'), scenario(f'ddp {name}'))


@pytest.mark.parametrize('name', cases(' '.join(case) for case in MATRIX))
def test_weights_of_each_forward_are_those_of_ddp_and_ranks_differ_where_each_has_its_own(scenario, name):
    first, second = scenario(f'fsdp {name}')
    for rank, other in zip((first, second), scenario(f'ddp {name}')):
        torch.testing.assert_close(rank['seen'], other['seen'], rtol=0, atol=TOLERANCE)
    eps = [rank['seen'][1::2] - rank['seen'][0::2] for rank in (first, second)]
    difference = max((a - b).norm() / b.norm() for a, b in zip(*eps))
    assert difference > 0.5 if name.endswith('onlynorm') else difference == 0


@pytest.mark.parametrize('name', of_both(UNITS))
def test_units_may_be_any(scenario, name):
    assert_same(scenario(f'fsdp {name}'), scenario(f'ddp reference {name.split()[-1]}'))


@pytest.mark.parametrize('name', of_both(FSDP_WAYS))
def test_every_way_to_step_is_the_same_update(scenario, name):
    assert_same(scenario(f'fsdp {name}'), scenario(f'ddp reference {name.split()[-1]}'))


@pytest.mark.parametrize('name', of_both(['tied', *NETS]))
def test_parameters_may_be_tied_unused_frozen_checkpointed_or_compiled(scenario, name):
    assert_same(scenario(f'fsdp {name}'), scenario(f'ddp {name}'))


@pytest.mark.parametrize('name', of_both(['frozen later']))
def test_layers_may_be_frozen_and_unfrozen_after_sam_was_built(scenario, name):
    assert_same(scenario(f'fsdp {name}'), scenario(f'ddp {name}'))


@pytest.mark.parametrize('name', of_both(['by a method']))
def test_units_may_be_called_by_a_method_that_is_registered_as_their_forward(scenario, name):
    assert_same(scenario(f'fsdp {name}'), scenario(f'ddp reference {name.split()[-1]}'))


@pytest.mark.slow
def test_what_is_not_a_norm_layer(scenario):
    assert_same(scenario('fsdp nonorm'), scenario('ddp reference nonorm'))


@pytest.mark.slow
@pytest.mark.parametrize('wrap', ['fsdp', 'replicas'])
def test_norm_layers_of_all_ranks_together(scenario, wrap):
    assert_same(scenario(f'fsdp {wrap} sync'), scenario('ddp sync'))


@pytest.mark.slow
@pytest.mark.parametrize('name', [f'{name} onlynorm' for name in METHODS] + [f'{name} all' for name in SHARDS_TAKE])
def test_methods_that_change_the_perturbation(scenario, name):
    assert_same(scenario(f'fsdp method {name}'), scenario(f'ddp method {name}'))


@pytest.mark.slow
def test_plain_updates_in_between(scenario):
    assert_same(scenario('fsdp every'), scenario('ddp every'))


@pytest.mark.slow
def test_half_precision_reports_what_the_weights_took(scenario):
    assert_same(scenario('fsdp half'), scenario('ddp half'))


# Pitfalls

@pytest.mark.parametrize('name', of_both(BETWEEN))
def test_nothing_that_was_gathered_before_a_pass_is_used_in_it(scenario, name):
    assert_weights(scenario(f'fsdp {name}'), scenario(f'ddp reference {name.split()[-1]}'))


@pytest.mark.slow
@pytest.mark.parametrize('params', SELECTIONS)
def test_sam_may_be_built_while_parameters_are_gathered(scenario, params):
    assert_weights(scenario(f'fsdp after a forward {params}'), scenario(f'ddp reference {params}'))


@pytest.mark.parametrize('params', [
    pytest.param(p, marks=[] if p == 'onlynorm' else pytest.mark.slow) for p in SELECTIONS])
def test_first_forward_with_most_frozen_leaves_the_types_of_gradients_as_they_are(scenario, params):
    assert_weights(scenario(f'frozen first {params} False'), scenario(f'frozen first {params} True'))
    for rank in scenario(f'frozen first {params} False'):
        assert rank['types'] == {'torch.float32'}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['last onlynorm', 'last all', 'by hand onlynorm'])
def test_micro_batches_send_gradients_with_the_last_or_where_g_is_taken_of_them(scenario, name):
    ranks = scenario(f'fsdp accumulated {name}')
    assert_weights(ranks, scenario(f'ddp accumulated last {name.split()[-1]}'))
    updates, units = 3, 3
    sent = [0] * (PARTS - 1) + [updates * units] if name.endswith('onlynorm') else [2 * updates * units] * PARTS
    for rank in ranks:
        assert rank['sent'] == sent


@pytest.mark.slow
def test_micro_batches_that_send_nothing_are_refused_where_g_is_taken_of_what_is_sent(scenario):
    for rank in scenario('unsynced'):
        assert 'leave set_requires_gradient_sync(True) in every micro-batch' in rank['error']
        assert '\n' not in rank['error'] and rank['same'] and rank['moved']


@pytest.mark.parametrize('name', cases(f'broken off {name} {params}' for name in BREAKS for params in SELECTIONS))
def test_pass_that_breaks_off_leaves_the_parts_bit_identical_and_training_goes_on(scenario, name):
    ranks = scenario(name)
    for rank in ranks:
        assert set(rank['same']) == NAMES and rank['trainable']
        # where whole tensors are perturbed, what ranks keep is not even written to
        assert bool(rank['touched']) == (name.endswith('all') and 'at eps' in name)
    assert_weights(ranks, scenario(f'broken off never {name.split()[-1]}'))


@pytest.mark.slow
@pytest.mark.parametrize('params', SELECTIONS)
def test_closures_that_forget_to_zero_are_seen_and_may_leave_a_batch_out(scenario, params):
    for rank in scenario(f'closures {params}'):
        assert rank['forgets'].startswith('closure: it adds to gradients that were there before')
        assert rank['same after it'] and rank['left out'] and rank['same after that'] and rank['moved']


@pytest.mark.slow
@pytest.mark.parametrize('overflow', ['at w', 'at eps'])
@pytest.mark.parametrize('params', SELECTIONS)
def test_scaler_and_clipping_are_those_of_ddp(scenario, params, overflow):
    ranks, others = (scenario(f'{wrap} overflow {overflow} {params}') for wrap in ('fsdp', 'ddp'))
    for rank, other in zip(ranks, others):
        assert rank['scales'] == other['scales'] == ranks[0]['scales']
        assert rank['clipped'] == pytest.approx(other['clipped'], rel=1e-6, nan_ok=True)
        assert rank['nonfinite'] == other['nonfinite']
        for name, w in rank['weights'].items():
            torch.testing.assert_close(w, other['weights'][name], rtol=0, atol=1e-6, msg=name)
            assert torch.equal(w, ranks[0]['weights'][name])


@pytest.mark.slow
def test_checkpointing_makes_the_state_of_the_optimizer_before_the_first_step(scenario):
    for rank in scenario('state'):
        assert rank['state'] == rank['names'] and rank['same']


@pytest.mark.slow
def test_norm_layers_outside_of_what_is_sharded_are_perturbed_as_without(scenario):
    for rank in scenario('norms outside'):
        for name, w in rank['sharded'].items():
            torch.testing.assert_close(w, rank['ddp'][name], rtol=0, atol=TOLERANCE, msg=name)


# What is communicated

@pytest.fixture(scope='module')
def model():
    return network('vit', torch.float32, 64)


def gathered(params):
    """The elements of parameters as they are gathered: their first dimensions are filled up to be the same on ranks."""
    return sum(-(-len(p) // RANKS) * RANKS * p[0].numel() for p in params)


def expected(model, name, keeps):
    """Collectives of an update, elements and calls. gloo makes a reduce-scatter of an all-reduce."""
    passes, sends = 1 if name == 'plain' else 2, 2 if name.startswith('shards') else 1
    in_blocks = set(model.blocks.parameters())
    counts = Counter()
    for block in model.blocks:  # what is let go after the forward is gathered once more for the backward
        counts['all_gather', gathered(block.parameters()) // RANKS] += passes * (2 if keeps == 'default' else 1)
        counts['all_reduce', gathered(block.parameters())] += sends
    root = gathered(p for p in model.parameters() if p not in in_blocks)
    counts['all_gather', root // RANKS] += passes  # the root keeps it
    counts['all_reduce', root] += sends
    own = {'whole, sync': sum(p.numel() for _, p in select_parameters(model)), 'shards': 3,
           'shards, layerwise_l2': 2 * len(list(model.parameters()))}
    if name in own:
        counts['all_reduce', own[name]] += 1
    return counts


@pytest.mark.parametrize('name', cases(
    f'counted {name} {keeps}' for name in COUNTED for keeps in ('default', 'gathered')))
def test_collectives_are_counted_and_nothing_is_read_from_the_device(scenario, model, name):
    *words, keeps = name.split()
    assert len(model.blocks) == 6
    for rank in scenario(name):
        assert rank['counts'] == expected(model, ' '.join(words[1:]), keeps)
        assert rank['reads'] == 0


@pytest.mark.slow
def test_ddp_sends_the_same_with_and_without_perturbed_norm_layers(scenario, model):
    for rank, plain in zip(scenario('counted whole ddp'), scenario('counted plain ddp')):
        assert rank['counts'] == plain['counts']
        sent = sum(size * n for (name, size), n in rank['counts'].items() if name == 'all_reduce')
        assert sent == sum(p.numel() for p in model.parameters())


# Errors

def test_what_needs_whole_tensors_is_refused_in_one_sentence(scenario):
    for rank in scenario('messages'):
        assert all('\n' not in found['error'] for found in rank.values())
        for name in ('all', 'nonorm'):
            assert rank[f'{name}, not sync']['error'].startswith(f"sync=False: params='{name}' of a model")
            assert "use sync=True, or params='onlynorm'" in rank[f'{name}, not sync']['error']
        assert rank['second order']['error'].startswith('optimizer: SecondOrder differentiates the gradient again')
        assert 'call it on the whole model' in rank['some outside']['error']
        assert rank['meshes']['error'] == 'model: fully_shard was called with 2 meshes, SAM takes one'
        assert rank['offloaded']['error'].endswith('leave CPUOffloadPolicy out')
        for name in REFUSED:
            for params in SELECTIONS:
                assert rank[f'{name} {params}']['error'].endswith('leave it out, or use DistributedDataParallel'), name
        for name in METHODS.keys() - SHARDS_TAKE:
            assert rank[f'{name} all']['error'].endswith("or params='onlynorm'"), name


def test_gradients_that_nothing_averages_are_a_warning(scenario):
    for rank in scenario('messages'):
        (message,) = rank['norms outside']['warnings']
        assert not rank['norms outside']['error'] and 'nothing averages their gradients' in message


class Boxed:
    def __init__(self, *values) -> None:
        self.values = values


def test_tensors_of_an_output_are_found_in_whatever_torch_can_take_apart():
    """A backward through one that was not found would be at w."""
    tensors = [torch.full((), float(i)) for i in range(6)]
    register_pytree_node(Boxed, lambda box: (list(box.values), None), lambda values, _: Boxed(*values))
    output = {'a': tensors[0], 'b': [tensors[1], ({'c': tensors[2]}, None, 'text', 3)],
              'd': Boxed(tensors[3], {'e': tensors[4]}, 'text'), 'f': {tensors[5]}, 'g': object()}
    assert list(map(id, tensors_of(output))) == list(map(id, tensors))
