"""Whole runs of train.py on 40 small images: logs, files, resuming, and SAM together with timm's options."""
import copy
import csv
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from conftest import LAUNCHER, ROOT
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from timm_sam import SAM, engine, select_parameters

SAM_ON = '--sam-variant sam --sam-rho 0.05'
VIT = '--model test_vit --model-kwargs img_size=32 --opt adamw --lr 0.001'
TIMM_COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
SAM_COLUMNS = ['train_sam_loss', 'train_sam_grad_norm', 'train_sam_eps_norm', 'train_sam_nonfinite']

plateau_is_deprecated = pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated:FutureWarning')
adahessian_needs_the_graph = pytest.mark.filterwarnings(
    r'ignore:Using backward\(\) with create_graph=True:UserWarning')


def flat(tree, path=''):
    """``{path: leaf}`` of nested dicts and lists; an empty one is a leaf."""
    if isinstance(tree, (dict, list, tuple)) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, value in items for k, v in flat(value, f'{path}/{key}').items()}
    return {path: tree}


def differences(first, second):
    """The paths at which two nested structures are not bitwise equal."""
    first, second = flat(first), flat(second)

    def same(a, b):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return type(a) is type(b) and a == b

    return [p for p in first.keys() | second.keys() if p not in first or p not in second or
            not same(first[p], second[p])]


def finite(row):
    return all(math.isfinite(float(value)) for value in row.values())


@pytest.fixture
def updates(monkeypatch):
    """One entry per update of the base optimizer: (perturbed batches that went into it, learning rate)."""
    seen, perturbed = [], []
    backward = SAM.backward

    def spy(self, *args, **kwargs):
        perturbed.append(1)
        return backward(self, *args, **kwargs)

    def note(optimizer, args, kwargs):
        seen.append((len(perturbed), optimizer.param_groups[0]['lr']))
        perturbed.clear()

    monkeypatch.setattr(SAM, 'backward', spy)
    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


@pytest.fixture
def script(monkeypatch):
    """Changes what an epoch does: ``script(stop=2)`` interrupts epoch 2, ``top1=[..]`` sets validation results by
    epoch, ``seeded=True`` makes the random draws of an epoch a function of its number."""
    real_train, real_evaluate = train.train_one_epoch, train.evaluate

    def change(stop=None, top1=None, loss=None, seeded=False):
        epochs = []

        def train_one_epoch(run, epoch):
            epochs.append(epoch)
            if epoch == stop:
                raise KeyboardInterrupt
            if seeded:
                torch.manual_seed(epoch)
                random.seed(epoch)
                np.random.seed(epoch)
            return real_train(run, epoch)

        def evaluate(run, model, suffix=''):
            if top1 is None and loss is None:
                return real_evaluate(run, model, suffix)
            values = (loss or [1.0] * 99)[epochs[-1]], (top1 or [50.0] * 99)[epochs[-1]]
            return OrderedDict(zip(('loss', 'top1', 'top5'), (*values, 100.0)))

        monkeypatch.setattr(train, 'train_one_epoch', train_one_epoch)
        monkeypatch.setattr(train, 'evaluate', evaluate)
        return epochs
    return change


# Two runs that many tests look at

@pytest.fixture(scope='module')
def plain(run_in, tmp_path_factory):
    return run_in(tmp_path_factory.mktemp('plain'), '--epochs 2')


@pytest.fixture(scope='module')
def with_sam(run_in, tmp_path_factory):
    return run_in(tmp_path_factory.mktemp('sam'), f'--epochs 2 {SAM_ON}')


# What a run says and writes

def test_summary_of_a_plain_run_has_the_columns_of_timm(plain):
    rows = plain.summary()
    assert plain.code == 0 and list(rows[0]) == TIMM_COLUMNS
    assert [row['epoch'] for row in rows] == ['0', '1'] and all(map(finite, rows))
    assert float(rows[1]['lr']) < float(rows[0]['lr']) == 0.05


def test_summary_of_a_sam_run_has_the_sam_columns_besides(with_sam):
    rows = with_sam.summary()
    assert with_sam.code == 0 and list(rows[0]) == [*TIMM_COLUMNS[:2], *SAM_COLUMNS, *TIMM_COLUMNS[2:]]
    assert [row['epoch'] for row in rows] == ['0', '1'] and all(map(finite, rows))
    assert [row['train_sam_nonfinite'] for row in rows] == ['0', '0']


def test_loss_rises_along_the_perturbation_and_falls_along_training(with_sam):
    first, second = with_sam.summary()
    for row in (first, second):
        assert float(row['train_sam_loss']) > float(row['train_loss']) and float(row['train_sam_grad_norm']) > 0
    assert float(second['train_loss']) < float(first['train_loss'])


