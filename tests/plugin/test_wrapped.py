"""Models that are sharded, or wrapped after SAM was built, on two ranks: one sentence, never wrong in silence."""
import pytest
from support.models import assert_identical
from support.scenarios import of_both_ranks
from support.wrapped_ranks import LATE, SHARDED


@pytest.fixture(scope='module')
def scenario(tmp_path_factory):
    return of_both_ranks('support.wrapped_ranks', tmp_path_factory.mktemp('wrapped'))


WORDS = {
    'fsdp1': 'FullyShardedDataParallel', 'fsdp1_with_parameters': 'FullyShardedDataParallel',
    'inside_of_fsdp1': 'FullyShardedDataParallel',
    'tensor_parallel': 'tensor parallelism', 'replicated_tensors': 'tensor parallelism',
    'tensor_parallel_in_fsdp2': 'tensor parallelism',
}


@pytest.mark.full
@pytest.mark.parametrize('how', SHARDED)
def test_parts_that_are_not_those_of_fully_shard_are_refused_at_construction_with_what_works(scenario, how):
    for rank in scenario(how):
        assert rank['said'].startswith(f'model: {WORDS[how]} leaves each rank a part of')
        assert rank['said'].endswith('use fully_shard or DistributedDataParallel instead') and '\n' not in rank['said']


@pytest.mark.full
@pytest.mark.parametrize('way', ['minimize', 'closure'])
@pytest.mark.parametrize('wrap', LATE)
def test_ddp_around_a_model_whose_sam_was_built_before_is_found_at_the_first_update(scenario, wrap, way):
    for rank in scenario(f'late {wrap} {way}'):
        assert 'wrap the model first, then build SAM(optimizer, wrapped, ...)' in rank['said']
        assert '\n' not in rank['said'] and rank['same']


@pytest.mark.full
def test_a_model_that_is_sharded_after_sam_was_built_is_found_at_the_first_update(scenario):
    for rank in scenario('late fsdp2'):
        assert rank['said'] == ('model: fully_shard was called after SAM was built; call it first, then build the '
                                'optimizer and SAM with the model')


@pytest.mark.full
def test_wrappers_of_other_models_and_wrappers_that_are_gone_are_nothing_to_refuse(scenario):
    for rank in scenario('others'):
        assert rank == {'said': '', 'kept': True}


@pytest.mark.full
def test_ddp_inside_of_a_trainers_module_is_known_if_sam_was_given_that_module(scenario):
    first, second = scenario('in a trainer')
    for rank in (first, second):
        assert_identical(rank['held'], rank['bare'])
    assert_identical(first['held'], second['held'])


@pytest.mark.full
def test_a_loss_that_goes_around_the_wrapper_is_warned_of_once_unless_the_trainer_owns_the_backward(scenario):
    for rank in scenario('around'):
        assert rank['wrapper'] == rank['own'] == []
        (message,) = rank['inside']
        assert 'loss_fn: it does not call the DistributedDataParallel' in message and 'backward_fn=' in message
