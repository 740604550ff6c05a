"""A checkpoint that has diverged: marked, in no mean, and no success."""
import csv
import json
import statistics

import pytest
import torch
from support.places import ROOT
from support.processes import run as run_command
from support.processes import torchrun
from support.validating import GREYS, constant_checkpoint, run_validate

CLASSES = len(GREYS)
KEY = '--allow-nonfinite'


@pytest.fixture
def checkpoints(fitted, tmp_path):
    """Two that are fine, one whose outputs are NaN, one whose outputs are infinite for one class."""
    fine = torch.load(fitted.checkpoint)['state_dict']
    torch.save({'state_dict': fine}, tmp_path / 'a.pth')
    torch.save({'state_dict': {name: value * 0.9 if name == 'fc.weight' else value for name, value in fine.items()}},
               tmp_path / 'b.pth')
    constant_checkpoint(tmp_path / 'c.pth', [2], CLASSES)
    for name, value in {'nan': torch.nan, 'inf': torch.inf}.items():
        bias = torch.zeros(CLASSES)
        bias[3] = value
        torch.save({'state_dict': {**fine, 'fc.bias': bias}}, tmp_path / f'{name}.pth')
    return tmp_path


BASE = f'--device cpu --model test_resnet --img-size 32 -j 0 -b 5 --num-classes {CLASSES}'


def printed(done):
    return json.loads(done.out.split('--result\n')[1], parse_constant=pytest.fail)  # NaN is no JSON


@pytest.mark.parametrize('name', ['nan', 'inf'])
def test_single_evaluation_marks_it_and_fails(checkpoints, fitted, name):
    command = f'--data-dir {fitted.data} --checkpoint {name}.pth --results-file r.csv'
    done = run_validate(checkpoints, command, BASE)
    assert done.code == 1 and printed(done)['non_finite'] == 24
    assert done.last_line == (f'validate.py: error: NaN or infinite outputs: {name}.pth; give other checkpoints, or '
                              '--allow-nonfinite to have exit code 0')
    assert f'WARNING: {name}.pth: 24 of 24 images have outputs that are NaN or infinite' in done.err
    with open(checkpoints / 'r.csv', newline='') as f:
        assert [row['non_finite'] for row in csv.DictReader(f)] == ['24']
    allowed = run_validate(checkpoints, f'{command} --overwrite {KEY}', BASE)
    assert allowed.code == 0 and printed(allowed)['non_finite'] == 24 and 'error' not in allowed.last_line


def test_finite_outputs_leave_no_mark(checkpoints, fitted):
    done = run_validate(checkpoints, f'--data-dir {fitted.data} --checkpoint a.pth', BASE)
    assert done.code == 0 and 'non_finite' not in printed(done)


def test_bulk_evaluation_marks_the_one_and_writes_all(checkpoints, fitted):
    (checkpoints / 'folder').mkdir()
    for name in ('a', 'nan'):
        (checkpoints / f'{name}.pth').rename(checkpoints / 'folder' / f'{name}.pth')
    done = run_validate(checkpoints, f'--data-dir {fitted.data} --checkpoint folder --results-file r.csv', BASE)
    assert done.code == 1 and 'outputs: folder/nan.pth;' in done.last_line
    with open(checkpoints / 'r.csv', newline='') as f:
        assert {row['checkpoint']: row['non_finite'] for row in csv.DictReader(f)} == {
            'folder/a.pth': '', 'folder/nan.pth': '24'}