def test_run_writes_the_files_of_timm_and_its_times_and_names_them(plain, with_sam):
    for done in (plain, with_sam):
        names = {'args.yaml', 'summary.csv', 'timing.csv', 'last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar',
                 'checkpoint-1.pth.tar'}
        assert {path.name for path in done.folder().iterdir()} == names
        for name in ('args.yaml', 'summary.csv', 'timing.csv', 'last.pth.tar', 'model_best.pth.tar'):
            assert f"Wrote {os.path.join('out', 'run', name)}" in done.err


def test_result_on_stdout_is_that_of_the_summary(with_sam):
    head, text = with_sam.out.split('\n', 1)
    results = {result['epoch']: result for result in json.loads(text)}
    assert head == '--result' and sorted(results) == [0, 1]
    for row in with_sam.summary():
        result = results[int(row['epoch'])]
        shown = {**{f'train_{k}': v for k, v in result['train'].items()},
                 **{f'eval_{k}': v for k, v in result['validation'].items()}}
        assert {key: str(value) for key, value in shown.items()} == {key: row[key] for key in shown}


@pytest.mark.parametrize('params', ['onlynorm', 'all', 'nonorm'])
@pytest.mark.parametrize('rho', [0.01, 0.3])
def test_norm_of_the_perturbation_is_rho(run_train, params, rho):
    row, = run_train(f'--sam-variant sam --sam-rho {rho} --sam-params {params}').summary()
    assert float(row['train_sam_eps_norm']) == pytest.approx(rho, rel=1e-5)


def test_log_lines_show_sam_and_the_time_left(plain, with_sam):
    number, left = r'[\d.e+-]+', r'Left: \d+:\d\d:\d\d$'
    lines = with_sam.log('Train: ')
    assert len(lines) == len(plain.log('Train: ')) == 10
    for line in lines:
        pattern = rf'Loss: {number} \({number}\)  SAM loss: {number} \({number}\)  \|g\|: {number}  \|eps\|: 0\.0500  '
        assert re.search(pattern, line) and re.search(left, line), line
    for line in plain.log('Train: '):
        assert re.search(left, line) and 'SAM' not in line and 'eps' not in line


@pytest.mark.parametrize('params', ['onlynorm', 'all', 'nonorm'])
def test_start_line_states_variant_rho_eta_and_counts(run_train, params):
    model = timm.create_model('test_resnet', num_classes=4)
    chosen = [p for _, p in select_parameters(model, params)]
    every = list(model.parameters())
    done = run_train(f'--sam-variant fisher --sam-rho 0.05 --sam-params {params} --epochs 1')
    line, = done.log('SAM fisher')
    assert line == (f'SAM fisher, rho=0.05, eta=1, params={params}: perturbs {len(chosen)} of {len(every)} tensors, '
                    f'{sum(p.numel() for p in chosen):,} of {sum(p.numel() for p in every):,} parameters')


def test_time_left_counts_only_the_updates_of_this_run(monkeypatch):
    # 10 of the updates 100 to 129 took 20 seconds: the other 20 take 40
    monkeypatch.setattr(engine.time, 'time', lambda: 1020.0)
    nothing = dict.fromkeys(('args', 'task', 'data', 'optimizer', 'sam', 'scaler', 'autocast', 'device', 'model_dtype'))
    run = engine.Run(**nothing, first_update=100, total_updates=130, started=1000.0)
    assert str(run.time_left(110)) == '0:00:40' and str(run.time_left(130)) == '0:00:00'


def test_plain_run_does_not_mention_sam(plain):
    assert 'sam' not in plain.err.lower() and 'sam' not in plain.out.lower()


def test_gradients_that_are_not_finite_are_counted(run_train):
    done = run_train(f'{SAM_ON} --lr 1e30')
    row, = done.summary()
    assert done.code == 0 and 1 <= int(row['train_sam_nonfinite']) <= 5
    assert f"non-finite: {row['train_sam_nonfinite']}" in done.log('Train: ')[-1]


# SAM and plain training

@pytest.mark.parametrize('options', [
    '--drop 0.1 --drop-path 0.1',
    '--drop 0.1 --drop-path 0.1 --grad-accum-steps 2',
    '--drop 0.1 --drop-path 0.1 --model-ema --model-ema-decay 0.9',
    '--drop 0.1 --sam-params all',
    f'{VIT} --drop 0.1 --drop-path 0.1 --clip-grad 1 --mixup 0.2',
    f'{VIT} --drop 0.1 --amp --amp-dtype bfloat16 --smoothing 0',
])
def test_rho_0_gives_bitwise_the_run_without_sam(run_train, options):
    rest = ' '.join(word for word in options.split() if word not in ('--sam-params', 'all'))
    expected = run_train(f'--epochs 2 {rest} --experiment plain')
    got = run_train(f'--epochs 2 --sam-variant sam --sam-rho 0 {options}')
    assert (expected.code, got.code) == (0, 0)
    entries = ('state_dict', 'state_dict_ema', 'optimizer', 'metric', 'epoch')
    first, second = ({k: v for k, v in got.checkpoint(name).items() if k in entries} for name in ('plain', 'run'))
    assert differences(first, second) == [] and ('state_dict_ema' in first) == ('ema' in options)
    assert [{k: row[k] for k in TIMM_COLUMNS} for row in got.summary()] == expected.summary('plain')


