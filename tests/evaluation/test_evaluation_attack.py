"""Attacks through validate.py: what is attacked, in which label space, and what is reported of it."""
import json
from collections import Counter

import pytest
import timm
import torch
from PIL import Image
from support.suites import R_IDS
from support.validating import constant_checkpoint, labelled, model_of, preprocessed, result, run_validate

import timm_sam.evaluation.attack.robustness
from timm_sam.evaluation.sets.label_spaces import imagenet_subset

ATTACK = '--attack l2=0.02,0.2 linf=0.25/255 --attack-steps 3 --attack-targets 2 --results-file r.json --overwrite'


@pytest.fixture
def run(fitted, tmp_path):
    """Attacks the fitted model on its validation images; gives measure -> entry, and the finished run."""
    def attack(command='', sets='validation={data}/validation'):
        done = run_validate(tmp_path, f'--eval {sets.format(data=fitted.data)} {ATTACK} {command}', fitted.base)
        assert done.code == 0, done.err[-3000:]
        rows = json.loads((tmp_path / 'r.json').read_text())['results']
        return {row['measure']: row for row in rows if row['group'] == 'adversarial'}, done
    return attack


@pytest.fixture
def attacks(monkeypatch):
    """The arguments and the outcome of every attacked batch."""
    seen = []
    attack = timm_sam.evaluation.attack.robustness.attack

    def watched(model, images, labels, indices, *args, **kwargs):
        found = attack(model, images, labels, indices, *args, **kwargs)
        seen.append((model, images.clone(), labels.tolist(), list(indices), args, found))
        return found
    monkeypatch.setattr(timm_sam.evaluation.attack.robustness, 'attack', watched)
    return seen


RADII = ['l2 0.02', 'l2 0.2', 'linf 0.25/255']


def test_robust_accuracy_is_at_most_the_clean_one_and_falls_with_the_radius(run):
    found, done = run()
    assert list(found) == ['clean', *RADII]
    values = {name: row['values'][0] for name, row in found.items()}
    assert values['clean'] == pytest.approx(result(done)[0]['validation_top1'], abs=1e-4)
    assert values['clean'] > values['l2 0.02'] > values['l2 0.2'] and values['clean'] > values['linf 0.25/255']
    assert {row['images'] for row in found.values()} == {24} and all(row['flags'] == [] for row in found.values())


def test_numbers_are_the_shares_of_the_images_that_the_attack_left(run, attacks):
    found, _ = run()
    for radius, (norm, value) in zip(RADII, [('l2', 0.02), ('l2', 0.2), ('linf', 0.25 / 255)]):
        mine = [outcome for *_, args, outcome in attacks if args == (norm, value)]
        assert sum(len(outcome.robust) for outcome in mine) == 24
        assert found[radius]['values'] == [100 * sum(int(o.robust.sum()) for o in mine) / 24]
        assert found['clean']['values'] == [100 * sum(int(o.clean.sum()) for o in mine) / 24]


