"""One odd run does not take the report down: it is listed with the reason, and the rest is reported as without it."""
import csv
import os
import time

import pytest
import yaml
from support.reports import age, rows, sam, write_run
from support.running import working_directory

from timm_sam.report import __main__ as command
from timm_sam.report import runs as runs_module
from timm_sam.report.runs import STOPPED, UNREADABLE, default_args, read_run

HEAD = 'epoch,train_loss,eval_loss,eval_top1\n'
GOOD = HEAD + '0,1,1,50\n1,1,1,60\n2,1,1,70\n'

# name -> what stands in args.yaml, and a word of the reason
OPTIONS = {
    'date': ('model: a\nseed: 2020-99-99\n', 'args.yaml'),
    'int': ('model: !!int x\n', 'args.yaml'),
    'digits': (f'model: a\nseed: {"9" * 5000}\n', 'args.yaml'),
    'deep': ('model: ' + '[' * 5000 + ']' * 5000, 'args.yaml'),
    'deep enough': ('model: a\nx: ' + '[' * 50 + ']' * 50, 'nested'),
    'endless': ('model: a\nx: &x [*x]\n', 'nested'),
    'laughs': ('model: a\na: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n' + ''.join(
        f'{b}: &{b} [{", ".join([f"*{a}"] * 9)}]\n' for a, b in zip('abcdefgh', 'bcdefghi')), 'more values'),
    'key': ('model: a\n? [1, 2]\n: 3\n', 'args.yaml'),
    'nul': ('model: a\0b\n', 'args.yaml'),
    'tag': ('!!python/object/apply:os.system ["touch pwned"]\n', 'args.yaml'),
    'epochs infinite': ('model: a\nepochs: .inf\n', 'schedule'),
    'epochs nan': ('model: a\nepochs: .nan\n', 'schedule'),
    'epochs text': ('model: a\nepochs: many\n', 'schedule'),
    'epochs list': ('model: a\nepochs: [1]\n', 'schedule'),
    'model': ('model: [a]\n', 'model'),
    'model null': ('model: null\n', 'model'),
    'seed': ('model: a\nseed: x\n', 'seed'),
    'seed null': ('model: a\nseed: null\n', 'seed'),
    'data': ('model: a\ndata_dir: {a: 1}\n', 'data_dir'),
    'dataset': ('model: a\ndataset: [1]\n', 'dataset'),
    'opt': ('model: a\nopt: 2020-01-01\n', 'opt'),
    'interval': ('model: a\nval_interval: x\n', 'val_interval'),
    'holdout': ('model: a\nholdout: x\n', 'holdout'),
    'rho infinite': ('model: a\nsam_variant: sam\nsam_rho: .inf\n', 'sam_rho: inf'),
    'rho negative': ('model: a\nsam_variant: sam\nsam_rho: -1\n', 'sam_rho: -1'),
    'rho text': ('model: a\nsam_variant: sam\nsam_rho: x\n', 'sam_rho'),
    'params': ('model: a\nsam_variant: sam\nsam_rho: 1\nsam_params: [all]\n', 'sam_params'),
}
SUMMARIES = {
    'blank': ('\n\n\n', 'blank'),
    'infinite epoch': (HEAD + '0,1,1,50\n1e999,1,1,60\n', 'epoch inf'),
    'no epoch': (HEAD + 'nan,1,1,50\n', 'epoch nan'),
    'no percentage': (HEAD + '0,1,1,50\n1,1,1,60\n2,1,1,1e308\n', 'no percentage'),
    'long field': ('epoch,train_loss\n0,"' + 'x' * 200_000 + '"\n', 'no table'),
    'open quote': (HEAD + '0,"1\n', 'columns'),
}