def test_rho_above_0_gives_other_weights(plain, with_sam):
    changed = differences(plain.checkpoint()['state_dict'], with_sam.checkpoint()['state_dict'])
    assert {'/fc.weight', '/conv1.0.weight', '/conv1.1.weight', '/conv1.1.running_mean'} <= set(changed)


def test_first_update_perturbs_nothing_that_batch_norm_remembers(run_train):
    # the statistics of the first update come from the pass at w alone, and w is the same in both runs
    first = run_train('--experiment plain -b 40')  # one update per epoch
    second = run_train(f'-b 40 {SAM_ON}')
    third = run_train(f'-b 40 {SAM_ON} --experiment both --sam-bn-stats both')
    assert (first.code, second.code, third.code) == (0, 0, 0)
    states = [first.checkpoint(name)['state_dict'] for name in ('plain', 'run', 'both')]
    statistics = [{k: v for k, v in state.items() if 'running' in k or 'num_batches' in k} for state in states]
    assert len(statistics[0]) > 20 and differences(statistics[0], statistics[1]) == []
    assert statistics[2]['conv1.1.num_batches_tracked'] == 2
    assert '/fc.weight' in differences(states[0], states[1])


@pytest.mark.parametrize('options, expected', [
    ('', [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ('--sam-every 2', [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]),  # counts on through the epochs of 5 updates
    ('--sam-every 4', [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0]),
    ('--sam-every 99', [1] + [0] * 14),
    ('--sam-start-epoch 1', [0] * 5 + [1] * 10),
    ('--sam-start-epoch 3', [0] * 15),
    ('--sam-end-epoch 1', [1] * 5 + [0] * 10),
    ('--sam-start-epoch 1 --sam-end-epoch 2', [0] * 5 + [1] * 5 + [0] * 5),
    ('--sam-start-epoch 1 --sam-every 2', [0] * 5 + [0, 1, 0, 1, 0] + [1, 0, 1, 0, 1]),
    ('--grad-accum-steps 2', [2, 2, 1] * 3),
    ('--grad-accum-steps 2 --sam-every 2', [2, 0, 1, 0, 2, 0, 2, 0, 1]),
])
def test_sam_perturbs_the_updates_it_is_asked_to(run_train, updates, options, expected):
    done = run_train(f'--epochs 3 {SAM_ON} {options}')
    assert done.code == 0 and [perturbed for perturbed, _ in updates] == expected
    for epoch, row in enumerate(done.summary()):
        share = expected[epoch * len(expected) // 3:(epoch + 1) * len(expected) // 3]
        norm = float(row['train_sam_eps_norm'])
        assert norm == pytest.approx(0.05, rel=1e-5) if any(share) else math.isnan(norm)
        assert math.isfinite(float(row['train_loss']))


def test_sam_every_counts_on_from_a_checkpoint(run_train, updates):
    options = f'{SAM_ON} --sam-every 2'
    run_train(f'--epochs 1 {options}')
    updates.clear()
    run_train(f'--epochs 2 {options} --resume out/run/last.pth.tar')
    assert [perturbed for perturbed, _ in updates] == [0, 1, 0, 1, 0]  # updates 5 to 9


# Checkpoints

@pytest.mark.parametrize('options', ['', '--model-ema --opt adamw --lr 0.001'])
def test_checkpoint_of_a_sam_run_has_the_structure_of_a_plain_one(run_train, options):
    run_train(f'--experiment plain {options}')
    done = run_train(f'{SAM_ON} {options}')
    first, second = done.checkpoint('plain'), done.checkpoint()
    first['args'], second['args'] = vars(first['args']), vars(second['args'])

    def structure(tree):
        return {path: (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else
                None if path.startswith('/args') else type(leaf) for path, leaf in flat(tree).items()}

    assert structure(first) == structure(second)
    assert list(first) == list(second) and 'optimizer' in first


@pytest.mark.parametrize('options', ['', VIT])
def test_checkpoint_of_a_sam_run_loads_into_timm(run_train, options):
    done = run_train(f'{SAM_ON} {options}')
    saved = done.checkpoint()
    vit = {'img_size': 32} if options else {}
    model = timm.create_model('test_vit' if options else 'test_resnet', num_classes=4, **vit)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(model, opt='adamw' if options else 'sgd', lr=0.1, weight_decay=2e-5)
    epoch = resume_task_checkpoint(task, str(done.folder() / 'last.pth.tar'), optimizer=optimizer, log_info=False)
    assert epoch == 1 and differences(model.state_dict(), saved['state_dict']) == []
    assert differences(optimizer.state_dict(), saved['optimizer']) == []
    assert len(optimizer.state) == len(list(model.parameters()))
    optimizer.step()  # the groups hold the parameters of this model


@pytest.mark.parametrize('before, after', [('', SAM_ON), (SAM_ON, '')])
def test_run_goes_on_with_or_without_sam_from_a_checkpoint_of_the_other_kind(run_train, script, before, after):
    saved = run_train(f'{before} --experiment before').checkpoint('before')
    epochs = script()
    done = run_train(f'{after} --epochs 2 --resume out/before/last.pth.tar')
    assert done.code == 0 and epochs == [1]
    assert '/fc.weight' in differences(saved['state_dict'], done.checkpoint()['state_dict'])


@pytest.mark.parametrize('options', [
    SAM_ON, f'{SAM_ON} {VIT}', '', '--opt lookahead_adam --lr 0.001', f'{SAM_ON} --grad-accum-steps 2'])
def test_resume_restores_weights_optimizer_and_average(run_train, monkeypatch, options):
    options += ' --model-ema --model-ema-decay 0.5'
    saved = run_train(f'--epochs 2 {options}').checkpoint()
    found = {}

    def look(run, epoch):
        task = run.task
        found.update(copy.deepcopy({
            'epoch': epoch - 1, 'state_dict': task.get_trainable_module().state_dict(),
            'state_dict_ema': task.get_trainable_module(ema=True).module.state_dict(),
            'optimizer': run.optimizer.state_dict()}))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'train_one_epoch', look)
    assert run_train(f'--epochs 3 {options} --resume out/run/last.pth.tar').code == 0
    assert differences(saved['state_dict'], saved['state_dict_ema']) != []
    for entry in ('epoch', 'state_dict', 'state_dict_ema'):
        assert differences(found[entry], saved[entry]) == [], entry
    assert differences(found['optimizer']['state'], saved['optimizer']['state']) == []
    assert found['optimizer']['state']


def test_resume_without_an_average_starts_it_from_the_weights(run_train, monkeypatch):
    saved = run_train().checkpoint()
    found = {}

    def look(run, epoch):
        found.update(copy.deepcopy(run.task.get_trainable_module(ema=True).module.state_dict()))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'train_one_epoch', look)
    assert run_train('--epochs 2 --model-ema --resume out/run/last.pth.tar').code == 0
    assert differences(found, dict(saved['state_dict'])) == []


def test_no_resume_opt_starts_with_a_fresh_optimizer(run_train, monkeypatch):
    saved = run_train().checkpoint()
    found = {}

    def look(run, epoch):
        found.update(epoch=epoch, state=len(run.optimizer.state), weights=copy.deepcopy(
            run.task.get_trainable_module().state_dict()))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'train_one_epoch', look)
    done = run_train('--epochs 2 --no-resume-opt --resume out/run/last.pth.tar --opt adamw')
    assert done.code == 0 and (found['epoch'], found['state']) == (1, 0)
    assert differences(dict(found['weights']), dict(saved['state_dict'])) == []


def test_initial_checkpoint_gives_the_weights_and_starts_at_epoch_0(run_train, monkeypatch):
    saved = run_train(f'{SAM_ON} --experiment first').checkpoint('first')
    found = {}

    def look(run, epoch):
        found.update(epoch=epoch, weights=copy.deepcopy(run.task.get_trainable_module().state_dict()))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'train_one_epoch', look)
    run_train('--initial-checkpoint out/first/last.pth.tar')
    assert found['epoch'] == 0 and differences(dict(found['weights']), dict(saved['state_dict'])) == []


