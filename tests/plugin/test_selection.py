"""Which parameters count as those of normalization layers, over all of timm."""
import re
import warnings

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from torch import nn

from timm_sam import select_parameters
from timm_sam.norms import NORM_TYPES, is_norm
from timm_sam.selection import SELECTIONS

# What may own parameters under these names, and is no normalization layer; everything else with "norm" in the name of
# its class is one. A class of a later timm that is neither fails the test below: decide, and add it to one of the two.
NOT_NORMS = {'NormFreeBlock', 'EvaAttention'}
NORMS = {
    'BatchNorm1d', 'BatchNorm2d', 'BatchNormAct2d', 'EvoNorm2dS0', 'EvoNorm2dS0a', 'FilterResponseNormTlu2d',
    'GlobalResponseNorm', 'GroupNorm', 'GroupNorm1', 'GroupNorm1NoBias', 'GroupNormAct', 'LayerNorm', 'LayerNorm2d',
    'LayerNorm2dNoBias', 'LayerNormAct2d', 'LayerNormNoBias', 'RmsNorm', 'RmsNorm2d', 'RmsNormAct2d', 'RmsNormFp32',
    'SimpleNorm2d',
}


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # timm's own, of models that do not matter here
        return timm.create_model(name, **kwargs)


def one_model_of_every_family() -> list[str]:
    names = [sorted(timm.list_models(module=m), key=lambda n: (len(n), n)) for m in timm.list_modules()]
    return [n[0] for n in names if n]


def owners(model: nn.Module) -> dict[str, str]:
    """Parameter name -> class of the module that owns it."""
    return {
        f'{prefix}.{name}' if prefix else name: type(module).__name__
        for prefix, module in model.named_modules() for name, _ in module.named_parameters(recurse=False)
    }


def looks_like_norm(cls: str) -> bool:
    return bool(re.search('norm|ResponseN|abn', cls, re.IGNORECASE))


def test_one_model_of_every_family_of_timm_is_looked_at():
    assert len(one_model_of_every_family()) >= 80


@pytest.mark.parametrize('name', [*one_model_of_every_family(), 'resnetv2_50d_frn', 'resnetv2_50d_evos', 'resnet50_gn',
                                  'convnextv2_atto', 'poolformerv2_s12', 'convnext_atto_rms', 'convnext_zepto_rms',
                                  'resmlp_12_224', 'hgnetv2_b0', 'cait_xxs24_224'])
def test_no_normalization_parameter_is_missed_and_nothing_else_is_taken(name):
    model = on_meta(name)
    expected = {n for n, cls in owners(model).items() if cls in NORMS}
    unknown = {cls for cls in owners(model).values() if looks_like_norm(cls)} - NORMS - NOT_NORMS
    assert not unknown, f'{unknown}: norm or not?'
    if not expected:
        with pytest.raises(ValueError, match='selects nothing'):
            select_parameters(model)
        return
    assert {n for n, _ in select_parameters(model)} == expected


@pytest.mark.parametrize('name, tensors, parameters, total', [
    ('resnet50', 106, 53_120, 25_557_032),
    ('vit_small_patch32_224', 50, 19_200, 22_878_952),
])
def test_reference_counts(name, tensors, parameters, total):
    model = on_meta(name)
    selected = select_parameters(model)
    assert (len(selected), sum(p.numel() for _, p in selected)) == (tensors, parameters)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for _, p in select_parameters(model, 'nonorm')) == total - parameters
    assert len(select_parameters(model, 'all')) == len(list(model.parameters()))


def test_batch_norm_in_a_downsample_branch_is_found_though_its_name_has_no_norm_in_it():
    names = [n for n, _ in select_parameters(on_meta('resnet50'))]
    assert [n for n in names if 'downsample' in n] == [
        f'layer{i}.0.downsample.1.{kind}' for i in (1, 2, 3, 4) for kind in ('weight', 'bias')]


def test_model_without_normalization_is_a_one_line_error_that_says_what_it_has():
    with pytest.raises(ValueError, match=r"onlynorm.*ScaledStdConv2d.*params='all'") as e:
        select_parameters(on_meta('dm_nfnet_f0'))
    assert '\n' not in str(e.value)


def test_gain_of_norm_free_blocks_and_weight_standardized_convolutions_is_not_taken():
    names = {n for n, _ in select_parameters(on_meta('dm_nfnet_f0'), 'nonorm')}
    assert any(n.endswith('skipinit_gain') for n in names)
    assert any(n.endswith('.gain') for n in names)