def write_odd_runs(root):
    """Folder name -> a word of why it is not averaged."""
    expected = {}
    for name, (text, word) in OPTIONS.items():
        folder = write_run(root / f'options {name}')
        (folder / 'args.yaml').write_text(text)
        age(folder)
        expected[folder.name] = word
    for name, (text, word) in SUMMARIES.items():
        folder = write_run(root / f'summary {name}')
        (folder / 'summary.csv').write_text(text)
        age(folder)
        expected[folder.name] = word
    for name in ('args.yaml', 'summary.csv', 'timing.csv'):
        folder = write_run(root / f'pipe {name}')
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        expected[folder.name] = f'{name} is no regular file'
        folder = write_run(root / f'device {name}')
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to('/dev/zero')
        expected[folder.name] = f'{name} is no regular file'
        folder = write_run(root / f'large {name}')
        with open(folder / name, 'wb') as f:
            f.truncate(1 << 30)  # takes no room
        expected[folder.name] = f'{name} has 1,073,741,824 bytes'
    folder = write_run(root / 'timing text')
    (folder / 'timing.csv').write_text('epoch,seconds,ranks,device\n0,soon,1,cpu\n')
    expected[folder.name] = 'timing.csv cannot be read'
    return expected


def reported(folder, out, capsys, *options):
    began = time.monotonic()
    code = command.main([str(folder), '--out', str(out), *options])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert shown.err == '' and time.monotonic() - began < 60
    return shown.out, (out / 'report.md').read_text()


def test_odd_runs_are_listed_and_the_rest_is_reported(grid, capsys):
    _, before = reported(grid / 'runs', grid / 'before', capsys, '--no-plots')
    tables = before[before.index('## 1.'):]
    grid_before = (grid / 'before' / 'report.csv').read_text()
    expected = write_odd_runs(grid / 'runs')
    _, after = reported(grid / 'runs', grid / 'after', capsys, '--no-plots')
    assert tables.strip() in after and (grid / 'after' / 'report.csv').read_text() == grid_before
    assert '## Not averaged' in after and not (grid / 'pwned').exists()
    listed = {os.path.basename(row['path']): row for row in rows(grid / 'after' / 'runs.csv')}
    assert set(expected) <= set(listed)
    for name, word in expected.items():
        assert listed[name]['status'] in ('unreadable', 'mixed'), listed[name]
        assert word in listed[name]['reason'] and len(listed[name]['reason']) < 300, listed[name]
        assert f'{name}` | {listed[name]["status"]} |' in after


@pytest.mark.parametrize('name', OPTIONS)
def test_reason_names_what_is_wrong(tmp_path, name):
    folder = write_run(tmp_path / 'a')
    (folder / 'args.yaml').write_text(OPTIONS[name][0])
    run = read_run(str(folder))
    assert run.status == UNREADABLE and OPTIONS[name][1] in run.reason and '\n' not in run.reason


def test_option_that_nobody_knows_does_no_harm(tmp_path, capsys):
    """They are only compared."""
    for i, odd in enumerate([{1: 2}, {'a': [None, {'b': 'c'}]}, {'when': 1}]):
        write_run(tmp_path / 'runs' / str(i), seed=i, **{f'odd{k}': v for k, v in odd.items()})
    _, text = reported(tmp_path / 'runs', tmp_path / 'out', capsys, '--no-plots')
    assert '3 runs: 3 finished.' in text


def test_error_that_nobody_thought_of_is_that_runs_alone(grid, capsys, monkeypatch):
    real = runs_module.planned_epochs

    def surprising(args):
        if args.seed == 1:
            raise ZeroDivisionError('float division by zero')
        return real(args)
    monkeypatch.setattr(runs_module, 'planned_epochs', surprising)
    _, text = reported(grid / 'runs', grid / 'out', capsys, '--no-plots')
    assert '16 runs: 11 finished, 5 unreadable.' in text and 'float division by zero' in text


def test_folder_that_holds_a_pipe_only_is_a_run_that_cannot_be_read(tmp_path):
    (tmp_path / 'a').mkdir()
    os.mkfifo(tmp_path / 'a' / 'summary.csv')
    assert read_run(str(tmp_path / 'a')).reason == 'no args.yaml'
    (tmp_path / 'a' / 'args.yaml').write_text(yaml.safe_dump({**default_args(), 'model': 'a', 'epochs': 3}))
    assert read_run(str(tmp_path / 'a')).reason == 'summary.csv is no regular file'
    (tmp_path / 'a' / 'summary.csv').unlink()
    assert read_run(str(tmp_path / 'a'), running_minutes=0).status == STOPPED