def test_model_is_attacked_in_eval_mode_on_images_that_it_normalizes_itself(run, attacks, fitted):
    run('--mean 0.4 --std 0.5 0.6 0.7')
    paths, labels = labelled(fitted.data / 'validation')
    options = {'mean': [0.4], 'std': [0.5, 0.6, 0.7]}
    expected = preprocessed(paths, fitted.model, **options)
    raw = preprocessed(paths, fitted.model, mean=[0.0], std=[1.0])
    model, *_ = attacks[0]
    assert not any(module.training for module in model.modules())
    for _, images, targets, indices, _, _ in attacks:
        assert images.min() >= 0 and images.max() <= 1
        torch.testing.assert_close(images, raw[indices], rtol=0, atol=1e-6)
        assert targets == labels[indices].tolist()
        with torch.no_grad():
            torch.testing.assert_close(model(images), fitted.model(expected[indices]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('loader', ['', '--no-prefetcher'])
def test_grey_images_are_normalized_by_the_attack_as_by_the_loader(tmp_path, fitted, attacks, loader):
    """The mean of the channels' numbers, not the first channel's."""
    model = timm.create_model('test_resnet', num_classes=6, in_chans=1)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'grey.pth')
    overlay = "pretrained_cfg_overlay={'mean':(0.1,0.4,0.7),'std':(0.2,0.2,0.5)}"
    command = (f'--model test_resnet --num-classes 6 --in-chans 1 --model-kwargs "{overlay}" --checkpoint grey.pth '
               f'--eval validation={fitted.data}/validation {ATTACK} {loader}')
    (line,) = result(run_validate(tmp_path, command))
    assert line['validation_clean'] == line['validation_top1']
    normalized, images, *_ = attacks[0]
    torch.testing.assert_close(normalized.mean.flatten(), torch.tensor([0.4]))
    torch.testing.assert_close(normalized.std.flatten(), torch.tensor([0.3]))
    preprocessing = json.loads((tmp_path / 'r.json').read_text())['protocol']['preprocessing']
    assert preprocessing['mean'] == pytest.approx([0.4]) and images.shape[1] == 1


@pytest.mark.parametrize('loader', ['', '--no-prefetcher'])
def test_images_of_more_than_eight_bits_as_they_are_are_not_attacked_cut_to_one(tmp_path, loader):
    model = timm.create_model('test_resnet', num_classes=4, in_chans=1)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'grey.pth')
    for name in 'abcd':
        (tmp_path / 'deep' / name).mkdir(parents=True)
        Image.new('I;16', (32, 32), 40_000).save(tmp_path / 'deep' / name / '0.png')
    model = '--model test_resnet --num-classes 4 --in-chans 1 --checkpoint grey.pth'
    command = f'{model} --eval val=deep {ATTACK} {loader}'
    assert result(run_validate(tmp_path, command))  # 16 bits become 8
    done = run_validate(tmp_path, f'{command} --input-img-mode F')
    assert done.code == 2 and 'leave out --input-img-mode F' in done.last_line
    assert ('--attack: images of val lie in [40000, 40000]' if loader else
            '0.png holds numbers from 40000 to 40000, of which prefetching keeps 8 bits') in done.last_line
    # without an attack they are what they are, where nothing cuts them
    done = run_validate(tmp_path, f'{model} --data-dir deep --split "" {loader} --input-img-mode F')
    assert done.code == (0 if loader else 2), done.err[-2000:]


def test_subset_is_class_balanced_seeded_and_part_of_the_result(run, attacks, fitted, tmp_path):
    def chosen(command):
        attacks.clear()
        found, done = run(command)
        indices = sorted({i for *_, indices, _, _ in attacks for i in indices})
        assert {row['images'] for row in found.values()} == {12}
        (flag,) = {flag for row in found.values() for flag in row['flags']}
        assert f'validation ({flag})' in done.out
        return indices, flag, json.loads((tmp_path / 'r.json').read_text())['protocol']['attack']['subset_sha256']
    first, second, third = (chosen(f'--attack-num-samples 12 --seed {seed}') for seed in (1, 1, 2))
    _, labels = labelled(fitted.data / 'validation')
    for indices, *_ in (first, third):
        assert Counter(labels[indices].tolist()) == dict.fromkeys(range(6), 2)
    assert first == second and first[0] != third[0] and first[2] != third[2]
    assert (first[1], third[1]) == ('12 of 24 images, seed 1', '12 of 24 images, seed 2')


def test_large_sets_are_attacked_in_part_unless_said_otherwise(run, monkeypatch):
    monkeypatch.setattr(timm_sam.evaluation.attack.robustness, 'MOST', 6)
    found, _ = run()
    assert found['clean']['images'] == 6 and found['clean']['flags'] == ['6 of 24 images, seed 42']
    found, _ = run('--attack-num-samples 24')
    assert found['clean']['images'] == 24 and found['clean']['flags'] == []


def test_attacked_set_is_the_first_in_distribution_or_the_one_that_is_named(run, attacks):
    sets = 'blur={data}/train validation={data}/validation'
    found, _ = run(sets=sets)
    assert {row['dataset'] for row in found.values()} == {'validation'}
    found, _ = run('--attack-set blur', sets=sets)
    assert {row['dataset'] for row in found.values()} == {'blur'} and found['clean']['images'] == 60


