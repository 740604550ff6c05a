"""Methods on two ranks: real gloo groups under torchrun, compared with one process.

What the ranks do is in `support/method_ranks.py`: all scenarios in one process group, so that the whole file starts
torchrun once.
"""
import pytest
import torch
import torch.nn.functional as F
from reference import base_step, gsam_gradients
from support.method_ranks import (
    ALPHA,
    CHUNKED,
    MICRO_BATCHES,
    RHO_MIN,
    UPDATES,
    UPDATES_PER_EPOCH,
    TwoHeads,
    single_samples,
)
from support.models import ALL, ONLYNORM, OPTIMIZERS, assert_identical, weights
from support.processes import RANKS
from support.ranks import RHO, SIZE, Engine, joined, network, samples, seed_rank
from support.scenarios import of_both_ranks
from support.states import differences

from timm_sam import SAM, methods


@pytest.fixture(scope='session')
def scenario(tmp_path_factory):
    """What both ranks have of a scenario."""
    return of_both_ranks('support.method_ranks', tmp_path_factory.mktemp('method_ranks'))


def assert_close(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance * 1e-2, msg=name)


def gsam():
    return methods.gsam(alpha=ALPHA, rho_min=RHO_MIN)


def reference(selected, parts=1):
    """One process: the gradient of each rank and micro-batch by the transcription, then their mean."""
    model = network('groupnorm')
    optimizer = OPTIMIZERS['sgd'](model)
    for step in range(UPDATES):
        gradients = []
        for part in range(RANKS * parts):
            x, y = samples('groupnorm', step, part)
            gradients.append(gsam_gradients(
                model, lambda x=x, y=y: F.cross_entropy(model(x), y), selected, 'sam', RHO, ALPHA).descent)
        base_step(model, optimizer, {name: sum(g[name] for g in gradients) / len(gradients) for name in gradients[0]})
    return weights(model)


@pytest.mark.parametrize('params, selected', [('onlynorm', ONLYNORM), ('all', ALL)])
def test_gsam_on_two_ranks_is_the_mean_of_the_transcriptions_of_both(scenario, params, selected):
    first, second = scenario(f'gsam {params}')
    assert_identical(first['weights'], second['weights'])
    assert_close(first['weights'], reference(selected))


@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_gsam_on_two_ranks_is_one_process_in_two_chunks(scenario, params):
    model = network('groupnorm')
    optimizer = OPTIMIZERS['sgd'](model)
    loop = Engine(model, optimizer, SAM(optimizer, model, rho=RHO, params=params, method=gsam()), SIZE)
    for step in range(UPDATES):
        loop.accumulate(joined(samples('groupnorm', step, rank) for rank in range(RANKS)))
        loop.step()
    assert_close(scenario(f'gsam {params}')[0]['weights'], weights(model))