def test_filter_keeps_names_that_match_anywhere():
    selected = [n for n, _ in select_parameters(on_meta('resnet50'), filter='layer4')]
    assert len(selected) == 20
    assert all(n.startswith('layer4.') for n in selected)
    late = [n for n, _ in select_parameters(on_meta('vit_small_patch32_224'), filter=r'blocks\.(8|9|10|11)\.')]
    assert late == [f'blocks.{b}.norm{k}.{kind}' for b in (8, 9, 10, 11) for k in (1, 2) for kind in ('weight', 'bias')]


def test_order_is_that_of_the_model_and_each_parameter_comes_once():
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.LayerNorm(3))
    model.append(model[0])
    assert [n for n, _ in select_parameters(model)] == ['0.weight', '0.bias', '2.weight', '2.bias']
    assert [n for n, _ in select_parameters(model, 'nonorm')] == ['1.weight', '1.bias']


def test_frozen_parameters_are_never_selected():
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.LayerNorm(3))
    model[0].requires_grad_(False)
    assert [n for n, _ in select_parameters(model)] == ['2.weight', '2.bias']
    assert [n for n, _ in select_parameters(model, 'all')] == ['1.weight', '1.bias', '2.weight', '2.bias']


def test_norm_that_is_shared_or_parametrized_away_from_its_type_does_not_confuse_the_rest():
    model = nn.Sequential(nn.LayerNorm(3, elementwise_affine=False), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3))
    with pytest.raises(ValueError, match='selects nothing'):
        select_parameters(model)


@pytest.mark.parametrize('wrap', [convert_splitbn_model, convert_sync_batchnorm], ids=['split', 'sync'])
def test_converted_batch_norm_still_counts(wrap):
    model = timm.create_model('test_resnet')
    before = {n for n, _ in select_parameters(model)}
    after = {n for n, _ in select_parameters(wrap(model))}
    assert before <= after
    assert all(is_norm(dict(model.named_modules())[n.rsplit('.', 1)[0]]) for n in before)


def test_every_normalization_class_of_torch_and_timm_is_a_norm_type():
    found = {
        cls for home in (nn, timm.layers) for name, cls in vars(home).items()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and looks_like_norm(name)
        and not name.startswith('Lazy')  # becomes the class without Lazy at its first call
    }
    others = {
        'ConvNormAct', 'ConvNormActAa', 'SeparableConvNormAct', 'NormMlpClassifierHead', 'ClNormMlpClassifierHead',
        'GlobalResponseNormMlp',  # blocks that contain one
        'CrossMapLRN2d', 'LocalResponseNorm',  # without parameters
    }
    assert {cls.__name__ for cls in found if not issubclass(cls, NORM_TYPES)} - others == set()


@pytest.mark.full
def test_names_have_no_prefix_of_compile_or_data_parallel_wrappers():
    model = timm.create_model('test_vit')
    plain = [n for n, _ in select_parameters(model)]
    assert [n for n, _ in select_parameters(torch.compile(model))] == plain
    assert [n for n, _ in select_parameters(nn.DataParallel(model))] == plain


def test_scripted_model_selects_the_same_parameters():
    model = timm.create_model('test_resnet', scriptable=True)
    plain = select_parameters(model)
    scripted = select_parameters(torch.jit.script(model))
    assert [n for n, _ in scripted] == [n for n, _ in plain]


def test_complex_parameters_are_refused_where_they_are_selected():
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.LayerNorm(3))
    assert len(select_parameters(model)) == 2
    with pytest.raises(ValueError, match=r"params='all' selects complex parameters \(they are 0.weight, 0.bias\)") as e:
        select_parameters(model, 'all')
    assert 'torch.view_as_complex' in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('kwargs, words', [
    ({'params': 'norm'}, ['norm', *SELECTIONS]),
    ({'filter': 'layer['}, ['layer[', 'regular expression']),
    ({'filter': 'no_such_layer'}, ['no_such_layer', '106', 'bn1.weight']),
])
def test_wrong_arguments_are_value_errors_that_name_value_and_remedy(kwargs, words):
    with pytest.raises(ValueError) as e:
        select_parameters(on_meta('resnet50'), **kwargs)
    assert all(w in str(e.value) for w in words)
    assert '\n' not in str(e.value)
