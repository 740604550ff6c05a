"""The paper's three networks beside plain transcriptions, and what SAM, checkpointing and compilers make of ours."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from reference_cifar import Network
from support.cifar import NETWORKS, STAGES, images
from torch import nn

from timm_sam import SAM, compile_split, select_parameters
from timm_sam.models import cifar

pytestmark = pytest.mark.full
LARGE = ('cifar_wrn28_10', 'cifar_resnet101', 'cifar_vgg19_bn')
CHECKPOINTED = [name for name in NETWORKS if 'vgg' not in name]  # timm's VGG has no checkpoints


def create(name, seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **options)


def copy_weights(source, target):
    """By order: both hold their layers in the order of the forward pass."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
    ours, theirs = ([m for m in model.modules() if isinstance(m, kinds)] for model in (source, target))
    assert len(ours) == len(theirs)
    # both keep a shortcut at the end of its block, but the reference its convolutions before its BatchNorms
    for kind in kinds:
        of_kind = [[m for m in modules if isinstance(m, kind)] for modules in (ours, theirs)]
        assert len(of_kind[0]) == len(of_kind[1])
        for a, b in zip(*of_kind):
            b.load_state_dict(a.state_dict())


@pytest.mark.parametrize('name', ['resnet56', 'resnext29_32x4d', 'wrn28_10'])
def test_outputs_and_gradients_equal_the_transcription(name):
    ours = create(f'cifar_{name}', num_classes=10).double()
    theirs = Network(name, 10).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in ours.modules():
            if isinstance(module, nn.BatchNorm2d):  # not the ones and zeros of the start
                module.weight.copy_(1 + 0.2 * torch.randn(module.weight.shape, generator=generator))
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
    copy_weights(ours, theirs)
    x = images(2, size=8).double()
    for mode in (True, False):  # the running statistics of the first are used in the second
        a, b = ours.train(mode)(x), theirs.train(mode)(x)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for model in (ours, theirs):
        model.train()
        F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    torch.testing.assert_close(ours.conv1.weight.grad, theirs.stem.weight.grad, rtol=1e-9, atol=1e-12)


def test_shortcut_of_a_wide_block_takes_the_raw_input():
    block = create('cifar_wrn28_10').layer1[0].double()
    with torch.no_grad():
        block.conv2.weight.zero_()
        x = torch.randn(1, 16, 8, 8, dtype=torch.float64)
        assert torch.equal(block(x), block.downsample(x))
    assert isinstance(block.downsample, nn.Conv2d)
    assert isinstance(block, cifar.PreActBlock)


@pytest.mark.parametrize('name', CHECKPOINTED)
def test_checkpointing_changes_no_gradient(name):
    model = create(name).double().train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x, losses = images(2, size=8).double(), []
    for m in (model, other):
        loss = F.cross_entropy(m(x), torch.tensor([3, 4]))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for (n, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(p.grad, q.grad), n
    assert torch.equal(other.forward_features(x), model.forward_features(x))


@pytest.mark.parametrize('name', ['cifar_resnet56', 'cifar_wrn28_10', 'cifar_vgg13_bn', 'cifar_densenet100'])
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_scripted_network_computes_the_same(name):
    model, x = create(name).eval(), images(2)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize(('name', 'filter', 'count'), [
    ('cifar_wrn28_10', 'layer3', (16, 9600)),
    ('cifar_wrn28_10', 'layer2|layer3', (32, 14400)),
    ('cifar_wrn28_10', 'layer3|^norm', (18, 10880)),
    ('cifar_resnext29_32x4d', 'layer3', (20, 14336)),
    ('cifar_resnext29_32x4d', 'layer2|layer3', (40, 21504)),
])
def test_late_blocks_are_chosen_by_the_names_of_the_stages(name, filter, count):
    found = select_parameters(create(name), 'onlynorm', filter)
    assert (len(found), sum(p.numel() for _, p in found)) == count


@pytest.mark.slow
def test_compiled_network_shares_the_forward_below_the_late_block():
    """With the weights of two forwards of the network that is not compiled."""
    x, y = images(2, size=8).double(), torch.tensor([0, 1])
    results, said = [], []
    torch.compiler.reset()
    for compiled, share in ((False, False), (False, True), (True, True)):
        model = create('cifar_resnet18').double().train()
        if compiled:
            compile_split(model, backend='aot_eager')
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.01), model, rho=0.5, filter='layer3', share_forward=share)
        for _ in range(2):
            sam.minimize(lambda model=model: F.cross_entropy(model(x), y))
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
        said.append(sam.sharing)
    assert said[0] == 'two full forwards per update: sharing is off'
    assert said[1].startswith('one forward for both passes')
    assert said[2].startswith('one forward for both passes through 1 compiled graph, ')
    for other in results[1:]:
        for n, p in results[0].items():
            torch.testing.assert_close(other[n], p, rtol=1e-9, atol=1e-12, msg=n)


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in NETWORKS])
def test_updates_of_one_seed_are_equal_to_the_bit(name):
    """One update of each selection, twice."""
    x = images(2, size=32 if 'vgg' in name else 8)
    runs = []
    for params in ('onlynorm', 'all', 'onlynorm', 'all'):
        model = create(name).train()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sam = SAM(optimizer, model, rho=0.1, params=params)
        sam.minimize(lambda model=model: F.cross_entropy(model(x), torch.tensor([0, 1])))
        assert float(sam.stats.eps_norm) == pytest.approx(0.1, rel=1e-4)
        assert float(sam.stats.loss_perturbed) > 0
        runs.append({n: p.detach().clone() for n, p in model.named_parameters()})
        moved = [n for n, p in runs[-1].items() if not torch.equal(p, before[n])]
        assert len(moved) > 0.9 * len(before)
    for first, second in ((0, 2), (1, 3)):
        assert all(torch.equal(p, runs[second][n]) for n, p in runs[first].items())
    assert any(not torch.equal(p, runs[1][n]) for n, p in runs[0].items())


def test_structures_are_those_of_the_table():
    for name, (blocks, stages) in STAGES.items():
        model = create(name)
        found = [len(getattr(model, f'layer{i + 1}')) for i in range(4)]
        assert sum(found) == blocks
        assert [n for n in found if n] == stages
