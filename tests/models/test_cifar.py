"""The CIFAR networks: sizes, heads, features, stochastic depth, initialization, and how timm knows them."""
import json
import math

import pytest
import timm
import torch
import yaml
from support.cifar import NETWORKS, STAGES, images
from support.processes import python, run
from support.running import in_process, quiet_about_timm
from support.validating import result, run_validate
from timm.layers import DropPath
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_sam import select_parameters, train, validate
from timm_sam.models import cifar


def create(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def test_all_networks_are_known_to_timm():
    assert set(timm.list_models('cifar_*')) == NETWORKS.keys() == set(cifar.default_cfgs)


@pytest.mark.full
def test_networks_are_known_to_the_commands_and_not_to_who_imports_the_package(tmp_path):
    script = ('import json, timm, timm_sam; before = timm.list_models("*cifar*"); import timm_sam.training.factory; '
              'print(json.dumps([before, len(timm.list_models("*cifar*"))]))')
    done = run(python('-c', script), tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out) == [[], 9]


@pytest.mark.full
@pytest.mark.parametrize('name', NETWORKS)
def test_parameters_are_those_of_the_architecture(name):
    expected = NETWORKS[name]
    for classes, count in zip((10, 100), expected.parameters):
        model = create(name, num_classes=classes)
        selected = {params: select_parameters(model, params) for params in ('all', 'onlynorm', 'nonorm')}
        sizes = {params: sum(p.numel() for _, p in found) for params, found in selected.items()}
        assert sum(p.numel() for p in model.parameters()) == sizes['all'] == count
        assert (sizes['onlynorm'], len(selected['onlynorm'])) == expected.norm
        names = [{n for n, _ in selected[params]} for params in ('onlynorm', 'nonorm')]
        assert names[0] | names[1] == {n for n, _ in model.named_parameters()}
        assert not names[0] & names[1]


@pytest.mark.full
def test_share_of_normalization_in_the_wide_resnet_is_the_papers():
    model = create('cifar_wrn28_10', num_classes=100)
    norm = sum(p.numel() for _, p in select_parameters(model, 'onlynorm'))
    assert f'{100 * (1 - norm / sum(p.numel() for p in model.parameters())):.2f}' == '99.95'  # "sparsity" of Table 5


@pytest.mark.full
@pytest.mark.parametrize('name', NETWORKS)
def test_outputs_features_and_heads(name):
    expected, x = NETWORKS[name], images(2)
    model = create(name, num_classes=100).eval()
    assert model.num_features == expected.features
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 100)
        features = model.forward_features(x)
        assert features.shape[:2] == (2, expected.features)
        assert torch.equal(model.forward_head(features), y)
        before = model.forward_head(features, pre_logits=True)
        assert before.shape == (2, expected.features)
        model.reset_classifier(0)
        assert torch.equal(model(x), before)
        model.reset_classifier(7)
        assert model(x).shape == (2, 7)
        grey = create(name, in_chans=1, num_classes=0).eval()
        assert grey(images(2)[:, :1]).shape == (2, expected.features)
    assert model.get_submodule(model.pretrained_cfg['classifier']) is model.get_classifier()
    assert model.get_submodule(model.pretrained_cfg['first_conv']).in_channels == 3
    assert features.shape[2:] == model.pretrained_cfg['pool_size']


@pytest.mark.full
@pytest.mark.parametrize('name', NETWORKS)
def test_features_of_each_stage(name):
    expected, x = NETWORKS[name], images(2)
    extractor = create(name, features_only=True).eval()
    assert extractor.feature_info.channels() == expected.channels
    assert extractor.feature_info.reduction() == expected.reductions
    model = create(name).eval()
    with torch.no_grad():
        taken = extractor(x)
        last, intermediates = model.forward_intermediates(x)
        for a, b, channels, reduction in zip(taken, intermediates, expected.channels, expected.reductions):
            assert a.shape == (2, channels, 32 // reduction, 32 // reduction)
            assert torch.equal(a, b)
        assert len(taken) == len(intermediates) == len(expected.channels)
        assert torch.equal(last, model.forward_features(x))
        first, = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
        assert torch.equal(first, intermediates[1])
        assert model.prune_intermediate_layers([1]) == [1]
        assert torch.equal(model(x), intermediates[1])


@pytest.mark.full
def test_last_feature_of_the_wide_resnet_is_normalized_where_asked():
    model, x = create('cifar_wrn28_10').eval(), images(1)
    with torch.no_grad():
        raw, = model.forward_intermediates(x, 1, intermediates_only=True)
        normalized, = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
        assert torch.equal(normalized, model.norm(raw))
        assert torch.equal(normalized, model.forward_features(x))


@pytest.mark.full
@pytest.mark.parametrize('name', STAGES)
def test_stochastic_depth_rises_linearly_from_the_first_block(name):
    blocks, _ = STAGES[name]
    rates = [m.drop_prob for m in create(name, drop_path_rate=0.2).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.2 * i / (blocks - 1) for i in range(1, blocks)])
    assert not any(isinstance(m, DropPath) for m in create(name, drop_path_rate=0.0).modules())


