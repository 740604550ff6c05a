"""ImageNet-C: its folders, one set of 75 parts, mCE by hand."""
import json
import os
import statistics

import pytest
import torch
from PIL import Image
from support.suites import IDS
from support.validating import constant_checkpoint, result, run_validate

from timm_sam.cli.device import Process
from timm_sam.cli.errors import OptionError
from timm_sam.evaluation.options import build_validate_parser, parse_validate_args
from timm_sam.evaluation.ranks import Ranks
from timm_sam.evaluation.session import Session
from timm_sam.evaluation.sets.corruptions import ALEXNET, mce, parts, rows, summary
from timm_sam.evaluation.sets.folders import find_suites
from timm_sam.evaluation.sets.suites import open_suite
from timm_sam.evaluation.tables import Measure

PARTS = [f'imagenet-c/{corruption}/{severity}' for corruption in ALEXNET for severity in range(1, 6)]


def right_of(corruption, severity):
    """How many of six images are right: fewer where the corruption is stronger, or comes later."""
    return max(0, 6 - severity - list(ALEXNET).index(corruption) % 3)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """ImageNet-C with six images per folder, some of class 0; noise is in a folder of its own, as its archive."""
    top = tmp_path_factory.mktemp('c')
    image = top / 'image.png'
    Image.new('RGB', (24, 24), (200, 30, 30)).save(image)
    for corruption in ALEXNET:
        for severity in range(1, 6):
            around = 'noise' if corruption.endswith('noise') else ''
            folder = top / 'imagenet-c' / around / corruption / str(severity)
            right = right_of(corruption, severity)
            for name, count in ((IDS[0], right), (IDS[1], 6 - right)):
                (folder / name).mkdir(parents=True)
                for i in range(count):
                    os.link(image, folder / name / f'{i}.png')
    return top


def test_published_folders_are_found(tree):
    assert find_suites(str(tree))[0] == {'imagenet-c': str(tree / 'imagenet-c')}
    found = parts(str(tree / 'imagenet-c'), 'x', False)
    assert list(found) == PARTS and found['imagenet-c/fog/2'] == str(tree / 'imagenet-c' / 'fog' / '2')
    assert found['imagenet-c/shot_noise/5'] == str(tree / 'imagenet-c' / 'noise' / 'shot_noise' / '5')


def test_missing_folders_are_named(tmp_path):
    (tmp_path / 'fog' / '1').mkdir(parents=True)
    with pytest.raises(OptionError, match=r'^x: 74 of 75 folders .* gaussian_noise/1, .*add --allow-partial'):
        parts(str(tmp_path), 'x', False)
    assert list(parts(str(tmp_path), 'x', True)) == ['imagenet-c/fog/1']
    with pytest.raises(OptionError, match='75 of 75 .*; complete the set$'):
        parts(str(tmp_path / 'fog'), 'x', True)
    with pytest.raises(OptionError, match='no such folder'):
        parts(str(tmp_path / 'none'), 'x', True)


def test_part_that_is_named_twice_is_one_line(tree, tmp_path):
    """One of the two folders would be evaluated, and nothing would say which."""
    checkpoint = constant_checkpoint(tmp_path / 'a.pth', [0])
    whole, part = f'imagenet-c={tree}/imagenet-c', f'imagenet-c/fog/2={tree}/imagenet-c/fog/1'
    for order in (f'{whole} {part}', f'{part} {whole}'):
        done = run_validate(tmp_path, f'--checkpoint {checkpoint} --allow-partial --eval {order}')
        assert done.code == 2 and f'--eval {part}: --eval {whole} has this part, too' in done.last_line


def test_its_labels_are_imagenets_and_its_images_are_cropped_already(tree):
    folder = str(tree / 'imagenet-c' / 'fog' / '2')
    suite = open_suite('imagenet-c/fog/2', folder, 1000, allow_partial=True)
    assert suite.crop_pct == 1 and suite.kind == 'ood' and suite.space.name == 'imagenet'
    assert {target for _, target in suite.samples} == {0, 1}
    with pytest.raises(OptionError, match='imagenet-c needs a model with 1000 outputs'):
        open_suite('imagenet-c/fog/2', folder, 10)