# --- names ------------------------------------------------------------------------------------------------------------

ACTING = '=1+1|x\x1b[2J\n# `<b>[a](b)$x^$ \\'


@pytest.mark.full
def test_names_from_folders_and_options_do_nothing(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path / 'runs' / f'{ACTING} {seed}', seconds=1.0, model=f'm{ACTING}', data_dir=f'd/{ACTING}',
                  opt=f'o{ACTING}', seed=seed)
        write_run(tmp_path / 'runs' / f'sam {seed}', seconds=1.0, model=f'm{ACTING}', data_dir=f'd/{ACTING}',
                  opt=f'o{ACTING}', **sam(0.1, seed))
    write_run(tmp_path / 'runs' / f'torn {ACTING}').joinpath('summary.csv').write_text('epoch,tr')
    with working_directory(tmp_path):
        out, text = reported('runs', tmp_path / 'out', capsys)  # pictures too
    assert '5 runs: 4 finished, 1 unreadable.' in text
    tables = [(tmp_path / 'out' / name).read_text() for name in ('runs.csv', 'report.csv')]
    for shown in (out, text, *tables):
        assert '\x1b' not in shown
    assert '<b>' not in text.replace('`` ', '').split('## Not averaged')[0]
    titles = [line for line in text.splitlines() if line.startswith('#')]
    assert len(titles) == 3 and titles[1].startswith('## 1. m=1+1&#124;x')
    for table in ('runs.csv', 'report.csv'):
        for row in rows(tmp_path / 'out' / table):
            assert not any(cell.startswith(('=', '@', '+')) for cell in row.values())
    assert sorted(path.name for path in (tmp_path / 'out').glob('*.png')) == [
        'table1-loss.png', 'table1-rho.png', 'table1-time.png']


def test_names_that_are_no_text_are_written(tmp_path, capsys):
    """A folder's name that is no UTF-8, and half a character in YAML."""
    folder = write_run(tmp_path / 'runs' / os.fsdecode(b'a\xff'))
    text = (folder / 'args.yaml').read_text().replace('model: resnet10t', 'model: "m\\uD800"')
    (folder / 'args.yaml').write_text(text)
    age(folder)
    out, text = reported(tmp_path / 'runs', tmp_path / 'out', capsys, '--no-plots')
    assert r'a\udcff' in (tmp_path / 'out' / 'runs.csv').read_text()
    out.encode()


# --- files ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['report.md', 'runs.csv', 'table1-loss.png'])
def test_report_goes_to_regular_files_only(grid, capsys, name):
    (grid / 'out').mkdir()
    os.mkfifo(grid / 'out' / name)
    code = command.main([str(grid / 'runs'), '--out', str(grid / 'out'), '--overwrite'])
    shown = capsys.readouterr()
    assert code == 2 and shown.err.count('\n') == 1 and f'{name} cannot be written: it is no regular file' in shown.err
    assert [path.name for path in (grid / 'out').iterdir()] == [name] and (grid / 'out' / name).is_fifo()


def test_full_disk_is_one_line(grid, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    code = command.main([str(grid / 'runs'), '--out', str(grid / 'out'), '--no-plots'])
    shown = capsys.readouterr()
    assert code == 2 and shown.err.count('\n') == 1 and 'cannot be written (No space left on device)' in shown.err
    assert list((grid / 'out').iterdir()) == []


def test_picture_that_cannot_be_drawn_is_left_out(grid, capsys, monkeypatch):
    from timm_sam.report import plots

    def broken(kind, table, epoch, path):
        raise FloatingPointError('no axis holds it')
    monkeypatch.setattr(plots, 'draw', broken)
    out, text = reported(grid / 'runs', grid / 'out', capsys)
    assert 'table1-rho.png is not drawn: FloatingPointError: no axis holds it' in out and '.png' not in text
    assert list(csv.reader(text.splitlines()))
