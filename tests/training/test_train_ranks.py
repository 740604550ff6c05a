"""train.py on two ranks and on two nodes: the same weights everywhere, and statistics shared as it was asked for.

The runs are those of `support/trainings.py`, in one pair of processes.
"""
import shlex
from contextlib import ExitStack

import pytest
import timm
import torch
from support.command_lines import AOT, DEIT, JSD, KD, NAFLEX, VIT
from support.models import assert_identical
from support.places import ROOT
from support.processes import RANKS, Process, free_ports, run_in_turn, torchrun
from support.states import differences, finite, summary

from timm_sam import select_parameters

SAM_ON = '--sam-variant sam --sam-rho 0.05'

TRAININGS = {
    'plain': '--log-wandb',
    'sam': SAM_ON,
    'bn_reduce': f'{SAM_ON} --dist-bn reduce --no-ddp-bb',
    'bn_broadcast': f'{SAM_ON} --dist-bn broadcast --no-ddp-bb',
    'bn_own': f'{SAM_ON} --dist-bn "" --no-ddp-bb',
    'accumulation': f'{SAM_ON} -b 4 --grad-accum-steps 2 --model-ema',  # 3 updates: timm's average starts at the second
    'sync': f'{SAM_ON} --sam-sync',
    'chunks': f'{SAM_ON} --sam-m 4',
    'dropout': f'{SAM_ON} -b 4 --epochs 2 --grad-accum-steps 2 --drop 0.1',
}
# each once without and once with SAM, for two epochs
MACHINERY = {
    'feature_distillation': f'{KD} feature',
    'token_distillation': f'{DEIT} {KD} token',
    'jsd_with_split_bn': f'{JSD} --split-bn',
    'naflex': NAFLEX,
    'checkpointing': f'{VIT} --grad-checkpointing --drop-path 0.1',
    'compiled': f'{AOT} --clip-grad 0.1',
}
SAM_MACHINERY = {'compiled': f'{SAM_ON} --sam-filter layer4'}
TRAININGS |= {
    f'{name}{end}': f"{options} --epochs 2 --val-split '' {sam}" for name, options in MACHINERY.items()
    for end, sam in (('', ''), ('_sam', SAM_MACHINERY.get(name, SAM_ON)))}
# what some weights are not trained in
FROZEN = {
    'fixed_norm': f'--norm-params fixed {SAM_ON} --sam-params all --norm-drop 0.1',
    'only_norm': f'--norm-params only {SAM_ON} --epochs 2',
}
WITH_SAM = [name for name, options in TRAININGS.items() if '--sam' in options]
WANDB = '''"""A logger that notes whatever it gets, by the rank that it gets it from."""
import os


def init(**options):
    log(options['name'])


def log(row):
    with open(f'wandb-rank{os.environ["RANK"]}.txt', 'a') as f:
        print(row, file=f)


def finish(exit_code):
    assert exit_code == 0


class Error(Exception):
    pass
'''
STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


@pytest.fixture(scope='session')
def trainings(base, teacher, tmp_path_factory):
    """The folder in which two ranks have run train.py with the options of TRAININGS."""
    folder = tmp_path_factory.mktemp('trainings')
    (folder / 'wandb.py').write_text(WANDB)
    runs = TRAININGS | FROZEN
    done = run_in_turn('support.trainings', {
        name: f'{base} {options.format(teacher=teacher)} --experiment {name}' for name, options in runs.items()},
        folder)
    assert done.err.count('Best metric') == len(runs)  # the second rank does not say it too
    return folder


def of_ranks(folder, name):
    return [torch.load(folder / f'{name}-rank{i}.pt') for i in range(RANKS)]


def state_of_ranks(folder, name):
    return [rank['weights'] for rank in of_ranks(folder, name)]


def parameters_only(state):
    return {name: value for name, value in state.items() if not name.endswith(STATISTICS)}


def statistics_only(state):
    return {name: value for name, value in state.items() if name.endswith(STATISTICS[:2])}


