"""SAM on two ranks: real gloo groups under torchrun, compared with one process and with the step of reference.py.

What the ranks do is in `support/ranks.py`: all scenarios in one process group, so that the whole file starts torchrun
once.
"""
import math
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from reference import base_step, sam_gradients
from support.models import ALL, ONLYNORM, OPTIMIZERS, assert_identical, buffers, weights
from support.processes import RANKS
from support.ranks import (
    BATCHES,
    CHUNKED,
    COMPILED,
    DDP,
    LATE,
    MICRO_BATCHES,
    OVERFLOWS,
    RHO,
    SIZE,
    Engine,
    joined,
    network,
    samples,
    seed_rank,
)
from support.scenarios import of_both_ranks
from torch import nn

from timm_sam import SAM, select_parameters


@pytest.fixture(scope='session')
def scenario(tmp_path_factory):
    """What both ranks have of a scenario: `scenario('sam default')`."""
    return of_both_ranks('support.ranks', tmp_path_factory.mktemp('ranks'))


def assert_close(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance * 1e-2, msg=name)


def selected_names(net, params='onlynorm', filter=None):
    return [name for name, _ in select_parameters(network(net), params, filter)]


def reference(net, selected, updates=20, broadcast=True):
    """The ranks' updates in one process: each rank's SAM gradient from its own batch, then their mean.

    Returns weights, buffers of each rank, and w + eps of each rank and update.
    """
    models = [network(net) for _ in range(RANKS)]
    optimizers = [OPTIMIZERS['sgd'](model) for model in models]
    at_eps = [[] for _ in range(RANKS)]
    for step in range(updates):
        gradients, first_buffers = [], buffers(models[0])
        for rank, model in enumerate(models):
            x, y = samples(net, step, rank)
            if broadcast:
                model.load_state_dict({**model.state_dict(), **first_buffers})
            at_w = weights(model)
            seed_rank(step, rank)
            result = sam_gradients(model, lambda m=model, x=x, y=y: F.cross_entropy(m(x), y), selected, 'sam', RHO)
            at_eps[rank].append({name: at_w[name] + result.eps[name] for name in selected})
            gradients.append(result.descent)
        mean = {name: sum(g[name] for g in gradients) / RANKS for name in gradients[0]}
        for model, optimizer in zip(models, optimizers):
            base_step(model, optimizer, mean)
    return weights(models[0]), [buffers(model) for model in models], at_eps


def test_static_graph_is_refused_because_its_first_backward_synchronizes(scenario):
    for messages in scenario('static graph'):
        assert len(messages) == 1 and 'build it without static_graph' in messages[0]


# Each rank perturbs for itself

@pytest.mark.parametrize('ddp', DDP)
def test_update_is_the_mean_of_the_sam_gradients_of_the_ranks(scenario, ddp):
    ranks = scenario(f'sam {ddp}')
    expected, statistics, _ = reference('dropout', ONLYNORM, broadcast=DDP[ddp].get('broadcast_buffers', True))
    for rank, values in zip(ranks, statistics):
        assert_close(rank['weights'], expected)
        assert_close(rank['buffers'], values)


@pytest.mark.parametrize('ddp', DDP)
def test_weights_are_bit_identical_on_all_ranks_after_20_updates(scenario, ddp):
    first, second = scenario(f'sam {ddp}')
    assert_identical(first['weights'], second['weights'])
    assert len(first['at_w']) == 20
    for a, b in zip(first['at_w'], second['at_w']):
        assert_identical(a, b)
    start = weights(network('dropout'))
    assert not any(torch.equal(first['weights'][name], start[name]) for name in start)


