"""Checkpoints of train.py: their form, resuming, which is best, and what an interrupt leaves."""
import copy
import csv
import functools
import json
import math
import re

import pytest
import timm
import torch
from support.states import differences, finite, flat
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint

from timm_sam import train
from timm_sam.ascent import Ascent
from timm_sam.training import factory

SAM_ON = '--sam-variant sam --sam-rho 0.05'
VIT = '--model test_vit --model-kwargs img_size=32 --opt adamw --lr 0.001'
SAM_COLUMNS = ['train_sam_loss', 'train_sam_grad_norm', 'train_sam_eps_norm', 'train_sam_nonfinite']

plateau_is_deprecated = pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated:FutureWarning')


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
    saved = run_train(before).checkpoint()
    epochs = script()
    done = run_train(f'{after} --lr 0.1 --epochs 2 --resume out/run/last.pth.tar')
    assert done.code == 0 and epochs == [1]
    assert '/fc.weight' in differences(saved['state_dict'], done.checkpoint()['state_dict'])
    with open(done.folder() / 'summary.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert all(math.isfinite(float(row[name])) for row in rows for name in ('train_loss', 'eval_loss', 'lr'))
    perturbed = [{row[name] != 'nan' for name in SAM_COLUMNS} for row in rows]
    assert perturbed == [{bool(before)}, {bool(after)}]
    [kept] = [line for line in done.log('WARNING') if 'optimizer' in line]
    assert 'goes on with what it had, lr 0.05 instead of 0.1; --no-resume-opt starts it anew' in kept


@pytest.mark.parametrize('options', [
    SAM_ON, f'{SAM_ON} {VIT}', '', '--opt lookahead_adam --lr 0.001', f'{SAM_ON} --grad-accum-steps 2'])
def test_resume_restores_weights_optimizer_and_average(run_train, monkeypatch, options):
    options += ' --model-ema --model-ema-decay 0.5'
    saved = run_train(f'--epochs 2 {options}').checkpoint()
    found = {}

    def look(run, epoch, *place):
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

    def look(run, epoch, *place):
        found.update(copy.deepcopy(run.task.get_trainable_module(ema=True).module.state_dict()))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'train_one_epoch', look)
    assert run_train('--epochs 2 --model-ema --resume out/run/last.pth.tar').code == 0
    assert differences(found, dict(saved['state_dict'])) == []


@pytest.mark.parametrize('before, after, named', [
    ('adamw', 'sgd', 'momentum'), ('adamw', 'lamb', 'bias_correction'), ('sgd', 'lookahead_sgd', '')])
def test_state_of_another_optimizer_is_refused_before_its_first_step(run_train, before, after, named):
    run_train(f'--opt {before}')
    done = run_train(f'--opt {after} --epochs 2 --resume out/run/last.pth.tar --experiment other')
    if not named:  # Lookahead starts anew around the state of what it wraps
        assert done.code == 0
        return
    assert done.code == 2 and 'Traceback' not in done.err and not done.folder('other').exists()
    assert 'is of another optimizer, one without' in done.last_line and named in done.last_line
    assert '--no-resume-opt' in done.last_line


def test_no_resume_opt_starts_with_a_fresh_optimizer(run_train, monkeypatch):
    saved = run_train().checkpoint()
    found = {}

    def look(run, epoch, *place):
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

    def look(run, epoch, *place):
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


def test_start_epoch_is_for_the_first_start_of_a_run_that_goes_on_by_itself(run_train, script):
    epochs = script()
    options = '--epochs 4 --start-epoch 1 --resume auto'
    assert run_train(f'{options} --stop-epoch 3').code == 0
    assert epochs == [1, 2]
    assert run_train(options).code == 0
    assert epochs == [1, 2, 3]


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
    shown = done.log('Test (EMA): loss: ')
    assert len(shown) == len(done.log('Test: loss: ')) == 2
    for row, line, other in zip(done.summary(), shown, done.log('Test: loss: ')):
        expected = f"loss: {float(row['eval_loss']):.4f} "
        assert expected in line and expected not in other


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


# Within an epoch

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
    eps_of, calls = Ascent.eps, []

    def poisoned(self, variant, g, *rest):
        calls.append(1)
        if len(calls) == 1:
            g[0].view(-1)[0] = float('inf')
        return eps_of(self, variant, g, *rest)

    monkeypatch.setattr(Ascent, 'eps', poisoned)
    whole = run_train(f'{SAM_ON} --recovery-interval 2 --experiment whole')
    resumed = run_train(f'{SAM_ON} --resume out/whole/recovery-0-1.pth.tar --experiment resumed')
    assert resumed.summary('resumed') == whole.summary('whole')
    (row,) = resumed.summary('resumed')
    assert row['train_sam_nonfinite'] == '1' and 'non-finite: 1 ' in resumed.log('Train: ')[-1]
    assert finite(row) and float(row['train_sam_grad_norm']) > 0


@pytest.mark.parametrize('start', ['last', 'recovery-2-2'])
def test_loss_scale_goes_on_from_a_checkpoint(run_train, script, monkeypatch, start):
    """The scaler of float16, which train.py itself makes on cuda only."""
    scales = []

    class Scaler(factory.LossScaler):
        def update(self, new_scale=None):
            super().update(new_scale)
            scales.append((self.get_scale(), self._get_growth_tracker()))

    def precision(args, device):
        autocast = functools.partial(torch.autocast, device_type='cpu', dtype=torch.float16)
        return None, autocast, Scaler('cpu', init_scale=2.0 ** 11, growth_interval=3)

    monkeypatch.setattr(factory, 'precision', precision)
    options = f'{SAM_ON} --epochs 4 --clip-grad 1 --drop 0.1'
    whole = run_train(f'{options} --recovery-interval 3 --experiment whole')
    expected = scales[:]
    scales.clear()
    if start == 'last':
        script(stop=2)
        run_train(options)
        script()
    folder = 'run' if start == 'last' else 'whole'
    done = run_train(f'{options} --resume out/{folder}/{start}.pth.tar')
    assert (whole.code, done.code) == (0, 0)
    assert len({scale for scale, _ in expected}) > 3 and expected[12][1] != 0  # it grows, and counts up to that
    assert scales == (expected if start == 'last' else expected[13:])
    assert done.checkpoint()['amp_scaler'] == whole.checkpoint('whole')['amp_scaler']
    assert differences(done.checkpoint()['state_dict'], whole.checkpoint('whole')['state_dict']) == []


def test_output_that_cannot_be_written_is_one_line(run_train, tmp_path):
    (tmp_path / 'file').write_text('')
    done = run_train('--output file')
    assert done.code == 2 and '--output file' in done.last_line and 'Traceback' not in done.err
    assert (tmp_path / 'file').read_text() == ''
