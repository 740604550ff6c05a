"""python -m timm_sam.analyze norms: kinds of parameters, distances, shares, pooled labels, files."""
import csv
import json
import random
import shlex
import shutil

import numpy as np
import pytest
import timm
import torch
from support.running import in_process
from torch import nn

from timm_sam.analyze import __main__ as analyze
from timm_sam.analyze.norms import KINDS, Tensors, distance, edges, kinds, pooled, shares, summaries, summary

GENERATOR = np.random.default_rng(0)


def sizes(model):
    found = dict.fromkeys(KINDS, 0)
    shapes = dict(model.named_parameters())
    for name, kind in kinds(model).items():
        found[kind] += shapes[name].numel()
    return found


@pytest.mark.parametrize('name, each', [('resnet50', 26_560), ('vit_small_patch32_224', 9_600)])
def test_kinds_of_two_networks(name, each):
    with torch.device('meta'):
        model = timm.create_model(name)
    found = sizes(model)
    assert found['norm weight'] == found['norm bias'] == each
    assert sum(found.values()) == sum(p.numel() for p in model.parameters())
    if name == 'resnet50':  # a normalization layer whose name does not say so
        assert kinds(model)['layer1.0.downsample.1.weight'] == 'norm weight'


def test_kinds_are_told_by_the_owner():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False), nn.LayerNorm(3, bias=False))
    net.norm = nn.Linear(3, 4)
    assert sizes(net) == {'norm weight': 3, 'norm bias': 0, 'other weight': 6 + 12, 'other': 3 + 4}


def test_distance_of_shifted_samples_is_the_shift():
    x = GENERATOR.normal(size=101)
    assert distance(x, GENERATOR.permutation(x) + 0.7) == pytest.approx(0.7)
    assert distance(x, x) == 0
    # of samples that differ in size: the mean of |quantile differences|
    assert distance(np.repeat(x, 3), x) == pytest.approx(0, abs=0.02)
    assert distance(np.array([2.0]), np.array([1.0, 5.0])) == pytest.approx(2.0)


def test_numbers_of_a_sample():
    found = summary(np.array([-2.0, 0.0, 1.0, 5.0]))
    assert found == dict(count=4, mean=1.0, std=pytest.approx(np.std([-2, 0, 1, 5])), mean_abs=2.0, max_abs=5.0,
                         zeros=1, negative=0.25, q05=pytest.approx(-1.7), q25=-0.5, q50=0.5, q75=2.0,
                         q95=pytest.approx(4.4))


def tensors(label, count):
    return Tensors(label, label, [(f'{i}', kind, GENERATOR.normal(size=count)) for i, kind in enumerate(KINDS[:2])])


def test_labels_are_pooled_and_bins_are_shares_of_all_of_a_label():
    found = [tensors('a', 10), tensors('b', 30), tensors('a', 20)]
    samples = pooled(found, 'norm bias')
    assert list(samples) == ['a', 'b']
    assert samples['a'].tolist() == [*found[0].values[1][2], *found[2].values[1][2]]
    bins = edges(samples)
    assert len(bins) == 101 and bins[0] == min(map(np.min, samples.values()))
    for heights in shares(samples, bins).values():
        assert heights.sum() == pytest.approx(1)
    rows = summaries(found)
    assert [(r['kind'], r['label'], r['checkpoints'], r['count']) for r in rows] == [
        (kind, label, n, count) for kind in KINDS[:2] for label, n, count in (('a', 2, 30), ('b', 1, 30))]
    assert rows[0]['w1'] == 0 and rows[1]['w1'] == distance(*pooled(found, 'norm weight').values())


def run_norms(cwd, command):
    base = 'norms --device cpu --model test_resnet --num-classes 6'
    return in_process(analyze.main, shlex.split(f'{base} {command}'), cwd)


def table(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_files(fitted, tmp_path):
    state = {name: value + 0.5 if name.endswith('bn1.weight') else value
             for name, value in fitted.model.state_dict().items()}
    torch.save({'state_dict': state}, tmp_path / 'other.pth.tar')
    before = torch.get_rng_state(), random.getstate()
    done = run_norms(tmp_path, f'--checkpoint {fitted.checkpoint} other.pth.tar --labels plain moved --out out')
    assert done.code == 0, done.err
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    content = json.loads((tmp_path / 'out/norms.json').read_text())
    rows = {(row['kind'], row['label']): row for row in content['rows']}
    moved = sum(p.numel() for name, p in fitted.model.named_parameters() if name.endswith('bn1.weight'))
    plain, other = rows['norm weight', 'plain'], rows['norm weight', 'moved']
    assert other['mean'] - plain['mean'] == pytest.approx(0.5 * moved / plain['count'])
    assert other['w1'] == pytest.approx(0.5 * moved / plain['count']) and plain['w1'] == 0
    assert rows['norm bias', 'moved']['w1'] == rows['other weight', 'moved']['w1'] == 0
    assert (tmp_path / 'out/norms.md').read_text().strip() == done.out.strip()
    assert len(table(tmp_path / 'out/norms-tensors.csv')) == 2 * len(list(fitted.model.parameters()))
    assert len(table(tmp_path / 'out/norms.csv')) == len(rows)
    for name in ('norms-a.png', 'norms-b.png'):
        assert (tmp_path / 'out' / name).read_bytes().startswith(b'\x89PNG')
    again = run_norms(tmp_path, f'--checkpoint {fitted.checkpoint} --out out')
    assert again.code == 2 and 'norms.md exists' in again.err.splitlines()[-1]


@pytest.mark.parametrize('more, words', [
    ('--skip-existing', '--skip-existing has no effect on norms'),
    ('--steps 3', 'unrecognized arguments: --steps'),
    ('--checkpoint copies --labels a b', '--labels: 2 names for 1 different checkpoints'),
])
def test_mistakes_are_one_line(fitted, tmp_path, more, words):
    (tmp_path / 'copies').mkdir()
    for name in ('last.pth.tar', 'model_best.pth.tar'):
        shutil.copy(fitted.checkpoint, tmp_path / 'copies' / name)
    done = run_norms(tmp_path, f'--checkpoint {fitted.checkpoint} --out out {more}')
    assert done.code == 2 and words in done.err.splitlines()[-1], done.err
