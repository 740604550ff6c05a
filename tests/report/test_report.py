"""Runs put into the paper's tables: what is averaged, what is not and why."""
import csv
import os
import time
from pathlib import Path

import pytest
import torch
import yaml
from support.running import working_directory

from timm_sam.report import __main__ as command
from timm_sam.report.markdown import MARK
from timm_sam.report.runs import (
    DIVERGED,
    DUPLICATE,
    FINISHED,
    MIXED,
    RUNNING,
    STOPPED,
    UNREADABLE,
    UNSCORED,
    default_args,
    find_runs,
    read_run,
)
from timm_sam.report.tables import build_tables
from timm_sam.runs import timing
from timm_sam.runs.sameness import NOT_COMPARED

EPOCHS = 3
LONG_AGO = time.time() - 7 * 24 * 3600


def write_run(folder, accuracies=(50.0, 60.0, 70.0), epochs=EPOCHS, seconds=None, loss='0.5', old=True, ranks=1,
              **args):
    """A run's folder as train.py writes it: one evaluated epoch per accuracy."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    args = {**default_args(), 'model': 'resnet10t', 'data_dir': 'data/digits', 'epochs': epochs, 'warmup_epochs': 0,
            'lr': 0.1, 'seed': 0, **args}
    if args['sam_variant'] is None:
        args['sam_rho'] = None
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    sam = args['sam_variant'] is not None
    with open(folder / 'summary.csv', 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['epoch', 'train_loss', *(['train_sam_loss'] if sam else []), 'eval_loss', 'eval_top1', 'lr'])
        for epoch, accuracy in enumerate(accuracies):
            last = epoch == len(accuracies) - 1
            writer.writerow([epoch, loss if last else '0.5', *(['0.75'] if sam else []), '1.0', accuracy, 0.1])
    if seconds is not None:
        for epoch in range(len(accuracies)):
            timing.record(str(folder), epoch, seconds, ranks, torch.device('cpu'))
    if old:
        age(folder)
    return folder


def age(folder):
    for path in folder.iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO))


def sam(rho, seed=0, variant='sam', params='all', **args):
    return dict(sam_variant=variant, sam_params=params, sam_rho=rho, seed=seed, **args)


def tables_of(folder, epoch='last'):
    return build_tables([read_run(path) for path in find_runs([str(folder)])], epoch)


def refused(capsys, argv):
    code = command.main(list(map(str, argv)))
    shown = capsys.readouterr()
    assert code == 2 and shown.out == '' and shown.err.count('\n') == 1
    assert shown.err.startswith('python -m timm_sam.report: error: ')
    return shown.err


def rows(path):
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


# One run

def test_run_with_all_its_epochs_is_finished(tmp_path):
    run = read_run(str(write_run(tmp_path / 'a', seconds=2.0)))
    assert (run.status, run.reason, run.epochs, run.complete) == (FINISHED, '', 3, True)
    assert run.accuracy('last') == run.accuracy('best') == 70.0
    assert (run.seconds, run.ranks, run.device) == (6.0, 1, 'cpu')


def test_best_epoch_counts_only_if_asked_for(tmp_path):
    run = read_run(str(write_run(tmp_path / 'a', (50.0, 80.0, 70.0))))
    assert (run.accuracy(), run.accuracy('best')) == (70.0, 80.0)


@pytest.mark.parametrize('options, epochs', [
    (dict(epochs=3), 3),
    (dict(epochs=3, cooldown_epochs=2), 5),
    (dict(epochs=3, warmup_epochs=1), 3),
    (dict(epochs=3, warmup_epochs=2, warmup_prefix=True), 5),
    (dict(epochs=3, warmup_epochs=1, warmup_prefix=True, cooldown_epochs=4), 8),
    (dict(epochs=3, lr_cycle_limit=2), 6),
    (dict(epochs=3, sched_on_updates=True, cooldown_epochs=2), 5),
    (dict(epochs=3, sched='step', cooldown_epochs=2), 3),  # timm's schedules without cycles know no cool-down
    (dict(epochs=3, sched='plateau'), 3),
    (dict(epochs=3, sched='none', lr=None), 3),
])
def test_epochs_in_all_are_those_that_timm_trains(tmp_path, options, epochs):
    write_run(tmp_path / 'short', [50.0] * (epochs - 1), **options)
    write_run(tmp_path / 'whole', [50.0] * epochs, **options)
    short, whole = (read_run(str(tmp_path / name)) for name in ('short', 'whole'))
    assert (whole.epochs, whole.status, short.status) == (epochs, FINISHED, STOPPED)


def test_run_evaluated_now_and_then_is_finished_by_its_last_epoch(tmp_path):
    folder = write_run(tmp_path / 'a', epochs=6, val_interval=2)
    for last, status in ((4, STOPPED), (5, FINISHED)):
        (folder / 'summary.csv').write_text(f'epoch,train_loss,eval_loss,eval_top1\n1,1,1,50\n{last},1,1,60\n')
        age(folder)
        assert read_run(str(folder)).status == status


def test_run_of_timms_own_script_is_read(tmp_path):
    folder = write_run(tmp_path / 'a')
    given = yaml.safe_load((folder / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({k: v for k, v in given.items() if not k.startswith('sam_')}))
    run = read_run(str(folder))
    assert run.status == FINISHED and run.args['sam_variant'] is None and run.seconds is None


def test_unfinished_run_is_running_while_it_writes_and_stopped_afterwards(tmp_path):
    write_run(tmp_path / 'new', (50.0,), old=False)
    write_run(tmp_path / 'old', (50.0,))
    write_run(tmp_path / 'none', ())
    running, stopped, none = (read_run(str(tmp_path / name)) for name in ('new', 'old', 'none'))
    assert (running.status, stopped.status, none.status) == (RUNNING, STOPPED, STOPPED)
    assert 'epoch 0 of 0..2' in stopped.reason and 'no epoch' in none.reason
    assert read_run(str(tmp_path / 'old'), running_minutes=1e6).status == RUNNING


def test_run_before_its_first_epoch_has_no_summary(tmp_path):
    folder = write_run(tmp_path / 'a', ())
    (folder / 'summary.csv').unlink()
    assert read_run(str(folder)).status == STOPPED


@pytest.mark.parametrize('loss', ['nan', 'inf'])
def test_run_that_ends_without_a_finite_loss_has_diverged(tmp_path, loss):
    run = read_run(str(write_run(tmp_path / 'a', loss=loss)))
    assert run.status == DIVERGED and f'train_loss is {loss} in epoch 2' in run.reason and run.complete


def test_epochs_without_perturbation_are_no_divergence(tmp_path):
    folder = write_run(tmp_path / 'a', **sam(0.1))
    text = (folder / 'summary.csv').read_text()
    (folder / 'summary.csv').write_text(text.replace('0.75', 'nan'))
    assert read_run(str(folder)).status == FINISHED


def test_run_that_went_on_from_another_or_with_other_options_is_mixed(tmp_path):
    write_run(tmp_path / 'late')
    path = tmp_path / 'late' / 'summary.csv'
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(''.join(lines[:1] + lines[2:]))
    run = read_run(str(tmp_path / 'late'))
    assert run.status == MIXED and 'begins with epoch 1' in run.reason
    write_run(tmp_path / 'changed')
    (tmp_path / 'changed' / 'args-before-epoch-2.yaml').write_text('lr: 1')
    run = read_run(str(tmp_path / 'changed'))
    assert run.status == MIXED and 'args-before-epoch-2.yaml' in run.reason


HEAD = 'epoch,train_loss,eval_loss,eval_top1\n0,1,1,50\n'


@pytest.mark.parametrize('summary, status, words', [
    (HEAD + '1,1,1,60\n2,1,1', UNREADABLE, 'torn'),
    (HEAD + '1,1,1,60\n2,1,1,7', UNREADABLE, 'torn'),
    (HEAD + '1,1,1,x\n2,1,1,70\n', UNREADABLE, 'line 3'),
    (HEAD + '\0\0\0\n', UNREADABLE, 'torn'),
    ('a,b\n1,2\n', UNREADABLE, 'columns'),
    (HEAD + '0,1,1,60\n1,1,1,70\n2,1,1,70\n', MIXED, 'epoch 0 comes after 0'),
    (HEAD + '1,1,1,60\n' + HEAD + '2,1,1,70\n', MIXED, 'line 4'),
    (HEAD + '1,1,1,1,60\n2,1,1,1,70\n', MIXED, 'other columns'),
    ('epoch,train_loss\n0,1\n1,1\n2,1\n', UNSCORED, 'validation'),
])
def test_summary_that_cannot_be_trusted_is_not_averaged(tmp_path, summary, status, words):
    folder = write_run(tmp_path / 'a')
    (folder / 'summary.csv').write_text(summary)
    run = read_run(str(folder))
    assert run.status == status and words in run.reason


def test_summary_that_is_no_text_is_unreadable(tmp_path):
    folder = write_run(tmp_path / 'a')
    (folder / 'summary.csv').write_bytes(b'\xff\xfe\x80\n')
    assert read_run(str(folder)).status == UNREADABLE


@pytest.mark.parametrize('text', ['', 'model: [', 'just text', 'epochs: 3\n', 'model: a\nepochs: x\n',
                                  'model: a\nsam_variant: new\n', 'model: a\nsam_variant: sam\n'])
def test_options_that_cannot_be_read_are_named(tmp_path, text):
    folder = write_run(tmp_path / 'a')
    (folder / 'args.yaml').write_text(text)
    run = read_run(str(folder))
    assert run.status == UNREADABLE and 'args.yaml' in run.reason


def test_missing_options_are_named(tmp_path):
    folder = write_run(tmp_path / 'a')
    (folder / 'args.yaml').unlink()
    run = read_run(str(folder))
    assert (run.status, run.reason) == (UNREADABLE, 'no args.yaml')


def test_run_of_changing_numbers_of_processes_is_mixed(tmp_path):
    folder = write_run(tmp_path / 'a', (50.0, 60.0), seconds=1.0)
    timing.record(str(folder), 2, 1.0, 2, torch.device('cpu'))
    (folder / 'summary.csv').write_text(HEAD + '1,1,1,60\n2,1,1,70\n')
    run = read_run(str(folder))
    assert run.status == MIXED and '1 and then by 2' in run.reason


# Times

def test_times_of_epochs_already_run_are_kept_and_repeated_ones_replaced(tmp_path):
    for epoch, seconds in ((0, 1.0), (1, 2.0), (2, 3.0), (1, 5.0)):  # killed in epoch 3, went on from epoch 1
        timing.record(str(tmp_path), epoch, seconds, 1, torch.device('cpu'))
    assert [(row['epoch'], row['seconds']) for row in rows(tmp_path / 'timing.csv')] == [('0', '1.000'), ('1', '5.000')]


def test_epoch_that_was_timed_in_part_counts_as_the_mean_of_the_others(tmp_path):
    folder = write_run(tmp_path / 'a')
    for epoch, seconds in ((0, 1.0), (1, float('nan')), (2, 2.0)):
        timing.record(str(folder), epoch, seconds, 1, torch.device('cpu'))
    assert read_run(str(folder)).seconds == pytest.approx(4.5)


# Tables

@pytest.fixture
def grid(tmp_path):
    """Plain, and SAM in two selections with two radii; 3 seeds each, but for one radius with one."""
    def seeds(name, accuracies, seconds, **args):
        for seed, accuracy in enumerate(accuracies):
            write_run(tmp_path / 'runs' / f'{name}-{seed}', (1.0, 2.0, accuracy), seconds=seconds,
                      **{**args, 'seed': seed})

    seeds('plain', (90.0, 91.0, 92.0), 1.0)
    seeds('all-.1', (93.0, 94.0, 95.0), 2.0, **sam(0.1))
    seeds('all-.2', (91.0, 94.0, 97.0), 2.0, **sam(0.2))
    seeds('all-.4', (99.0,), 2.0, **sam(0.4))
    seeds('on-1', (95.0, 95.5, 96.0), 1.5, **sam(1, params='onlynorm'))
    seeds('on-2', (97.0, 97.0, 98.0), 1.5, **sam(2, params='onlynorm'))
    return tmp_path


def test_mean_std_and_number_of_seeds(grid):
    (table,), _ = tables_of(grid / 'runs')
    cells = {(c.row.name, c.selection, c.rho): (c.mean, c.std, len(c.runs)) for c in table.cells}
    assert cells == {
        ('plain', None, None): (91.0, 1.0, 3),
        ('sam', 'all', 0.1): (94.0, 1.0, 3),
        ('sam', 'all', 0.2): (94.0, 3.0, 3),
        ('sam', 'all', 0.4): (99.0, None, 1),
        ('sam', 'onlynorm', 1.0): (95.5, 0.5, 3),
        ('sam', 'onlynorm', 2.0): (pytest.approx(97 + 1 / 3), pytest.approx(3 ** -0.5), 3),
    }
    assert table.title == 'resnet10t on digits' and table.optimizer == 'sgd'


def test_radius_of_highest_mean_is_chosen_among_those_with_most_seeds(grid):
    (table,), _ = tables_of(grid / 'runs')
    chosen = {(c.row.name, c.selection): (c.rho, c.at_edge) for c in table.cells if c.chosen}
    # 0.4 has one seed only; the first of two equal means
    assert chosen == {('plain', None): (None, False), ('sam', 'all'): (0.1, True), ('sam', 'onlynorm'): (2.0, True)}


def test_run_time_is_relative_to_plain(grid):
    (table,), _ = tables_of(grid / 'runs')
    assert [c.relative_time for c in table.cells] == [1.0, 2.0, 2.0, 2.0, 1.5, 1.5]


def test_radius_with_a_diverged_run_is_shown_but_not_chosen(grid, capsys):
    write_run(grid / 'runs' / 'on-2-3', (1.0, 2.0, 10.0), loss='nan', seconds=1.5, **sam(2, 3, params='onlynorm'))
    (table,), runs = tables_of(grid / 'runs')
    cell = next(c for c in table.cells if c.rho == 2.0)
    assert (len(cell.runs), len(cell.diverged), cell.chosen) == (3, 1, False)
    assert next(c for c in table.cells if c.rho == 1.0).chosen
    assert command.main([str(grid / 'runs'), '--out', str(grid / 'out'), '--no-plots']) == 0
    out = capsys.readouterr().out
    assert '| sam | onlynorm | 2 | 97.33 ± 0.58, 1 diverged | 3 | 1.50 |' in out
    assert '95.50 ± 0.50**</u> (3, ρ 1†; 1 diverged at other ρ)' in out
    assert 'on-2-3` | diverged |' in out


def test_cell_of_diverged_runs_only_says_so(tmp_path, capsys):
    write_run(tmp_path / 'runs' / 'plain')
    write_run(tmp_path / 'runs' / 'sam', loss='nan', **sam(5))
    assert command.main([str(tmp_path / 'runs'), '--out', str(tmp_path / 'out'), '--no-plots']) == 0
    out = capsys.readouterr().out
    assert '| sam | diverged |' in out and '| sam | all | 5 | 1 diverged | 0 |' in out


def test_same_seed_twice_counts_once(tmp_path):
    for name, accuracy in (('a', 90.0), ('b', 90.0), ('c', 80.0)):
        write_run(tmp_path / name, (1.0, 2.0, accuracy))
    (table,), runs = tables_of(tmp_path)
    assert [run.status for run in runs] == [FINISHED, DUPLICATE, DUPLICATE]
    assert 'same result' in runs[1].reason and 'another result' in runs[2].reason
    assert (table.plain.mean, table.plain.std) == (90.0, None)


@pytest.mark.parametrize('name, value', [
    ('output', 'elsewhere'), ('experiment', 'x'), ('log_interval', 7), ('workers', 9), ('device', 'cuda:1'),
    ('data_dir', '/other/place/digits/'), ('checkpoint_hist', 2), ('wandb_tags', ['a'])])
def test_runs_that_differ_in_where_and_what_is_logged_are_one_cell(tmp_path, name, value):
    write_run(tmp_path / 'a', seed=0)
    write_run(tmp_path / 'b', **{'seed': 1, name: value})
    (table,), _ = tables_of(tmp_path)
    assert len(table.plain.runs) == 2


@pytest.mark.parametrize('name, value, shown', [
    ('lr', 0.2, 'lr 0.2'), ('batch_size', 64, 'batch_size 64'), ('opt', 'adamw', 'opt adamw'),
    ('weight_decay', 0.5, 'weight_decay 0.5'), ('model_kwargs', {'depth': 3}, 'model_kwargs depth=3'),
    ('aa', 'rand-m9', 'aa rand-m9'), ('mixup', 0.1, 'mixup 0.1'), ('ranks', 8, 'ranks 8')])
def test_runs_that_differ_in_anything_else_are_not_mixed_and_the_titles_say_in_what(tmp_path, name, value, shown):
    write_run(tmp_path / 'a', seed=0, seconds=1)
    write_run(tmp_path / 'b', **{'seed': 1, 'seconds': 1, name: value})
    tables, _ = tables_of(tmp_path)
    assert [len(table.plain.runs) for table in tables] == [1, 1]
    assert any(table.title.endswith(f'resnet10t on digits, {shown}') for table in tables)


@pytest.mark.parametrize('name, value, title', [
    ('data_dir', 'data/cifar', 'resnet10t on cifar'), ('dataset', 'torch/cifar10', 'resnet10t on torch/cifar10'),
    ('model', 'resnet18', 'resnet18 on digits')])
def test_other_data_or_model_is_another_table(tmp_path, name, value, title):
    write_run(tmp_path / 'a')
    write_run(tmp_path / 'b', **{name: value})
    tables, _ = tables_of(tmp_path)
    assert {table.title for table in tables} == {'resnet10t on digits', title}


def test_other_options_of_sam_are_rows_of_the_same_table(tmp_path):
    write_run(tmp_path / 'plain')
    write_run(tmp_path / 'whole', **sam(0.1, variant='fisher', params='onlynorm'))
    write_run(tmp_path / 'late', **sam(0.1, variant='fisher', params='onlynorm', sam_filter='layer4', sam_every=2))
    write_run(tmp_path / 'eta', **sam(0.1, 1, variant='fisher', params='onlynorm', sam_eta=1.0))  # its own default
    (table,), _ = tables_of(tmp_path)
    assert [row.name for row in table.rows] == ['plain', 'fisher', 'fisher, every 2, filter layer4']
    assert len(table.of(table.rows[1], 'onlynorm')[0].runs) == 2


def test_rows_stand_in_the_order_of_the_paper(tmp_path):
    for variant in ('layerwise_l2', 'elementwise_linf', 'sam', 'fisher', 'elementwise_l2_orig', 'elementwise_l2'):
        write_run(tmp_path / variant, **sam(0.1, variant=variant))
    write_run(tmp_path / 'z')
    (table,), _ = tables_of(tmp_path)
    assert [row.name for row in table.rows][:5] == [
        'plain', 'sam', 'elementwise_l2', 'elementwise_l2_orig', 'elementwise_linf']


def test_every_option_that_is_not_compared_exists_and_has_a_reason():
    assert set(NOT_COMPARED) - {'config'} <= set(default_args()) and all(NOT_COMPARED.values())
    assert not set(NOT_COMPARED) & {'lr', 'epochs', 'batch_size', 'model', 'data_dir', 'val_interval', 'opt', 'amp'}


# The command

def test_report_of_the_grid(grid, capsys):
    write_run(grid / 'runs' / 'torn').joinpath('summary.csv').write_text('epoch,tr')
    write_run(grid / 'runs' / 'half', (1.0,), **sam(0.1, 7))
    assert command.main([str(grid / 'runs'), '--out', str(grid / 'out'), '--no-plots']) == 0
    shown = capsys.readouterr()
    text = (grid / 'out' / 'report.md').read_text()
    assert text.startswith(MARK) and text.removeprefix(MARK).strip() in shown.out and shown.err == ''
    assert '18 runs: 16 finished, 1 stopped, 1 unreadable.' in text
    assert '| variant | all | onlynorm |' in text
    assert '| plain (sgd) | 91.00 ± 1.00 (3) |  |' in text
    assert '| sam | 94.00 ± 1.00 (3, ρ 0.1†) | <u>**97.33 ± 0.58**</u> (3, ρ 2†) |' in text
    assert '| sam | all | 0.4 | 99.00 | 1 | 2.00 |' in text
    assert '| sam | all | 0.1 | **94.00 ± 1.00** | 3 | 2.00 |' in text
    assert 'torn` | unreadable | summary.csv is torn' in text and 'half` | stopped | evaluated up to epoch 0' in text
    assert sorted(path.name for path in (grid / 'out').iterdir()) == ['report.csv', 'report.md', 'runs.csv']

    line = rows(grid / 'out' / 'report.csv')[1]
    assert [line[k] for k in ('variant', 'selection', 'rho', 'n', 'top1_mean', 'top1_std', 'chosen', 'seeds')] == [
        'sam', 'all', '0.1', '3', '94.0000', '1.0000', '1', '0 1 2']
    assert (line['train_seconds'], line['relative_time']) == ('6.0', '2.000')
    statuses = [run['status'] for run in rows(grid / 'out' / 'runs.csv')]
    assert sorted(set(statuses)) == ['finished', 'stopped', 'unreadable'] and len(statuses) == 18


def test_best_epoch_is_named_in_the_report(tmp_path, capsys):
    write_run(tmp_path / 'runs' / 'a', (50.0, 80.0, 70.0))
    argv = [str(tmp_path / 'runs'), '--out', str(tmp_path / 'out'), '--no-plots', '--epoch', 'best']
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    assert '1 run: 1 finished.' in out and '80.00 (1)' in out and 'best epoch' in out


def test_report_of_unfinished_runs_only_is_a_list(tmp_path, capsys):
    write_run(tmp_path / 'runs' / 'a', (1.0,))
    assert command.main([str(tmp_path / 'runs'), '--out', str(tmp_path / 'out')]) == 0
    assert '| stopped |' in capsys.readouterr().out


def test_runs_are_found_below_folders_once_and_in_order(tmp_path):
    for name in ('b/2', 'b/1', 'a'):
        write_run(tmp_path / name)
    with working_directory(tmp_path):
        assert find_runs(['b', 'a', 'b/1', '.']) == ['b/1', 'b/2', 'a']


def test_report_is_written_again_over_itself_and_old_pictures_go(grid, capsys):
    argv = [str(grid / 'runs'), '--out', str(grid / 'out'), '--no-plots']
    assert command.main(argv) == 0
    (grid / 'out' / 'table7-rho.png').write_bytes(b'of an earlier report')
    (grid / 'out' / 'notes.txt').write_text('mine')
    assert command.main(argv) == 0
    assert sorted(p.name for p in (grid / 'out').iterdir()) == ['notes.txt', 'report.csv', 'report.md', 'runs.csv']


def test_interrupted_report_can_be_written_again(grid, monkeypatch):
    argv = [str(grid / 'runs'), '--out', str(grid / 'out'), '--no-plots']
    with monkeypatch.context() as patch:
        patch.setattr(command.markdown, 'grid_csv', lambda tables: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command.main(argv)
    (grid / 'out' / 'runs.csv').write_text('torn')
    assert command.main(argv) == 0


def test_foreign_file_is_not_written_over(grid, capsys):
    (grid / 'out').mkdir()
    (grid / 'out' / 'report.csv').write_text('mine')
    argv = [grid / 'runs', '--out', grid / 'out', '--no-plots']
    message = refused(capsys, argv)
    assert 'report.csv' in message and '--overwrite' in message
    assert [p.name for p in (grid / 'out').iterdir()] == ['report.csv']
    assert (grid / 'out' / 'report.csv').read_text() == 'mine'
    assert command.main([*map(str, argv), '--overwrite']) == 0
    assert (grid / 'out' / 'report.csv').read_text() != 'mine'


@pytest.mark.parametrize('case', ['missing', 'empty', 'file'])
def test_folder_without_runs_is_refused(tmp_path, capsys, case):
    path = tmp_path / case
    if case == 'empty':
        path.mkdir()
    if case == 'file':
        path.write_text('')
    assert str(path) in refused(capsys, [path, '--out', tmp_path / 'out'])
    assert not (tmp_path / 'out').exists()


def test_out_that_is_a_file_is_refused(tmp_path, capsys):
    write_run(tmp_path / 'runs')
    (tmp_path / 'out').write_text('')
    assert '--out' in refused(capsys, [tmp_path / 'runs', '--out', tmp_path / 'out'])


def test_without_matplotlib_there_are_tables_and_a_note(grid, capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'timm_sam.report.plots', None)
    monkeypatch.delattr('timm_sam.report.plots', raising=False)
    assert command.main([str(grid / 'runs'), '--out', str(grid / 'out')]) == 0
    shown = capsys.readouterr()
    assert 'No pictures' in shown.out and '.png' not in (grid / 'out' / 'report.md').read_text()


# Pictures

@pytest.fixture
def png():
    pytest.importorskip('matplotlib')

    def size(path):
        data = path.read_bytes()
        assert data[:8] == b'\x89PNG\r\n\x1a\n'
        return len(data)
    return size


def test_pictures_are_drawn(grid, capsys, png):
    write_run(grid / 'runs' / 'bad', loss='nan', seconds=1, **sam(0.8))
    write_run(grid / 'runs' / 'collapsed', (1.0, 2.0, 10.0), seconds=1, **sam(1.6))  # below the axis
    write_run(grid / 'runs' / 'zero', seconds=1, **sam(0.0, variant='fisher', params='nonorm', sam_filter='layer4'))
    assert command.main([str(grid / 'runs'), '--out', str(grid / 'out')]) == 0
    text = (grid / 'out' / 'report.md').read_text()
    for kind in ('rho', 'time', 'loss'):
        assert png(grid / 'out' / f'table1-{kind}.png') > 10_000 and f'(table1-{kind}.png)' in text


def test_plain_runs_alone_have_a_loss_and_no_radius(tmp_path, png):
    write_run(tmp_path / 'runs' / 'a')
    assert command.main([str(tmp_path / 'runs'), '--out', str(tmp_path / 'out')]) == 0
    assert sorted(p.name for p in (tmp_path / 'out').glob('*.png')) == ['table1-loss.png']


# With train.py

def test_report_of_real_runs_one_of_them_resumed(run_train, tmp_path):
    run_train('--epochs 2 --experiment plain')
    options = '--epochs 2 --sam-variant sam --sam-rho 0.5 --experiment sam'
    run_train(options)
    first = rows(tmp_path / 'out' / 'sam' / 'timing.csv')[:1]
    done = run_train(f'{options} --resume out/sam/checkpoint-0.pth.tar --recovery-interval 2')
    times = rows(tmp_path / 'out' / 'sam' / 'timing.csv')
    assert done.code == 0 and times[0] == first[0] and [row['epoch'] for row in times] == ['0', '1']
    assert all(float(row['seconds']) > 0 and row['ranks'] == '1' and row['device'] == 'cpu' for row in times)

    assert command.main([str(tmp_path / 'out'), '--out', str(tmp_path / 'report'), '--no-plots']) == 0
    plain, with_sam = rows(tmp_path / 'report' / 'report.csv')
    for line, experiment in ((plain, 'plain'), (with_sam, 'sam')):
        assert float(line['top1_mean']) == pytest.approx(float(done.summary(experiment)[-1]['eval_top1']), abs=1e-3)
    assert float(with_sam['relative_time']) > 0

    # gone on with from the middle of epoch 1: that epoch has no time of its own
    (recovery,) = (tmp_path / 'out' / 'sam').glob('recovery-1-3.pth.tar')
    assert run_train(f'{options} --resume {recovery}').code == 0
    again = rows(tmp_path / 'out' / 'sam' / 'timing.csv')
    assert again[0] == first[0] and again[1]['seconds'] == 'nan' and len(again) == 2
    assert read_run(str(tmp_path / 'out' / 'sam')).seconds == pytest.approx(2 * float(first[0]['seconds']))
