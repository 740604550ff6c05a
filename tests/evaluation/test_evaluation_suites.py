"""Suites of validate.py: published sets in small, with models whose outputs are known, so that scores are known too."""
import argparse
import csv
import io
import json
import os
import shutil

import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from support.suites import IDS, NAMES, V2
from support.validating import GREYS, constant_checkpoint, result, run_validate, sha256

import timm_sam
import timm_sam.evaluation.protocol
import timm_sam.evaluation.single
from timm_sam.evaluation.provenance import precision

# Outputs 1 and 988 are classes of ImageNet-R, 15 and 988 of ImageNet-A; 303 is ObjectNet's air_mug
FIRST = [0, 1, 15, 303, 988]
SECOND = [1, 303, 999, 988, 15]
THIRD = [999, 0, 1, 2, 3]

# set -> folder, class folder -> number of images
TREES = {
    'imagenet': ('imagenet/val', {IDS[0]: 3, IDS[1]: 1, IDS[999]: 4}),
    'imagenetv2': (V2, {'0': 1, '15': 1, '303': 1, '999': 1}),
    'imagenet-r': ('imagenet-r', {IDS[1]: 2, IDS[988]: 1, IDS[967]: 1}),
    'imagenet-a': ('imagenet-a', {IDS[15]: 1, IDS[988]: 1, IDS[987]: 2}),
    'objectnet': ('objectnet-1.0/images', {'air_mug': 1, 'pen': 2, 'tie': 1, 'squeegee': 2}),
}
GROUPS = {'air_mug': [303], 'pen': [300, 305, 309], 'tie': [200, 302], 'squeegee': []}

# by hand: the data set's images that FIRST gets right, of all its images, in its label space and among all outputs
BY_HAND = {
    ('imagenet', 'top1'): 3 / 8, ('imagenet', 'top5'): 4 / 8,
    ('imagenetv2', 'top1'): 1 / 4, ('imagenetv2', 'top5'): 3 / 4,
    # best of R's outputs: 1, 988, 2, 4, 6
    ('imagenet-r', 'top1'): 2 / 4, ('imagenet-r', 'top5'): 3 / 4, ('imagenet-r', 'top1_1000way'): 0,
    # best of A's outputs: 15, 988, 6, 11, 13
    ('imagenet-a', 'top1'): 1 / 4, ('imagenet-a', 'top5'): 2 / 4, ('imagenet-a', 'top1_1000way'): 0,
    # three groups: all among the best five
    ('objectnet', 'top1'): 1 / 4, ('objectnet', 'top5'): 1, ('objectnet', 'top1_1000way'): 0,
}


def write_images(folder, classes, image):
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            os.link(image, folder / name / f'{i}.png')


@pytest.fixture(scope='session')
def root(tmp_path_factory):
    """Small published sets; ImageNet-Sketch is missing, ObjectNet complete, the others lack classes."""
    top = tmp_path_factory.mktemp('root')
    image = top / 'image.png'
    Image.new('RGB', (24, 20), (200, 30, 30)).save(image)
    for folder, classes in TREES.values():
        write_images(top / folder, classes, image)
    write_images(top / 'fog', {IDS[0]: 1, IDS[303]: 1}, image)
    mappings = top / 'objectnet-1.0' / 'mappings'
    mappings.mkdir()
    (mappings / 'folder_to_objectnet_label.json').write_text(json.dumps({folder: folder for folder in GROUPS}))
    (mappings / 'objectnet_to_imagenet_1k.json').write_text(json.dumps(
        {folder: '; '.join(NAMES[output] for output in outputs) for folder, outputs in GROUPS.items() if outputs}))
    (mappings / 'imagenet_to_label_2012_v2').write_text('\n'.join(NAMES) + '\n')
    (mappings / 'pytorch_to_imagenet_2012_id.json').write_text(json.dumps({str(i): i for i in range(1000)}))
    return top


@pytest.fixture(scope='session')
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoints')
    return [constant_checkpoint(folder / f'seed{i}.pth', best) for i, best in enumerate((FIRST, SECOND, THIRD))]


