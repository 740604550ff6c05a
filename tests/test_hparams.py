"""Every recipe parses, builds its model and selects what it says."""
from pathlib import Path

import pytest

import train
from timm_sam import SAM
from timm_sam.factory import build_model, create_optimizer, create_sam
from timm_sam.options import parse_args

ROOT = Path(__file__).parent.parent
RECIPES = sorted(p for p in (ROOT / 'hparams').rglob('*.yaml') if p.name != 'base.yaml')


def test_there_are_plain_sam_and_sam_on_recipes_for_a_resnet_and_a_vit():
    names = {p.stem for p in RECIPES if p.parent.name == 'digits'}
    assert {f'{m}{kind}' for m in ('resnet10t', 'vit_tiny') for kind in ('', '_sam_all', '_sam_on')} <= names


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: str(p.relative_to(ROOT / 'hparams')))
def test_recipe_builds_what_its_name_says(recipe, tmp_path):
    args = parse_args(train.build_parser(), ['-c', str(recipe), '--data-dir', str(tmp_path), '--device', 'cpu'])
    args.rank = 1  # says nothing
    model = build_model(args)
    sam = create_sam(args, create_optimizer(args, model), model)
    kind = recipe.stem.split('_sam_')[-1] if '_sam_' in recipe.stem else None
    if kind is None:
        assert sam is None
    else:
        assert isinstance(sam, SAM)
        assert sam.params == {'on': 'onlynorm', 'all': 'all'}[kind]


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda p: str(p.relative_to(ROOT / 'hparams')))
def test_recipe_opens_with_what_it_is(recipe):
    assert recipe.read_text().startswith('# ')