@pytest.mark.parametrize('name', ['cifar_vgg13_bn', 'cifar_densenet100'])
def test_no_stochastic_depth_without_residual_blocks(name):
    with pytest.raises(TypeError, match='drop_path_rate'):
        create(name, drop_path_rate=0.1)


def test_drop_block_is_refused_where_there_is_no_place_for_it():
    with pytest.raises(ValueError, match='drop_block_rate 0.1: pre-activation'):
        create('cifar_wrn28_10', drop_block_rate=0.1)
    assert any(type(m).__name__ == 'DropBlock2d' for m in create('cifar_resnet56', drop_block_rate=0.1).modules())


@pytest.mark.full
@pytest.mark.parametrize('name', NETWORKS)
def test_initialization(name):
    model = create(name)
    fan_in = name == 'cifar_densenet100'  # timm's own
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            outer = module.in_channels // module.groups if fan_in else module.out_channels
            std = math.sqrt(2 / (outer * math.prod(module.kernel_size)))
            found = module.weight.std(unbiased=False).item()
            # the standard deviation of n normal numbers is known to 1 / sqrt(2 n)
            assert found == pytest.approx(std, rel=5 / math.sqrt(2 * module.weight.numel())), path
            assert module.bias is None or not module.bias.any(), path
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
            assert (module.weight == 1).all() and not module.bias.any(), path  # the last of a block, too
        elif isinstance(module, nn.Dropout):
            assert module.p == 0
    linear = model.get_classifier()
    if name.startswith('cifar_vgg'):
        assert linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
    else:  # torch's default is uniform in this range
        bound = 1 / math.sqrt(linear.in_features)
        assert 0.95 * bound < linear.weight.abs().max().item() <= bound
    assert linear.bias.any() == (name not in ('cifar_densenet100', *(n for n in NETWORKS if 'vgg' in n)))


@pytest.mark.parametrize('name', NETWORKS)
def test_flops_are_those_of_the_architecture(name):
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=10).eval()
        x = torch.empty(1, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == pytest.approx(2e9 * NETWORKS[name].gmac, rel=1e-3)


@pytest.mark.parametrize('name', NETWORKS)
def test_there_are_no_weights_to_load(name):
    with torch.device('meta'), pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('main', [train.main, validate.main], ids=['train', 'validate'])
def test_commands_say_in_a_line_that_there_are_no_weights(main, tmp_path):
    (tmp_path / 'val' / 'a').mkdir(parents=True)
    command = ['--model', 'cifar_resnet56', '--pretrained', '--data-dir', '.', '--device', 'cpu']
    done = in_process(main, command, tmp_path)
    assert done.code == 2
    assert 'No pretrained weights exist for cifar_resnet56' in done.err.strip().splitlines()[-1]
    assert 'Traceback' not in done.err


@pytest.mark.full
def test_run_is_trained_and_evaluated_as_it_was_validated(run_in, image_folder, tmp_path):
    done = run_in(tmp_path, '--model cifar_resnet56 --sam-variant sam --sam-rho 0.1 --aa cifar10 --lr 0.001')
    assert done.code == 0, done.err
    summary, = done.summary()
    command = f'--device cpu -j 0 --data-dir {image_folder} --checkpoint out/run/last.pth.tar'
    with quiet_about_timm():
        evaluated = run_validate(tmp_path, '', command)
    found = result(evaluated)
    assert found['model'] == 'cifar_resnet56'
    assert found['top1'] == pytest.approx(float(summary['eval_top1']), abs=1e-3)
    loss = float(evaluated.log('Test')[-1].split('Loss: ')[1].split()[0])
    assert loss == pytest.approx(float(summary['eval_loss']), abs=1e-3)
    args = yaml.safe_load((tmp_path / 'out' / 'run' / 'args.yaml').read_text())
    assert (args['model'], args['aa']) == ('cifar_resnet56', 'cifar10')
    assert list(timm.get_pretrained_cfg('cifar_resnet56').std) == [0.2023, 0.1994, 0.2010]


def test_checkpointing_is_refused_where_timm_has_none(tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    command = ['--model', 'cifar_vgg13_bn', '--grad-checkpointing', '--data-dir', '.', '--device', 'cpu']
    done = in_process(train.main, command, tmp_path)
    assert done.code == 2
    assert done.err.strip().splitlines()[-1] == \
        'train.py: error: --grad-checkpointing: cifar_vgg13_bn has none; leave it out'