def test_crop_of_a_run_is_not_that_of_images_that_are_cropped_already(tree, tmp_path):
    (tmp_path / 'last.pth.tar').write_bytes(b'')
    (tmp_path / 'args.yaml').write_text('model: test_resnet\ncrop_pct: 0.9\n')
    for more, crop in (('', 1), ('--crop-pct 0.8', None)):
        args, resolved = parse_validate_args(build_validate_parser(), (
            f'--device cpu --checkpoint {tmp_path}/last.pth.tar --eval-root {tree} --allow-partial {more}').split())
        session = Session(args, resolved, Process(torch.device('cpu')), Ranks())
        assert args.crop_pct == (0.8 if more else 0.9)
        assert {suite.crop_pct for suite in session.suites(1000)} == {crop}


def test_alexnet_itself_has_an_mce_of_a_hundred():
    assert len(ALEXNET) == 15
    assert mce({corruption: 100 - error for corruption, error in ALEXNET.items()}) == pytest.approx(100)
    # the paper's own errors of AlexNet, Table 1, in whole percent
    assert [round(error) for error in ALEXNET.values()] == [
        89, 89, 92, 82, 83, 79, 80, 87, 83, 82, 56, 85, 65, 72, 61]
    half = {corruption: 100 - error * (0.5 if corruption == 'fog' else 1) for corruption, error in ALEXNET.items()}
    assert mce(half) == pytest.approx(100 * (14 + 0.5) / 15)


def measures(values, name='top1', **more):
    return [Measure('OOD', f'imagenet-c/{place}', name, 10, (), [value], [0], **more)
            for place, value in values.items()]


def test_summary_by_hand_and_what_is_not_its_own_stays():
    attacked = Measure('adversarial', 'imagenet-c/fog/1', 'l2 0.5', 10, (), [1.0])
    other = Measure('ID', 'val', 'top1', 10, (), [80.0])
    given = [*measures({'fog/1': 60.0, 'fog/2': 40.0, 'snow/5': 20.0}), other, attacked]
    found = summary(given)
    assert [(m.dataset, m.name, m.values) for m in found] == [
        ('val', 'top1', [80.0]), ('imagenet-c/fog/1', 'l2 0.5', [1.0]),
        ('imagenet-c', 'top1', [35.0]),  # of 50 and 20: no corruption counts more because more of it is there
        ('imagenet-c', 'fog', [50.0]), ('imagenet-c', 'snow', [20.0])]
    assert found[2].flags == ['partial: 3 of 75 folders'] and found[2].images == 30
    assert found[3].details == [{'1': {'top1': 60.0}, '2': {'top1': 40.0}}]
    # strong severities lower a corruption's number: one that lacks some is marked, too
    assert [m.flags for m in found[3:]] == [['partial: 2 of 5 folders'], ['partial: 1 of 5 folders']]
    pairs = [(m.dataset, m.name) for m in given if m.group != 'adversarial']
    assert rows(pairs) == {(m.dataset, m.name) for m in found if m.group != 'adversarial'}
    assert summary([other]) == [other]


@pytest.mark.full
def test_validate_evaluates_it_as_one_set(tree, tmp_path):
    checkpoint = constant_checkpoint(tmp_path / 'a.pth', [0, 1])
    command = (f'--checkpoint {checkpoint} --eval-root {tree} --allow-partial --results-file r '
               f'--save-outputs predictions -b 100')
    result(run_validate(tmp_path, command))
    content = json.loads((tmp_path / 'r.json').read_text())
    found = {row['measure']: row for row in content['results']}
    assert list(found) == ['top1', 'mce', *ALEXNET, 'top5']
    accuracy = {c: statistics.fmean(100 * right_of(c, s) / 6 for s in range(1, 6)) for c in ALEXNET}
    assert {c: found[c]['values'][0] for c in ALEXNET} == pytest.approx(accuracy)
    assert found['top1']['values'] == [pytest.approx(statistics.fmean(accuracy.values()))]
    by_hand = sum((100 - accuracy[c]) / ALEXNET[c] for c in ALEXNET) / 15 * 100
    assert found['mce']['values'] == [pytest.approx(by_hand)] and found['mce']['group'] == 'OOD'
    assert found['top5']['values'] == [100.0] and found['top1']['images'] == 75 * 6
    assert found['fog']['details'][0]['2']['outputs'].endswith('-imagenet-c%2Ffog%2F2.npz')
    assert all(entry['crop_pct'] == 1 for entry in content['protocol']['datasets'])
    before = (tmp_path / 'r.json').read_bytes()
    result(run_validate(tmp_path, f'{command} --skip-existing'))
    assert (tmp_path / 'r.json').read_bytes() == before
