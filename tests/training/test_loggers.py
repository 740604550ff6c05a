"""Loggers get the rows of `summary.csv`, go on after a restart, and are off, with one line, where one is missing."""
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.states import summary

PACKAGES = {'wandb': 'wandb', 'tensorboard': 'torch.utils.tensorboard', 'trackio': 'trackio'}
ALL = ' '.join(f'--log-{name}' for name in PACKAGES)


class Recorded:
    """Stand-ins for the three packages; `calls` is what was asked of each."""

    def __init__(self, monkeypatch):
        self.calls = {name: [] for name in PACKAGES}
        modules = {name: ModuleType(module) for name, module in PACKAGES.items()}
        for name in ('wandb', 'trackio'):
            for function in ('init', 'log', 'finish'):
                setattr(modules[name], function, self.of(name, function))
        modules['wandb'].Error = type('Error', (Exception,), {})
        modules['tensorboard'].SummaryWriter = self.writer
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, PACKAGES[name], module)
        monkeypatch.setattr(torch.utils, 'tensorboard', modules['tensorboard'], raising=False)

    def of(self, name, function):
        def call(*args, **options):
            if function == 'finish' or name == 'trackio':
                print(f'* {name} speaks')
            self.calls[name].append((function, args, options))
        return call

    def writer(self, **options):
        self.calls['tensorboard'].append(('SummaryWriter', (), options))
        writer = ModuleType('writer')
        for function in ('add_scalar', 'flush', 'close'):
            setattr(writer, function, self.of('tensorboard', function))
        return writer

    def named(self, name, function):
        return [(args, options) for called, args, options in self.calls[name] if called == function]


@pytest.fixture
def recorded(monkeypatch):
    return Recorded(monkeypatch)


def as_written(rows):
    return [{name: str(value) for name, value in row.items()} for row in rows]


def without_epoch(rows):
    return [{name: value for name, value in row.items() if name != 'epoch'} for row in rows]


def test_each_logger_gets_the_rows_of_the_summary_and_goes_on_with_them(run_in, recorded, tmp_path):
    options = f'{ALL} --wandb-project p --wandb-tags a b --trackio-project q --sam-variant sam --sam-rho 0.05'
    first = run_in(tmp_path, f'{options} --epochs 2')
    assert first.code == 0 and first.err.count('trackio speaks') == 4 and 'wandb speaks' in first.err
    assert first.out.startswith('--result')
    begun = {name: list(calls) for name, calls in recorded.calls.items()}
    for calls in recorded.calls.values():
        calls.clear()
    assert run_in(tmp_path, f'{options} --epochs 3 --resume auto').code == 0
    again, recorded.calls = recorded.calls, {name: begun[name] + recorded.calls[name] for name in begun}
    folder = tmp_path / 'out' / 'run'
    rows = summary(folder)
    assert [row['epoch'] for row in rows] == ['0', '1', '2'] and 'train_sam_loss' in rows[0] and 'lr' in rows[0]

    (_, start), (_, gone_on) = recorded.named('wandb', 'init')
    assert {name: start[name] for name in ('project', 'name', 'tags', 'resume', 'id')} == {
        'project': 'p', 'name': 'run', 'tags': ['a', 'b'], 'resume': None, 'id': None}
    assert start['config']['sam_rho'] == 0.05 and gone_on['config']['epochs'] == 3
    assert as_written(row for (row,), _ in recorded.named('wandb', 'log')) == rows

    (_, start), (_, gone_on) = recorded.named('trackio', 'init')
    assert (start['project'], start['name'], start['resume'], gone_on['resume']) == ('q', 'run', 'never', 'allow')
    logged = recorded.named('trackio', 'log')
    assert as_written(row for (row,), _ in logged) == without_epoch(rows)
    assert [step['step'] for _, step in logged] == [0, 1, 2]

    writers = [options for _, options in recorded.named('tensorboard', 'SummaryWriter')]
    assert [(options['log_dir'], options['purge_step']) for options in writers] == [('out/run', 0), ('out/run', 2)]
    scalars = [{}, {}, {}]
    for (name, value, step), _ in recorded.named('tensorboard', 'add_scalar'):
        scalars[step][name] = str(value)
    assert scalars == without_epoch(rows)
    for name, end in (('tensorboard', 'close'), ('trackio', 'finish'), ('wandb', 'finish')):
        assert [begun[name][-1][0], again[name][-1][0]] == [end, end]
    assert recorded.named('wandb', 'finish') == 2 * [((), {'exit_code': 0})]


def test_loggers_are_off_where_nobody_asks_for_them(run_in, recorded, tmp_path):
    assert run_in(tmp_path).code == 0
    assert not any(recorded.calls.values())


