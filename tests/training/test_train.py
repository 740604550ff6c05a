"""Whole runs of train.py on 40 small images: logs, files, and SAM together with timm's options."""
import json
import math
import os
import re

import pytest
import timm
import torch
from support.loop import CPU
from support.states import differences, finite

from timm_sam import select_parameters
from timm_sam.training import progress

SAM_ON = '--sam-variant sam --sam-rho 0.05'
VIT = '--model test_vit --model-kwargs img_size=32 --opt adamw --lr 0.001'
TIMM_COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
SAM_COLUMNS = ['train_sam_loss', 'train_sam_grad_norm', 'train_sam_eps_norm', 'train_sam_nonfinite']

adahessian_needs_the_graph = pytest.mark.filterwarnings(
    r'ignore:Using backward\(\) with create_graph=True:UserWarning')


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
    monkeypatch.setattr(progress.time, 'time', lambda: 1000.0)
    told = progress.Progress(CPU, 10, first_update=100, total_updates=130)
    monkeypatch.setattr(progress.time, 'time', lambda: 1020.0)
    assert str(told.time_left(110)) == '0:00:40' and str(told.time_left(130)) == '0:00:00'


def test_plain_run_does_not_mention_sam(plain):
    assert 'sam' not in plain.err.lower() and 'sam' not in plain.out.lower()


def test_gradients_that_are_not_finite_are_counted(run_train):
    done = run_train(f'{SAM_ON} --lr 1e30 --allow-nonfinite')
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
    ('--sam-start-epoch 2', [0] * 10 + [1] * 5),
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


@pytest.mark.parametrize('options', [
    '--sam-start-epoch 3', '--sam-start-epoch 99', '--sam-start-epoch 5 --cooldown-epochs 2',
    '--sam-start-epoch 3 --warmup-epochs 1'])
def test_start_that_no_epoch_reaches_is_an_error_and_writes_nothing(run_train, options):
    done = run_train(f'--epochs 3 {SAM_ON} {options}')
    start = options.split()[1]
    assert done.code == 2 and done.last_line.startswith(
        f'train.py: error: --sam-start-epoch {start} is not before the end of training, which has ')
    assert not done.folder().exists()


@pytest.mark.parametrize('options', ['--sam-start-epoch 4 --cooldown-epochs 2', '--sam-start-epoch 3 --warmup-epochs 1 '
                                     '--warmup-prefix'])
def test_start_in_epochs_that_schedules_add_perturbs(run_train, updates, options):
    assert run_train(f'--epochs 3 {SAM_ON} {options}').code == 0
    assert sum(perturbed for perturbed, _ in updates) == 5


def test_sam_every_counts_on_from_a_checkpoint(run_train, updates):
    options = f'{SAM_ON} --sam-every 2'
    run_train(f'--epochs 1 {options}')
    updates.clear()
    run_train(f'--epochs 2 {options} --resume out/run/last.pth.tar')
    assert [perturbed for perturbed, _ in updates] == [0, 1, 0, 1, 0]  # updates 5 to 9


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
        # of bfloat16 weights it is that of what they took, each rounded to 8 bits
        rel = 0.1 if '--model-dtype' in options else 1e-4
        assert float(row['train_sam_eps_norm']) == pytest.approx(0.05, rel=rel)
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