@pytest.fixture
def run(tmp_path, checkpoints):
    def evaluate(command, *numbers):
        return run_validate(tmp_path, f'--checkpoint {" ".join(checkpoints[i] for i in numbers or (0,))} {command}')
    return evaluate


def read(path):
    """(data set, measure) -> the entry of a JSON results file."""
    content = json.loads(path.read_text())
    return {(row['dataset'], row['measure']): row for row in content['results']}, content


def test_published_sets_in_their_label_spaces(run, root, tmp_path):
    done = run(f'--eval-root {root} --allow-partial --results-file r.json')
    (line,) = result(done)
    found, content = read(tmp_path / 'r.json')
    assert {key: row['values'] for key, row in found.items()} == {key: [100 * v] for key, v in BY_HAND.items()}
    assert list(found) == list(BY_HAND)  # in distribution first, then by the order of the sets
    assert [row['group'] for row in found.values()] == ['ID'] * 4 + ['OOD'] * 9
    assert {row['dataset']: row['images'] for row in found.values()} == {
        'imagenet': 8, 'imagenetv2': 4, 'imagenet-r': 4, 'imagenet-a': 4, 'objectnet': 4}
    assert line == {'model': 'test_resnet', 'checkpoint': content['protocol']['checkpoints'][0]['path'],
                    **{f'{name}_{measure}': 100 * value for (name, measure), value in BY_HAND.items()}}


def test_eval_root_says_what_it_found_and_what_is_missing(run, root):
    done = run(f'--eval-root {root} --allow-partial')
    (line,) = done.log('--eval-root')
    assert line == (f'--eval-root {root}: found imagenet, imagenetv2, imagenet-r, imagenet-a, objectnet; '
                    f'not there: imagenet-sketch, imagenet-c')
    assert done.log('objectnet: 4 images')[0].endswith('2 images of classes outside ImageNet left out')


def test_set_that_is_named_replaces_the_one_below_eval_root_and_other_names_are_training_classes(run, root, tmp_path):
    done = run(f'--eval imagenet-r={root}/imagenet-r fog={root}/fog imagenet={root}/fog --eval-root {root} '
               f'--allow-partial --results-file r.json')
    assert done.code == 0, done.err
    found, content = read(tmp_path / 'r.json')
    assert found['imagenet', 'top1']['images'] == 2 and found['imagenet', 'top1']['values'] == [50]
    assert found['fog', 'top1']['values'] == [50] and found['fog', 'top5']['values'] == [100]
    assert ('fog', 'top1_1000way') not in found and found['fog', 'top1']['group'] == 'OOD'
    names = [entry['name'] for entry in content['protocol']['datasets']]
    assert sorted(names) == ['fog', 'imagenet', 'imagenet-a', 'imagenet-r', 'imagenetv2', 'objectnet']


def test_border_of_objectnets_images_is_cut_and_of_no_others(run, root, tmp_path, monkeypatch):
    seen = {}
    score = timm_sam.evaluation.protocol.score

    def watched(subject, loaded, places, space, title, **kwargs):
        seen[title] = torch.cat([images for images, _ in loaded])
        return score(subject, loaded, places, space, title, **kwargs)
    monkeypatch.setattr(timm_sam.evaluation.protocol, 'score', watched)
    top = shutil.copytree(root, tmp_path / 'top')
    framed = Image.new('RGB', (24, 24), (255, 0, 0))
    framed.paste((0, 255, 0), (1, 1, 23, 23))
    for path in [*top.glob('objectnet-1.0/images/*/*'), *top.glob('fog/*/*')]:
        framed.save(path)
    sets = f'--eval objectnet={top}/objectnet-1.0 fog={top}/fog --allow-partial --crop-pct 1'
    for option, frames in (('', {'objectnet': False, 'fog': True}),
                           ('--crop-border-pixels 0', {'objectnet': True, 'fog': True}),
                           ('--crop-border-pixels 2', {'objectnet': False, 'fog': False})):
        assert run(f'{sets} {option}').code == 0
        # red is normalized to -1 where there is none of it
        assert {name: bool((images[:, 0] > -0.99).any()) for name, images in seen.items()} == frames


