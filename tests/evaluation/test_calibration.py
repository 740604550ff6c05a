"""Calibration: closed forms, a second and obvious implementation, label spaces, and what validate.py says of it."""
import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from support.validating import labelled, preprocessed, result, run_validate

from timm_sam.evaluation.calibration import (
    BINS,
    MEASURES,
    calibration,
    certainties,
    ece,
    equal_mass,
    equal_width,
)
from timm_sam.evaluation.per_image import Collector, whole
from timm_sam.evaluation.sets.label_spaces import LabelSpace


def images(logits, targets, groups=None):
    space = LabelSpace('space', groups)
    logits, targets = torch.as_tensor(logits, dtype=torch.float32), torch.as_tensor(targets)
    return {name: value.numpy() for name, value in certainties(logits, space.reduce(logits), targets, space).items()}


def random_case(count=200, classes=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, classes, generator=generator),
            torch.randint(classes, (count,), generator=generator))


# By closed forms

@pytest.mark.parametrize('classes', [2, 10])
def test_equal_outputs_have_the_likelihood_of_chance(classes):
    found = calibration(images(torch.zeros(classes, classes), range(classes))['space'])
    assert found['nll'] == pytest.approx(math.log(classes)) and found['brier'] == pytest.approx(1 - 1 / classes)
    # every confidence is 1/classes, and so is the accuracy: the best of equal outputs is the same for all
    assert found['ece_width'] == pytest.approx(0, abs=1e-9)


def test_two_classes_are_the_logistic_function():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    found = calibration(images(logits, [0, 0, 0])['space'])
    p = [1 / (1 + math.exp(-x)) for x in (2.0, -1.0, 3.0)]  # of the right class
    assert found['nll'] == pytest.approx(-sum(map(math.log, p)) / 3)
    assert found['brier'] == pytest.approx(sum(2 * (1 - x) ** 2 for x in p) / 3)
    # all three confidences lie in bins of their own
    distances = [1 - p[0], 1 - p[1], 1 - p[2]]  # the second is wrong with confidence 1 - p: the distance is that
    assert found['ece_width'] == pytest.approx(100 * sum(distances) / 3)


@pytest.mark.parametrize('sure, brier, error', [(0, 0, 0), (1, 2, 100)])
def test_certain_model_is_all_right_or_all_wrong(sure, brier, error):
    found = calibration(images([[200.0, 0.0, -50.0]] * 20, [sure] * 20)['space'])
    assert (found['brier'], found['ece_width'], found['ece_mass']) == pytest.approx((brier, error, error))
    assert found['nll'] == pytest.approx(200 * sure)


def test_confidence_that_is_kept_has_no_error():
    """A model that says 3/4 and is right three times in four."""
    logits = torch.tensor([[math.log(3.0), 0.0]] * 400)
    found = calibration(images(logits, [0, 0, 0, 1] * 100)['space'])
    assert found['ece_width'] == pytest.approx(0, abs=1e-6)
    assert found['bins']['width'][11] == pytest.approx([400, 0.75, 0.75])  # 11/15 < 0.75 <= 12/15


# By a second implementation: one image after the other