@pytest.mark.parametrize('name', CHUNKED)
def test_every_method_on_two_ranks_is_one_process_in_two_chunks(scenario, name):
    first, second = scenario(f'method {name}')
    assert_identical(first['weights'], second['weights'])
    assert differences(first['state'], second['state']) == []
    model = network('groupnorm')
    optimizer = OPTIMIZERS['sgd'](model)
    loop = Engine(model, optimizer, SAM(optimizer, model, rho=RHO, params='all', method=CHUNKED[name]()), SIZE)
    for step in range(UPDATES):
        data = [samples('groupnorm', step, rank) for rank in range(RANKS)]
        loop.run.update.begin(step // UPDATES_PER_EPOCH, step, single_samples(model, data))
        loop.accumulate(joined(data), epoch=step // UPDATES_PER_EPOCH)
        loop.step()
    assert_close(first['weights'], weights(model))


def test_closures_and_compiled_models_give_the_same_weights(scenario):
    expected = scenario('gsam onlynorm')[0]['weights']
    for name in ('closure', 'compiled'):
        first, second = scenario(name)
        assert_identical(first['weights'], second['weights'])
        assert_close(first['weights'], expected)


def test_gradients_travel_once_an_update_in_one_piece_of_the_size_of_the_model(scenario):
    elements = sum(p.numel() for p in network('groupnorm').parameters())
    for result in scenario('gsam onlynorm'):
        sent = {what: calls for what, calls in result['counts'].items() if what[0] in ('all_reduce', 'allreduce')}
        assert sent == {(next(iter(sent))[0], elements): UPDATES}


@pytest.mark.parametrize('way', ['last', 'no_sync', 'engine'])
def test_accumulation_on_two_ranks_combines_each_micro_batch_and_sends_after_the_last(scenario, way):
    first, second = scenario(f'accumulated {way}')
    assert_identical(first['weights'], second['weights'])
    assert_close(first['weights'], reference(ONLYNORM, MICRO_BATCHES))
    for result in (first, second):
        assert all(not counts for counts in result['counts'][:-1])
        assert sum(result['counts'][-1].values()) == UPDATES


def test_synchronised_ascent_combines_the_means_like_one_process_with_the_whole_batch(scenario):
    first, second = scenario('sync')
    assert_identical(first['weights'], second['weights'])
    model = network('groupnorm')
    sam = SAM(OPTIMIZERS['sgd'](model), model, rho=RHO, method=gsam())
    for step in range(UPDATES):
        x, y = joined(samples('groupnorm', step, rank) for rank in range(RANKS))
        sam.minimize(lambda x=x, y=y: F.cross_entropy(model(x), y))
    assert_close(first['weights'], weights(model))


def test_running_statistics_are_shared_as_by_plain_ddp(scenario):
    """Each update begins with the first rank's; on the first rank they are those of its own passes at w."""
    model = network('batchnorm')
    twins = [model, network('batchnorm')]
    optimizers = [OPTIMIZERS['sgd'](twin) for twin in twins]
    for step in range(UPDATES):
        gradients, at_first = [], {name: b.clone() for name, b in twins[0].named_buffers()}
        for rank, twin in enumerate(twins):
            twin.load_state_dict({**twin.state_dict(), **at_first})
            x, y = samples('batchnorm', step, rank)
            seed_rank(step, rank)
            gradients.append(gsam_gradients(
                twin, lambda t=twin, x=x, y=y: F.cross_entropy(t(x), y), ONLYNORM, 'sam', RHO, ALPHA).descent)
        mean = {name: sum(g[name] for g in gradients) / RANKS for name in gradients[0]}
        for twin, optimizer in zip(twins, optimizers):
            base_step(twin, optimizer, mean)
    for result, twin in zip(scenario('batchnorm'), twins):
        assert_close(result['weights'], weights(twin))
        assert_close(result['buffers'], dict(twin.named_buffers()))


def test_overflow_at_w_on_one_rank_leaves_the_ranks_together(scenario):
    first, second = scenario('overflow')
    assert (first['nonfinite'], second['nonfinite']) == (0, 1)
    assert_identical(first['weights'], second['weights'])
    assert all(torch.isfinite(w).all() for w in first['weights'].values())


def test_parameters_that_no_rank_used_have_no_gradient_and_others_the_mean(scenario):
    first, second = scenario('unused')
    assert first['has_gradient'] == second['has_gradient'] == [True, True, False]
    assert_identical(first['gradients'], second['gradients'])
    torch.manual_seed(0)
    alone = TwoHeads().double()
    torch.manual_seed(0)
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randint(3, (5,))
    sam = SAM(torch.optim.SGD(alone.parameters(), lr=0.1), alone, rho=RHO, method=gsam())
    sam.backward(lambda: F.cross_entropy(alone(x, 0), y))
    torch.testing.assert_close(first['gradients']['heads.0.weight'], alone.heads[0].weight.grad / 2)


def test_means_that_methods_observe_are_over_all_ranks(scenario):
    first, second = scenario('observed')
    assert first['calls'] == second['calls'] == [(0, True), (1, False), (2, True), (3, False)]
    assert_identical(first['weights'], second['weights'])
    assert all(torch.equal(a, b) for a, b in zip(first['mean'] + first['last'], second['mean'] + second['last']))
    # the last mean is of the selected parameters there, of all of them here, the selected ones first
    for ours, of_all in zip(first['mean'], first['last']):
        torch.testing.assert_close(ours, of_all)
    assert len(first['last']) == len(ALL) and len(first['mean']) == len(ONLYNORM)


def test_what_methods_observe_is_not_what_ddp_writes_over_it_in_its_buckets(scenario):
    for lent, own in zip(scenario('observed, buckets=True'), scenario('observed, buckets=False'), strict=True):
        assert lent['calls'] == own['calls']
        for a, b in zip(lent['mean'] + lent['last'], own['mean'] + own['last'], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
