"""What the report reads from the folder of one run: its state and its times."""
import os

import pytest
import torch
import yaml
from support.reports import age, rows, sam, tables_of, write_run

from timm_sam.report import __main__ as command
from timm_sam.report.runs import (
    DIVERGED,
    FINISHED,
    MIXED,
    RUNNING,
    STOPPED,
    UNREADABLE,
    UNSCORED,
    find_runs,
    read_run,
)
from timm_sam.runs import timing


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


def several_classes(folder, column='eval_map', **args):
    """A run of --task multilabel, with this column in the place of top-1."""
    folder = write_run(folder, task='multilabel', num_classes=4, **args)
    summary = folder / 'summary.csv'
    summary.write_text(summary.read_text().replace('eval_top1', column))
    age(folder)
    return folder


@pytest.mark.full
def test_run_with_several_classes_per_image_is_reported_by_its_own_metric(tmp_path, capsys):
    several_classes(tmp_path / 'runs' / 'several')
    several_classes(tmp_path / 'runs' / 'more', **sam(0.1))
    several_classes(tmp_path / 'runs' / 'none', 'eval_sample_f1', **sam(0.2))
    write_run(tmp_path / 'runs' / 'one', (1.0, 2.0, 60.0))
    run = read_run(str(tmp_path / 'runs' / 'several'))
    assert (run.status, run.metric, run.accuracy('best')) == (FINISHED, 'map', 70.0)
    run = read_run(str(tmp_path / 'runs' / 'none'))
    assert run.status == UNSCORED and 'eval_map' in run.reason
    assert command.main([str(tmp_path / 'runs'), '--out', str(tmp_path / 'out')]) == 0
    text = capsys.readouterr().out
    assert 'Validation top-1 accuracy or mAP (where the title says so) in %' in text
    second, first = sorted(text.split('\n## ')[1:3], key=lambda section: 'task classification' in section)
    assert '| top-1 |' in first and '60.00' in first and 'mAP' not in first
    assert second.splitlines()[0].endswith('(mAP)') and '| mAP |' in second and '60.00' not in second
    assert '| sam | all | 0.1 | 70.00 | 1 | unknown |' in second.replace('**', '')
    lines = rows(tmp_path / 'out' / 'report.csv')
    assert sorted(line['metric'] for line in lines) == ['map', 'map', 'top1']


def test_run_of_timms_own_script_is_read(tmp_path):
    folder = write_run(tmp_path / 'a')
    given = yaml.safe_load((folder / 'args.yaml').read_text())
    (folder / 'args.yaml').write_text(yaml.safe_dump({k: v for k, v in given.items() if not k.startswith('sam_')}))
    run = read_run(str(folder))
    assert run.status == FINISHED and run.args['sam_variant'] is None and run.seconds is None


def test_runs_of_timms_own_script_on_other_data_are_not_averaged_together(tmp_path):
    """It leaves a folder that was given without a flag where it was given."""
    for seed, name in enumerate(('cifar10', 'cifar10', 'cifar100')):
        folder = write_run(tmp_path / f'run-{seed}', seed=seed)
        given = yaml.safe_load((folder / 'args.yaml').read_text())
        (folder / 'args.yaml').write_text(yaml.safe_dump({**given, 'data': f'/disk-{seed}/{name}', 'data_dir': None}))
    tables, _ = tables_of(tmp_path)
    assert [(table.data, table.plain.seeds) for table in tables] == [('cifar10', [0, 1]), ('cifar100', [2])]


def test_run_behind_a_link_is_found_once_and_by_its_own_name(tmp_path):
    write_run(tmp_path / 'elsewhere')
    write_run(tmp_path / 'runs' / 'own', seed=1)
    for name, target in (('all', '..'), ('latest', 'own'), ('linked', '../elsewhere'), ('nothing', 'nowhere')):
        (tmp_path / 'runs' / name).symlink_to(target)
    assert find_runs([str(tmp_path / 'runs')]) == [str(tmp_path / 'runs' / name) for name in ('own', 'linked')]


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_run(tmp_path / 'own')
    locked = write_run(tmp_path / 'locked', seed=1)
    list_of, state_of = os.scandir, os.stat

    def refused(path, real, *args, **kwargs):
        if os.path.dirname(os.path.join(path, '')) == str(locked) or os.path.dirname(path) == str(locked):
            raise PermissionError(13, 'Permission denied', str(path))
        return real(path, *args, **kwargs)
    monkeypatch.setattr(os, 'scandir', lambda path='.': refused(path, list_of))
    found = find_runs([str(tmp_path)])
    assert sorted(found) == [str(locked), str(tmp_path / 'own')]
    monkeypatch.setattr(os, 'stat', lambda path, *args, **kwargs: refused(path, state_of, *args, **kwargs))
    run = read_run(str(locked))
    assert run.status == UNREADABLE and 'Permission denied' in run.reason


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
