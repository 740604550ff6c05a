"""The command timm_sam.report: its files, its pictures, its mistakes."""
import io
import sys

import pytest
from support.reports import rows, sam, write_run
from support.running import working_directory

from timm_sam.report import __main__ as command
from timm_sam.report.runs import (
    find_runs,
    read_run,
)


def refused(capsys, argv):
    code = command.main(list(map(str, argv)))
    shown = capsys.readouterr()
    assert code == 2 and shown.out == '' and shown.err.count('\n') == 1
    assert shown.err.startswith('python -m timm_sam.report: error: ')
    return shown.err


def test_report_of_the_grid(grid, capsys):
    write_run(grid / 'runs' / 'torn').joinpath('summary.csv').write_text('epoch,tr')
    write_run(grid / 'runs' / 'half', (1.0,), **sam(0.1, 7))
    assert command.main([str(grid / 'runs'), '--out', str(grid / 'out'), '--no-plots']) == 0
    shown = capsys.readouterr()
    text = (grid / 'out' / 'report.md').read_text()
    assert text.startswith(command.MARK) and text.removeprefix(command.MARK).strip() in shown.out and shown.err == ''
    assert '18 runs: 16 finished, 1 stopped, 1 unreadable.' in text
    assert '| variant | all | onlynorm |' in text
    assert '| plain (sgd) | 91.00 ± 1.00 (3) |  |' in text
    assert '| sam | 94.00 ± 1.00 (3, ρ 0.1†) | <u>**97.33 ± 0.58**</u> (3, ρ 2†) |' in text
    assert '| sam | all | 0.4 | 99.00 | 1 | 2.00 |' in text
    assert '| sam | all | 0.1 | **94.00 ± 1.00** | 3 | 2.00 |' in text
    assert 'torn` | unreadable | summary.csv is torn' in text and 'half` | stopped | evaluated up to epoch 0' in text
    assert sorted(path.name for path in (grid / 'out').iterdir()) == [
        'differences.csv', 'report.csv', 'report.html', 'report.md', 'runs.csv']

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
    (grid / 'out' / 'evaluations.csv').write_text('of an earlier report')
    (grid / 'out' / 'notes.txt').write_text('mine')
    assert command.main(argv) == 0
    assert sorted(p.name for p in (grid / 'out').iterdir()) == [
        'differences.csv', 'notes.txt', 'report.csv', 'report.html', 'report.md', 'runs.csv']


def test_interrupted_report_can_be_written_again(grid, monkeypatch):
    argv = [str(grid / 'runs'), '--out', str(grid / 'out'), '--no-plots']
    with monkeypatch.context() as patch:
        patch.setattr(command.page, 'as_html', lambda document, folder: 1 / 0)
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


def test_stdout_that_nobody_reads_is_one_line(grid, capsys, monkeypatch):
    class Gone(io.StringIO):
        def flush(self):
            raise BrokenPipeError(32, 'Broken pipe')
    monkeypatch.setattr(sys, 'stdout', Gone())
    assert command.main([str(grid / 'runs'), '--out', str(grid / 'out'), '--no-plots']) == 2
    err = capsys.readouterr().err
    assert 'stdout cannot be written (Broken pipe)' in err and err.count('\n') == 1
    assert '# Report' in (grid / 'out' / 'report.md').read_text()


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


@pytest.mark.full
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
