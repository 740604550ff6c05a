"""Recipes: the paper's tables as data against train.py's own reading of each YAML file."""
import re
from collections import Counter

import pytest
import torch
from support.paper import ILLEGIBLE, PAPER, SETTINGS
from support.places import ROOT
from support.recipes import (
    DIGITS,
    FILES,
    HPARAMS,
    QUIET,
    RECIPES,
    chain,
    commands,
    header,
    identify,
    parse,
    path_of,
    rho_if_missing,
    values_of,
)
from support.running import working_directory

from timm_sam import SAM, train
from timm_sam.training.factory import build_model, create_optimizer
from timm_sam.training.options import parse_args
from timm_sam.training.plain import Plain
from timm_sam.training.sam_options import create_update


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
    assert Counter(f.split('/')[1] for f, _ in PAPER if '_' not in f.split('/')[-1] or f.startswith('imagenet')) == {
        'resnet50': 8, 'vit_small_patch32_224': 6, 'vit_small_ft': 9, 'vit_tiny': 26, 'vit_small': 26, 'resnet18': 26,
        'resnet56': 26, 'resnext29_32x4d': 26, 'wrn28_10': 26,
        'vgg13_bn': 26, 'vgg16_bn': 26, 'vgg19_bn': 26, 'densenet100': 26}
    assert Counter(f for f, _ in PAPER if f.startswith('cifar') and '_' in f.split('/')[-1]) == {
        'cifar/wrn28_10/cifar100_late_blocks': 2, 'cifar/resnext29_32x4d/cifar100_late_blocks': 2,
        'cifar/wrn28_10/cifar100_masks': 5, 'cifar/resnet18/cifar10_masks': 3,
        'cifar/wrn28_10/cifar100_weight_decay': 6, 'cifar/wrn28_10/cifar100_norm_drop': 2,
        'cifar/wrn28_10/cifar100_fixed_norm': 1,
        'cifar/wrn28_10/cifar10_only_norm': 3, 'cifar/resnet101/cifar10_only_norm': 3}


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
    ambiguous = [(f, n) for f, n in PAPER if f.startswith('cifar') and n == 'fisher_onlynorm']
    assert len(ambiguous) == 20
    for folder, name in ambiguous:
        rho = SETTINGS[folder].rows[name].rho
        assert 'lost which radius is bold' in header(path_of(folder, name))
        assert f'{rho:g} is a reading' in header(path_of(folder, name))
        assert SETTINGS[folder].rows['sam_onlynorm'].rho == rho  # what it is read from


@pytest.mark.full
@pytest.mark.parametrize('folder', [f for f in SETTINGS if 'late_blocks' in f])
@pytest.mark.parametrize(('name', 'counts'), [('block_3', (16, 20)), ('blocks_2_and_3', (32, 40))])
def test_late_blocks_are_what_figure_3_perturbs(folder, name, counts, tmp_path):
    args = parse(path_of(folder, name), tmp_path)
    optimized = build_model(args, QUIET)
    sam = create_update(args, QUIET, torch.optim.SGD(optimized.parameters(), lr=0.1), optimized, 0.1, 1, 1)
    assert len(sam.selected) == counts['resnext' in folder]


@pytest.mark.parametrize(('folder', 'name'), PAPER)
def test_header_names_table_accuracy_and_that_it_is_not_reproduced(folder, name):
    setting, text = SETTINGS[folder], header(path_of(folder, name))
    first, second = text.splitlines()[:2]
    for table in setting.tables:
        assert re.search(rf'\b{table}\b', first), table
    assert second.endswith('Not reproduced here.')
    accuracy = setting.rows[name].accuracy
    assert (f': {accuracy}. ' if accuracy else ': none') in second
    with_aa = setting.rows[name].with_aa
    assert ('AutoAugment' in second) == (with_aa is not None)
    assert with_aa is None or f'. With AutoAugment: {with_aa}. ' in second


@pytest.mark.parametrize(('folder', 'name'), PAPER)
def test_commands_in_the_header_are_the_recipe(folder, name, tmp_path):
    setting, recipe = SETTINGS[folder], path_of(folder, name)
    expected = setting.of(name)
    devices, batch = setting.devices, setting.values['batch_size']
    found = commands(header(recipe))
    with_aa = setting.rows[name].with_aa is not None
    assert len(found) == (2 if folder.startswith('imagenet') or with_aa else 1)
    assert found[0][0] == devices
    assert sorted(processes == 1 for processes, _ in found) == \
        ([False, True] if folder.startswith('imagenet') else [True] * len(found))
    for number, (processes, arguments) in enumerate(found):
        if with_aa and number == 1:
            expected['aa'] = 'cifar10'
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
    assert {(p, k) for p in FILES for k in values_of(p) if k != 'base'} - used == set()
