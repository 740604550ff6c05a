"""SAM's step on a CUDA device: the reference, loss scales, graphs of torch.compile, and a host that never waits."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import sam_step
from support.gpu import DEVICE, data, net, no_waiting
from support.models import OPTIMIZERS, SELECTIONS, WAYS, BatchLoss, assert_identical, buffers, weights, whole_graphs

from timm_sam import SAM, VARIANTS, compile_split, methods

pytestmark = pytest.mark.gpu

RHO = {'elementwise_linf': 0.1, 'layerwise_l2': 0.2}
MANY = {
    'usam': {}, 'msam': {}, 'friendly': {}, 'stable': {}, 'looksam': dict(k=2, alpha=0.7), 'gsam': dict(alpha=0.4),
    'random_mask': dict(sparsity=0.5), 'ssam_dynamic': dict(sparsity=0.5, total_epochs=10),
}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('params', SELECTIONS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_step_is_that_of_the_reference_with_the_same_random_masks(variant, params, way):
    rho = RHO.get(variant, 0.5)
    model, twin = net(), net()
    base = OPTIMIZERS['adamw'](twin)
    sam = SAM(OPTIMIZERS['adamw'](model), model, variant=variant, params=params, rho=rho)
    for step in range(4):
        torch.manual_seed(step)
        loss = WAYS[way](sam, BatchLoss(model, data(step)))
        torch.manual_seed(step)
        expected = sam_step(twin, base, BatchLoss(twin, data(step)), SELECTIONS[params], variant, rho)
        close(loss, expected.loss, 1e-11)
        close(weights(model), weights(twin), 1e-9)  # Adam divides by the root of small second moments
        close(buffers(model), buffers(twin), 1e-11)


@pytest.mark.parametrize('params', ['onlynorm', 'all'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_host_never_waits_in_an_update(variant, params):
    model = net(torch.float32)
    sam = SAM(sgd(model), model, variant=variant, params=params, rho=0.1)
    loss = BatchLoss(model, data(0, torch.float32))
    sam.minimize(loss)  # checks the shared forward, which reads
    with no_waiting():
        for _ in range(2):
            sam.minimize(loss)
    assert float(sam.nonfinite) == 0


@pytest.mark.parametrize('params', ['onlynorm', 'all'])
@pytest.mark.parametrize('method', MANY)
def test_host_never_waits_in_an_update_of_a_method(method, params):
    model = net(torch.float32)
    sam = SAM(sgd(model), model, params=params, rho=0.1, method=methods.METHODS[method](**MANY[method]))
    loss = BatchLoss(model, data(0, torch.float32))
    for update in range(2):  # masks are drawn, and shared forwards checked
        sam.begin(0, update)
        sam.minimize(loss)
    with no_waiting():
        for update in range(2, 5):
            sam.begin(0, update)
            sam.minimize(loss)


def test_host_never_waits_for_gradients_with_a_loss_scale():
    model = net(torch.float32)
    sam, scaler = SAM(sgd(model), model, rho=0.5), torch.amp.GradScaler(DEVICE)
    loss = BatchLoss(model, data(0, torch.float32))
    sam.backward(loss, scaler=scaler)
    sam.zero_grad()
    with no_waiting():
        sam.backward(loss, scaler=scaler)


def images(size=4):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(size, 3, 32, 32, generator=generator).to(DEVICE),
            torch.randint(5, (size,), generator=generator).to(DEVICE))


def network(name):
    torch.manual_seed(0)
    options = dict(img_size=32) if 'vit' in name else {}
    return timm.create_model(name, num_classes=5, **options).to(DEVICE)


@pytest.mark.parametrize('params', ['onlynorm', 'all'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit'])
def test_update_under_autocast_is_that_of_float32_but_for_rounding(name, dtype, params):
    x, y = images(32)
    found = {}
    for kind in ('autocast', 'float32'):
        model = network(name)
        sam = SAM(sgd(model), model, params=params, rho=0.05)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, enabled=kind == 'autocast' and dtype == torch.float16)

        def loss(kind=kind, model=model):
            with torch.autocast(DEVICE, dtype, enabled=kind == 'autocast'):
                return F.cross_entropy(model(x), y)

        sam.backward(loss, scaler=scaler)
        scaler.unscale_(sam)
        close(sam.stats.eps_norm.float(), torch.tensor(0.05, device=DEVICE), 1e-5)
        found[kind] = torch.cat([p.grad.flatten() for p in model.parameters()]), sam.stats
        scaler.step(sam)
        scaler.update()
    (grads, stats), (exact, exact_stats) = found['autocast'], found['float32']
    assert F.cosine_similarity(grads, exact, dim=0) > (0.99 if dtype == torch.float16 else 0.95)
    close(stats.loss.float(), exact_stats.loss.float(), 0.02)
    close(stats.grad_norm.float(), exact_stats.grad_norm.float(), 0.05)


def test_overflow_of_float16_skips_the_update_and_lowers_the_scale():
    x, y = images()
    model = network('test_resnet')
    sam, scaler = SAM(sgd(model), model, params='all', rho=0.05), torch.amp.GradScaler(DEVICE, init_scale=2.0 ** 60)

    def loss():
        with torch.autocast(DEVICE, torch.float16):
            return F.cross_entropy(model(x), y)

    before, moved = weights(model), 0
    for _ in range(80):
        sam.zero_grad()
        sam.backward(loss, scaler=scaler)
        at, scale = weights(model), scaler.get_scale()
        scaler.step(sam)
        scaler.update()
        skipped = scaler.get_scale() < scale
        if skipped:
            assert_identical(weights(model), at)
        moved += not skipped
    assert moved > 10 and 0 < int(sam.nonfinite) < 80 - moved + 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(weights(model)['fc.weight'], before['fc.weight'])


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.AdamW])
def test_fused_optimizers_of_torch_step_as_others_do(kind, scaled):
    found = []
    for options in (dict(fused=True), dict(foreach=True)):
        model = net(torch.float32)
        sam = SAM(kind(model.parameters(), lr=0.01, **options), model, rho=0.5)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0, enabled=scaled)
        for step in range(4):
            torch.manual_seed(step)
            sam.zero_grad()
            sam.backward(BatchLoss(model, data(step, torch.float32)), scaler=scaler)
            scaler.step(sam)
            scaler.update()
        found.append(weights(model))
    close(*found, 2e-5)


@pytest.mark.parametrize('cast', [False, True])
@pytest.mark.parametrize('name, part', [('test_resnet', 'layer4'), ('test_vit', r'blocks\.[45]')])
def test_shared_forward_gives_what_two_forwards_give(name, part, cast):
    x, y = images()
    found = []
    for share in (True, False):
        model = network(name)
        sam = SAM(sgd(model), model, rho=0.5, filter=part, share_forward=share)

        def loss(model=model):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=cast):
                return F.cross_entropy(model(x), y)

        for _ in range(3):
            sam.minimize(loss)
        assert sam.sharing.startswith('one forward for both passes') == share
        found.append((weights(model), buffers(model)))
    close(*found, 2e-2 if cast else 1e-3)  # convolutions of cuDNN are in TF32, and not the same from run to run


@pytest.mark.parametrize('way', ['minimize', 'closure'])
def test_weights_that_autocast_has_cast_are_cast_again_at_w_plus_eps(way):
    x, y = images(16)
    model = network('test_vit')
    sam = SAM(sgd(model), model, params='all', rho=2.0)
    with torch.autocast(DEVICE, torch.bfloat16):  # around both passes: its cache outlives the first
        if way == 'minimize':
            sam.minimize(lambda: F.cross_entropy(model(x), y))
        else:
            def closure():
                sam.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss
            sam.step(closure)
    assert sam.stats.loss_perturbed > sam.stats.loss + 0.1


def test_weights_in_bfloat16_are_set_back_bit_for_bit():
    x, y = images()
    model = network('test_vit').bfloat16()
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, params='all', rho=0.5)
    before = weights(model)
    sam.minimize(lambda: F.cross_entropy(model(x.bfloat16()), y))
    assert_identical(weights(model), before)
    assert sam.stats.loss_perturbed > sam.stats.loss


@pytest.mark.filterwarnings('ignore:TensorFloat32')
@pytest.mark.parametrize('how', [
    'split', pytest.param('whole', marks=whole_graphs), pytest.param('cuda graphs', marks=whole_graphs)])
def test_compiled_model_takes_the_steps_of_the_one_that_is_not(how):
    x, y = images()
    found = []
    for compiled in (True, False):
        torch._dynamo.reset()
        model = network('test_vit')
        called = model
        if compiled and how == 'split':
            compile_split(model)
        elif compiled:
            called = torch.compile(model, mode='reduce-overhead' if how == 'cuda graphs' else None)
        sam = SAM(sgd(model), called, rho=0.5, filter=r'blocks\.[45]' if how == 'split' else None)
        losses = [float(sam.minimize(lambda called=called: F.cross_entropy(called(x), y))) for _ in range(4)]
        found.append((weights(model), losses))
    close(found[0][0], found[1][0], 2e-3)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-2)


def test_state_moves_between_cpu_and_gpu():
    model = net(torch.float32)
    sam = SAM(OPTIMIZERS['adamw'](model), model, rho=0.5, method=methods.msam())
    sam.minimize(BatchLoss(model, data(0, torch.float32)))
    base, own = copy.deepcopy(sam.state_dict()), copy.deepcopy(sam.method_state_dict())
    there = net(torch.float32).cpu()
    there.load_state_dict(model.state_dict())
    second = SAM(OPTIMIZERS['adamw'](there), there, rho=0.5, method=methods.msam())
    second.load_state_dict(base)
    second.load_method_state_dict(own)
    torch.manual_seed(0)
    second.minimize(BatchLoss(there.eval(), tuple(t.cpu() for t in data(1, torch.float32))))
    torch.manual_seed(0)
    sam.minimize(BatchLoss(model.eval(), data(1, torch.float32)))
    close({name: p.cpu() for name, p in weights(model).items()}, weights(there), 1e-3)