def test_suites_leave_it_out_of_the_mean_and_say_so(checkpoints, fitted):
    command = (f'--eval validation={fitted.data}/validation train={fitted.data}/train --results-file r '
               '--checkpoint a.pth nan.pth c.pth')
    done = run_validate(checkpoints, command, BASE)
    assert done.code == 1 and 'nan.pth on validation, nan.pth on train;' in done.last_line
    found = json.loads((checkpoints / 'r.json').read_text())['results']
    row = next(row for row in found if (row['dataset'], row['measure']) == ('validation', 'top1'))
    fine = [row['values'][0], row['values'][2]]
    assert row['non_finite'] == [0, 24, 0] and row['n'] == 2 and fine[0] != fine[1]
    assert row['mean'] == pytest.approx(statistics.fmean(fine))
    assert row['std'] == pytest.approx(statistics.stdev(fine))
    assert row['flags'] == ['24 of 24 outputs not finite']
    with open(checkpoints / 'r.csv', newline='') as f:
        line = next(line for line in csv.reader(f) if line[1:3] == ['validation', 'top1'])
    assert line[4:] == [f'{fine[0]:.4f}', 'nan', f'{fine[1]:.4f}', f'{row["mean"]:.4f}', f'{row["std"]:.4f}',
                        '24 of 24 outputs not finite']
    shown = f'{row["mean"]:.2f} ± {row["std"]:.2f} (n = 2)'
    for text in (done.out, (checkpoints / 'r.md').read_text()):
        lines = [line for line in text.splitlines() if 'validation (24 of 24 outputs not finite)' in line]
        assert len(lines) == 2 and shown in lines[0] and f'{row["values"][1]:.2f} non-finite' in lines[0]
    # what is gone on with from the journal is as bad as it was
    again = run_validate(checkpoints, f'{command} --skip-existing', BASE)
    assert again.code == 1 and again.last_line == done.last_line and not again.log('validation: [')
    assert run_validate(checkpoints, f'{command} --skip-existing {KEY}', BASE).code == 0


def test_json_of_suites_on_stdout_marks_it_too(checkpoints, fitted):
    command = f'--eval validation={fitted.data}/validation "b b={fitted.data}/train" --calibration'
    fine, broken = printed(run_validate(checkpoints, f'{command} --checkpoint a.pth nan.pth', BASE))
    assert not [name for name in fine if 'non_finite' in name] and fine['validation_nll'] > 0
    assert (broken['validation_non_finite'], broken['b_b_non_finite']) == (24, 60)
    assert broken['validation_nll'] is None and broken['validation_top1'] >= 0


def test_one_value_or_none_is_left(checkpoints, fitted):
    command = f'--eval validation={fitted.data}/validation --results-file r.json --overwrite --allow-nonfinite'
    assert run_validate(checkpoints, f'{command} --checkpoint a.pth nan.pth', BASE).code == 0
    row = json.loads((checkpoints / 'r.json').read_text())['results'][0]
    assert (row['n'], row['mean'], row['std']) == (1, row['values'][0], None)
    done = run_validate(checkpoints, f'{command} --checkpoint inf.pth nan.pth', BASE)
    row = json.loads((checkpoints / 'r.json').read_text())['results'][0]
    assert done.code == 0 and (row['n'], row['mean'], row['std']) == (0, None, None) and '– (n = 0)' in done.out


def test_attack_leaves_it_out_too(checkpoints, fitted):
    done = run_validate(
        checkpoints, f'--eval validation={fitted.data}/validation --attack linf=1/255 --attack-steps 2 '
                     f'--attack-targets 1 --results-file r.json --checkpoint a.pth nan.pth b.pth', BASE)
    rows = {row['measure']: row for row in json.loads((checkpoints / 'r.json').read_text())['results']}
    assert done.code == 1 and set(rows) == {'top1', 'top5', 'clean', 'linf 1/255'}
    for row in rows.values():
        assert row['n'] == 2 and row['mean'] == pytest.approx((row['values'][0] + row['values'][2]) / 2)


@pytest.mark.slow
def test_two_processes_write_all_and_one_fails(checkpoints, fitted):
    command = f'{BASE} --data-dir {fitted.data} --checkpoint nan.pth --results-file r.json --results-format json'
    done = run_command(torchrun(ROOT / 'validate.py', *command.split()), checkpoints)
    assert done.code != 0 and json.loads((checkpoints / 'r.json').read_text())['non_finite'] == 24
    assert done.err.count('error: NaN or infinite outputs: nan.pth') == 1
