"""What train.py builds of its options: how a classifier begins, and which optimizers there are."""
import sys

import pytest
import torch
from support.command_lines import DEIT
from support.loop import CPU
from torch import nn

from timm_sam import train
from timm_sam.cli.errors import OptionError
from timm_sam.training import factory
from timm_sam.training.options import parse_args


def built(options):
    torch.manual_seed(0)
    return factory.build_model(parse_args(train.build_parser(), f'--device cpu --data-dir . {options}'.split()), CPU)


def test_both_classifiers_of_a_distilled_model_are_scaled_and_shifted():
    plain, changed = built(DEIT), built(f'{DEIT} --head-init-scale 0.5 --head-init-bias -3')
    for head, other in zip(plain.get_classifier(), changed.get_classifier(), strict=True):
        assert torch.equal(other.weight, head.weight * 0.5) and other.weight.any() and (other.bias == -3).all()
    assert torch.equal(plain.cls_token, changed.cls_token)


@pytest.mark.parametrize('option', ['--head-init-scale 0.5', '--head-init-bias -3.0'])
def test_model_without_a_classifier_has_none_to_begin_with(option):
    features = '--model vit_small_patch14_dinov2 --model-kwargs img_size=28 embed_dim=16 depth=1 num_heads=2'
    with pytest.raises(OptionError, match=f'^{option}: the classifier of vit_small_patch14_dinov2 has no such'):
        built(f'{features} {option}')


def test_optimizer_whose_package_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setitem(sys.modules, 'apex', None)
    args = parse_args(train.build_parser(), ['--device', 'cpu', '--data-dir', '.', '--opt', 'fusedsgd'])
    with pytest.raises(OptionError, match='^--opt fusedsgd: APEX optimizers require apex to be installed'):
        factory.create_optimizer(args, CPU, nn.Linear(2, 2), 0.1)


@pytest.mark.parametrize('options', ['--opt adan --opt-betas 0.9 0.9 0.9', '--opt adafactor --opt-betas 0.9',
                                     '--opt lookahead_adamw --opt-betas 0.9 0.99', '--opt sgd --opt-betas 0.9'])
def test_betas_are_as_many_as_the_optimizer_takes(options):
    args = parse_args(train.build_parser(), f'--device cpu --data-dir . {options}'.split())
    module = nn.Linear(2, 2)
    optimizer = factory.create_optimizer(args, CPU, module, 0.1)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
