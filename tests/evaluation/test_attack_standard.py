"""validate.py --attack-version standard: the four attacks of AutoAttack by its package."""
import json
import random

import numpy as np
import pytest
import torch
from support.attack_models import linear, pictures, predicted
from support.validating import result, run_validate
from torch import nn

from timm_sam.evaluation.attack.attack import attack
from timm_sam.evaluation.attack.standard import standard

pytestmark = pytest.mark.full


@pytest.fixture
def short(monkeypatch):
    """Few steps: the package's own numbers, 100 and 5000 queries of Square, are for a machine with time."""
    package = pytest.importorskip('pyautoattack')
    set_version = package.AutoAttack._set_version

    def few(self, version='standard'):
        set_version(self, version)
        assert self.attacks_to_run == ['apgd-ce', 'apgd-t', 'fab-t', 'square']
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 10
        self.square.n_queries = 10
    monkeypatch.setattr(package.AutoAttack, '_set_version', few)


@pytest.fixture
def case(short):
    torch.manual_seed(0)
    # Square's smallest square is as large as the images that other tests of attacks use
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 6)).eval(), pictures(6, (3, 8, 8), spread=0.3)
    labels = predicted(model, images)
    labels[0] = (labels[0] + 1) % 6  # a mistake
    return model, images, labels


def margin(model, images, labels, norm):
    """Radius from which a linear model can be broken, by its definition: the distance to the nearest class."""
    weight, logits = model[1].weight, model(images)
    distances = []
    for row, label in zip(logits, labels.tolist()):
        gaps = [(row[label] - row[k]) / torch.linalg.vector_norm(weight[label] - weight[k], 1 if norm == 'linf' else 2)
                for k in range(len(row)) if k != label]
        distances.append(min(gaps).item())
    return torch.tensor(distances)


@pytest.mark.parametrize('norm', ['l2', 'linf'])
def test_linear_model_breaks_where_it_can(case, norm):
    model, images, labels = case
    with torch.no_grad():
        distances = margin(model, images, labels, norm)
    radius = distances[1:].median().item() * 1.05
    found = standard(model, images, labels, norm, radius, seed=0)
    assert found.clean.tolist() == [False] + [True] * 5
    assert found.robust.tolist() == ((distances > radius) & found.clean).tolist()
    assert 0 < found.robust.sum() < 5
    # more attacks break at least as much
    assert not (found.robust & ~attack(model, images, labels, range(6), norm, radius, steps=20).robust).any()


def test_same_seed_gives_the_same_and_random_states_stay(case, capsys):
    model, images, labels = case
    radius = 0.02
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = standard(model, images, labels, 'linf', radius, seed=3)
    assert torch.equal(torch.get_rng_state(), states[0]) and np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2] and capsys.readouterr().out == ''
    torch.manual_seed(99)
    again = standard(model, images, labels, 'linf', radius, seed=3)
    assert torch.equal(first.robust, again.robust) and torch.equal(first.clean, again.clean)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_less_than_four_classes_are_refused(case):
    with pytest.raises(ValueError, match='3 logits'):
        standard(linear(3), pictures(6), case[2] % 3, 'l2', 0.1, seed=0)


def test_validate_reports_it_under_a_name_of_its_own_and_goes_on(fitted, short, tmp_path, monkeypatch):
    command = (f'--eval validation={fitted.data}/validation --attack l2=0.05 --attack-num-samples 7 '
               f'--attack-version standard --results-file r')
    result(run_validate(tmp_path, command, fitted.base))
    content = json.loads((tmp_path / 'r.json').read_text())
    rows = {row['measure']: row['values'][0] for row in content['results'] if row['group'] == 'adversarial'}
    assert list(rows) == ['clean', 'l2 0.05 (standard)'] and rows['l2 0.05 (standard)'] <= rows['clean']
    assert content['protocol']['attack']['attacks'] == ['APGD-CE', 'APGD-T', 'FAB-T', 'Square']
    assert content['protocol']['attack']['package'].startswith('pyautoattack ')
    monkeypatch.setattr('timm_sam.evaluation.attack.robustness.standard', None)  # is not called
    before = (tmp_path / 'r.json').read_bytes()
    result(run_validate(tmp_path, f'{command} --skip-existing', fitted.base))
    assert (tmp_path / 'r.json').read_bytes() == before


@pytest.mark.parametrize('options, words', [
    ('--attack-version standard', '--attack-version has no effect without --attack'),
    ('--attack l2=1 --attack-version standard --attack-steps 3', '--attack-steps is of our own attacks'),
    ('--attack l2=1 --attack-version plus', '--attack-version')])
def test_what_does_not_go_together_is_one_line(fitted, tmp_path, options, words):
    done = run_validate(tmp_path, f'--eval v={fitted.data}/validation {options}', fitted.base)
    assert done.code == 2 and words in done.last_line


def test_without_the_package_it_is_named(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr('timm_sam.evaluation.checks.is_installed', lambda: False)
    done = run_validate(tmp_path, f'--eval v={fitted.data}/validation --attack l2=1 --attack-version standard',
                        fitted.base)
    assert done.code == 2 and 'pip install pyautoattack' in done.last_line
