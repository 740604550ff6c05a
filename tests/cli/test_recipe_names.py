"""Recipes by name, with and without ending: a file of one's own wins; an unknown name, and what is like it."""
import pytest
import yaml
from support.recipes import HPARAMS, RECIPES, path_of
from support.running import in_process

from timm_sam import train
from timm_sam.cli import recipes
from timm_sam.cli.errors import OptionError
from timm_sam.cli.parser import load_yaml
from timm_sam.training.options import parse_args

NAME = 'imagenet/resnet50/layerwise_l2_onlynorm'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_all_recipes_have_a_name_and_are_found_by_it():
    named = {str(path.relative_to(HPARAMS).with_suffix('')) for path in RECIPES}
    assert len(named) > 200 and named <= {*recipes.names()}
    assert not any(name.endswith('base') for name in recipes.names())
    for name in recipes.names():
        assert recipes.find(name) == str(HPARAMS / f'{name}.yaml')


@pytest.mark.parametrize('name', [NAME, f'{NAME}.yaml', f'hparams/{NAME}.yaml', f'hparams/{NAME}'])
def test_recipe_by_name_sets_what_its_file_and_its_bases_say(name, tmp_path):
    where = ['--data-dir', str(tmp_path), '--device', 'cpu']
    by_path = parse_args(train.build_parser(), [*where, '-c', str(path_of('imagenet/resnet50', NAME.split('/')[2]))])
    by_name = parse_args(train.build_parser(), [*where, '-c', name])
    assert vars(by_name) == {**vars(by_path), 'config': name}
    assert (by_name.model, by_name.sam_variant, by_name.scale) == ('resnet50', 'layerwise_l2', [0.08, 1.0])


@pytest.mark.parametrize('given, own', [
    (NAME, NAME), (f'{NAME}.yaml', f'{NAME}.yaml'), (NAME, f'{NAME}.yaml'), ('digits', 'digits'), ('own', 'own.yaml')])
def test_file_of_ones_own_wins(tmp_path, given, own):
    (tmp_path / own).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / own).write_text('lr: 7\n')
    assert load_yaml(given, train.build_parser())[0] == {'lr': 7.0}


def test_folder_of_a_recipes_name_is_in_no_ones_way(tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    assert load_yaml(NAME, train.build_parser())[0]['model'] == 'resnet50'


@pytest.mark.parametrize('name', [NAME, f'{NAME}.yaml'])
def test_file_of_ones_own_builds_on_a_recipe(tmp_path, name):
    (tmp_path / 'own.yaml').write_text(yaml.safe_dump({'base': name, 'lr': 7}))
    values, _ = load_yaml('own.yaml', train.build_parser())
    assert values == {**load_yaml(NAME, train.build_parser())[0], 'lr': 7.0}


def test_base_is_relative_to_the_file_before_it_is_a_recipe(tmp_path):
    folder = tmp_path / 'of_mine'
    (folder / NAME).parent.mkdir(parents=True)
    (folder / f'{NAME}.yaml').write_text('lr: 7\n')
    (folder / 'own.yaml').write_text(f'base: {NAME}\n')
    assert load_yaml('of_mine/own.yaml', train.build_parser())[0] == {'lr': 7.0}


@pytest.mark.parametrize('name, words', [
    ('imagenet/resnet50/layerwise_l2_onlynrom', [NAME]),
    ('imagenet/resnet50/layerwise_l2_onlynrom.yaml', [NAME]),
    ('resnet50/layerwise_l2_onlynorm', [NAME]),
    ('layerwise_l2_onlynorm', ['/layerwise_l2_onlynorm, ']),
    ('imagenet/resnet50', ['imagenet/resnet50/']),
    ('qqqqqqqq', ['give the path of a YAML file']),
    ('../hparams/' + NAME, []), (f'imagenet/../{NAME}', []), ('/' + NAME, []), ('', []), ('a\0b', []), ('\udcff', []),
    ('x' * 5000, []),
])
def test_unknown_name_is_one_line_with_those_that_are_like_it(name, words):
    with pytest.raises(OptionError) as e:
        recipes.find(name)
    assert 'No such file, and no recipe of this name; ' in str(e.value)
    assert [word for word in words if word not in str(e.value)] == []


def test_command_refuses_an_unknown_name_with_code_2_and_writes_nothing(tmp_path):
    done = in_process(train.main, ['-c', 'imagenet/resnet50/sam_al', '--data-dir', '.'], tmp_path)
    assert (done.code, done.out) == (2, '') and done.err.count('\n') == 1
    assert done.err.startswith('train.py: error: --config imagenet/resnet50/sam_al: No such file')
    assert 'did you mean imagenet/resnet50/sam_all' in done.err and not any(tmp_path.iterdir())


def test_folder_inside_the_package_goes_before_the_one_beside_it(tmp_path, monkeypatch):
    """Of an installed package, beside which another package's folder may lie."""
    package = tmp_path / 'site-packages' / 'timm_sam'
    (package / 'cli').mkdir(parents=True)
    (package.parent / 'hparams').mkdir()
    monkeypatch.setattr(recipes, '__file__', str(package / 'cli' / 'recipes.py'))
    assert recipes.folder() == str(package.parent / 'hparams')
    (package / 'hparams').mkdir()
    assert recipes.folder() == str(package / 'hparams')
