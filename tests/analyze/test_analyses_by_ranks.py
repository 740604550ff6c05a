"""Every analysis with images by one process and by two, with a worker each: the same files, and nothing of a model or
of a random state changed."""
import copy
import csv
import json
import random
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import reference_analysis as reference
import timm
import torch
from support.processes import RANKS, run_in_turn
from support.running import in_process
from support.validating import BASE, labelled, preprocessed

import timm_sam.analyze.hessian
import timm_sam.analyze.line_rows
import timm_sam.analyze.rank_rows
from timm_sam.analyze import __main__ as analyze
from timm_sam.analyze.line import TIMES
from timm_sam.evaluation.session import Session

SMALL = BASE.replace(' -b 5', '')
COMMANDS = {
    'sharpness': '--m 6 --num-images 24 --measure worst-linf=0.003 average-l2-raw=0.01 --steps 3 --draws 2',
    'rank': '-b 7 --variance 0.99 0.9',
    'hessian': '-b 7 --num-images 24 --probes 3 --tolerance 0.2',
    'line': '--m 6 --num-images 24 --variant sam elementwise_linf --rho 0.2 0.01 --params onlynorm all',
    'card': '--m 6 --num-images 12 --rank-images 18 --measure worst-linf=0.003 average-l2=0.1 --steps 2 --draws 2 '
            '--probes 2 --tolerance 0.3 --rho 0.2',
}


def command(name, fitted, second=''):
    return (f'{name} {SMALL} --num-classes 6 --data-dir {fitted.data} --checkpoint {fitted.checkpoint} {second} '
            f'{COMMANDS[name]} --out {name}')


def states():
    return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())


def all_of(model):
    """Whatever of a model an analysis could leave behind."""
    return dict(
        state={name: value.clone() for name, value in model.state_dict().items()},
        modes=[module.training for module in model.modules()],
        hooks=[len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        grads=[(p.requires_grad, p.grad) for p in model.parameters()],
        fused=[getattr(module, 'fused_attn', None) for module in model.modules()])


@pytest.fixture(scope='module')
def second(fitted, tmp_path_factory):
    """Another checkpoint, whose weights differ."""
    generator = torch.Generator().manual_seed(0)
    state = {name: value + 0.2 * torch.randn(value.shape, generator=generator) if name.endswith(('weight', 'bias'))
             else value for name, value in fitted.model.state_dict().items()}
    path = tmp_path_factory.mktemp('second') / 'second.pth.tar'
    torch.save({'state_dict': state}, path)
    return str(path)


@pytest.fixture(scope='module')
def alone(fitted, second, tmp_path_factory):
    """What one process does, and what is as before."""
    folder = tmp_path_factory.mktemp('alone')
    opened, subject_of = [], Session.subject

    def spy(self, checkpoint):
        subject = subject_of(self, checkpoint)
        for p in subject.model.parameters():
            p.grad = torch.ones_like(p)
        opened.append((subject.model, copy.deepcopy(all_of(subject.model))))
        return subject

    random_states, done = [states()], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, 'subject', spy)
        for name in COMMANDS:
            done[name] = in_process(analyze.main, shlex.split(command(name, fitted, second)), folder)
            random_states.append(states())
    for name in COMMANDS:
        assert done[name].code == 0, done[name].err[-3000:]
    content = {name: json.loads((folder / name / f'{name}.json').read_text()) for name in COMMANDS}
    return SimpleNamespace(folder=folder, done=done, opened=opened, states=random_states, content=content)


def test_models_and_random_states_are_as_before(alone):
    assert all(state == alone.states[0] for state in alone.states)
    assert len(alone.opened) == 2 * len(COMMANDS)
    for model, before in alone.opened:
        now = all_of(model)
        assert now['modes'] == before['modes'] and now['hooks'] == before['hooks'] and now['fused'] == before['fused']
        assert now['state'].keys() == before['state'].keys()
        assert all(torch.equal(value, before['state'][name]) for name, value in now['state'].items())
        assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(now['grads'], before['grads']))


