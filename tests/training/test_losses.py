"""--loss and what belongs to it: timm's losses by its factory, older flags, mistakes, and SAM's update with each."""
import json
import shlex

import pytest
import torch
from reference import sam_step
from support.loop import CPU
from support.models import SELECTIONS, TinyNet, batch, weights
from timm.loss import (
    LOSS_TYPES,
    MULTI_LABEL_LOSS_TYPES,
    AsymmetricLossMultiLabel,
    AsymmetricLossSingleLabel,
    BinaryCrossEntropy,
    DistributionBalancedLoss,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyBinaryCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
    TwoWayLoss,
    ZlprLoss,
)
from torch import nn

from timm_sam import SAM, train
from timm_sam.cli.errors import OptionError
from timm_sam.training.factory import create_task, num_outputs
from timm_sam.training.losses import create_loss
from timm_sam.training.options import read_args

SEVERAL = '--task multilabel --dataset hfds/several --num-classes 3'


def parse(command):
    return read_args(train.build_parser(), shlex.split(command))


@pytest.fixture
def stats(tmp_path, monkeypatch):
    """A file of statistics of three classes, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'stats.json').write_text(json.dumps({'pos_counts': [2, 4, 5], 'num_samples': 10}))


@pytest.mark.parametrize('command, kind', [
    ('', LabelSmoothingCrossEntropy), ('--smoothing 0', nn.CrossEntropyLoss), ('--mixup 0.2', SoftTargetCrossEntropy),
    ('--loss bce', BinaryCrossEntropy), ('--loss bce --smoothing 0', BinaryCrossEntropy),
    ('--loss asl', AsymmetricLossSingleLabel), ('--loss poly', PolyCrossEntropy),
    ('--loss jsd --aug-splits 3', JsdCrossEntropy),
    (SEVERAL, BinaryCrossEntropy), (f'{SEVERAL} --loss asl', AsymmetricLossMultiLabel),
    (f'{SEVERAL} --loss poly', PolyBinaryCrossEntropy), (f'{SEVERAL} --loss twoway', TwoWayLoss),
    (f'{SEVERAL} --loss zlpr', ZlprLoss), (f'{SEVERAL} --loss db --class-stats stats.json', DistributionBalancedLoss),
])
def test_loss_is_the_one_of_timm(stats, command, kind):
    assert type(create_loss(parse(command))) is kind


def test_every_loss_that_timm_lists_is_among_those(stats):
    for loss in LOSS_TYPES:
        more = {'db': '--class-stats stats.json', 'jsd': '--aug-splits 3'}.get(loss, '')
        task = SEVERAL if loss in MULTI_LABEL_LOSS_TYPES else ''
        assert isinstance(create_loss(parse(f'{task} --loss {loss} {more}')), nn.Module)


@pytest.mark.parametrize('options, values', [
    ('--loss asl --asl-gamma-pos 0.5 --asl-gamma-neg 3 --asl-clip 0.1 --asl-reduction mean',
     {'gamma_pos': 0.5, 'gamma_neg': 3.0, 'clip': 0.1, 'reduction': 'mean'}),
    ('--loss poly --poly-epsilon -1 --poly-gamma 2 --poly-alpha 0.25', {'epsilon': -1.0, 'gamma': 2.0, 'alpha': 0.25}),
    ('--loss twoway --twoway-tp 2 --twoway-tn 3', {'tp': 2.0, 'tn': 3.0}),
    ('--smoothing 0.2 --bce-sum --bce-target-thresh 0.3',
     {'smoothing': 0.2, 'sum_classes': True, 'target_threshold': 0.3}),
])
def test_parameters_reach_the_loss(options, values):
    loss = create_loss(parse(f'{SEVERAL} {options}'))
    assert {name: getattr(loss, name) for name in values} == values


@pytest.mark.parametrize('options, name, expected', [
    ('--loss-pos-weight 2', 'pos_weight', 2.0),
    ('--loss-pos-weight 1,2,3', 'pos_weight', [1.0, 2.0, 3.0]),
    ('--class-stats stats.json --loss-pos-weight neg_pos', 'pos_weight', [4.0, 1.5, 1.0]),
    ('--class-stats stats.json --loss-pos-weight neg_pos --loss-weight-power 0.5', 'pos_weight',
     [2.0, 1.5 ** 0.5, 1.0]),
    ('--class-stats stats.json --loss-pos-weight neg_pos --loss-weight-max 3', 'pos_weight', [3.0, 1.5, 1.0]),
    ('--class-stats stats.json --loss-class-weight inv_freq', 'weight', [30 / 19, 15 / 19, 12 / 19]),
    ('--loss asl --loss-class-weight 1,2,3', 'weight', [1.0, 2.0, 3.0]),
])
def test_weights_of_classes(stats, options, name, expected):
    weight = getattr(create_loss(parse(f'{SEVERAL} {options}')), name)
    torch.testing.assert_close(torch.as_tensor(weight), torch.tensor(expected))


@pytest.mark.parametrize('older, newer, options', [
    ('--bce-loss', '--loss bce', {'loss': 'bce'}),
    ('--jsd-loss --aug-splits 3', '--loss jsd --aug-splits 3', {'loss': 'jsd'}),
    ('--bce-loss --bce-pos-weight 2', '--loss bce --loss-pos-weight 2.0', {'loss': 'bce', 'loss_pos_weight': '2.0'}),
])
def test_older_flags_mean_the_newer_ones_and_warn(caplog, older, newer, options):
    first, second = parse(older), parse(newer)
    older_names = ('bce_loss', 'jsd_loss', 'bce_pos_weight')
    same = {name: value for name, value in vars(first).items() if name not in older_names}
    assert same.items() <= vars(second).items() and options.items() <= same.items()
    flag = older.split()[0]
    assert [r.message for r in caplog.records if 'deprecated' in r.message][0] == (
        f"{flag} is deprecated: use --loss {options['loss']}")


def test_options_of_another_loss_are_warned_of(caplog):
    parse(f'{SEVERAL} --poly-gamma 2 --asl-clip 0.1')
    assert caplog.messages == ['--asl-clip 0.1, --poly-gamma 2.0 without effect: --loss is bce']


@pytest.mark.parametrize('command, words', [
    (f'{SEVERAL} --bce-loss --loss asl', ['--bce-loss', '--loss asl']),
    ('--bce-pos-weight 2 --loss-pos-weight 3 --loss bce', ['--bce-pos-weight 2.0', '--loss-pos-weight 3']),
    (f'{SEVERAL} --loss twoway --mixup 0.5', ['--loss twoway', '--mixup']),
    (f'{SEVERAL} --loss zlpr --smoothing 0.1', ['--loss zlpr', '--smoothing 0.1']),
    (f'{SEVERAL} --loss zlpr --loss-pos-weight 2', ['--loss zlpr', '--loss-pos-weight 2']),
    (f'{SEVERAL} --loss ce', ['--loss ce', '--task multilabel']),
    ('--loss zlpr', ['--loss zlpr', '--task multilabel']),
    ('--loss jsd', ['--loss jsd', '--aug-splits 0']),
    ('--bce-sum', ['--bce-sum', '--loss bce', 'ce']),
    ('--loss asl --mixup 0.2', ['--loss asl', '--mixup 0.2']),
    ('--loss poly --poly-gamma 2', ['--loss poly', '--poly-gamma 2.0']),
    (f'{SEVERAL} --loss db', ['--loss db', '--class-stats']),
    (f'{SEVERAL} --loss-pos-weight neg_pos', ['--loss-pos-weight neg_pos', '--class-stats']),
    (f'{SEVERAL} --class-stats stats.json --loss-pos-weight inv_freq', ['--loss-pos-weight inv_freq', 'neg_pos']),
    (f'{SEVERAL} --loss-class-weight nowhere.json', ['--loss-class-weight nowhere.json', 'give a number']),
    (f'{SEVERAL} --class-stats nowhere.json', ['--class-stats nowhere.json', 'pos_counts']),
    (f'{SEVERAL} --loss-class-weight -1', ['--loss-class-weight -1']),
    (f'{SEVERAL} --loss-weight-beta 1', ['--loss-weight-beta 1.0']),
    (f'{SEVERAL} --loss asl --asl-reduction sum --sam-variant sam --sam-rho 1 --sam-m 4',
     ['--asl-reduction', '--sam-m']),
    ('--task multilabel --dataset hfds/several', ['--task multilabel', '--num-classes']),
    (f'{SEVERAL} --multilabel-threshold 1', ['--multilabel-threshold 1.0']),
    (f'{SEVERAL} --kd-model-name resnet18', ['--kd-model-name resnet18', '--task multilabel']),
    (f'{SEVERAL} --target-key a,b', ['--num-classes 3', '2 fields']),
    (f'{SEVERAL} --target-key a,b,c --target-format multihot', ['--target-format multihot', 'a,b,c']),
    (f'{SEVERAL} --eval-metric top1', ['--eval-metric top1', 'map']),
    ('--target-format multihot', ['--target-format multihot', '--task multilabel']),
    ('--target-key a,b', ['--target-key a,b', '--task multilabel']),
    ('--eval-metric map', ['--eval-metric map', 'top1']),
])
def test_mistake_names_flag_value_and_remedy(stats, command, words):
    with pytest.raises(OptionError) as error:
        parse(command)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize('options', ['--loss-class-weight 1,2,3,4', '--loss-pos-weight 1,2',
                                     '--loss db --class-stats stats.json'])
def test_weights_for_another_number_of_classes_are_refused(stats, options):
    args = parse(f'{SEVERAL} --num-classes 5 {options}')
    model = nn.Linear(2, 5)
    model.num_classes = 5
    with pytest.raises(OptionError, match='entries but the model has 5 classes'):
        num_outputs(args, model)


@pytest.mark.parametrize('variant, rho', [('sam', 0.5), ('layerwise_l2', 0.2)])
@pytest.mark.parametrize('options', [
    '', '--loss-pos-weight 1,2,3 --smoothing 0.1', '--loss asl --loss-pos-weight 2', '--loss poly --poly-gamma 1',
    '--loss twoway', '--loss zlpr', '--loss db --class-stats stats.json'])
def test_update_with_several_classes_equals_the_reference_in_float64(stats, options, variant, rho):
    model, twin = TinyNet().double(), TinyNet().double()
    args = parse(f'{SEVERAL} {options}')
    loss = create_loss(args).double()
    task, twin_task = (create_task(args, CPU, net, loss, torch.float64) for net in (model, twin))
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, variant=variant, rho=rho)
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    before = weights(model)
    for step in range(4):
        input = batch(step)[0]
        target = torch.randint(0, 2, (len(input), 3), generator=torch.Generator().manual_seed(step)).double()
        torch.manual_seed(step)
        sam.minimize(lambda data=(input, target): task(*data)['loss'])
        torch.manual_seed(step)
        sam_step(twin, base, lambda data=(input, target): twin_task(*data)['loss'], SELECTIONS['onlynorm'], variant,
                 rho)
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-10, atol=1e-12)
    assert all(not torch.equal(before[name], value) for name, value in weights(model).items())