def by_loops(logits, targets, groups):
    """ECE with bins of equal width and of equal mass, NLL, Brier: of the best output of each group."""
    rows, nll, brier = [], 0.0, 0.0
    for row, target in zip(np.asarray(logits, np.float64), targets):
        row = [max(row[i] for i in group) for group in groups]
        total = sum(math.exp(x - max(row)) for x in row)
        p = [math.exp(x - max(row)) / total for x in row]
        nll -= math.log(p[target]) / len(targets)
        brier += sum((x - (i == target)) ** 2 for i, x in enumerate(p)) / len(targets)
        rows.append((max(p), p.index(max(p)) == target))

    def error(bins):
        return 100 * sum(abs(sum(c for c, _ in b) - sum(r for _, r in b)) for b in bins) / len(rows)
    wide = [[row for row in rows if i / BINS < row[0] <= (i + 1) / BINS] for i in range(BINS)]
    ordered = sorted(rows, key=lambda row: row[0])
    sizes = [len(rows) // BINS + (i < len(rows) % BINS) for i in range(BINS)]
    heavy = [ordered[sum(sizes[:i]):sum(sizes[:i + 1])] for i in range(BINS)]
    return dict(ece_width=error(wide), ece_mass=error(heavy), nll=nll, brier=brier)


@pytest.mark.parametrize('count', [7, 200])
@pytest.mark.parametrize('groups', [None, ((0,), (3,), (5, 6), (1,))])
def test_measures_are_those_of_one_image_after_the_other(count, groups):
    logits, targets = random_case(count)
    by_class = groups or [(i,) for i in range(8)]
    targets = targets % len(by_class)
    found = calibration(images(logits, targets, groups)['space'])
    assert {name: found[name] for name in MEASURES} == pytest.approx(by_loops(logits, targets.tolist(), by_class))


def test_among_all_outputs_a_group_is_one_class_and_others_stay_apart():
    groups = ((0, 2), (3,))
    logits, targets = random_case(50, 5)
    targets = targets % 2
    found = images(logits, targets, groups)['all']
    for row, target, (confidence, right, nll, brier) in zip(logits.double(), targets.tolist(), found):
        p = row.softmax(0)
        own = p[list(groups[target])].sum()
        others = [p[i] for i in range(5) if i not in groups[target]]
        assert confidence == pytest.approx(p.max().item())
        assert right == (int(row.argmax()) in groups[target])
        assert nll == pytest.approx(-math.log(own)) and brier == pytest.approx(
            ((1 - own) ** 2 + sum(x ** 2 for x in others)).item())
    assert (found[:, 1] != images(logits, targets, groups)['space'][:, 1]).any()  # or the two could be mixed up


# Bins

def test_bins_of_equal_width_hold_their_upper_end():
    assert equal_width(np.array([0, 1e-9, 1 / 15, 1 / 15 + 1e-9, 0.5, 1.0])).tolist() == [0, 0, 0, 1, 7, 14]


def test_bins_of_equal_mass_are_equal_and_in_order():
    confidence = np.random.default_rng(0).random(103)
    places = equal_mass(confidence)
    assert np.bincount(places).tolist() == [7] * 13 + [6] * 2
    assert (np.diff(places[np.argsort(confidence)]) >= 0).all()


def test_error_of_bins_by_hand():
    assert ece([(3, 0.5, 0.2), (0, 0.0, 0.0), (1, 0.9, 1.0)]) == pytest.approx((3 * 0.3 + 0.1) / 4)


def test_images_without_finite_values_are_left_out():
    logits, targets = random_case(20)
    broken = torch.cat([logits, torch.full((2, 8), torch.nan)])
    assert calibration(images(broken, [*targets, 0, 0])['space']) == calibration(images(logits, targets)['space'])
    nothing = calibration(images(broken[20:], [0, 0])['space'])
    assert nothing['images'] == 0 and all(math.isnan(nothing[name]) for name in MEASURES)
    with pytest.raises(ValueError, match=r'\(3, 2\)'):
        calibration(np.zeros((3, 2)))


@pytest.mark.parametrize('every', [1, 2, 100])
def test_parts_of_ranks_are_put_in_the_order_of_the_data_set(every):
    batches = list(torch.arange(24.0).view(12, 2).split(3))
    parts = []
    for rank in range(3):
        places = list(range(rank, 4, 3))
        collector = Collector(lambda outputs, reduced, targets: {'x': outputs}, places, every)
        for place in places:
            collector(batches[place], batches[place], batches[place])
        parts.append(collector.by_place())
    assert whole(parts)['x'].tolist() == torch.arange(24.0).view(12, 2).tolist() and whole([{}]) == {}


# validate.py

@pytest.fixture(scope='module')
def evaluated(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp('calibration')
    done = run_validate(folder, f'--eval validation={fitted.data}/validation --results-file r', fitted.base)
    result(done)
    # what was done without calibration is not enough for it
    result(run_validate(folder, f'--eval validation={fitted.data}/validation --results-file r --skip-existing '
                                f'--calibration', fitted.base))
    return folder


def test_validate_says_it_of_a_data_set(fitted, evaluated):
    paths, targets = labelled(fitted.data / 'validation')
    with torch.no_grad():
        logits = fitted.model(preprocessed(paths, fitted.model))
    expected = by_loops(logits, targets.tolist(), [(i,) for i in range(logits.shape[1])])
    rows = {row['measure']: row for row in json.loads((evaluated / 'r.json').read_text())['results']}
    assert list(rows) == ['top1', 'top5', *MEASURES]
    for name, value in expected.items():
        assert rows[name]['values'] == pytest.approx([value], rel=1e-4)
        assert (rows[name]['group'], rows[name]['images'], rows[name]['unit']) == (
            'calibration', len(paths), MEASURES[name][0])
    (bins,) = rows['ece_width']['details']
    assert sum(count for count, _, _ in bins) == len(paths) and len(rows['ece_mass']['details'][0]) == BINS
    assert 'details' not in rows['nll'] and 'nll (nats)' in (evaluated / 'r.md').read_text()
    assert [line['measure'] for line in csv.DictReader(io.StringIO((evaluated / 'r.csv').read_text()))] == list(rows)


def test_what_is_done_is_gone_on_with(fitted, evaluated, monkeypatch):
    before = (evaluated / 'r.json').read_bytes()
    monkeypatch.setattr('timm_sam.evaluation.protocol.score', None)  # is not called
    done = run_validate(evaluated, f'--eval validation={fitted.data}/validation --results-file r --skip-existing '
                                   f'--calibration', fitted.base)
    result(done)
    assert (evaluated / 'r.json').read_bytes() == before
    lost = run_validate(evaluated, f'--eval validation={fitted.data}/validation --results-file r --skip-existing',
                        fitted.base)
    assert lost.code == 2 and 'ece_width of validation' in lost.last_line


def test_calibration_is_for_suites(fitted, tmp_path):
    done = run_validate(tmp_path, f'--calibration --data-dir {fitted.data}', fitted.base)
    assert done.code == 2 and '--calibration has no effect without --eval' in done.last_line
