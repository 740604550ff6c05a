"""Names of evaluation sets: published ones in any case, and what looks like one."""
import pytest
from support.validating import run_validate

from timm_sam.cli.errors import OptionError
from timm_sam.evaluation.options import build_validate_parser, parse_validate_args
from timm_sam.evaluation.sets.folders import PUBLISHED
from timm_sam.evaluation.sets.names import KNOWN, canonical, like, meant


def test_published_sets_are_known_in_any_case():
    assert set(PUBLISHED) < set(KNOWN)
    for known in KNOWN:
        for name in (known, known.upper(), known.title()):
            assert canonical(name) == meant(name, 'x') == known and like(canonical(name)) is None


@pytest.mark.parametrize('name', ['validation', 'Blur', 'imagenet-blur', 'imagenet-xx', 'val2', 'C', 'objects'])
def test_other_names_stay_as_they_are(name):
    assert canonical(name) == meant(name, 'x') == name and like(name) is None


@pytest.mark.parametrize('name, known', [
    ('ImageNet_A', 'imagenet-a'), ('imagenetr', 'imagenet-r'), ('imagenet-v2', 'imagenetv2'),
    ('ObjectNet.', 'objectnet'), ('ImageNet C', 'imagenet-c'), ('imagenetReal', 'imagenet-real')])
def test_names_that_differ_by_signs_are_asked_about(name, known):
    with pytest.raises(OptionError, match=f'^--eval {name}=x: is this {known}, .* Write {known}=') as caught:
        meant(name, f'--eval {name}=x')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name, known', [('imagnet-r', 'imagenet-r'), ('ImageNet-Sketh', 'imagenet-sketch'),
                                         ('objecnet', 'objectnet'), ('obejctnet', 'objectnet'),
                                         ('imagenet-p', 'imagenet-a')])
def test_names_that_are_almost_one_are_warned_of(name, known):
    assert meant(name, 'x') == name and like(name) is not None
    assert name == 'imagenet-p' or like(name) == known  # that one is as near to three of them


@pytest.mark.parametrize('name', ['fog', 'fog/6', 'fog/1/2', 'speckle_noise/1', ''])
def test_parts_of_imagenet_c_are_those_that_there_are(name):
    assert meant('ImageNet-C/Fog/3', 'x') == 'imagenet-c/fog/3'
    with pytest.raises(OptionError, match='^--eval x: imagenet-c has no such part: write imagenet-c/CORRUPTION'):
        meant(f'imagenet-c/{name}', '--eval x')


def test_command_line_takes_any_case(tmp_path):
    args, _ = parse_validate_args(build_validate_parser(), [
        '--device', 'cpu', '--model', 'test_resnet', '--eval', f'ImageNet-A={tmp_path}', f'Mine={tmp_path}',
        '--attack', 'l2=1', '--attack-set', 'IMAGENET-A'])
    assert args.eval == [('imagenet-a', str(tmp_path)), ('Mine', str(tmp_path))] and args.attack_set == 'imagenet-a'


@pytest.mark.parametrize('names, words', [
    ('ImageNet-A=. imagenet-a=.', '--eval names imagenet-a twice'),
    ('ImageNet_A=.', '--eval ImageNet_A=.: is this imagenet-a,')])
def test_mistakes_are_one_line(tmp_path, names, words):
    done = run_validate(tmp_path, f'--eval {names}')
    assert done.code == 2 and words in done.last_line


def test_warning_names_the_set(fitted, tmp_path):
    done = run_validate(tmp_path, f'--eval imagnet={fitted.data}/validation blur={fitted.data}/train', fitted.base)
    assert done.code == 0
    (line,) = [line for line in done.err.splitlines() if 'is meant' in line]
    assert f'write imagenet={fitted.data}/validation' in line
