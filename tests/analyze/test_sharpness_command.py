"""python -m timm_sam.analyze sharpness: files, many checkpoints, going on, mistakes."""
import csv
import json
import random
import shlex
import shutil
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.running import in_process
from support.validating import BASE

import timm_sam.analyze.sharpness_rows
from timm_sam.analyze import __main__ as analyze
from timm_sam.evaluation.sets.images import class_balanced_subset, shuffled

SMALL = BASE.replace(' -b 5', '')
MEASURES = '--measure worst-linf=0.003 step-linf=0.003,0.01 average-l2-raw=0.01 --steps 3 --draws 2'


def base(fitted):
    return f'sharpness {SMALL} --num-classes 6 --data-dir {fitted.data} --m 6 --num-images 24 {MEASURES} --out out'


def run_analyze(cwd, command):
    return in_process(analyze.main, shlex.split(command), cwd)


@pytest.fixture(scope='module')
def seeds(fitted, tmp_path_factory):
    """A second checkpoint, whose weights differ a little."""
    path = tmp_path_factory.mktemp('seeds') / 'second.pth.tar'
    generator = torch.Generator().manual_seed(0)
    state = {name: value * (1 + 0.1 * torch.randn(value.shape, generator=generator)) if value.is_floating_point()
             and 'running' not in name else value for name, value in fitted.model.state_dict().items()}
    torch.save({'state_dict': state}, path)
    return [fitted.checkpoint, str(path)]


@pytest.fixture(scope='module')
def alone(fitted, seeds, tmp_path_factory):
    """What one process does, and the random states around it."""
    folder = tmp_path_factory.mktemp('alone')
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    states = [(torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())]
    done = run_analyze(folder, f'{base(fitted)} --checkpoint {" ".join(seeds)}')
    states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))
    assert done.code == 0, done.err[-3000:]
    content = json.loads((folder / 'out/sharpness.json').read_text())
    return SimpleNamespace(folder=folder, done=done, states=states, content=content)


def test_table_has_a_row_per_measure_and_mean_and_deviation_over_checkpoints(alone):
    rows = alone.content['results']
    assert [row['measure'] for row in rows] == [
        'worst-linf 0.003', 'step-linf 0.003', 'step-linf 0.01', 'average-l2-raw 0.01']
    for row in rows:
        assert row['mean'] == pytest.approx(statistics.fmean(row['values']))
        assert row['std'] == pytest.approx(statistics.stdev(row['values']))
        assert [detail['mean'] for detail in row['details']] == row['values'] and row['images'] == 24
        for detail in row['details']:
            assert len(detail['batches']) == 4
            assert detail['mean'] == pytest.approx(statistics.fmean(detail['batches']))
    worst, step = rows[0]['details'], rows[1]['details']
    assert all(a >= b >= 0 for w, s in zip(worst, step) for a, b in zip(w['batches'], s['batches']))
    assert min(worst[0]['batches']) > 0  # of the second, which was not fitted, one batch has no rise at this radius
    lines = list(csv.reader((alone.folder / 'out/sharpness.csv').read_text().splitlines()))
    assert len(lines) == 5 and float(lines[1][4]) == pytest.approx(rows[0]['values'][0], abs=1e-5)
    assert 'worst-linf 0.003' in alone.done.out and ' ± ' in (alone.folder / 'out/sharpness.md').read_text()
    assert (alone.folder / 'out/sharpness.png').read_bytes().startswith(b'\x89PNG')
    assert 'Left: ' in alone.done.err


def test_protocol_says_what_numbers_depend_on(alone):
    found = alone.content['protocol']['analysis']
    assert found['search'] == 'apgd' and found['m'] == 6 and found['images'] == 24 and found['params'] == 'all'
    assert alone.content['protocol']['datasets'][0]['name'] == 'train'


def test_random_states_are_as_before(alone):
    assert alone.states[0] == alone.states[1]


@pytest.mark.full
def test_interrupted_analysis_goes_on_and_gives_the_same_files(alone, fitted, seeds, tmp_path, monkeypatch):
    shutil.copytree(alone.folder / 'out', tmp_path / 'out')
    journal = tmp_path / 'out/sharpness.journal.0.jsonl'
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 4 * 4
    journal.write_text(''.join(lines[:21]) + lines[21][:30])
    calls, measure = [], timm_sam.analyze.sharpness_rows.batch_sharpness
    monkeypatch.setattr(timm_sam.analyze.sharpness_rows, 'batch_sharpness',
                        lambda *a, **k: calls.append(len(a[2])) or measure(*a, **k))
    done = run_analyze(tmp_path, f'{base(fitted)} --checkpoint {" ".join(seeds)} --skip-existing')
    assert done.code == 0, done.err
    assert calls == [3, 4, 4]
    for kind in ('json', 'csv', 'md'):
        assert (tmp_path / f'out/sharpness.{kind}').read_text() == (alone.folder / f'out/sharpness.{kind}').read_text()