# Resuming

FALLING = [50.0, 40.0, 45.0, 30.0, 20.0, 10.0, 9.0, 8.0, 7.0]  # top-1 that never gets better

SCHEDULES = [
    '',
    '--sched-on-updates',
    '--sched-on-updates --grad-accum-steps 2 --warmup-epochs 1 --warmup-lr 1e-3',
    '--warmup-epochs 2 --warmup-lr 1e-3',
    '--warmup-epochs 2 --warmup-lr 1e-3 --warmup-prefix --cooldown-epochs 1',
    '--lr-noise 0.2 0.9 --lr-noise-pct 0.5',
    '--lr-cycle-limit 2 --lr-cycle-mul 2 --epochs 3',
    '--sched step --decay-epochs 2 --decay-rate 0.5',
    '--sched step --decay-epochs 2 --decay-rate 0.5 --sched-on-updates',
    '--sched multistep --decay-milestones 2 4',
    '--sched poly --min-lr 1e-4',
    '--sched tanh',
    '--sched wsd --decay-epochs 2',
    '--sched rsqrt --decay-epochs 2 --warmup-epochs 1',
    '--sched constant',
    '--sched none',
]


def learning_rates(updates):
    rates = [rate for _, rate in updates]
    updates.clear()
    return rates


def check_resumed_schedule(run_train, script, updates, options, boundary):
    options = f'--epochs 6 -b 20 {options}'
    script(top1=FALLING)
    assert run_train(f'{options} --experiment whole').code == 0
    whole = learning_rates(updates)
    script(top1=FALLING, stop=boundary)
    assert run_train(options).code == 0
    before = learning_rates(updates)
    epochs = script(top1=FALLING)
    assert run_train(f'{options} --resume out/run/last.pth.tar').code == 0
    assert epochs[0] == boundary
    assert before + learning_rates(updates) == whole
    return whole