@pytest.mark.parametrize('ddp', DDP)
def test_perturbation_of_a_rank_is_that_of_its_own_batch(scenario, ddp):
    ranks = scenario(f'sam {ddp}')
    _, _, expected = reference('dropout', ONLYNORM, broadcast=DDP[ddp].get('broadcast_buffers', True))
    for rank, of_rank in zip(ranks, expected):
        assert len(rank['at_eps']) == len(of_rank)
        for actual, value in zip(rank['at_eps'], of_rank):
            assert_close(actual, value)
    for a, b in zip(*(rank['at_eps'] for rank in ranks)):
        assert not any(torch.equal(a[name], b[name]) for name in ONLYNORM)


@pytest.mark.parametrize('ddp', DDP)
def test_collectives_and_their_sizes_are_those_of_plain_ddp(scenario, ddp):
    net = network('dropout')
    parameters, tensors = sum(p.numel() for p in net.parameters()), len(list(net.parameters()))
    for actual, plain in zip(scenario(f'sam {ddp}'), scenario(f'plain {ddp}')):
        assert actual['counts'] == plain['counts']
        # the count sees what DDP sends: all gradients each time, and which tensors were used, each time or once
        masks = 20 if ddp == 'find_unused' else 0
        sent = sum(size * calls for (name, size), calls in plain['counts'].items() if name == 'all_reduce')
        assert sent == 20 * parameters + masks * tensors
        assert plain['counts']['broadcast', 8] == (20 if DDP[ddp].get('broadcast_buffers', True) else 0)


@pytest.mark.parametrize('ddp', DDP)
def test_shared_forward_is_the_mean_of_the_sam_gradients_of_the_ranks(scenario, ddp):
    ranks = scenario(f'shared {ddp}')
    expected, statistics, _ = reference(
        'resnet', selected_names('resnet', filter=LATE), 5, DDP[ddp].get('broadcast_buffers', True))
    for rank, values in zip(ranks, statistics):
        assert rank['sharing'].startswith('one forward for both passes through')
        assert_close(rank['weights'], expected)
        assert_close(rank['buffers'], values)
    assert_identical(ranks[0]['weights'], ranks[1]['weights'])


@pytest.mark.parametrize('ddp', ['default', 'no_buffer_broadcast'])
def test_shared_forward_changes_no_bit_on_any_rank(scenario, ddp):
    for one, two in zip(scenario(f'shared {ddp}'), scenario(f'unshared {ddp}')):
        assert one['sharing'].startswith('one forward for both passes through')
        assert two['sharing'].startswith('two full forwards')
        assert_identical(one['weights'], two['weights'])
        assert_identical(one['buffers'], two['buffers'])
        assert one['counts'] == two['counts']


