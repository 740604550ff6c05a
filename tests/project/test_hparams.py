"""Recipes: the paper's tables as data against train.py's own reading of each YAML file, and two updates of each."""
import itertools
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from support.images import write_image_folder
from support.paper import ILLEGIBLE, PAPER, SETTINGS
from support.places import ROOT
from support.running import in_process, quiet_about_timm, working_directory
from timm.data import create_transform

from timm_sam import SAM, train
from timm_sam.cli.device import Process
from timm_sam.training.data import augmentation
from timm_sam.training.factory import build_model, create_optimizer
from timm_sam.training.options import parse_args
from timm_sam.training.plain import Plain
from timm_sam.training.sam_options import create_update
from timm_sam.training.schedule import create_schedule

HPARAMS = ROOT / 'hparams'
DIGITS = sorted(p for p in HPARAMS.glob('digits/*.yaml') if p.stem != 'base')
FILES = sorted(p for folder in ('cifar', 'imagenet') for p in HPARAMS.glob(f'{folder}/**/*.yaml'))
RECIPES = [p for p in FILES if not p.stem.endswith('base')]
QUIET = Process(torch.device('cpu'), rank=1)  # says nothing


def identify(value):
    return str(value.relative_to(HPARAMS)) if isinstance(value, Path) else None


def path_of(folder, name):
    return HPARAMS / folder / f'{name}.yaml'


def parse(recipe, data_dir, *options):
    where = ['-c', str(recipe), '--data-dir', str(data_dir), '--device', 'cpu']
    return parse_args(train.build_parser(), [*where, *options])


def rho_if_missing(folder, name):
    return ['--sam-rho', '0.02'] if (folder, name) in ILLEGIBLE else []


def header(recipe):
    """The comment a recipe opens with, without its '# '."""
    lines = itertools.takewhile(lambda line: line.startswith('#'), recipe.read_text().splitlines())
    return '\n'.join(line[2:] for line in lines)


def commands(text):
    """Command lines of a text: (processes per node, arguments of train.py) of each."""
    joined = re.sub(r'\s*\\\n\s*', ' ', text)
    found = []
    for line in joined.splitlines():
        if not re.match(r'\s*(python|torchrun) .*\btrain\.py ', line):
            continue
        words = shlex.split(line)
        launcher, arguments = words[:words.index('train.py')], words[words.index('train.py') + 1:]
        assert launcher in (['python'], ['torchrun', '--nproc-per-node', launcher[-1]]), line
        found.append((1 if launcher == ['python'] else int(launcher[-1]), arguments))
    return found


# ---- what the files say

def test_there_are_plain_sam_and_sam_on_recipes_for_a_resnet_and_a_vit():
    names = {p.stem for p in DIGITS}
    assert {f'{m}{kind}' for m in ('resnet10t', 'vit_tiny') for kind in ('', '_sam_all', '_sam_on')} <= names


@pytest.mark.parametrize('recipe', DIGITS, ids=identify)
def test_recipe_builds_what_its_name_says(recipe, tmp_path):
    args = parse(recipe, tmp_path)
    model = build_model(args, QUIET)
    optimizer = create_optimizer(args, QUIET, model, args.lr or args.lr_base)
    sam = create_update(args, QUIET, optimizer, model, args.lr or args.lr_base, 1, 1)
    kind = recipe.stem.split('_sam_')[-1] if '_sam_' in recipe.stem else None
    if kind is None:
        assert isinstance(sam, Plain)
    else:
        assert isinstance(sam, SAM)
        assert sam.params == {'on': 'onlynorm', 'all': 'all'}[kind]


@pytest.mark.parametrize('recipe', DIGITS + FILES, ids=identify)
def test_recipe_opens_with_what_it_is(recipe):
    assert recipe.read_text().startswith('# ')


def test_folders_hold_exactly_the_runs_of_the_tables():
    assert {str(p.relative_to(HPARAMS).with_suffix('')) for p in RECIPES} == \
        {f'{f}/{n}' for f, n in PAPER}
    assert Counter(f.split('/')[1] for f, _ in PAPER) == \
        {'resnet50': 8, 'vit_small_patch32_224': 6, 'vit_small_ft': 9, 'vit_tiny': 26, 'vit_small': 26, 'resnet18': 26}


