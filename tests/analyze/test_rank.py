"""Feature rank by singular values, streamed both ways; and features of layers by hooks that do not stay."""
import numpy as np
import pytest
import reference_analysis as reference
import timm
import torch
from torch import nn

import timm_sam.models  # noqa: F401  # the networks for CIFAR
from timm_sam.analyze import rank, streaming
from timm_sam.analyze.features import features_of, has_tokens, layer_names
from timm_sam.analyze.rank import CENTRINGS, Gram, eigenvalues, ranks
from timm_sam.analyze.streaming import measure_rank, plan
from timm_sam.evaluation.ranks import Ranks

SLAB = 16  # so that few numbers are several
CPU = torch.device('cpu')
SHARES = [0.5, 0.9, 0.95, 0.99]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    for module in (rank, streaming):
        monkeypatch.setattr(module, 'SLAB', SLAB)


def phi(n, d, seed=0):
    """Features whose singular values fall slowly, around means that are large beside them, as after a ReLU."""
    generator = np.random.default_rng(seed)
    k = min(n, d)
    values = 1 / np.arange(1, k + 1)
    mixed = generator.normal(size=(n, k)) * values @ generator.normal(size=(k, d))
    return torch.tensor(mixed + 5 * generator.random(d), dtype=torch.float32)


def gram_of(features, sizes=None):
    n, d = features.shape
    gram = Gram(n, d, CPU)
    along = 1 if gram.wide else 0
    for part in features.split(sizes or features.shape[along], along):
        gram.add(part)
    assert gram.complete
    return gram


def of(features):
    gram = gram_of(features)
    return {centring: ranks(eigenvalues(gram, centring), SHARES) for centring in CENTRINGS}


def test_shares_of_the_variance():
    squares = torch.tensor([90, 8, 1.5, 0.5], dtype=torch.float64)
    assert ranks(squares, [0.99, 0.95, 0.9, 0.89]) == [3, 2, 2, 1]
    assert ranks(squares, [0.9999999]) == [4] and ranks(torch.zeros(3, dtype=torch.float64), [0.99]) == [0]


@pytest.mark.parametrize('n, d', [(30, 90), (90, 30), (25, 25), (50, 45)])
def test_products_of_either_side_give_the_singular_values(n, d):
    features = phi(n, d)
    gram = gram_of(features)
    assert gram.wide == (d > n)
    for centring in CENTRINGS:
        found = eigenvalues(gram, centring).numpy()
        expected = reference.squared_singular_values(features, centring)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-10 * float((features.double() ** 2).sum()))
        assert ranks(torch.from_numpy(found), SHARES) == [
            reference.feature_rank(features, share, centring) for share in SHARES]


@pytest.mark.parametrize('n, d', [(40, 90), (90, 40)])
def test_each_centring_does_not_see_its_own_constants(n, d):
    features, generator = phi(n, d), np.random.default_rng(1)
    before = of(features)
    per_feature = of(features + torch.tensor(50 * generator.random((1, d)), dtype=torch.float32))
    per_sample = of(features + torch.tensor(50 * generator.random((n, 1)), dtype=torch.float32))
    assert per_feature['feature'] == before['feature'] and per_sample['sample'] == before['sample']
    # constants that differ between features are all that the other one sees
    assert per_feature['sample'] == [1] * len(SHARES) != before['sample']


def test_parts_of_any_size_give_the_same_bits():
    for features in (phi(30, 2 * SLAB + 50), phi(2 * SLAB + 50, 30)):
        whole = gram_of(features)
        for size in (7, 300, SLAB):
            parts = gram_of(features, size)
            for centring in CENTRINGS:
                assert torch.equal(parts.centred(centring), whole.centred(centring))


def test_features_of_which_nothing_is_left():
    assert of(torch.zeros(5, 8)) == of(torch.zeros(8, 5)) == dict.fromkeys(CENTRINGS, [0] * len(SHARES))
    one = of(torch.rand(6, 1))
    assert one['feature'] == [1] * len(SHARES) and one['sample'] == [0] * len(SHARES)
    alike = of(torch.rand(1, 7).expand(20, 7))
    assert alike['feature'] == [0] * len(SHARES) and alike['sample'] == [1] * len(SHARES)


def test_samples_that_are_there_twice_change_nothing():
    features = phi(30, 50)
    assert of(torch.cat([features, features]))['feature'] == of(features)['feature']


def test_plan_takes_columns_as_memory_allows():
    n = 100
    dims = dict(small=50, wide=130, wider=100 + SLAB + 3, also=100)
    row = 4 * n
    assert plan(n, dims, 10 ** 9) == [dict(small=range(50), wide=range(130), wider=range(119), also=range(100))]
    assert plan(n, dims, 64 * row + 5) == [
        dict(small=range(50), wide=range(64), also=range(100)), dict(wide=range(64, 128)),
        dict(wide=range(128, 130), wider=range(48)), dict(wider=range(48, 112)), dict(wider=range(112, 119))]
    assert plan(n, dict(wide=112), 1) == [dict(wide=range(i, i + SLAB)) for i in range(0, 112, SLAB)]


def stream(memory, size):
    n = 45
    layers = dict(wide=phi(n, 4 * SLAB), tall=phi(n, 7, seed=1), broken=phi(n, 9, seed=2))
    layers['broken'][3, 4] = float('nan')
    passes, found = [], {}

    def batches():
        passes.append(1)
        yield from torch.arange(n).split(size)

    sizes = [len(part) for part in torch.arange(n).split(size)]
    dims = {name: part.shape[1] for name, part in layers.items()}
    measure_rank(lambda rows: {name: part[rows] for name, part in layers.items()}, dims, n, memory, SHARES, Ranks(),
                 CPU, batches, sizes, found.__setitem__)
    for name in ('wide', 'tall'):
        assert {c: found[name][c] for c in CENTRINGS} == of(layers[name])
    assert [found[name]['finite'] for name in layers] == [True, True, False]
    return len(passes), found