@pytest.mark.parametrize('options', SCHEDULES)
def test_learning_rate_goes_on_from_a_checkpoint_as_if_uninterrupted(run_train, script, updates, options):
    rates = check_resumed_schedule(run_train, script, updates, options, 3)
    assert ('constant' in options or 'none' in options) == (len(set(rates)) == 1)


@plateau_is_deprecated
@pytest.mark.parametrize('boundary', [2, 4])
@pytest.mark.parametrize('options', [
    '', '--warmup-epochs 2 --warmup-lr 1e-3', '--cooldown-epochs 1', '--lr-noise 0.2 0.9 --lr-noise-pct 0.5',
    '--eval-metric loss'])
def test_plateau_remembers_its_patience_over_a_checkpoint(run_train, script, updates, options, boundary):
    rates = check_resumed_schedule(
        run_train, script, updates, f'--sched plateau --patience-epochs 1 --decay-rate 0.5 {options}', boundary)
    assert len(set(rates)) > 1


@pytest.mark.parametrize('options', [
    f'{SAM_ON} --model-ema --model-ema-decay 0.9 --model-ema-warmup --drop 0.1 --drop-path 0.1',
    f'{SAM_ON} {VIT} --grad-accum-steps 2 --sched-on-updates --sam-every 2 --clip-grad 1',
    '--mixup 0.2 --mixup-off-epoch 2',
])
def test_resumed_run_ends_bitwise_where_the_uninterrupted_one_does(run_train, script, options):
    options = f'--epochs 4 {options}'
    script(seeded=True)
    whole = run_train(f'{options} --experiment whole')
    script(seeded=True, stop=2)
    run_train(options)
    epochs = script(seeded=True)
    resumed = run_train(f'{options} --resume out/run/last.pth.tar')
    assert (whole.code, resumed.code, epochs) == (0, 0, [2, 3])
    first, second = resumed.checkpoint('whole'), resumed.checkpoint()
    for state in (first, second):
        del state['args']
    assert differences(first, second) == []
    assert resumed.summary() == whole.summary('whole')
    names = [{path.name for path in resumed.folder(name).iterdir()} for name in ('whole', 'run')]
    assert names[0] == names[1]


def test_summary_of_a_run_resumed_in_its_folder_has_one_header_and_every_epoch_once(run_train):
    run_train(f'--epochs 2 {SAM_ON}')
    done = run_train(f'--epochs 4 {SAM_ON} --resume out/run/last.pth.tar')
    lines = (done.folder() / 'summary.csv').read_text().splitlines()
    assert done.code == 0 and [line.split(',')[0] for line in lines] == ['epoch', '0', '1', '2', '3']


def test_resume_from_an_earlier_checkpoint_of_the_folder_replaces_the_later_epochs_by_the_same(run_train):
    before = run_train('--epochs 3').summary()
    done = run_train('--epochs 3 --resume out/run/checkpoint-0.pth.tar')
    after = done.summary()
    assert done.code == 0 and [row['epoch'] for row in after] == ['0', '1', '2']
    assert after == before


def test_resume_into_a_new_folder_leaves_the_old_one_alone(run_train):
    old = run_train('--epochs 2 --experiment old')
    folder = old.folder('old')
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    done = run_train('--epochs 3 --resume out/old/last.pth.tar')
    assert done.code == 0 and [row['epoch'] for row in done.summary()] == ['2']
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before


def test_start_epoch_wins_over_the_epoch_of_the_checkpoint(run_train, script):
    run_train('--epochs 2 --experiment old')
    epochs = script()
    assert run_train('--epochs 2 --start-epoch 0 --resume out/old/last.pth.tar').code == 0
    assert epochs == [0, 1]


