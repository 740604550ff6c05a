"""validate.py and the analyses on a CUDA device: the numbers of the CPU, the types that are asked for, and memory."""
import csv
import json
import shlex

import pytest
import torch
from support.gpu import DEVICE
from support.running import in_process
from support.validating import result, run_validate

from timm_sam.analyze import __main__ as analyze

pytestmark = pytest.mark.gpu

ATTACKS = 'l2=0.02,0.2 linf=0.25/255'


@pytest.fixture
def validate(fitted, tmp_path):
    return lambda options, device=DEVICE: run_validate(tmp_path, f'{options} --device {device}', fitted.base)


def rows(folder, name):
    return json.loads((folder / name).read_text())['results']


def test_accuracies_calibration_and_attacks_are_those_of_the_cpu(fitted, validate, tmp_path):
    found = {}
    for device in ('cpu', DEVICE):
        done = validate(
            f'--eval validation={fitted.data}/validation train={fitted.data}/train --attack {ATTACKS} --attack-steps 5 '
            f'--attack-targets 2 --attack-num-samples 20 --results-file {device}.json', device)
        assert done.code == 0, done.err[-3000:]
        found[device] = rows(tmp_path, f'{device}.json')
    mine, theirs = found[DEVICE], found['cpu']
    assert len(mine) == len(theirs) > 5
    for row, other in zip(mine, theirs):
        assert (row['group'], row['measure']) == (other['group'], other['measure'])
        one = 100 / 20 + 1e-6 if row['group'] == 'adversarial' else 1e-3  # an image that lies on the border
        assert row['values'] == pytest.approx(other['values'], abs=one, rel=1e-3)


@pytest.mark.parametrize('options', [
    '--amp', '--amp --amp-dtype bfloat16', '--model-dtype bfloat16', '--channels-last', '--torchcompile',
    '--no-prefetcher', '--pin-mem -j 2', '--amp --channels-last --fast-norm', '--torchscript',
    '--use-ema', '--retry -b 7', '--num-gpu 1'])
def test_flags_of_timms_script_run_there(fitted, validate, options):
    torch._dynamo.reset()
    plain = result(validate(f'--data-dir {fitted.data}', 'cpu'))
    found = result(validate(f'--data-dir {fitted.data} {options}'))
    assert found['top1'] == pytest.approx(plain['top1'], abs=5.0)


def test_retry_halves_the_batch_where_memory_does_not_suffice(fitted, validate):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(400e6 / torch.cuda.get_device_properties(0).total_memory)
    command = f'--data-dir {fitted.data} --img-size 1024 -b 24'
    try:
        once, again = validate(command), validate(f'{command} --retry')
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert once.code == 2 and 'Traceback' not in once.err and '--batch-size' in once.last_line
    assert again.code == 0 and 'top1' in again.out


@pytest.mark.parametrize('command', [
    'sharpness --measure step-linf=0.003 step-l2=0.01 --m 6',
    'hessian --probes 2 --iterations 20 --tolerance 0.3', 'norms'])
def test_analyses_give_the_numbers_of_the_cpu(fitted, tmp_path, command):
    name, *options = shlex.split(command)
    found = {}
    for device in ('cpu', DEVICE):
        data = [] if name == 'norms' else ['--data-dir', str(fitted.data), '--num-images', '24']
        done = in_process(analyze.main, [
            name, '--device', device, '--model', 'test_resnet', '--img-size', '32', '-j', '0', '--num-classes', '6',
            '--checkpoint', fitted.checkpoint, '--out', device, *data, *options], tmp_path)
        assert done.code == 0, done.err[-3000:]
        found[device] = (tmp_path / device / f'{name}.csv').read_text().splitlines()
    for mine, theirs in zip(csv.reader(found[DEVICE]), csv.reader(found['cpu']), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            try:
                assert float(a) == pytest.approx(float(b), rel=0.02, abs=1e-4)
            except ValueError:
                assert a == b or DEVICE in a


def test_card_is_made_there(fitted, tmp_path):
    done = in_process(analyze.main, shlex.split(
        f'card --device {DEVICE} --model test_resnet --img-size 32 -j 0 --num-classes 6 --data-dir {fitted.data} '
        f'--checkpoint {fitted.checkpoint} --out out --m 6 --num-images 12 --rank-images 18 --measure worst-linf=0.003 '
        f'--steps 2 --probes 2 --iterations 20 --tolerance 0.3 --rho 0.2'), tmp_path)
    assert done.code == 0, done.err[-3000:]
    assert (tmp_path / 'out' / 'card.json').exists()
