"""The paper's ablations: what of normalization layers is trained, what decays, and dropout behind them."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from support.loop import CPU
from support.models import TinyNet, assert_identical, batch, flops, one_step, sam_on, weights, whole_graphs
from support.states import differences
from timm import layers
from timm.layers import BatchNormAct2d, FilterResponseNormAct2d
from timm.layers.grn import GlobalResponseNorm
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from torch import nn

import timm_sam
import timm_sam.models
from timm_sam import train
from timm_sam.cli.device import Process
from timm_sam.cli.errors import OptionError
from timm_sam.norms import is_norm, norm_parameters
from timm_sam.runs.sameness import changed_options
from timm_sam.training.factory import create_optimizer, place_model
from timm_sam.training.norm_drop import drop_behind_norms
from timm_sam.training.options import parse_args

SAM = '--sam-variant sam --sam-rho 0.05'
SAM_ALL = f'{SAM} --sam-params all'


def parse(options):
    return parse_args(train.build_parser(), f'--device cpu --data-dir . {options}'.split())


def norm_names(model):
    owned = {id(p) for m in model.modules() if is_norm(m) for p in norm_parameters(m)}
    return {name for name, p in model.named_parameters() if id(p) in owned}


@pytest.fixture(scope='module')
def resnet():
    return timm.create_model('test_resnet', num_classes=4)


# ---- what decays

def decays(model, options):
    """What --wd-params makes of a model: {name: (weight decay, lr scale)}."""
    args = parse(f'--weight-decay 0.05 {options}')
    optimizer = create_optimizer(args, CPU, model, 0.1)
    found = {id(p): (group['weight_decay'], group.get('lr_scale', 1.0))
             for group in optimizer.param_groups for p in group['params']}
    assert len(found) == sum(len(group['params']) for group in optimizer.param_groups)
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('which, count', [
    ('all', 25_557_032), ('nonorm', 25_503_912), ('none', 0), ('timm', 25_502_912)])
def test_so_many_parameters_of_a_resnet50_decay(which, count):
    with torch.device('meta'):
        model = timm.create_model('resnet50')
    found = decays(model, f'--opt momentum --wd-params {which}')
    assert sum(model.get_parameter(name).numel() for name, (decay, _) in found.items() if decay == 0.05) == count
    assert {decay for decay, _ in found.values()} <= {0, 0.05}


def test_names_that_the_model_exempts_decay_with_all_and_nonorm():
    model = timm.create_model('test_vit', img_size=32)
    assert {'pos_embed', 'cls_token'} & model.no_weight_decay()
    for which in ('all', 'nonorm'):
        found = decays(model, f'--wd-params {which}')
        spared = {name for name, (decay, _) in found.items() if not decay}
        assert spared == (norm_names(model) if which == 'nonorm' else set())


def test_layer_decay_stays_as_timm_makes_it(resnet):
    timms, ours = (decays(resnet, f'--layer-decay 0.5 --layer-decay-min-scale 0.1 --wd-params {which}')
                   for which in ('timm', 'nonorm'))
    assert {name: scale for name, (_, scale) in timms.items()} == {name: scale for name, (_, scale) in ours.items()}
    assert len({scale for _, scale in ours.values()}) > 2
    assert {name for name, (decay, _) in ours.items() if not decay} == norm_names(resnet)


def test_default_makes_the_groups_of_timm(resnet):
    args = parse('--opt adamw --weight-decay 0.05 --lr 0.1')
    ours, timms = create_optimizer(args, CPU, resnet, 0.1), create_optimizer_v2(resnet, **optimizer_kwargs(args))
    assert differences(ours.state_dict(), timms.state_dict()) == [] and ours.defaults == timms.defaults


@pytest.mark.filterwarnings("ignore:.*'opt_einsum':UserWarning")
def test_every_optimizer_of_timm_takes_the_groups(resnet):
    tried = 0
    for name in list_optimizers(exclude_filters=['bnb*', 'fused*']):
        found = decays(resnet, f'--opt {name} --wd-params nonorm')
        assert {n for n, (decay, _) in found.items() if not decay} == norm_names(resnet), name
        tried += 1
    assert tried > 50


@pytest.mark.parametrize('patterns', ['', "fallback_list=['fc.*']", 'fallback_no_weight_decay=True'])
def test_what_a_hybrid_optimizer_treats_another_way_stays(resnet, patterns):
    def fallback(which):
        args = parse('--opt muon --weight-decay 0.05')
        args.wd_params = which
        args.opt_kwargs = {'fallback_list': ['fc.*']} if 'fc' in patterns else (
            {'fallback_no_weight_decay': True} if patterns else {})
        return {id(p) for group in create_optimizer(args, CPU, model, 0.1).param_groups
                for p in group['params'] if group.get('use_fallback')}
    model = timm.create_model('test_vit', img_size=32) if 'no_weight' in patterns else resnet
    assert fallback('all') == fallback('timm') and bool(fallback('all')) == bool(patterns)


# ---- what is trained

def placed(options, model, process=CPU):
    return place_model(parse(options), process, model, None)


def test_fixed_layers_scale_by_one_and_shift_by_nothing():
    model = timm.create_model('test_resnet')
    assert any((model.get_parameter(name) == 0).all() for name in norm_names(model) if name.endswith('weight'))
    before = weights(model)
    placed('--norm-params fixed', model)
    for name, p in model.named_parameters():
        assert p.requires_grad == (name not in norm_names(model))
        expected = before[name] if p.requires_grad else torch.full_like(p, float(name.endswith('weight')))
        assert torch.equal(p, expected), name


def test_layers_without_plain_scale_and_shift_keep_what_they_begin_with():
    model = nn.Sequential(GlobalResponseNorm(4), layers.EvoNorm2dS0(4), layers.FilterResponseNormTlu2d(4))
    before = weights(model)
    assert len(before) == 8
    placed('--norm-params fixed', model)
    assert not any(p.requires_grad for p in model.parameters())
    assert_identical(weights(model), before)


def test_only_norm_layers_of_each_split_are_trained():
    model = placed('--norm-params only --split-bn --aug-splits 2', timm.create_model('test_resnet'))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == norm_names(model)
    assert any('aux_bn' in n for n in norm_names(model))


@pytest.mark.parametrize('options', ['--norm-params fixed', '--norm-params only', '--norm-drop 0.1'])
def test_model_without_norm_layers_is_one_line(options):
    with pytest.raises(OptionError, match=f'^{options}: .*choose another --model, or leave it out$'):
        placed(f'--model vgg11 {options}', nn.Linear(2, 2))


def test_update_of_norm_layers_alone_costs_two_units_and_with_sam_four():
    with torch.device('meta'):
        model = timm.create_model('cifar_resnet18')
        x, y = torch.empty(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)

    def loss():
        return F.cross_entropy(model(x), y)

    unit = flops(lambda: loss().backward()) / 3
    placed('--norm-params only', model, Process(torch.device('meta')))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert flops(lambda: loss().backward()) == pytest.approx(2 * unit, rel=0.01)
    sam = timm_sam.SAM(torch.optim.SGD(trained, lr=0.1), model, params='all', rho=0.1, share_forward=False)
    # another function for the pass at w: whether one sees the same input twice cannot be told without numbers
    assert flops(lambda: sam.minimize(loss, ascent_fn=lambda: loss())) == pytest.approx(4 * unit, rel=0.01)


# ---- dropout

def doubled(model, p=0.25):
    """The model, and the same with dropout."""
    other = copy.deepcopy(model)
    assert drop_behind_norms(other, p) == sum(map(is_norm, model.modules()))
    return model, other


MODELS = {'test_resnet': {}, 'test_vit': dict(img_size=32), 'test_efficientnet': {}, 'test_convnext3': {}}


@pytest.mark.parametrize('name', MODELS)
def test_dropout_changes_neither_names_nor_types_nor_evaluation(name):
    model, dropping = doubled(timm.create_model(name, num_classes=4, **MODELS[name]).eval())
    assert list(dropping.state_dict()) == list(model.state_dict())
    assert norm_names(dropping) == norm_names(model)
    for a, b in zip((m for m in model.modules() if is_norm(m)), (m for m in dropping.modules() if is_norm(m))):
        assert isinstance(b, type(a)) and type(b).__name__ == type(a).__name__
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(dropping)(x), model(x))
    dropping.train()
    assert not torch.equal(dropping(x), dropping(x))


LAYERS = {
    'plain': nn.BatchNorm2d(4), 'layer': nn.LayerNorm(8), 'fused': BatchNormAct2d(4, apply_act=False),
    'frn': FilterResponseNormAct2d(4, apply_act=False), 'evo': layers.EvoNorm2dS0(4, group_size=2)}


@pytest.mark.parametrize('name', LAYERS)
def test_what_is_dropped_is_an_output_and_the_rest_grows_by_as_much(name):
    layer, dropping = doubled(LAYERS[name])
    x = torch.randn(32, 4, 8, 8)
    clean, dropped = layer(x), dropping(x)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.testing.assert_close(dropped[kept], clean[kept] / 0.75)


@pytest.mark.parametrize('layer', [BatchNormAct2d, FilterResponseNormAct2d])
def test_dropout_lies_before_the_activation_of_a_layer(layer):
    """Sigmoid of nothing is one half: after it, nothing would be left."""
    _, dropping = doubled(layer(4, act_layer=nn.Sigmoid, inplace=False))
    out = dropping(torch.randn(32, 4, 8, 8))
    assert (out == 0.5).float().mean().item() == pytest.approx(0.25, abs=0.02) and not (out == 0).any()


def test_place_of_a_layer_that_is_taken_is_shared():
    _, dropping = doubled(BatchNormAct2d(4, apply_act=False, drop_layer=lambda: nn.Dropout(1.0)))
    assert not dropping(torch.randn(2, 4, 8, 8)).any()


@pytest.mark.parametrize('model', ['test_resnet', 'test_efficientnet'])
def test_layers_that_are_synchronized_or_split_drop_once(model):
    options = f'--model {model} --norm-drop 0.25'
    apart = Process(torch.device('meta'), rank=1, world_size=2, distributed=True)
    found = [m for m in placed(f'{options} --sync-bn', timm.create_model(model), apart).modules() if is_norm(m)]
    assert all(isinstance(m, nn.SyncBatchNorm) for m in found)
    assert all(hasattr(m, '_norm_drop') != hasattr(m, 'drop') for m in found)
    split = placed(f'{options} --split-bn --aug-splits 2', timm.create_model(model))
    first = next(m for m in split.modules() if is_norm(m)).train()
    out = first(torch.randn(32, first.num_features, 8, 8))
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize('method', ['minimize', 'closure', 'backward', 'primitives'])
def test_both_passes_drop_the_same(method):
    _, model = doubled(TinyNet().double())
    masks = []
    model.norm.register_forward_hook(lambda module, args, out: masks.append(out.detach() == 0))
    sam = sam_on(model)
    for seed in range(2):
        one_step(method, sam, model, seed)
    assert len(masks) == 4 and all(mask.any() for mask in masks)
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize('filter', [r'^norm|^head', r'^gn'])
def test_shared_forward_is_that_of_two_full_ones(filter):
    found = []
    for share in (True, False):
        _, model = doubled(TinyNet().double())
        sam = sam_on(model, params='all', filter=filter, share_forward=share)
        for seed in range(5):  # the first three are checked
            one_step('minimize', sam, model, seed)
        assert ('one forward for both passes' in sam.sharing) == share
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=1e-12)


@pytest.mark.full
@whole_graphs
def test_compiled_model_drops_as_the_eager_one():
    found = []
    for compiled in (False, True):
        _, model = doubled(TinyNet().double())
        if compiled:
            model.compile(backend='aot_eager')
        sam = sam_on(model)
        for seed in range(2):
            torch.manual_seed(seed)
            x, y = batch(seed)
            sam.minimize(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet'])
def test_checkpointed_segments_drop_again_what_they_dropped(name):
    found = []
    torch.manual_seed(0)
    start = timm.create_model(name, num_classes=3, **MODELS[name]).double()
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    for checkpointing in (False, True):
        _, model = doubled(start)
        model.set_grad_checkpointing(checkpointing)
        sam = sam_on(model, params='all')
        torch.manual_seed(1)
        sam.minimize(lambda model=model: F.cross_entropy(model(x), y))
        found.append(weights(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-11)


# ---- the command line

@pytest.mark.parametrize('options, message', [
    ('--norm-params fixed --pretrained', '--norm-params fixed with --pretrained would overwrite'),
    (f'--norm-params fixed --initial-checkpoint {__file__}', '--norm-params fixed with --initial-checkpoint /'),
    (f'--norm-params fixed {SAM}', '--norm-params fixed leaves --sam-params onlynorm nothing to perturb: use'),
    (f'--norm-params only {SAM} --sam-params nonorm', '--norm-params only leaves --sam-params nonorm nothing to pert'),
    ('--norm-params only --kd-model-name x --kd-distill-type feature', '--norm-params only with --kd-distill-type fe'),
    ('--norm-params only --layer-decay 0.9 --layer-decay-no-opt-scale 2', '--layer-decay-no-opt-scale 2: with --layer'),
    ('--norm-params some', "argument --norm-params: invalid choice: 'some'"),
    ('--wd-params some', "argument --wd-params: invalid choice: 'some'"),
    ('--wd-params all --opt-kwargs filter_bias_and_bn=True', '--wd-params all with --opt-kwargs filter_bias_and_bn s'),
    *((f'--norm-drop {p}', f'--norm-drop {p}') for p in ('1', '-0.1', 'nan')),
    ('--norm-drop 0.1 --torchscript', '--norm-drop 0.1 cannot be scripted: leave out --torchscript')])
def test_what_does_not_fit_is_one_line_and_writes_nothing(run_train, options, message):
    done = run_train(options)
    assert done.code == 2 and done.err.count('Traceback') == 0
    assert f'train.py: error: {message}' in done.last_line
    assert not done.folder().exists()


@pytest.mark.parametrize('options', ['--norm-params only', '--norm-drop 0.1', '--wd-params nonorm'])
def test_run_of_another_version_was_without(options):
    now = vars(parse(options))
    name, = (key for key in ('norm_params', 'norm_drop', 'wd_params') if now[key] != getattr(parse(''), key))
    before = {key: value for key, value in now.items() if key not in ('norm_params', 'norm_drop', 'wd_params')}
    assert changed_options(before, now) == [name]
    assert changed_options(before, vars(parse(''))) == []


# ---- runs

@pytest.mark.parametrize('options', ['--model-ema --layer-decay 0.7', '--grad-accum-steps 2 --opt lion --lr 1e-3'])
def test_fixed_layers_are_fixed_to_the_end_and_all_is_nonorm(run_train, options):
    command = f'--norm-params fixed --wd-params all --weight-decay 0.1 {options} {SAM} --sam-params'
    found = {}
    for params in ('all', 'nonorm'):
        done = run_train(f'{command} {params} --experiment {params}')
        assert done.code == 0, done.err[-2000:]
        found[params] = done.checkpoint(params)
    assert differences(found['all']['state_dict'], found['nonorm']['state_dict']) == []
    names = norm_names(timm.create_model('test_resnet', num_classes=4))
    for entry in ('state_dict', *(['state_dict_ema'] if 'ema' in options else [])):
        state = found['all'][entry]
        assert all(torch.equal(state[n], torch.full_like(state[n], float(n.endswith('weight')))) for n in names)
        assert state['layer1.0.bn1.running_mean'].any()
    assert done.log('Weight decay of')


@pytest.mark.parametrize('options', ['--sam-m 4', '--grad-checkpointing --channels-last'])
def test_all_but_norm_layers_stay_at_the_start_and_all_is_onlynorm(run_train, options):
    found = {}
    for params in ('all', 'onlynorm'):
        done = run_train(f'--norm-params only {options} {SAM} --sam-params {params} --experiment {params}')
        assert done.code == 0, done.err[-2000:]
        found[params] = done.checkpoint(params)['state_dict']
    assert differences(found['all'], found['onlynorm']) == []
    torch.manual_seed(parse('').seed)
    before = timm.create_model('test_resnet', num_classes=4).state_dict()
    names = norm_names(timm.create_model('test_resnet', num_classes=4))
    for name, value in before.items():
        if 'running' not in name and 'tracked' not in name:
            assert torch.equal(found['all'][name], value) == (name not in names), name


def test_no_dropout_is_the_same_run_and_some_goes_on_bit_for_bit(run_train):
    runs = {'without': '', 'none': '--norm-drop 0', 'some': '--norm-drop 0.2 --recovery-interval 2'}
    done = {name: run_train(f'{SAM_ALL} --epochs 2 {options} --experiment {name}') for name, options in runs.items()}
    states = {name: done[name].checkpoint(name) for name in runs}
    for entry in ('state_dict', 'optimizer'):
        assert differences(states['none'][entry], states['without'][entry]) == []
    assert differences(states['some']['state_dict'], states['none']['state_dict'])
    assert list(states['some']['state_dict']) == list(states['none']['state_dict'])
    on = run_train(f'{SAM_ALL} --epochs 2 {runs["some"]} --resume out/some/recovery-1-1.pth.tar --experiment on')
    assert on.code == 0, on.err[-2000:]
    for entry in ('state_dict', 'optimizer'):
        assert differences(on.checkpoint('on')[entry], states['some'][entry]) == []
    other = run_train(f'{SAM_ALL} --epochs 2 --norm-drop 0.3 --experiment some --resume auto')
    assert other.code == 2 and 'had another --norm-drop than 0.3' in other.last_line