# Which epoch is best

def best_epoch(done):
    line, = done.log('*** Best metric: ')
    return int(re.search(r'\(epoch (\d+)\)', line)[1]), done.checkpoint(name='model_best')['epoch']


@pytest.mark.parametrize('metric, best', [('top1', 2), ('loss', 1)])
def test_best_checkpoint_is_that_of_the_metric(run_train, script, metric, best):
    script(loss=[1.0, 0.5, 0.7], top1=[40.0, 50.0, 60.0])
    done = run_train(f'--epochs 3 --eval-metric {metric}')
    assert done.code == 0 and best_epoch(done) == (best, best)
    results = json.loads(done.out.split('\n', 1)[1])
    assert results[-1]['epoch'] == best  # the best is printed last


def test_best_survives_a_resume(run_train, script):
    script(loss=[0.5, 0.9, 0.8, 0.7], stop=2)
    run_train('--epochs 4 --eval-metric loss')
    script(loss=[0.5, 0.9, 0.8, 0.7])
    done = run_train('--epochs 4 --eval-metric loss --resume out/run/last.pth.tar')
    assert done.code == 0 and best_epoch(done) == (0, 0)


def test_only_the_best_checkpoints_are_kept(run_train, script):
    script(top1=[40.0, 60.0, 50.0, 30.0])
    done = run_train('--epochs 4 --checkpoint-hist 2')
    assert {path.name for path in done.folder().glob('checkpoint-*')} == {f'checkpoint-{e}.pth.tar' for e in (1, 2)}
    assert done.checkpoint()['epoch'] == 3


def test_empty_val_split_trains_without_validation_and_ranks_by_the_training_loss(run_train, tmp_path, image_folder):
    # no validation folder is needed then
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'train').symlink_to(image_folder / 'train')
    done = run_train(f"--epochs 3 --data-dir data --val-split '' {SAM_ON}")
    rows = done.summary()
    assert done.code == 0 and list(rows[0]) == ['epoch', 'train_loss', *SAM_COLUMNS, 'lr']
    losses = [float(row['train_loss']) for row in rows]
    assert best_epoch(done) == (losses.index(min(losses)), losses.index(min(losses)))
    assert 'Test' not in done.err and 'validation' not in done.out


def test_val_interval_validates_these_epochs_and_the_last(run_train):
    done = run_train(f'--epochs 5 --val-interval 2 {SAM_ON}')
    assert done.code == 0 and [row['epoch'] for row in done.summary()] == ['1', '3', '4']
    assert {path.name for path in done.folder().glob('checkpoint-*')} == {f'checkpoint-{e}.pth.tar' for e in (1, 3, 4)}


def test_average_is_what_gets_validated(run_train):
    done = run_train('--model-ema --model-ema-decay 0.5 --epochs 2')
    shown = [line.split('Loss:')[1] for line in done.log('Test (EMA): [   1/1]')]
    assert len(shown) == len(done.log('Test: [   1/1]')) == 2
    for row, line in zip(done.summary(), shown):
        assert f"({float(row['eval_loss']):>6.3f})" in line


# Interruption

def test_interrupt_ends_gracefully_with_the_results_so_far(run_train, script):
    script(stop=1)
    done = run_train(f'--epochs 3 {SAM_ON}')
    assert done.code == 0 and done.log('WARNING') == ['WARNING: Interrupted.']
    assert [result['epoch'] for result in json.loads(done.out.split('\n', 1)[1])] == [0]
    assert [row['epoch'] for row in done.summary()] == ['0'] and done.checkpoint()['epoch'] == 0


def test_interrupt_in_the_first_epoch_has_no_results(run_train, script):
    script(stop=0)
    done = run_train()
    assert done.code == 0 and json.loads(done.out.split('\n', 1)[1]) == []
    assert [path.name for path in done.folder().iterdir()] == ['args.yaml']


# SAM with timm's options