def test_missing_classes_are_an_error_without_allow_partial(run, root, tmp_path):
    done = run(f'--eval imagenet-r={root}/imagenet-r --results-file r.json')
    assert done.code == 2 and '197 of 200 classes of ImageNet-R have no folder' in done.last_line
    assert list(tmp_path.iterdir()) == []


def test_partial_set_is_marked_in_every_output(run, root, tmp_path):
    done = run(f'--eval imagenet-r={root}/imagenet-r --allow-partial --results-file r')
    flag = 'partial: 3 of 200 classes'
    assert f'imagenet-r ({flag})' in done.out and f'imagenet-r ({flag})' in (tmp_path / 'r.md').read_text()
    assert (tmp_path / 'r.csv').read_text().splitlines()[1].endswith(f',{flag}')
    found, content = read(tmp_path / 'r.json')
    assert found['imagenet-r', 'top1']['flags'] == [flag] == content['protocol']['datasets'][0]['flags']


def test_several_checkpoints_give_mean_and_standard_deviation(run, root, tmp_path, checkpoints):
    sets = f'imagenet={root}/imagenet imagenet-r={root}/imagenet-r'
    done = run(f'--eval {sets} --allow-partial --results-file r', 0, 1, 2)
    lines = result(done)
    assert [line['imagenet_top1'] for line in lines] == [37.5, 12.5, 50.0]
    assert [line['imagenet-r_top1_1000way'] for line in lines] == [0.0, 50.0, 0.0]
    assert [line['checkpoint'] for line in lines] == checkpoints
    found, content = read(tmp_path / 'r.json')
    assert content['checkpoints'] == ['seed0.pth', 'seed1.pth', 'seed2.pth']
    top1 = found['imagenet', 'top1']
    assert top1['mean'] == pytest.approx(100 / 3) and top1['std'] == pytest.approx(19.0941, abs=1e-4)
    assert found['imagenet', 'top5']['values'] == [50, 62.5, 100]
    # seed1 sees 1 and 988, as seed0 does; the last one's best among R's outputs are 1, 2, 4, 6, 8
    assert found['imagenet-r', 'top5']['values'] == [75, 75, 50]
    text = (tmp_path / 'r.md').read_text()
    assert '| 37.50 | 12.50 | 50.00 | 33.33 ± 19.09 |' in text and 'mean ± std' in done.out
    with open(tmp_path / 'r.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert (rows[0]['mean'], rows[0]['std']) == ('33.3333', '19.0941')


def test_results_go_to_the_kind_of_file_that_is_asked_for(run, root, tmp_path):
    sets = f'--eval imagenet={root}/imagenet --allow-partial'
    for command, files in [('--results-file a.json', {'a.json'}), ('--results-file b.csv', {'b.csv'}),
                           ('--results-file c.md', {'c.md'}), ('--results-file d', {'d.json', 'd.csv', 'd.md'}),
                           ('--results-file e --results-format md', {'e'}),
                           ('--results-file f.txt --results-format csv', {'f.txt'})]:
        assert run(f'{sets} {command}').code == 0
        assert {p.name for p in tmp_path.iterdir() if p.name[0] == min(files)[0] and 'journal' not in p.name} == files
    assert read(tmp_path / 'a.json')[0] == read(tmp_path / 'd.json')[0]
    for kind, others in {'csv': ['b.csv', 'f.txt'], 'md': ['c.md', 'e']}.items():
        assert [(tmp_path / name).read_text() for name in others] == [(tmp_path / f'd.{kind}').read_text()] * 2


def test_content_of_the_tables(run, root, tmp_path, checkpoints):
    done = run(f'--eval fog={root}/fog imagenet-r={root}/imagenet-r imagenet={root}/imagenet --allow-partial '
               f'--results-file r')
    rows = list(csv.reader(io.StringIO((tmp_path / 'r.csv').read_text())))
    assert rows == [
        ['group', 'dataset', 'measure', 'images', checkpoints[0], 'mean', 'std', 'flags'],
        ['ID', 'imagenet', 'top1', '8', '37.5000', '37.5000', '', 'partial: 3 of 1000 classes'],
        ['ID', 'imagenet', 'top5', '8', '50.0000', '50.0000', '', 'partial: 3 of 1000 classes'],
        ['OOD', 'fog', 'top1', '2', '50.0000', '50.0000', '', 'partial: 2 of 1000 classes'],
        ['OOD', 'fog', 'top5', '2', '100.0000', '100.0000', '', 'partial: 2 of 1000 classes'],
        ['OOD', 'imagenet-r', 'top1', '4', '50.0000', '50.0000', '', 'partial: 3 of 200 classes'],
        ['OOD', 'imagenet-r', 'top5', '4', '75.0000', '75.0000', '', 'partial: 3 of 200 classes'],
        ['OOD', 'imagenet-r', 'top1_1000way', '4', '0.0000', '0.0000', '', 'partial: 3 of 200 classes'],
    ]
    lines = (tmp_path / 'r.md').read_text().splitlines()
    assert lines[0] == f'|  | data set | measure | images | {checkpoints[0]} |'
    assert lines[1] == '|---|---|---|---:|---:|'
    assert lines[2] == '| ID | imagenet (partial: 3 of 1000 classes) | top1 | 8 | 37.50 |'
    assert lines[4] == '| OOD | fog (partial: 2 of 1000 classes) | top1 | 2 | 50.00 |'
    assert len(lines) == 9
    shown = done.out.split('--result')[0].splitlines()
    assert [line.split()[-1] for line in shown[2:]] == [row[4][:-2] for row in rows[1:]]


def test_protocol_says_what_the_numbers_depend_on(run, root, tmp_path, checkpoints):
    run(f'--eval objectnet={root}/objectnet-1.0 imagenet={root}/imagenet --allow-partial --seed 7 -b 3 '
        f'--attack l2=0.5 linf=1/255 --attack-num-samples 5 --attack-steps 2 --attack-targets 3 --results-file r.json')
    protocol = read(tmp_path / 'r.json')[1]['protocol']
    assert protocol['checkpoints'] == [
        dict(path=checkpoints[0], sha256=sha256(checkpoints[0]), weights='state_dict', model='test_resnet',
             parameters=469688)]
    assert (protocol['seed'], protocol['batch_size'], protocol['use_ema']) == (7, 3, False)
    assert protocol['precision'] == 'float32' and protocol['device'] == 'cpu'
    assert protocol['versions'] == dict(timm_sam=timm_sam.__version__, timm=timm.__version__,
                                        torch=torch.__version__, torchvision=torchvision.__version__)
    preprocessing = protocol['preprocessing']
    assert preprocessing['input_size'] == [3, 32, 32] and preprocessing['crop_pct'] == 0.95
    assert preprocessing['mean'] == [0.5] * 3 and preprocessing['interpolation'] == 'bilinear'
    objectnet, imagenet = protocol['datasets']
    assert objectnet['crop_border_pixels'] == 2 and objectnet['images'] == 4 and objectnet['kind'] == 'ood'
    assert objectnet['notes'] == ['2 images of classes outside ImageNet left out'] and objectnet['classes'] == 3
    assert imagenet['folder'] == f'{root}/imagenet/val' and len(imagenet['samples_sha256']) == 64
    attack = protocol['attack']
    assert attack['radii'] == [dict(norm='l2', radius=0.5, written='0.5'),
                               dict(norm='linf', radius=1 / 255, written='1/255')]
    assert (attack['dataset'], attack['images'], attack['seed'], attack['steps'], attack['targets']) == (
        'imagenet', 5, 7, 2, 3)


def test_protocol_holds_all_that_a_score_is_known_by(run, root, tmp_path, monkeypatch):
    identities = []
    key_of = timm_sam.evaluation.protocol.key_of

    def watched(**parts):
        if 'part' in parts:
            identities.append(json.loads(json.dumps(parts)))
        return key_of(**parts)
    monkeypatch.setattr(timm_sam.evaluation.protocol, 'key_of', watched)
    assert run(f'--eval imagenet={root}/imagenet objectnet={root}/objectnet-1.0 --allow-partial --gp max '
               f'--results-file r.json').code == 0
    protocol = read(tmp_path / 'r.json')[1]['protocol']
    assert [identity['sha256'] for identity in identities] == [protocol['checkpoints'][0]['sha256']] * 2
    for identity, dataset in zip(identities, protocol['datasets'], strict=True):
        assert identity['settings'].items() <= protocol.items()
        assert identity['dataset'].items() <= dataset.items()
    assert protocol['gp'] == 'max' and protocol['num_classes'] == 1000 and protocol['allow_partial'] is True
    assert protocol['class_map'] == '' and protocol['model_kwargs'] == {} and protocol['prefetcher'] is True


def test_products_are_not_shortened_in_suites(run, root, tmp_path, monkeypatch):
    seen = {}
    for name in ('protocol', 'single'):
        module = getattr(timm_sam.evaluation, name)

        def watched(*args, name=name, score=module.score, **kwargs):
            cudnn = torch.backends.cudnn
            seen[name] = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
            return score(*args, **kwargs)
        monkeypatch.setattr(module, 'score', watched)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', True)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try:
        assert run(f'--eval imagenet={root}/imagenet --allow-partial').code == 0
        assert torch.get_float32_matmul_precision() == 'high' and torch.backends.cudnn.allow_tf32
        assert run(f'--data-dir {root}/imagenet --split val').code == 0
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == {'protocol': ('highest', False, False, True), 'single': ('high', True, True, False)}


@pytest.mark.parametrize('options, device, text', [
    ({}, 'cpu', 'float32'), ({}, 'cuda', 'float32 (TF32 off)'),
    ({'model_dtype': 'float32'}, 'cuda', 'float32 (TF32 off)'),
    ({'model_dtype': 'bfloat16'}, 'cuda', 'bfloat16'), ({'amp': True}, 'cuda', 'float32, autocast to float16')])
def test_precision_of_the_protocol(options, device, text):
    args = argparse.Namespace(**{'amp': False, 'amp_dtype': 'float16', 'model_dtype': None, **options})
    assert precision(args, torch.device(device)) == text


def test_image_that_is_a_dangling_link_is_named(run, root, tmp_path):
    shutil.copytree(root / 'fog', tmp_path / 'fog')
    (tmp_path / 'fog' / IDS[0] / 'gone.png').symlink_to('nowhere')
    done = run(f'--eval fog={tmp_path}/fog --allow-partial')
    assert done.code == 2 and 'Traceback' not in done.err and f'{IDS[0]}/gone.png cannot be read' in done.last_line


def test_weights_that_are_twice_in_a_folder_are_evaluated_once_and_said(root, tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    constant_checkpoint(folder / 'checkpoint-1.pth', SECOND)
    constant_checkpoint(folder / 'checkpoint-2.pth', FIRST)
    (folder / 'last.pth').hardlink_to(folder / 'checkpoint-2.pth')
    (folder / 'tmp.pth').write_bytes(b'torn')
    done = run_validate(tmp_path, f'--checkpoint {folder} --eval imagenet={root}/imagenet --allow-partial')
    assert [line['imagenet_top1'] for line in result(done)] == [12.5, 37.5]
    assert done.log('Unfinished or the same') == [
        f'Unfinished or the same as another checkpoint: {folder}/tmp.pth, {folder}/last.pth']


@pytest.mark.parametrize('key', ['state_dict_ema', 'model_ema'])
def test_use_ema_takes_the_averaged_weights(root, tmp_path, key):
    path = constant_checkpoint(tmp_path / 'c.pth', FIRST, key=key)
    sets = f'--checkpoint {path} --eval imagenet={root}/imagenet --allow-partial --results-file r.json --overwrite'
    # without it, the outputs are all zero; which of them is best is torch's choice, but not all of FIRST's
    averaged = result(run_validate(tmp_path, f'{sets} --use-ema'))[0]
    assert read(tmp_path / 'r.json')[1]['protocol']['checkpoints'][0]['weights'] == key
    plain = result(run_validate(tmp_path, sets))[0]
    assert read(tmp_path / 'r.json')[1]['protocol']['checkpoints'][0]['weights'] == 'state_dict'
    assert (averaged['imagenet_top1'], averaged['imagenet_top5']) == (37.5, 50)
    assert (plain['imagenet_top1'], plain['imagenet_top5']) != (37.5, 50)


def test_file_of_nothing_but_weights(root, tmp_path):
    path = constant_checkpoint(tmp_path / 'c.pth', FIRST)
    state = torch.load(path, weights_only=True)['state_dict']
    torch.save(state, tmp_path / 'new.pth')
    torch.save(state, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)  # cannot be mapped
    for name in ('new.pth', 'old.pth'):
        done = run_validate(tmp_path, f'--checkpoint {name} --eval imagenet={root}/imagenet --allow-partial '
                                      f'--results-file r.json --overwrite')
        assert result(done)[0]['imagenet_top1'] == 37.5
        assert read(tmp_path / 'r.json')[1]['protocol']['checkpoints'][0]['weights'] == ''


def test_options_of_the_run_beside_the_checkpoint_build_the_model(root, tmp_path):
    path = constant_checkpoint(tmp_path / 'last.pth.tar', FIRST)
    values = dict(model='test_resnet', img_size=40, interpolation='bicubic', num_classes=1000, lr=3.0)
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(values))
    sets = f'--checkpoint {path} --eval imagenet={root}/imagenet --allow-partial --results-file r.json --overwrite'
    done = run_validate(tmp_path, sets, '--device cpu -j 0')
    assert result(done)[0]['imagenet_top1'] == 37.5
    assert f'Model and preprocessing as in {tmp_path}/args.yaml: test_resnet' in done.err
    preprocessing = read(tmp_path / 'r.json')[1]['protocol']['preprocessing']
    assert preprocessing['input_size'] == [3, 40, 40] and preprocessing['interpolation'] == 'bicubic'
    assert run_validate(tmp_path, f'{sets} --img-size 36', '--device cpu -j 0').code == 0
    preprocessing = read(tmp_path / 'r.json')[1]['protocol']['preprocessing']
    assert preprocessing['input_size'] == [3, 36, 36] and preprocessing['interpolation'] == 'bicubic'


def test_data_dir_is_the_first_set_and_in_distribution(fitted, tmp_path):
    shutil.copytree(fitted.data / 'train', tmp_path / 'shifted')
    single = result(run_validate(tmp_path, f'--data-dir {fitted.data}', fitted.base))
    done = run_validate(
        tmp_path, f'--data-dir {fitted.data} --eval shifted=shifted --results-file r.json', fitted.base)
    (line,) = result(done)
    assert line['validation_top1'] == single['top1'] and line['validation_top5'] == single['top5']
    found = read(tmp_path / 'r.json')[0]
    assert [(key[0], row['group']) for key, row in found.items()] == [
        ('validation', 'ID')] * 2 + [('shifted', 'OOD')] * 2


def test_class_map_numbers_the_folders_of_suites(fitted, tmp_path):
    (tmp_path / 'map.txt').write_text('\n'.join(reversed(list(GREYS))))
    command = f'--data-dir {fitted.data} --class-map map.txt'
    single = result(run_validate(tmp_path, command, fitted.base))
    (line,) = result(run_validate(tmp_path, f'{command} --eval train={fitted.data}/train', fitted.base))
    assert line['validation_top1'] == single['top1'] < 20


def test_every_checkpoint_is_tried_before_the_first_is_evaluated(run, root, tmp_path, checkpoints, monkeypatch):
    broken = constant_checkpoint(tmp_path / 'ten.pth', [0], 10)
    calls = []
    monkeypatch.setattr(timm_sam.evaluation.protocol, 'score', lambda *args, **kwargs: calls.append(args))
    done = run_validate(tmp_path, f'--checkpoint {checkpoints[0]} {broken} --eval imagenet={root}/imagenet '
                                  f'--allow-partial --results-file r.json')
    assert done.code == 2 and f'--checkpoint {broken} cannot be loaded into test_resnet' in done.last_line
    assert calls == [] and [path.name for path in tmp_path.iterdir()] == ['ten.pth']
