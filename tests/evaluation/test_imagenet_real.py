"""imagenet-real in suites: any of an image's labels is right, images without one do not count; as timm's own class."""
import json
import math
import os

import pytest
import torch
from PIL import Image
from support.suites import IDS
from support.validating import constant_checkpoint, model_of, preprocessed, result, run_validate
from timm.data import RealLabelsImagenet

from timm_sam.cli.errors import OptionError
from timm_sam.evaluation.calibration import certainties
from timm_sam.evaluation.sets.label_spaces import LabelSpace
from timm_sam.evaluation.sets.real import relabelled
from timm_sam.evaluation.sets.suites import open_suite

pytestmark = pytest.mark.full

IMAGES = 12
# lists of one, several and no labels; 7 is what FIRST says first, 3 is among its first five
LABELS = [[7], [7, 20], [3], [], [20], [5, 7], [999], [3, 999], [], [0], [7], [20, 30, 40]]
FIRST = [7, 1, 3, 2, 4]


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    """Some of ImageNet's validation images under their names, in folders of classes; and labels."""
    top = tmp_path_factory.mktemp('imagenet')
    generator = torch.Generator().manual_seed(0)
    for number in range(1, IMAGES + 1):
        folder = top / 'val' / IDS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20, 24, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f'ILSVRC2012_val_{number:08d}.JPEG')
    (top / 'real.json').write_text(json.dumps(LABELS))
    return top


def suite_of(tree):
    return open_suite('imagenet-real', str(tree), 1000, allow_partial=True)


def test_targets_are_sets_of_labels(tree):
    suite = relabelled(suite_of(tree), str(tree / 'real.json'))
    assert suite.kind == 'id' and len(suite.samples) == 10 and '2 images without a label left out' in suite.notes
    for path, target in suite.samples:
        number = int(os.path.basename(path)[15:23])
        assert suite.space.sets[target] == tuple(sorted(LABELS[number - 1]))


def test_any_label_is_right_and_those_of_an_image_are_one_class():
    space = LabelSpace('x', sets=((1,), (0, 2)))
    logits = torch.tensor([[1.0, 3.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0]])
    targets = torch.tensor([0, 1, 1])
    assert space.accepted(3, targets).tolist() == [[False, True, False], [True, False, True], [True, False, True]]
    assert space.label_of(targets).tolist() == [1, 0, 0]
    found = certainties(logits, logits, targets, space)
    assert list(found) == ['space'] and found['space'][:, 1].tolist() == [1, 1, 0]
    p = logits.double().softmax(1)
    assert found['space'][1, 2].item() == pytest.approx(-math.log(p[1, 0] + p[1, 2]))
    assert found['space'][1, 3].item() == pytest.approx(2 * p[1, 1].item() ** 2)
    for sets in (((1,), ()), ((0,),)):
        with pytest.raises(ValueError, match='sets of classes'):
            LabelSpace('x', None if () in sets else ((0,), (1,)), sets)


@pytest.fixture(scope='module')
def evaluated(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp('real')
    checkpoint = constant_checkpoint(folder / 'constant.pth', FIRST)
    torch.save({'state_dict': {name: value * (100 if name == 'fc.weight' else 1)
                               for name, value in model_of(1000).state_dict().items()}}, folder / 'random.pth')
    command = (f'--checkpoint {checkpoint} {folder}/random.pth --eval imagenet-real={tree} imagenet={tree} '
               f'--real-labels {tree}/real.json --allow-partial --calibration --save-outputs predictions '
               f'--quantize-weights 8 --results-file r')
    result(run_validate(folder, command))
    return folder, command


def test_accuracy_is_that_of_timms_own_class(tree, evaluated):
    content = json.loads((evaluated[0] / 'r.json').read_text())
    rows = {(row['dataset'], row['measure']): row for row in content['results']}
    paths = sorted((tree / 'val').glob('*/*.JPEG'), key=lambda path: path.name)
    model = model_of(1000)
    with torch.no_grad():
        model.fc.weight.mul_(100)
        logits = model(preprocessed(paths, model))
    constant = torch.zeros(1000)
    constant[FIRST] = torch.tensor([10.0, 9, 8, 7, 6])
    for column, outputs in enumerate((constant.expand(IMAGES, 1000), logits)):
        real = RealLabelsImagenet([path.name for path in paths], real_json=str(tree / 'real.json'))
        real.add_result(outputs)
        for k in (1, 5):
            assert rows['imagenet-real', f'top{k}']['values'][column] == pytest.approx(real.get_accuracy(k))
    assert rows['imagenet-real', 'top1']['values'][0] == 40 and rows['imagenet-real', 'top5']['values'][0] == 60
    assert rows['imagenet-real', 'top1']['images'] == 10 and rows['imagenet', 'top1']['images'] == IMAGES
    assert rows['imagenet-real', 'top1_w8']['values'][0] == 40
    assert rows['imagenet-real', 'ece_width']['values'][0] > 10
    assert [row['dataset'] for row in content['results'] if row['group'] == 'ID'][:1] == ['imagenet-real']


def test_what_is_done_is_gone_on_with_unless_labels_are_others(tree, evaluated, tmp_path, monkeypatch):
    folder, command = evaluated
    before = (folder / 'r.json').read_bytes()
    result(run_validate(folder, f'{command} --skip-existing'))
    assert (folder / 'r.json').read_bytes() == before
    other = [[7] if several else [] for several in LABELS]
    (tmp_path / 'other.json').write_text(json.dumps(other))
    result(run_validate(folder, f'{command} --skip-existing --real-labels {tmp_path}/other.json'))
    rows = json.loads((folder / 'r.json').read_text())['results']
    assert rows[0]['values'][0] == 100
    result(run_validate(folder, f'{command} --overwrite'))


@pytest.mark.parametrize('content', [None, '', '{}', '[]', '[[1], 2]', '[[1000]]', '[[-1]]', '[["x"]]'])
def test_file_that_holds_no_labels_is_one_line(tree, tmp_path, content):
    path = tmp_path / 'x.json'
    if content is not None:
        path.write_text(content)
    with pytest.raises(OptionError, match=r'--real-labels .*x\.json: it is no JSON list'):
        relabelled(suite_of(tree), str(path))


def test_images_that_labels_do_not_know_are_one_line(tree, tmp_path):
    (tmp_path / 'few.json').write_text('[[1]]')
    with pytest.raises(OptionError, match='ILSVRC2012_val_000000.*is no image of --real-labels'):
        relabelled(suite_of(tree), str(tmp_path / 'few.json'))
    (tmp_path / 'none.json').write_text(json.dumps([[]] * IMAGES))
    with pytest.raises(OptionError, match='no label for any image'):
        relabelled(suite_of(tree), str(tmp_path / 'none.json'))


@pytest.mark.parametrize('options, words', [
    ('--eval imagenet-real={tree}', 'needs the labels: add --real-labels real.json'),
    ('--eval imagenet={tree} --real-labels {tree}/real.json', 'or for --eval imagenet-real=DIR: leave it out'),
    ('--eval imagenet-real={tree} --real-labels {tree}/real.json --attack l2=1', 'is in distribution'),
    ('--eval imagenet-real={tree} --real-labels {tree}/real.json --attack l2=1 --attack-set imagenet-real',
     'its images have several labels')])
def test_what_does_not_go_together_is_one_line(tree, evaluated, tmp_path, options, words):
    done = run_validate(tmp_path, f'--checkpoint {evaluated[0]}/constant.pth --allow-partial '
                                  f'{options.format(tree=tree)}')
    assert done.code == 2 and words in done.last_line, done.last_line