@pytest.mark.parametrize('options', [
    '--mixup 0.2 --cutmix 1.0',
    '--mixup 0.2 --bce-loss',
    '--no-prefetcher',
    '--no-prefetcher --mixup 0.2 --reprob 0.5',
    '--channels-last',
    '--grad-accum-steps 3',
    '--clip-grad 0.5',
    '--clip-grad 0.01 --clip-mode value',
    '--clip-grad 0.1 --clip-mode agc',
    '--amp --amp-dtype bfloat16',
    '--model-dtype bfloat16',
    '--sync-bn',
    '--aug-splits 3 --jsd-loss --split-bn',
    '--train-img-sizes 24 32 --variable-batch-loss-scale linear',
    '--layer-decay 0.7',
    '--torchscript',
    '--model-ema --model-ema-warmup',
    '--model-ema --model-ema-force-cpu',
    '--in-chans 1 --mean 0.5 --std 0.25',
    f'{VIT} --grad-checkpointing --drop-path 0.1',
    f'{VIT} --amp --amp-dtype bfloat16 --clip-grad 1',
    f'{VIT} --fast-norm',
    '--opt sgd',
    '--opt momentum',
    '--opt adamw --lr 0.001',
    '--opt lion --lr 0.0005',
    '--opt lamb --lr 0.01',
    '--opt muon --lr 0.01',
    pytest.param('--opt adahessian --lr 0.1', marks=adahessian_needs_the_graph),
    '--opt lookahead_adam --lr 0.001',
])
@pytest.mark.parametrize('variant', ['--sam-variant sam --sam-rho 0.05'])
def test_sam_trains_with(run_train, options, variant):
    done = run_train(f'{variant} {options} --epochs 2 --log-interval 2')
    assert done.code == 0, done.err[-2000:]
    for row in done.summary():
        assert finite(row) and row['train_sam_nonfinite'] == '0' and float(row['train_sam_grad_norm']) > 0
        assert float(row['train_sam_eps_norm']) == pytest.approx(0.05, rel=1e-4)
        assert float(row['train_sam_loss']) > float(row['train_loss'])
    assert all(torch.isfinite(v).all() for v in done.checkpoint()['state_dict'].values())


@pytest.mark.parametrize('variant', [
    'elementwise_l2', 'elementwise_l2_orig', 'elementwise_linf', 'layerwise_l2', 'fisher'])
@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_every_variant_trains(run_train, variant, params):
    done = run_train(f'--sam-variant {variant} --sam-rho 0.01 --sam-params {params} --epochs 2')
    assert done.code == 0
    for row in done.summary():
        assert finite(row) and float(row['train_sam_eps_norm']) > 0
        assert float(row['train_sam_loss']) > float(row['train_loss'])


@pytest.mark.parametrize('same, options', [
    ('--grad-checkpointing', f'{VIT} --epochs 2'), ('--torchscript', '--epochs 2'), ('--channels-last', '-b 40')])