@pytest.mark.parametrize('ddp', COMPILED)
def test_compiled_shared_forward_gives_the_weights_of_eager_full_ones(scenario, ddp):
    for one, two in zip(scenario(f'compiled {ddp}'), scenario('not compiled')):
        graphs = '[2-9]' if ddp == 'several_buckets' else '[1-9]'  # dynamo makes a graph of each of DDP's buckets
        assert re.match(f'one forward for both passes through {graphs} compiled graph', one['sharing'])
        for part in ('weights', 'buffers'):
            for name, value in two[part].items():
                torch.testing.assert_close(one[part][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_shared_forward_sends_what_plain_ddp_sends(scenario):
    parameters = sum(p.numel() for p in network('resnet').parameters())
    for shared, plain in zip(scenario('shared default'), scenario('plain resnet')):
        assert shared['counts'] == plain['counts']
        assert sum(size * calls for (name, size), calls in plain['counts'].items() if name == 'all_reduce') == (
            5 * parameters)


def test_rank_whose_layers_cannot_be_shared_keeps_step_with_one_whose_can(scenario):
    first, second = scenario('unsteady')
    assert first['sharing'].startswith('one forward for both passes')
    assert second['sharing'] == 'two full forwards per update: Sequential does not repeat its output'
    assert_identical(first['weights'], second['weights'])
    assert first['counts'] == second['counts'] == scenario('plain resnet')[0]['counts']


# Chunks of a batch

@pytest.mark.parametrize('net, variant, params', CHUNKED)
def test_chunks_in_one_process_give_the_weights_of_as_many_ranks(scenario, net, variant, params):
    ranks = scenario(f'{net} {variant} {params}')
    model = network(net)
    optimizer = OPTIMIZERS['sgd'](model)
    loop = Engine(model, optimizer, SAM(optimizer, model, variant=variant, params=params, rho=0.1), sam_m=SIZE)
    for step in range(10):
        loop.accumulate(joined(samples(net, step, rank) for rank in range(RANKS)))
        loop.step()
    for rank in ranks:
        assert_close(rank['weights'], weights(model))


@pytest.mark.parametrize('variant', ['sam', 'layerwise_l2'])
@pytest.mark.parametrize('size', [7, 8])
def test_chunk_counts_by_its_samples(variant, size):
    model, expected = network('batchnorm'), network('batchnorm')
    optimizer, base = OPTIMIZERS['sgd'](model), OPTIMIZERS['sgd'](expected)
    loop = Engine(model, optimizer, SAM(optimizer, model, variant=variant, rho=RHO), sam_m=3)
    for step in range(5):
        x, y = samples('batchnorm', step, 0, size)
        loop.accumulate((x, y))
        loop.step()
        gradients = [(len(c), sam_gradients(expected, lambda a=a, c=c: F.cross_entropy(expected(a), c), ONLYNORM,
                                            variant, RHO).descent) for a, c in zip(x.split(3), y.split(3))]
        base_step(expected, base, {name: sum(n * g[name] for n, g in gradients) / size for name in ALL})
    assert_close(weights(model), weights(expected))
    assert_close(buffers(model), buffers(expected))


# One perturbation for all ranks

@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_synchronised_ascent_costs_one_collective_of_the_size_of_the_selection(scenario, params):
    selection = sum(p.numel() for _, p in select_parameters(network('groupnorm'), params))
    for sync, own, plain in zip(
            scenario(f'sync=True {params}'), scenario(f'sync=False {params}'), scenario('plain groupnorm')):
        assert own['counts'] == plain['counts']
        assert sync['counts'] - plain['counts'] == Counter({('all_reduce', selection): 20})
        assert not plain['counts'] - sync['counts']


@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_synchronised_perturbation_has_the_same_bits_on_all_ranks(scenario, params):
    first, second = scenario(f'sync=True {params}')
    assert len(first['at_eps']) == 20
    for at_w, a, b in zip(first['at_w'], first['at_eps'], second['at_eps']):
        assert_identical(a, b)
        eps = math.sqrt(sum(((a[name] - at_w[name]) ** 2).sum().item() for name in a))
        assert eps == pytest.approx(RHO, rel=1e-9)
    assert_identical(first['weights'], second['weights'])


@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_synchronised_ascent_is_one_process_with_the_whole_batch(scenario, params):
    model = network('groupnorm')
    optimizer = OPTIMIZERS['sgd'](model)
    for step in range(20):
        x, y = joined(samples('groupnorm', step, rank) for rank in range(RANKS))
        base_step(model, optimizer, sam_gradients(
            model, lambda x=x, y=y: F.cross_entropy(model(x), y), selected_names('groupnorm', params), 'sam',
            RHO).descent)
    for rank in scenario(f'sync=True {params}'):
        assert_close(rank['weights'], weights(model))
    own = scenario(f'sync=False {params}')[0]['weights']
    assert max((own[name] - p).abs().max() for name, p in weights(model).items()) > 1e-4


def in_one_process(net, steps, **options):
    """The model after updates on the batches of all ranks together."""
    model = network(net)
    sam = SAM(OPTIMIZERS['sgd'](model), model, rho=RHO, share_forward=False, **options)
    for step in range(steps):
        x, y = joined(samples(net, step, rank) for rank in range(RANKS))
        sam.minimize(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return model


@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_synchronised_ascent_and_statistics_are_one_process_with_the_whole_batch(scenario, params):
    model = in_one_process('batchnorm', 10, params=params)
    ranks = scenario(f'syncbn {params}')
    for rank in ranks:
        assert_close(rank['weights'], weights(model))
        assert_close(rank['buffers'], buffers(model))
    assert_identical(ranks[0]['weights'], ranks[1]['weights'])
    assert_identical(ranks[0]['buffers'], ranks[1]['buffers'])


@pytest.mark.parametrize('share', [False, True])
def test_synchronised_statistics_below_the_first_perturbed_layer_are_those_of_one_process(scenario, share):
    model = in_one_process('resnet without drop', 5, filter=LATE)
    for rank in scenario(f'syncbn late share={share}'):
        assert rank['sharing'].startswith('one forward for both' if share else 'two full forwards')
        assert_close(rank['weights'], weights(model))
        assert_close(rank['buffers'], buffers(model))


def test_shared_forward_gathers_statistics_once(scenario):
    def gathers(name):
        return [sum(n for key, n in rank['counts'].items() if key[0] == 'all_gather') for rank in scenario(name)]

    layers = sum(isinstance(m, nn.BatchNorm2d) for m in network('resnet without drop').modules())
    assert gathers('syncbn plain') == [5 * layers] * RANKS
    assert gathers('syncbn late share=False') == [10 * layers] * RANKS
    late = sum(isinstance(m, nn.BatchNorm2d) for name, m in network('resnet without drop').named_modules()
               if re.match(LATE, name))
    for count in gathers('syncbn late share=True'):  # the first time the shared ones are computed again, for a check
        assert 5 * (layers + late) <= count <= 5 * (layers + late) + layers - late < 10 * layers


def test_ranks_share_their_forwards_together_or_not_at_all_where_statistics_are_synchronised(scenario):
    first, second = scenario('syncbn unsteady')
    assert second['sharing'] == 'two full forwards per update: Sequential does not repeat its output'
    assert first['sharing'] == 'two full forwards per update: a module on another rank does not repeat its output'
    assert_identical(first['weights'], second['weights'])


def test_ranks_check_together_where_statistics_are_synchronised(scenario):
    first, second = scenario('unperturbed')
    assert (first['nonfinite'], second['nonfinite']) == (0, 1)
    for rank in (first, second):
        assert rank['sharing'].startswith('one forward for both passes')
    assert_identical(first['weights'], second['weights'])


# Gradient accumulation

@pytest.mark.parametrize('way', ['backward', 'engine', 'sam_m'])
def test_micro_batches_are_chunks_of_one_batch(scenario, way):
    ranks = scenario(f'accumulated {way}')
    model = network('groupnorm')
    optimizer = OPTIMIZERS['sgd'](model)
    loop = Engine(model, optimizer, SAM(optimizer, model, rho=RHO), sam_m=SIZE)
    for step in range(10):
        loop.accumulate(joined(samples('groupnorm', step, part) for part in range(MICRO_BATCHES * RANKS)))
        loop.step()
    for rank in ranks:
        assert_close(rank['weights'], weights(model))
    assert_identical(ranks[0]['weights'], ranks[1]['weights'])


def test_short_last_group_of_micro_batches_is_their_mean(scenario):
    ranks = scenario('short group')
    model = network('groupnorm')
    optimizer = OPTIMIZERS['sgd'](model)
    for group in (range(MICRO_BATCHES), range(MICRO_BATCHES, BATCHES)):
        gradients = []
        for x, y in (samples('groupnorm', 0, RANKS * k + rank) for k in group for rank in range(RANKS)):
            gradients.append(sam_gradients(model, lambda x=x, y=y: F.cross_entropy(model(x), y),
                                           selected_names('groupnorm'), 'sam', RHO).descent)
        base_step(model, optimizer, {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]})
    parameters = sum(p.numel() for p in model.parameters())
    for rank in ranks:
        assert_close(rank['weights'], weights(model))
        assert rank['counts']['all_reduce', parameters] == 2


@pytest.mark.parametrize('way', ['backward', 'engine'])
def test_only_the_last_micro_batch_sends_gradients(scenario, way):
    parameters = sum(p.numel() for p in network('groupnorm').parameters())
    for rank in scenario(f'accumulated {way}'):
        gradients = [{key: n for key, n in counts.items() if key[0] == 'all_reduce'} for counts in rank['counts']]
        assert gradients == [{}, {}, {('all_reduce', parameters): 10}]
        assert len({float(norm) for norm in rank['norms']}) == MICRO_BATCHES * 10  # each has its own g


def test_only_the_last_chunk_sends_gradients(scenario):
    parameters = sum(p.numel() for p in network('groupnorm').parameters())
    for rank in scenario('accumulated sam_m'):
        counts = {key: n for key, n in rank['counts'][-1].items() if key[0] == 'all_reduce'}
        assert counts == {('all_reduce', parameters): 10}


# Loss scales

@pytest.mark.parametrize('name', [*OVERFLOWS, 'sync'])
def test_overflow_on_one_rank_leaves_finite_and_identical_weights(scenario, name):
    first, second = scenario(f'overflow {name}')
    assert len(first['weights']) == len(second['weights']) == 13
    for a, b in zip(first['weights'], second['weights']):
        assert_identical(a, b)
        assert all(torch.isfinite(w).all() for w in a.values())
    assert not torch.equal(first['weights'][-1]['stem.weight'], first['weights'][-2]['stem.weight'])


@pytest.mark.parametrize('name', OVERFLOWS)
def test_overflow_on_one_rank_changes_the_scale_on_all_by_the_rule_of_the_scaler(scenario, name):
    first, second = scenario(f'overflow {name}')
    assert first['scales'] == second['scales']
    backs_off = 'descent' in OVERFLOWS[name][1]
    assert first['scales'] == [256.0] * 2 + ([128.0] * 4 if backs_off else [256.0] * 4)


@pytest.mark.parametrize('name', OVERFLOWS)
def test_update_is_skipped_on_all_ranks_only_if_the_descent_overflows(scenario, name):
    for rank in scenario(f'overflow {name}'):
        moved = [not torch.equal(before['stem.weight'], after['stem.weight'])
                 for before, after in zip(rank['weights'][1::2], rank['weights'][2::2])]
        assert moved == [True, True, 'descent' not in OVERFLOWS[name][1], True, True, True]


@pytest.mark.parametrize('name', OVERFLOWS)
def test_overflow_is_counted_where_the_ascent_had_it(scenario, name):
    bad_rank, passes = OVERFLOWS[name]
    for rank, result in enumerate(scenario(f'overflow {name}')):
        counted = int(rank == bad_rank and 'ascent' in passes)
        assert result['nonfinite'] == [0] * 2 + [counted] * 4


def test_synchronised_ascent_counts_an_overflow_on_every_rank(scenario):
    for rank in scenario('overflow sync'):
        assert rank['nonfinite'] == [0, 0, 1, 1, 1, 1] and rank['scales'] == [256.0] * 6


def test_half_precision_finds_its_scale_together(scenario):
    first, second = scenario('half precision')
    assert first['scales'] == second['scales']
    assert first['scales'][0] == 2.0 ** 29 and first['scales'][-1] == first['scales'][-5] < 2.0 ** 24
    for a, b in zip(first['weights'], second['weights']):
        assert_identical(a, b)
        assert all(torch.isfinite(w).all() for w in a.values())
    for rank in (first, second):
        assert rank['nonfinite'][0] == 1 and rank['nonfinite'][-1] == rank['nonfinite'][-5] < 20
    start = weights(network('batchnorm', torch.float32))
    assert not any(torch.equal(first['weights'][-1][name], start[name]) for name in start)