def different(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize('name', WITH_SAM)
def test_train_py_on_two_ranks_perturbs_by_rho(trainings, name):
    rows = summary(trainings / 'out' / name)
    assert len(rows) == (2 if '--epochs 2' in TRAININGS[name] else 1)
    for row in rows:
        assert float(row['train_sam_eps_norm']) == pytest.approx(0.05, rel=1e-5)
        assert row['train_sam_nonfinite'] == '0' and float(row['train_sam_loss']) > float(row['train_loss'])
        assert finite(row)


@pytest.mark.parametrize('name', TRAININGS)
def test_train_py_leaves_the_same_weights_on_both_ranks_and_in_the_checkpoint(trainings, name):
    first, second = state_of_ranks(trainings, name)
    assert_identical(parameters_only(first), parameters_only(second))
    saved = torch.load(trainings / 'out' / name / 'last.pth.tar', weights_only=False)
    # what learns from features has more than the student
    student = {n.removeprefix('student.'): value for n, value in first.items() if not n.startswith('projection.')}
    assert_identical(dict(saved['state_dict']), student)


@pytest.mark.parametrize('name', WITH_SAM)
def test_sam_in_train_py_changes_every_weight_on_two_ranks(trainings, name):
    plain_name = name.removesuffix('_sam') if name.endswith('_sam') else 'plain'
    plain, sam = (parameters_only(state_of_ranks(trainings, which)[0]) for which in (plain_name, name))
    if 'filter' in TRAININGS[name]:  # a few weights of norm layers below move by less than their last bit
        assert len(different(plain, sam)) > 0.8 * len(plain)
    else:
        assert different(plain, sam) == list(plain)


@pytest.mark.parametrize('name', FROZEN)
def test_weights_that_are_not_trained_are_those_of_the_start_on_both_ranks(trainings, name):
    first, second = map(parameters_only, state_of_ranks(trainings, name))
    assert_identical(first, second)
    torch.manual_seed(42)
    model = timm.create_model('test_resnet', num_classes=4)
    start, norms = dict(model.named_parameters()), {n for n, _ in select_parameters(model)}
    for weight, value in first.items():
        if name == 'only_norm':
            assert torch.equal(value, start[weight]) == (weight not in norms), weight
        elif weight in norms:
            assert torch.equal(value, torch.full_like(value, float(weight.endswith('weight')))), weight
        else:
            assert not torch.equal(value, start[weight]), weight


@pytest.mark.parametrize('name', ['sync', 'chunks'])
def test_option_of_train_py_changes_the_perturbation_on_two_ranks(trainings, name):
    default, other = (parameters_only(state_of_ranks(trainings, which)[0]) for which in ('sam', name))
    assert len(different(default, other)) > 0.9 * len(default)


@pytest.mark.parametrize('name', ['bn_reduce', 'bn_broadcast', 'bn_own'])
def test_statistics_may_be_shared_in_any_way_without_a_change_of_weights(trainings, name):
    default, other = (parameters_only(state_of_ranks(trainings, which)[0]) for which in ('sam', name))
    assert_identical(default, other)


def test_dist_bn_shares_the_statistics_of_the_clean_passes(trainings):
    own, broadcast, reduced = (
        [statistics_only(state) for state in state_of_ranks(trainings, name)]
        for name in ('bn_own', 'bn_broadcast', 'bn_reduce'))
    assert different(own[0], own[1]) == list(own[0])
    assert_identical(broadcast[0], own[0])
    assert_identical(broadcast[1], own[0])
    assert_identical(reduced[0], reduced[1])
    for name, value in reduced[0].items():
        torch.testing.assert_close(value, (own[0][name] + own[1][name]) / 2, rtol=1e-6, atol=1e-7)
    assert different(reduced[0], own[0]) == list(own[0])


def test_ranks_perturb_for_themselves_and_end_with_the_same_weights(trainings):
    first, second = of_ranks(trainings, 'dropout')
    # each rank has its own images, hence its own gradient, but a perturbation of the same size
    assert first['stats']['grad_norm'] != second['stats']['grad_norm']
    for rank in (first, second):
        assert rank['stats']['eps_norm'].item() == pytest.approx(0.05, rel=1e-5)
    assert differences(first['weights'], second['weights']) == []
    assert differences(first['optimizer'], second['optimizer']) == []
    saved = torch.load(trainings / 'out' / 'dropout' / 'last.pth.tar', weights_only=False)['state_dict']
    assert differences(dict(saved), dict(first['weights'])) == []
    rows = summary(trainings / 'out' / 'dropout')
    assert [row['epoch'] for row in rows] == ['0', '1'] and all(map(finite, rows))
    assert float(rows[1]['train_loss']) < float(rows[0]['train_loss'])


def test_only_the_first_rank_talks_to_a_logger(trainings):
    noted, = trainings.glob('wandb-rank*.txt')
    name, row = noted.read_text().splitlines()
    assert (noted.name, name) == ('wandb-rank0.txt', 'plain') and "'epoch': 0, 'train_loss': " in row


def test_average_of_the_weights_is_kept_on_two_ranks(trainings):
    saved = torch.load(trainings / 'out' / 'accumulation' / 'last.pth.tar', weights_only=False)
    average, final = saved['state_dict_ema'], saved['state_dict']
    assert average.keys() == final.keys()
    assert all(torch.isfinite(v).all() for v in average.values())
    assert different(parameters_only(average), parameters_only(final)) == list(parameters_only(average))


@pytest.mark.slow
def test_two_nodes_give_the_weights_of_one_node_with_two_processes(trainings, base, tmp_path):
    """Two agents of one process each, as on two machines: about 8 s."""
    (port,) = free_ports(1)
    command = torchrun(
        ROOT / 'train.py', *shlex.split(f'{base} {SAM_ON} --experiment nodes'), ranks=1, options=[
            '--nnodes', 2, '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'127.0.0.1:{port}', '--rdzv-id', 'nodes',
            '--local-addr', '127.0.0.1'])
    with ExitStack() as stack:
        nodes = [stack.enter_context(Process(command, tmp_path)) for _ in range(2)]
        nodes = [node.wait() for node in nodes]
    assert [node.code for node in nodes] == [0, 0], [node.err[-3000:] for node in nodes]
    assert sum('2 process(es), one device each' in node.err for node in nodes) == 1
    state = torch.load(tmp_path / 'out' / 'nodes' / 'last.pth.tar', weights_only=False)['state_dict']
    assert_identical(dict(state), dict(state_of_ranks(trainings, 'sam')[0]))