def test_option_that_changes_no_number_changes_none_under_sam(run_train, same, options):
    first = run_train(f'{SAM_ON} {options} --experiment first').checkpoint('first')
    second = run_train(f'{SAM_ON} {options} {same}').checkpoint()
    assert first['state_dict'].keys() == second['state_dict'].keys()
    for name, value in first['state_dict'].items():
        torch.testing.assert_close(second['state_dict'][name], value, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize('options', [
    '--drop 0.1 --drop-path 0.1 --sam-filter layer[34]',
    '--drop 0.1 --drop-path 0.1 --sam-filter layer[34] --grad-accum-steps 2 --sam-every 2 --sam-bn-stats both',
    f'{VIT} --drop 0.1 --drop-path 0.1 --sam-filter blocks.[45] --mixup 0.2 --clip-grad 1',
    f'{VIT} --sam-filter blocks.[45] --grad-checkpointing --amp --amp-dtype bfloat16',
])
def test_shared_forward_changes_no_weight(run_train, options):
    two = run_train(f'{SAM_ON} {options} --epochs 2 --sam-no-shared-forward --experiment two')
    one = run_train(f'{SAM_ON} {options} --epochs 2')
    assert (one.code, two.code) == (0, 0)
    assert differences(one.checkpoint('two')['state_dict'], one.checkpoint()['state_dict']) == []
    assert one.summary() == two.summary('two')


def test_log_says_once_how_much_of_the_forward_is_shared(run_train):
    done = run_train(f'{SAM_ON} --sam-filter layer4')
    assert len(done.log('SAM forward: one forward for both passes through')) == 1
    without = run_train(f'{SAM_ON} --sam-filter layer4 --sam-no-shared-forward --experiment two')
    line, = without.log('SAM forward')
    assert line.startswith('SAM forward: two full forwards') and without.code == 0


def test_ascent_on_a_part_of_the_batch_gives_another_perturbation_of_the_same_size(run_train):
    whole = run_train(f'{SAM_ON} --experiment whole')
    part = run_train(f'{SAM_ON} --sam-ascent-fraction 0.25')
    assert differences(part.checkpoint('whole')['state_dict'], part.checkpoint()['state_dict']) != []
    for row in (whole.summary('whole')[0], part.summary()[0]):
        assert finite(row) and float(row['train_sam_eps_norm']) == pytest.approx(0.05, rel=1e-5)


def test_filter_limits_what_is_perturbed(run_train):
    done = run_train(f'{SAM_ON} --sam-filter layer4')
    line, = done.log('SAM sam')
    assert 'perturbs 6 of 47 tensors' in line
    assert float(done.summary()[0]['train_sam_eps_norm']) == pytest.approx(0.05, rel=1e-5)


def test_recovery_checkpoint_holds_the_weights_within_an_epoch_and_goes_on_from_there(run_train):
    done = run_train(f'{SAM_ON} --recovery-interval 2 --experiment old')
    names = {path.name for path in done.folder('old').glob('recovery*')}
    assert names == {'recovery-0-1.pth.tar', 'recovery-0-3.pth.tar'}
    within, after = done.checkpoint('old', 'recovery-0-3'), done.checkpoint('old')
    assert differences(within['state_dict'], after['state_dict']) != []
    resumed = run_train(f'{SAM_ON} --epochs 2 --resume out/old/recovery-0-3.pth.tar').summary()
    assert resumed == run_train(f'{SAM_ON} --epochs 2 --experiment whole').summary('whole')


@pytest.mark.parametrize('options', ['', '--reprob 0.5', '--no-prefetcher --mixup 0.2'])
def test_run_goes_on_within_an_epoch_with_the_random_numbers_of_the_prefetcher(run_train, options):
    whole = run_train(f'{SAM_ON} {options} --drop 0.1 --recovery-interval 2 --epochs 2 --experiment whole')
    done = run_train(
        f'{SAM_ON} {options} --drop 0.1 --epochs 2 --resume out/whole/recovery-1-1.pth.tar --experiment on')
    assert done.summary('on') == whole.summary('whole')[1:]
    assert differences(done.checkpoint('on')['state_dict'], whole.checkpoint('whole')['state_dict']) == []


def test_nonfinite_gradients_are_counted_over_a_restart_and_hide_no_other_norms(run_train, monkeypatch):
    compute_eps, calls = SAM._compute_eps, []

    def poisoned(self, params, scale):
        calls.append(1)
        if len(calls) == 1:
            params[0].grad.view(-1)[0] = float('inf')
        return compute_eps(self, params, scale)

    monkeypatch.setattr(SAM, '_compute_eps', poisoned)
    whole = run_train(f'{SAM_ON} --recovery-interval 2 --experiment whole')
    resumed = run_train(f'{SAM_ON} --resume out/whole/recovery-0-1.pth.tar --experiment resumed')
    assert resumed.summary('resumed') == whole.summary('whole')
    (row,) = resumed.summary('resumed')
    assert row['train_sam_nonfinite'] == '1' and 'non-finite: 1 ' in resumed.log('Train: ')[-1]
    assert finite(row) and float(row['train_sam_grad_norm']) > 0


# Several processes

RANK_SCRIPT = '''
"""train.py, and what each rank has at the end."""
import sys

sys.path.insert(0, {root!r})

import torch
import train

torch.set_num_threads(1)
fit = train.fit


def spy(run, *rest):
    fit(run, *rest)
    module = run.task.get_trainable_module()
    torch.save({{'weights': module.state_dict(), 'stats': run.sam.stats._asdict(), 'rank': run.args.rank,
                'optimizer': run.optimizer.state_dict()}}, f'rank{{run.args.rank}}.pt')


train.fit = spy
sys.exit(train.main(sys.argv[1:]))
'''


@pytest.mark.parametrize('options', ['--grad-accum-steps 2 --drop 0.1'])
def test_ranks_perturb_for_themselves_and_end_with_the_same_weights(base, tmp_path, options):
    script = tmp_path / 'ranks.py'
    script.write_text(RANK_SCRIPT.format(root=str(ROOT)))
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(script),
         *shlex.split(f'{base} -b 4 --epochs 2 {SAM_ON} {options}')],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f'rank{i}.pt') for i in range(2)]
    assert [rank['rank'] for rank in ranks] == [0, 1]
    # each rank has its own images, hence its own gradient, but a perturbation of the same size
    norms = [rank['stats']['grad_norm'] for rank in ranks]
    assert norms[0] != norms[1]
    for rank in ranks:
        assert rank['stats']['eps_norm'].item() == pytest.approx(0.05, rel=1e-5)
    assert differences(ranks[0]['weights'], ranks[1]['weights']) == []
    assert differences(ranks[0]['optimizer'], ranks[1]['optimizer']) == []
    saved = torch.load(tmp_path / 'out' / 'run' / 'last.pth.tar', weights_only=False)['state_dict']
    assert differences({f'module.{k}': v for k, v in saved.items()}, dict(ranks[0]['weights'])) == []
    with open(tmp_path / 'out' / 'run' / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [row['epoch'] for row in rows] == ['0', '1'] and all(map(finite, rows))
    assert float(rows[1]['train_loss']) < float(rows[0]['train_loss'])
    assert done.stderr.count('Best metric') == 1