def test_existing_results_are_not_replaced(alone, fitted):
    done = run_analyze(alone.folder, f'{base(fitted)} --checkpoint {fitted.checkpoint}')
    one_line(done, 'sharpness.md exists; add --skip-existing')


@pytest.mark.parametrize('fewer, lost', [
    ('', 'holds {second} (SHA-256 '),
    ('{second} --measure worst-linf=0.003', 'holds step-linf 0.003 of train, ...'),
])
def test_going_on_does_not_replace_a_larger_table(alone, fitted, seeds, fewer, lost):
    before = (alone.folder / 'out/sharpness.json').read_bytes()
    command = f'{base(fitted)} --skip-existing --checkpoint {fitted.checkpoint} {fewer.format(second=seeds[1])}'
    one_line(run_analyze(alone.folder, command), lost.format(second=seeds[1]))
    assert (alone.folder / 'out/sharpness.json').read_bytes() == before


def one_line(done, words):
    assert done.code == 2, done.err[-3000:]
    assert done.out == ''
    line = done.err.strip().splitlines()[-1]
    assert line.startswith('python -m timm_sam.analyze sharpness: error: ') and words in line


@pytest.mark.parametrize('more, words', [
    ('--amp', '--amp is not for analyses'),
    ('--model-dtype bfloat16', '--model-dtype bfloat16: small differences'),
    ('--torchscript', '--torchscript is not for analyses'),
    ('--num-gpu 2', '--num-gpu 2: leave it out'),
    ('--reparam', '--reparam is not for analyses'),
    ('--test-pool', '--test-pool is not for analyses'),
    ('--num-images 20', '--num-images 20 is no multiple of --m 6: use 18'),
    ('--num-images 600', '--num-images 600: train has 60 images'),
    ('--num-images 0', '--num-images'),
    ('-b 7', '--batch-size 7: batches of this analysis are --m images'),
    ('--measure worst-l3=1', "got 'worst-l3=1'"),
    ('--measure worst-l2=1,-1', "radius '-1' of"),
    ('--measure worst-l2-row=1', "got 'worst-l2-row=1'"),
    ('--filter nothing', '--params all --filter nothing: '),
    ('--labels a b', '--labels: 2 names for 1 checkpoints'),
    ('--model test_vit', 'fitted.pth.tar'),
    ('--out missing/there/../../file', '--out'),
])
def test_mistakes_are_one_line(fitted, tmp_path, more, words):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'missing').mkdir()
    (tmp_path / 'missing/there').mkdir()
    one_line(run_analyze(tmp_path, f'{base(fitted)} --checkpoint {fitted.checkpoint} {more}'), words)


def test_infinite_weight_is_one_line(fitted, tmp_path):
    state = {name: value.clone() for name, value in fitted.model.state_dict().items()}
    state['layer1.0.conv1.weight'].view(-1)[3] = float('inf')
    torch.save({'state_dict': state}, tmp_path / 'inf.pth.tar')
    one_line(run_analyze(tmp_path, f'{base(fitted)} --checkpoint inf.pth.tar'),
             'layer1.0.conv1.weight holds NaN or infinite numbers')
    assert not list((tmp_path / 'out').glob('sharpness.[jmc]*'))


def test_class_without_images_is_one_line(fitted, tmp_path):
    shutil.copytree(fitted.data / 'train', tmp_path / 'data/train')
    for path in (tmp_path / 'data/train/grey3').iterdir():
        path.unlink()
    command = base(fitted).replace(str(fitted.data), str(tmp_path / 'data'))
    one_line(run_analyze(tmp_path, f'{command} --checkpoint {fitted.checkpoint}'), 'grey3')


def test_unknown_analysis_is_one_line(tmp_path):
    done = run_analyze(tmp_path, 'flatness')
    assert done.code == 2 and len(done.err.strip().splitlines()) == 1 and 'flatness' in done.err


def test_batches_hold_samples_of_many_classes():
    suite = SimpleNamespace(name='x', samples=[(f'/d/{c}/{i}.png', c) for c in range(40) for i in range(16)])
    chosen = class_balanced_subset(suite, 320, 42)
    order = shuffled(suite, chosen, 42)
    assert sorted(order) == chosen and order != chosen and order == shuffled(suite, chosen[::-1], 42)
    assert order != shuffled(suite, chosen, 43)
    for i in range(0, 320, 32):
        assert len({suite.samples[j][1] for j in order[i:i + 32]}) > 32 / 4