@pytest.mark.parametrize(('folder', 'name'), PAPER)
def test_recipe_has_the_values_of_its_table(folder, name, tmp_path):
    expected = SETTINGS[folder].of(name)
    args = parse(path_of(folder, name), tmp_path, *rho_if_missing(folder, name))
    if (folder, name) in ILLEGIBLE:
        expected['sam_rho'] = 0.02
    assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize(('folder', 'name'), ILLEGIBLE)
def test_illegible_radius_is_asked_for(folder, name, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        parse(path_of(folder, name), tmp_path)
    assert e.value.code == 2
    assert 'needs --sam-rho' in capsys.readouterr().err
    assert 'not legible' in header(path_of(folder, name))


def test_ambiguous_radius_is_called_so():
    assert 'lost which radius is bold' in header(path_of('cifar/resnet18/cifar10', 'fisher_onlynorm'))


@pytest.mark.parametrize(('folder', 'name'), PAPER)
def test_header_names_table_accuracy_and_that_it_is_not_reproduced(folder, name):
    setting, text = SETTINGS[folder], header(path_of(folder, name))
    first, second = text.splitlines()[:2]
    for table in setting.tables:
        assert re.search(rf'\b{table}\b', first), table
    assert second.endswith('Not reproduced here.')
    accuracy = setting.rows[name].accuracy
    assert (f': {accuracy}. ' if accuracy else ': none') in second


@pytest.mark.parametrize(('folder', 'name'), PAPER)
def test_commands_in_the_header_are_the_recipe(folder, name, tmp_path):
    setting, recipe = SETTINGS[folder], path_of(folder, name)
    expected = setting.of(name)
    devices, batch = setting.devices, setting.values['batch_size']
    found = commands(header(recipe))
    assert len(found) == (2 if folder.startswith('imagenet') else 1)
    assert found[0][0] == devices
    assert sorted(processes == 1 for processes, _ in found) == ([False, True] if len(found) == 2 else [True])
    for processes, arguments in found:
        assert arguments[:2] == ['-c', str(recipe.relative_to(ROOT))]
        at = arguments.index('--data-dir') + 1
        arguments[at] = str(tmp_path)
        if (folder, name) in ILLEGIBLE:
            expected['sam_rho'] = 0.02
            arguments[arguments.index('RHO')] = '0.02'
        with working_directory(ROOT):
            args = parse_args(train.build_parser(), [*arguments, '--device', 'cpu'])
        assert processes * args.batch_size * args.grad_accum_steps == devices * batch
        if args.sam_variant is not None:  # as many images share a perturbation as on one of the paper's devices
            assert (args.sam_m or args.batch_size) * (processes if args.sam_sync else 1) == batch
        elif 'resnet' in folder:  # as many images are normalized together
            assert args.batch_size == batch
        how = ('batch_size', 'grad_accum_steps', 'sam_m', 'sam_sync')
        assert {k: getattr(args, k) for k in expected if k not in how} == \
            {k: v for k, v in expected.items() if k not in how}


def chain(path):
    """The files a recipe is made of, itself first: (path, its own values)."""
    values = yaml.safe_load(path.read_text())
    base = values.pop('base', None)
    return [(path, values), *(chain((path.parent / base).resolve()) if base else [])]


@pytest.mark.parametrize('recipe', FILES, ids=identify)
def test_nothing_is_repeated_that_a_base_already_says(recipe):
    (_, own), *bases = chain(recipe)
    inherited = {k: v for _, values in reversed(bases) for k, v in values.items()}
    assert {k: v for k, v in own.items() if k in inherited and inherited[k] == v} == {}


def test_every_value_of_a_base_is_inherited_by_some_recipe():
    used = set()
    for recipe in RECIPES:
        seen = set()
        for path, values in chain(recipe):
            used |= {(path, k) for k in values if k not in seen}
            seen |= values.keys()
    assert {(p, k) for p in FILES for k in yaml.safe_load(p.read_text()) if k != 'base'} - used == set()


# ---- what timm makes of them

def test_resnet50_trains_for_a_hundred_epochs_the_last_ten_of_them_at_the_lowest_rate(tmp_path):
    args = parse(path_of('imagenet/resnet50', 'sgd'), tmp_path)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule, epochs = create_schedule(args, optimizer, updates_per_epoch=2502, decreasing_metric=False)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        schedule.step(epoch + 1)
    assert epochs == 100
    assert rates[0] == 1e-4  # warm-up starts
    assert max(rates) == rates[3] == pytest.approx(0.2, rel=0.01)
    assert rates[3:90] == sorted(rates[3:90], reverse=True)
    assert rates[89] > 1e-6
    assert rates[90:] == [1e-6] * 10


@pytest.mark.parametrize(('folder', 'name', 'kind', 'nesterov', 'decays_norm'), [
    ('imagenet/resnet50', 'sgd', torch.optim.SGD, True, False),
    ('imagenet/vit_small_patch32_224', 'adamw', torch.optim.AdamW, None, False),
    ('imagenet/vit_small_patch32_224', 'lion', timm.optim.Lion, None, False),
    ('cifar/resnet18/cifar10', 'sgd', torch.optim.SGD, False, True),
    ('cifar/vit_tiny/cifar10', 'adamw', torch.optim.AdamW, None, True),
])
def test_optimizer_is_the_one_meant(folder, name, kind, nesterov, decays_norm, tmp_path):
    args = parse(path_of(folder, name), tmp_path)
    model = build_model(args, QUIET)
    optimizer = create_optimizer(args, QUIET, model, args.lr or args.lr_base)
    assert type(optimizer) is kind
    assert optimizer.defaults.get('nesterov') is nesterov
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    exempt = model.no_weight_decay() if hasattr(model, 'no_weight_decay') else ()
    for parameter_name, p in model.named_parameters():
        one_d = p.ndim == 1 or parameter_name.endswith('.bias')
        plain = parameter_name not in exempt and (decays_norm or not one_d)
        assert decay[id(p)] == (args.weight_decay if plain else 0), parameter_name


def training_transform(args):
    """The loader's transform, as an image that it returns."""
    config = dict(mean=args.mean, std=args.std, interpolation=args.interpolation)
    options = augmentation(args, config)
    keys = ('is_training', 'no_aug', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'vflip', 'color_jitter',
            'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'auto_augment', 'interpolation', 're_prob')
    chosen = {k: options[k] for k in keys if k in options}
    size = (3, args.img_size, args.img_size)
    return create_transform(size, mean=args.mean, std=args.std, use_prefetcher=True, **chosen)


def test_cifar_crop_is_a_window_of_the_padded_image_at_every_offset(tmp_path):
    args = parse(path_of('cifar/vit_tiny/cifar10', 'adamw'), tmp_path, '--hflip', '0')
    args.aa = None  # comes after the crop
    transform = training_transform(args)
    row, column = np.mgrid[:40, :40]
    padded = np.stack([row, column, np.zeros_like(row)], -1).astype(np.uint8)  # each pixel knows its place
    seen = Counter()
    for _ in range(2000):
        window = np.asarray(transform(Image.fromarray(padded)))
        top, left = int(window[0, 0, 0]), int(window[1, 0, 0])
        assert (window.transpose(1, 2, 0) == padded[top:top + 32, left:left + 32]).all()
        seen[top, left] += 1
    assert set(seen) == set(itertools.product(range(9), range(9)))
    assert max(seen.values()) < 60  # 25 on average


@pytest.mark.parametrize(('folder', 'name', 'expected'), [
    ('imagenet/resnet50', 'sgd', []),
    ('cifar/resnet18/cifar10', 'sgd', []),
    ('cifar/vit_tiny/cifar10', 'adamw', ['AutoAugment']),
])
def test_augmentation_is_crop_and_flip_and_autoaugment_where_asked(folder, name, expected, tmp_path):
    args = parse(path_of(folder, name), tmp_path)
    args.mean, args.std = args.mean or (0.5,) * 3, args.std or (0.5,) * 3
    steps = training_transform(args).transforms
    # with color jitter 0 timm still adds the transform; it then leaves images as they are
    names = [type(t).__name__ for t in steps if type(t).__name__ != 'ColorJitter']
    assert names == ['RandomResizedCropAndInterpolation', 'RandomHorizontalFlip', *expected, 'MaybePILToTensor']
    for jitter in (t for t in steps if type(t).__name__ == 'ColorJitter'):
        assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (None,) * 4


def test_resnet18_works_at_the_sizes_of_the_cifar_network(tmp_path):
    args = parse(path_of('cifar/resnet18/cifar10', 'sgd'), tmp_path)
    model = build_model(args, QUIET)
    stages = model.forward_intermediates(torch.zeros(2, 3, args.img_size, args.img_size), intermediates_only=True)
    assert [s.shape[-1] for s in stages[1:]] == [32, 16, 8, 4]


# ---- two updates of each

@pytest.fixture(scope='module')
def four_images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp('four'), splits={'train': 1})


@pytest.fixture(scope='module')
def weights_of_21k_classes(tmp_path_factory):
    """What stands in for the published weights of the ViT-S, which is out of reach here."""
    file = tmp_path_factory.mktemp('weights') / 'vit.pth'
    model = timm.create_model('vit_small_patch16_224.augreg_in21k')
    assert model.num_classes == 21843
    torch.save(model.state_dict(), file)
    yield file
    file.unlink()


SMALL = {  # sizes at which two updates take a moment
    'resnet50': '--img-size 64',
    'vit_small_patch32_224': '--img-size 64 --model-kwargs img_size=64',
    'vit_small_ft': '--img-size 32 --model-kwargs img_size=32',
    'resnet18': '--img-size 32',
    'vit_tiny': '', 'vit_small': '',
}


def is_shown_by_others(folder, name):
    """Not of ImageNet, nor of the smallest network on CIFAR-10, nor one of two per folder that show its network."""
    shown = folder.startswith('imagenet') or folder == 'cifar/vit_tiny/cifar10'
    return not shown and name not in ('sgd', 'adamw', 'fisher_onlynorm')


@pytest.mark.parametrize(('folder', 'name'), [
    pytest.param(f, n, marks=pytest.mark.slow if is_shown_by_others(f, n) else ()) for f, n in PAPER])
def test_recipe_trains(folder, name, four_images, tmp_path, request):
    command = (f'-c {path_of(folder, name)} --data-dir {four_images} --device cpu -j 0 -b 2 --epochs 1 '
               f"--warmup-epochs 0 --cooldown-epochs 0 --val-split '' --log-interval 1 --output {tmp_path}/out "
               f'--experiment run {SMALL[folder.split("/")[1]]}')
    if folder.endswith('_ft'):
        command += f' --pretrained-path {request.getfixturevalue("weights_of_21k_classes")}'
    with quiet_about_timm():
        done = in_process(train.main, [*shlex.split(command), *rho_if_missing(folder, name)], tmp_path)
    assert done.code == 0, done.err
    assert 'Training for 1 epochs of 2 updates' in done.err
    summary, = done.summary()
    checkpoint = done.checkpoint()
    shutil.rmtree(tmp_path / 'out')  # hundreds of megabytes
    assert all(torch.isfinite(p).all() for p in checkpoint['state_dict'].values())
    assert np.isfinite(float(summary['train_loss']))
    row = SETTINGS[folder].rows[name]
    assert ('train_sam_loss' in summary) == (row.variant is not None)
    if row.variant is not None:
        assert np.isfinite(float(summary['train_sam_loss']))
        assert float(summary['train_sam_eps_norm']) > 0
        assert float(summary['train_sam_nonfinite']) == 0
        if row.variant in ('sam', 'fisher') and row.rho:
            # the l2 norm of eps is rho for SAM, and near it where T is near 1
            near = 1e-3 if row.variant == 'sam' else 0.5
            assert float(summary['train_sam_eps_norm']) == pytest.approx(row.rho, rel=near)