def test_memory_and_batches_change_nothing():
    once, found = stream(10 ** 8, 45)
    assert once == 1 and found['wide']['d'] == 4 * SLAB and found['tall']['n'] == 45
    assert stream(1, 10) == (4, found)
    assert stream(4 * 45 * 2 * SLAB, 7) == (2, found)


# ---- layers

def network(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **(dict(img_size=32) if 'vit' in name else {})).eval()


IMAGES = torch.rand(3, 3, 32, 32)


@pytest.mark.parametrize('name, layer, d', [
    ('test_resnet', 'layer3', 768), ('test_vit', 'blocks.4', 64), ('test_efficientnet', 'blocks.3', None),
    ('cifar_resnet56', 'layer2', None)])
def test_default_layers_are_there_and_no_hook_stays(name, layer, d):
    model = network(name)
    names = layer_names(model, None)
    assert names == [layer, 'pre_logits']
    everything = layer_names(model, ['all', 'pre_logits'])
    assert everything[-2:] == [model.feature_info[-1]['module'], 'pre_logits'] and len(set(everything)) > 2
    with features_of(model, everything) as features:
        found = features(IMAGES)
        again = features(IMAGES)
    assert all(rows.shape[0] == 3 and rows.ndim == 2 and not rows.requires_grad for rows in found.values())
    assert d is None or found[layer].shape == (3, d)
    assert all(torch.equal(found[key], again[key]) for key in found)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        last = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(found['pre_logits'], last)


def test_hooks_go_where_a_forward_pass_fails():
    model = network('test_resnet')
    with pytest.raises(RuntimeError), features_of(model, ['layer3']) as features:
        features(torch.rand(3, 5, 32, 32))
    assert not any(module._forward_hooks for module in model.modules())


def test_tokens():
    model = network('test_vit')
    with features_of(model, ['blocks.4', 'head', 'pre_logits'], 'all') as features:
        tokens, head, _ = features(IMAGES).values()
    tokens = tokens.view(3, -1, 64)
    assert head.shape == (3, 5)  # behind what is before the logits
    for kind, expected in ((None, tokens[:, 0]), ('first', tokens[:, 0]), ('mean', tokens.mean(1))):
        with features_of(model, ['blocks.4'], kind) as features:
            assert torch.equal(features(IMAGES)['blocks.4'], expected)
    assert has_tokens(model, ['blocks.4'], IMAGES) and not has_tokens(model, ['head'], IMAGES)


@pytest.mark.parametrize('name, options, layer, taken', [
    ('test_vit2', {}, 'blocks.4', 'mean'),  # one register, and no class token
    ('deit_tiny_distilled_patch16_224', dict(depth=2), 'blocks.1', 'first'),
    ('eva02_tiny_patch14_224', dict(depth=1, img_size=28), 'blocks.0', 'first'),
    ('cait_xxs24_224', dict(depth=2, embed_dim=48), 'blocks.1', 'mean'),  # the class token comes behind all blocks
    ('convit_tiny', dict(depth=3, local_up_to_layer=2), 'blocks.1', 'mean'),  # and here behind this one
    ('convit_tiny', dict(depth=3, local_up_to_layer=2), 'blocks.2', 'first')])
def test_first_token_is_taken_only_where_it_is_the_class_token(name, options, layer, taken):
    model = timm.create_model(name, num_classes=5, **{'img_size': 32, **options}).eval()
    images = torch.rand(3, 3, options.get('img_size', 32), options.get('img_size', 32))
    with features_of(model, [layer], None) as default, features_of(model, [layer], taken) as named:
        assert torch.equal(default(images)[layer], named(images)[layer])


@pytest.mark.parametrize('layer, words', [
    ('layer9', 'layer9: ResNet has no such layer; use layer4, layer'), ('', ': ResNet has no such layer'),
    ('twice', 'twice: it is run 2 times in a forward pass'), ('idle', 'idle: it is not run in a forward pass'),
    ('pair', 'pair: it gives a tuple, no tensor'), ('first', 'first: it gives torch.float32 of shape (1, 192, 2, 2)')])
def test_layers_that_cannot_be_taken(layer, words):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class First(nn.Module):
        def forward(self, x):
            return x[:1]

    class Odd(nn.Module):
        def __init__(self, inner, net):
            super().__init__()
            self.inner, self.net = inner, [net]

        def forward(self, x):
            net, x = self.net[0], self.inner(x)
            net.first(net.pair(net.twice(net.twice(x)))[0])
            return x

    model = network('test_resnet')
    model.twice, model.idle, model.pair, model.first = nn.ReLU(), nn.ReLU(), Pair(), First()
    model.layer3 = Odd(model.layer3, model)
    with pytest.raises(ValueError) as error, features_of(model, layer_names(model, [layer])) as features:
        features(IMAGES)
    assert words in str(error.value)


def test_network_that_says_nothing_of_its_layers():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    for asked in (None, ['all']):
        with pytest.raises(ValueError, match='name modules'):
            layer_names(net, asked)
    with features_of(net, layer_names(net, ['1'])) as features:
        assert features(torch.rand(2, 3, 2, 2))['1'].shape == (2, 4)