@pytest.mark.full
def test_two_processes_and_workers_give_the_files_of_one(alone, fitted, second, tmp_path):
    run_in_turn('support.analyses', {
        name: command(name, fitted, second).replace('-j 0', '-j 1') for name in COMMANDS}, tmp_path)
    for name in COMMANDS:
        logs = [json.loads((tmp_path / f'{name}.{rank}.log').read_text()) for rank in range(RANKS)]
        assert [log[0] for log in logs] == [0, 0] and logs[0][1] == alone.done[name].out and logs[1][1] == ''
        texts = [path for path in (alone.folder / name).iterdir() if path.suffix in ('.json', '.csv', '.md', '.html')]
        assert len(texts) == (3 if name != 'card' else 3 + 2 * 3)
        for path in texts:
            assert (tmp_path / name / path.name).read_text() == path.read_text()


def test_time_left_is_said_and_figures_are_drawn(alone):
    for name in COMMANDS:
        assert 'Left: ' in alone.done[name].err and 'passes' in alone.done[name].err
        assert (alone.folder / name / f'{name}.png').read_bytes().startswith(b'\x89PNG')
        rows = alone.content[name]['results']
        lines = list(csv.reader((alone.folder / name / f'{name}.csv').read_text().splitlines()))
        assert [line[2] for line in lines[1:]] == [row['measure'] for row in rows]
        assert all(row['measure'] in alone.done[name].out for row in rows)


# ---- rank

def test_ranks_are_those_of_the_features(alone, fitted):
    rows = {row['measure']: row for row in alone.content['rank']['results']}
    assert list(rows) == [f'{row} {layer} {share}' for layer in ('layer3', 'pre_logits')
                          for row in ('rank', 'rank_released') for share in (0.99, 0.9)]
    model = timm.create_model('test_resnet', num_classes=6).eval()
    images = preprocessed(labelled(fitted.data / 'train')[0], model)
    for i, checkpoint in enumerate(alone.content['rank']['protocol']['checkpoints']):
        model.load_state_dict(torch.load(checkpoint['path'], weights_only=True)['state_dict'])
        with torch.no_grad():
            last = model.forward_features(images)
            features = {'layer3': model.layer3(model.layer2(model.layer1(model.maxpool(model.act1(model.bn1(
                model.conv1(images))))))).flatten(1), 'pre_logits': model.forward_head(last, pre_logits=True)}
        for layer, phi in features.items():
            for row, centring in (('rank', 'feature'), ('rank_released', 'sample')):
                for share in (0.99, 0.9):
                    found = rows[f'{row} {layer} {share}']
                    assert found['values'][i] == reference.feature_rank(phi, share, centring)
                    assert found['details'][i]['n'] == len(phi) == found['images'] == 60
                    assert found['details'][i]['d'] == phi.shape[1] and found['unit'] == f'd = {phi.shape[1]}'
    assert rows['rank layer3 0.99']['values'] != rows['rank_released layer3 0.99']['values']
    assert 'rank layer3 0.99 (d = 768)' in alone.done['rank'].out
    assert rows['rank layer3 0.99']['values'][0] != rows['rank layer3 0.99']['values'][1]
    assert '60 images, 1 forward passes' in alone.done['rank'].err


def test_interrupted_rank_goes_on_with_the_layers_that_are_missing(alone, fitted, second, tmp_path, monkeypatch):
    shutil.copytree(alone.folder / 'rank', tmp_path / 'rank')
    journal = tmp_path / 'rank/rank.journal.0.jsonl'
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 2
    journal.write_text(lines[0] + lines[2] + lines[3][:20])
    asked, measure = [], timm_sam.analyze.rank_rows.measure_rank
    monkeypatch.setattr(timm_sam.analyze.rank_rows, 'measure_rank',
                        lambda features, dims, *more: asked.append(list(dims)) or measure(features, dims, *more))
    done = in_process(analyze.main, shlex.split(f'{command("rank", fitted, second)} --skip-existing'), tmp_path)
    assert done.code == 0, done.err
    assert asked == [['pre_logits'], ['pre_logits']]
    for kind in ('json', 'csv', 'md'):
        assert (tmp_path / f'rank/rank.{kind}').read_text() == (alone.folder / f'rank/rank.{kind}').read_text()


# ---- hessian

def test_curvature_is_that_of_the_mean_loss(alone, fitted):
    top, trace, error = alone.content['hessian']['results']
    assert (top['measure'], trace['measure']) == ('top eigenvalue', 'trace') and top['images'] == 24
    assert all(value > 0 for value in top['values']) and top['values'][0] != top['values'][1]
    for value, found, detail in zip(trace['values'], error['values'], trace['details']):
        assert value == pytest.approx(np.mean(detail['probes'])) and len(detail['probes']) == 3
        assert found == detail['standard_error'] == pytest.approx(np.std(detail['probes'], ddof=1) / 3 ** 0.5)