def test_logger_that_is_not_installed_is_off_with_one_line(run_in, monkeypatch, tmp_path):
    for module in PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    done = run_in(tmp_path, ALL)
    assert done.code == 0 and len(summary(tmp_path / 'out' / 'run')) == 1
    for name in PACKAGES:
        line, = (line for line in done.err.splitlines() if f'--log-{name}' in line)
        assert f'{name} is not installed, nothing is logged there; pip install {name}' in line


def test_logger_that_cannot_be_imported_is_one_line(run_in, monkeypatch, tmp_path):
    (tmp_path / 'trackio.py').write_text("raise TypeError('Descriptors cannot be created directly')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'trackio', raising=False)
    done = run_in(tmp_path, '--log-trackio')
    assert done.code == 2 and 'Traceback' not in done.err
    assert '--log-trackio: trackio is installed, but cannot be imported (Descriptors cannot' in done.last_line


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_logger_that_fails_in_the_middle_does_not_end_the_run(run_in, recorded, tmp_path, name):
    def broken(*args, **options):
        recorded.calls[name].append(('broken', args, options))
        raise BrokenPipeError('its process is gone')
    sys.modules[name].log = broken
    done = run_in(tmp_path, f'{ALL} --epochs 3')
    assert done.code == 0 and len(summary(tmp_path / 'out' / 'run')) == 3 and done.out.startswith('--result')
    line, = (line for line in done.err.splitlines() if f'--log-{name} has failed' in line)
    assert 'BrokenPipeError: its process is gone' in line and 'from epoch 0 on' in line
    assert len(recorded.named(name, 'broken')) == 1 and recorded.named('tensorboard', 'close')


def test_logger_that_cannot_be_closed_leaves_the_run_as_it_ended(run_in, recorded, tmp_path):
    def broken(**options):
        raise ConnectionError('too late')
    sys.modules['wandb'].finish = broken
    done = run_in(tmp_path, ALL)
    assert done.code == 0 and '--log-wandb has failed (ConnectionError: too late)' in done.err
    assert recorded.named('trackio', 'finish')


def test_slash_behind_the_experiment_is_no_part_of_the_runs_name(run_in, recorded, tmp_path):
    assert run_in(tmp_path, '--log-wandb --log-trackio --experiment run/').code == 0
    assert [recorded.named(name, 'init')[0][1]['name'] for name in ('wandb', 'trackio')] == ['run', 'run']


def test_folder_of_wandbs_own_runs_is_not_the_package(run_in, monkeypatch, tmp_path):
    (tmp_path / 'wandb').mkdir()
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *(p for p in sys.path if not find_wandb(p))])
    done = run_in(tmp_path, '--log-wandb')
    assert done.code == 0 and '--log-wandb: wandb is not installed' in done.err
    monkeypatch.delitem(sys.modules, 'wandb')


def find_wandb(folder):
    return (Path(folder) / 'wandb' / '__init__.py').exists()


@pytest.mark.parametrize('name, refusal', [('trackio', ValueError), ('wandb', OSError), ('wandb', 'Error')])
def test_what_a_logger_refuses_is_one_line(run_in, recorded, tmp_path, name, refusal):
    refusal = getattr(sys.modules[name], refusal) if isinstance(refusal, str) else refusal

    def refuse(**options):
        raise refusal('no account\nfor this')
    sys.modules[name].init = refuse
    done = run_in(tmp_path, f'--log-{name} --{name}-project a/b')
    assert done.code == 2 and f"--log-{name}: project 'a/b' cannot be logged to (no account for this)" in done.last_line
    assert ('--trackio-project' if name == 'trackio' else 'WANDB_MODE=offline') in done.last_line
    again = run_in(tmp_path)
    assert again.code == 0, again.err


def test_wandb_is_told_of_a_run_that_fails(run_in, recorded, tmp_path):
    assert run_in(tmp_path, '--log-wandb --lr 1e30 --epochs 2').code == 1
    assert recorded.named('wandb', 'finish') == [((), {'exit_code': 1})]


@pytest.mark.skipif(find_spec('tensorboard') is None, reason='needs tensorboard: pip install it')
@pytest.mark.filterwarnings('ignore')  # of the package's own
def test_tensorboard_shows_each_epoch_once_also_after_one_that_was_made_again(run_in, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert run_in(tmp_path, '--epochs 3 --log-tensorboard').code == 0
    folder = tmp_path / 'out' / 'run'
    again = run_in(tmp_path, f'--epochs 3 --log-tensorboard --resume {folder}/checkpoint-0.pth.tar --lr 0.01')
    assert again.code == 0, again.err
    seen = EventAccumulator(str(folder))
    seen.Reload()
    rows = summary(folder)
    assert {*seen.Tags()['scalars']} == rows[0].keys() - {'epoch'}
    for name in seen.Tags()['scalars']:
        assert [event.step for event in seen.Scalars(name)] == [0, 1, 2]
        assert [event.value for event in seen.Scalars(name)] == pytest.approx([float(row[name]) for row in rows])