def test_size_of_batches_changes_hardly_a_number(run, attacks):
    small, _ = run('-b 5')
    assert sorted(i for *_, indices, args, _ in attacks for i in indices if args[0] == 'linf') == list(range(24))
    large, _ = run('-b 24')
    for name in small:  # float noise may turn an image, no more
        assert small[name]['values'] == pytest.approx(large[name]['values'], abs=100 / 24 + 0.01)


def test_several_norms_are_attacked_batch_by_batch_with_time_left(run):
    _, done = run('--log-freq 1')
    lines = [line for line in done.err.splitlines() if line.startswith('Attack: ')]
    assert len(lines) == 15 and lines[0].startswith('Attack: validation [   1/15]  l2 0.02: robust ')
    assert [line.split(']  ')[1].split(':')[0] for line in lines[:4]] == [*RADII, 'l2 0.02']
    assert lines[-1].startswith('Attack: validation [  15/15]  linf 0.25/255: robust ')
    assert lines[-1].endswith('Left: 0s')


def test_constant_model_is_not_robust_silently(tmp_path, fitted):
    """Its gradients are zero, so that nothing was tried but the random starts: that is said."""
    path = constant_checkpoint(tmp_path / 'c.pth', [2, 0, 1], 6)
    done = run_validate(
        tmp_path, f'--eval validation={fitted.data}/validation --attack linf=0.5 --attack-steps 2 '
                  f'--results-file r.json --checkpoint {path}', fitted.base)
    (line,) = result(done)
    # a sixth of the images are of class 2
    assert line['validation_clean'] == line['validation_linf_0.5'] == 16.6667
    rows = {row['measure']: row for row in json.loads((tmp_path / 'r.json').read_text())['results']}
    assert rows['linf 0.5']['flags'] == ['4 images without usable gradients'] and rows['clean']['flags'] == []
    assert 'linf 0.5: 0 images gave logits or gradients that are not finite, 4 have no gradient' in done.err


def test_flags_of_every_checkpoint_are_shown(tmp_path, fitted):
    path = constant_checkpoint(tmp_path / 'c.pth', [2, 0, 1], 6)
    for order in (f'{fitted.checkpoint} {path}', f'{path} {fitted.checkpoint}'):
        done = run_validate(tmp_path, f'--eval validation={fitted.data}/validation --attack linf=0.5 '
                                      f'--attack-steps 2 --checkpoint {order}', fitted.base)
        assert done.code == 0 and 'validation (4 images without usable gradients)' in done.out


@pytest.mark.full
def test_masked_set_is_attacked_in_its_own_label_space(tmp_path, attacks):
    """A prediction outside the label space is no success of the attack, and labels are classes of the set."""
    model, classes = model_of(1000), list(imagenet_subset('r'))
    for i in range(6):
        Image.new('RGB', (32, 32), (40 * i, 90, 30 * i)).save(tmp_path / f'{i}.png')
    paths = sorted(tmp_path.glob('*.png'))
    with torch.no_grad():
        x = preprocessed(paths, model)
        model.fc.bias -= model(x).mean(dim=0)  # what the images have in common decides nothing
        model.fc.bias[[i for i in range(1000) if i not in classes]] += 50
        best = model(x)[:, classes].argmax(dim=1)
    assert len(set(best.tolist())) > 1
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'c.pth')
    # each image lies in the folder of the class of ImageNet-R that the model takes it for
    for path, label in zip(paths, best.tolist()):
        (tmp_path / 'r' / R_IDS[label]).mkdir(parents=True, exist_ok=True)
        path.rename(tmp_path / 'r' / R_IDS[label] / path.name)
    command = ('--checkpoint c.pth --eval imagenet-r=r --allow-partial --attack-set imagenet-r '
               '--attack linf=1e-9 linf=0.1 --attack-steps 3')
    (line,) = result(run_validate(tmp_path, command))
    assert line['imagenet-r_top1'] == line['imagenet-r_clean'] == 100 and line['imagenet-r_top1_1000way'] == 0
    assert line['imagenet-r_linf_1e-9'] == 100 and line['imagenet-r_linf_0.1'] < 100
    model, images, labels, *_ = attacks[0]
    assert model(images).shape[1] == 200 and labels == sorted(best.tolist())[:5]