def test_interrupted_hessian_goes_on_with_the_probes_that_are_missing(alone, fitted, second, tmp_path, monkeypatch):
    shutil.copytree(alone.folder / 'hessian', tmp_path / 'hessian')
    journal = tmp_path / 'hessian/hessian.journal.0.jsonl'
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * (1 + 3)
    journal.write_text(''.join(lines[:2] + lines[4:7]))
    asked, probe = [], timm_sam.analyze.hessian.probe
    monkeypatch.setattr(timm_sam.analyze.hessian, 'probe', lambda *a: asked.append(a[-1]) or probe(*a))
    done = in_process(analyze.main, shlex.split(f'{command("hessian", fitted, second)} --skip-existing'), tmp_path)
    assert done.code == 0, done.err
    assert asked == [1, 2, 2]
    for kind in ('json', 'csv', 'md'):
        assert (tmp_path / f'hessian/hessian.{kind}').read_text() == (
            alone.folder / f'hessian/hessian.{kind}').read_text()


# ---- line

def test_losses_along_each_direction(alone):
    rows = alone.content['line']['results']
    names = [f'{variant}-{params} rho={rho:g} t={t:g}' for params in ('onlynorm', 'all')
             for variant, rho in (('sam', 0.2), ('elementwise_linf', 0.01)) for t in TIMES]
    assert [row['measure'] for row in rows] == names
    by_name = {row['measure']: row for row in rows}
    at_w = {name: by_name[name]['values'] for name in names if name.endswith(' t=0')}
    assert all(values == pytest.approx(next(iter(at_w.values()))) for values in at_w.values())
    for i, row in enumerate(rows):
        assert row['images'] == 24 and len(row['values']) == 2
        for value, detail in zip(row['values'], row['details']):
            assert value == pytest.approx(np.mean(detail['batches'])) and len(detail['batches']) == 4
        if row['measure'].endswith(' t=0'):  # at t = 1/5 the loss has risen
            assert all(a > b for a, b in zip(rows[i + 1]['values'], row['values']))


def test_interrupted_line_goes_on(alone, fitted, second, tmp_path, monkeypatch):
    shutil.copytree(alone.folder / 'line', tmp_path / 'line')
    journal = tmp_path / 'line/line.journal.0.jsonl'
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 4 * 4
    journal.write_text(''.join(lines[:-6]))
    calls, measure = [], timm_sam.analyze.line_rows.measure_line
    monkeypatch.setattr(timm_sam.analyze.line_rows, 'measure_line',
                        lambda *a: calls.append(len(a[3])) or measure(*a))
    done = in_process(analyze.main, shlex.split(f'{command("line", fitted, second)} --skip-existing'), tmp_path)
    assert done.code == 0, done.err
    assert calls == [2, 4]
    for kind in ('json', 'csv', 'md'):
        assert (tmp_path / f'line/line.{kind}').read_text() == (alone.folder / f'line/line.{kind}').read_text()


@pytest.mark.parametrize('name', COMMANDS)
def test_outputs_that_are_not_finite_are_marked_and_end_with_code_1(fitted, second, tmp_path, name):
    state = torch.load(second, weights_only=True)['state_dict']
    for part in ('weight', 'bias'):
        state[f'layer3.0.bn3.{part}'].fill_(3e38)
    torch.save({'state_dict': state}, tmp_path / 'huge.pth.tar')
    line = command(name, fitted).replace(fitted.checkpoint, f'{fitted.checkpoint} huge.pth.tar')
    done = in_process(analyze.main, shlex.split(f'{line} --labels fine huge'), tmp_path)
    assert done.code == 1 and 'huge.pth.tar' in done.err.splitlines()[-1] and 'give other checkpoints' in done.err
    text = (tmp_path / name / f'{name}.json').read_text()
    assert 'NaN' not in text and 'Infinity' not in text
    for row in json.loads(text)['results']:
        if row['group'] == 'norms':  # what is known of weights needs no outputs
            assert row['n'] == 2 and row['non_finite'] == [0, 0]
            continue
        assert row['values'][0] is not None and row['n'] == 1 and row['mean'] == row['values'][0]
        assert row['non_finite'][0] == 0 < row['non_finite'][1]
    assert (tmp_path / name / f'{name}.png').exists()
