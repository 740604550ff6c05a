"""timm's machinery with SAM-ON: averages, teachers, unusual loaders, precision, compilation, clipping, loss scales."""
import math

import pytest
import torch
from reference import sam_gradients
from support.command_lines import AOT, DEIT, JSD, KD, NAFLEX, SIZES, VIT
from support.loop import run_around
from support.models import OPTIMIZERS, SELECTIONS, BatchLoss, TinyNet, assert_identical, batch, buffers, weights
from timm import utils
from timm.task import ClassificationTask
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader, TensorDataset

from timm_sam import SAM, VARIANTS, train
from timm_sam.perturbation import perturbation
from timm_sam.split import WHOLE_GRAPHS_WORK
from timm_sam.training.data import Data
from timm_sam.training.engine import train_one_epoch
from timm_sam.training.options import parse_args

RHO = 0.05
SAM_ON = f'--sam-variant sam --sam-rho {RHO}'
SHORT = "--epochs 2 --val-split '' --log-interval 99"


@pytest.fixture(scope='module')
def trained(run_in, teacher, tmp_path_factory):
    """``trained(options)``: a run of two epochs; each is run once."""
    done = {}

    def run(options):
        options = ' '.join(options.format(teacher=teacher).split())
        if options not in done:
            torch.compiler.reset()
            done[options] = run_in(tmp_path_factory.mktemp('run'), f'{SHORT} {options}')
            assert done[options].code == 0, done[options].err[-2000:]
        return done[options]
    return run


def state(done):
    return done.checkpoint()['state_dict']


def different(first, second):
    """The names under which two state dictionaries are not bitwise equal."""
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


CASES = {
    'ema': '--model-ema --model-ema-decay 0.9',
    'logit distillation': f'{KD} logit',
    'feature distillation': f'{KD} feature',
    'token distillation': f'{DEIT} {KD} token',
    'hard token distillation': f'{DEIT} {KD} token --kd-token-distill-type hard',
    'JSD': JSD,
    'JSD with split-bn': f'{JSD} --split-bn',
    'split-bn': '--aug-splits 2 --split-bn --resplit --reprob 0.5',
    'naflex': NAFLEX,
    'naflex with mixup': f'{NAFLEX} --mixup 0.2 --cutmix 1.0',
    'naflex without prefetcher': f'{NAFLEX} --no-prefetcher',
    'image sizes': SIZES,
    'image sizes, loss by size': f'{SIZES} --variable-batch-loss-scale linear',
    'bfloat16': '--model-dtype bfloat16',
    'layer decay': '--layer-decay 0.7',
    'layer decay of a vit': f'{VIT} --layer-decay 0.7',
    'compiled': AOT,
    'checkpointing': f'{VIT} --grad-checkpointing --drop-path 0.1',
    'checkpointing of a resnet': '--grad-checkpointing',
    'torchscript': '--torchscript',
    'mixup': '--mixup 0.2',
    'cutmix': '--cutmix 1.0',
    'mixup and cutmix': '--mixup 0.2 --cutmix 1.0 --mixup-mode elem',
    'mixup without prefetcher': '--no-prefetcher --mixup 0.2',
    'cutmix without prefetcher': '--no-prefetcher --cutmix 1.0',
    'clip norm': '--clip-grad 0.1',
    'clip value': '--clip-grad 0.01 --clip-mode value',
    'clip agc': '--clip-grad 0.01 --clip-mode agc',
}
# what needs SAM's own options, which a plain run has not
SAM_CASES = {
    'compiled, filter': (AOT, '--sam-filter layer4'),
    'm': ('', '--sam-m 4'),
    'ascent fraction': ('', '--sam-ascent-fraction 0.5'),
    'm and ascent fraction': ('', '--sam-m 4 --sam-ascent-fraction 0.5'),
    'JSD, m': (JSD, '--sam-m 4'),
    'JSD, ascent fraction': (JSD, '--sam-ascent-fraction 0.5'),
    'JSD with split-bn, m and ascent fraction': (f'{JSD} --split-bn', '--sam-m 4 --sam-ascent-fraction 0.5'),
    'naflex, m': (NAFLEX, '--sam-m 4'),
    'naflex, ascent fraction': (NAFLEX, '--sam-ascent-fraction 0.5'),
    'naflex, m and ascent fraction': (NAFLEX, '--sam-m 4 --sam-ascent-fraction 0.5'),
}
EVERY_CASE = {**{name: (options, '') for name, options in CASES.items()}, **SAM_CASES}


# torch hides this warning of dynamo's own from its users, but only where warnings are not errors
grad_of_inputs = pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning')


@pytest.mark.parametrize('case', [
    pytest.param(case, marks=grad_of_inputs) if case == 'compiled, filter' else case for case in EVERY_CASE])
def test_sam_acts_with(trained, case):
    options, sam_options = EVERY_CASE[case]
    plain, sam = trained(options), trained(f'{options} {SAM_ON} {sam_options}')
    rows = sam.summary()
    assert [row['epoch'] for row in rows] == ['0', '1']
    rel = 0.1 if case == 'bfloat16' else 1e-4  # that of what the weights took, each rounded to 8 bits
    for row, plain_row in zip(rows, plain.summary()):
        assert math.isfinite(float(row['train_loss'])) and math.isfinite(float(row['train_sam_loss']))
        assert float(row['train_sam_eps_norm']) == pytest.approx(RHO, rel=rel)
        assert float(row['train_sam_grad_norm']) > 0 and row['train_sam_nonfinite'] == '0'
        assert row['train_loss'] != plain_row['train_loss']
    first, second = state(plain), state(sam)
    changed = different(first, second)
    # all that is trained goes another way, not only what is perturbed; bfloat16 has too few digits for that
    floats = {name for name, value in first.items() if value.is_floating_point()}
    assert floats <= changed if case != 'bfloat16' else len(changed) > len(floats) / 2
    # as many batches as without SAM; chunks are batches of their own
    assert changed <= floats or '--sam-m' in sam_options
    assert all(torch.isfinite(value).all() for value in second.values())


@pytest.mark.parametrize('case', CASES)
def test_rho_0_is_bitwise_the_plain_run_with(trained, case):
    plain, sam = trained(CASES[case]), trained(f'{CASES[case]} --sam-variant sam --sam-rho 0')
    assert different(state(plain), state(sam)) == set()
    assert [row['train_loss'] for row in plain.summary()] == [row['train_loss'] for row in sam.summary()]


# The same update by other means

@pytest.mark.parametrize('options', [
    f'{KD} feature', f'{DEIT} {KD} token --drop 0.1', f'{NAFLEX} --drop 0.1', f'{JSD} --split-bn', SIZES,
    '--layer-decay 0.7'])
def test_shared_forward_changes_no_weight_with(trained, options):
    options += f" {SAM_ON} --sam-filter {'layer4' if 'model ' not in options else 'blocks.1'}"
    one, two = trained(options), trained(f'{options} --sam-no-shared-forward')
    assert any('one forward for both passes' in line for line in one.log('SAM forward'))
    assert different(state(one), state(two)) == set() and one.summary() == two.summary()


@pytest.mark.parametrize('options', ['', VIT, JSD, f'{JSD} --split-bn', f'{KD} logit'])
def test_chunks_of_a_batch_are_micro_batches_with(trained, options):
    chunks, micro, whole = (state(trained(f'{options} {SAM_ON} {rest}')) for rest in (
        '--sam-m 4', '-b 4 --grad-accum-steps 2', ''))
    assert largest_difference(chunks, micro) < 1e-5
    floats = {name: value for name, value in chunks.items() if value.is_floating_point()}
    assert largest_difference(floats, {name: whole[name] for name in floats}) > 1e-3


@pytest.mark.parametrize('options', ['', pytest.param('--sam-filter layer4', marks=grad_of_inputs)])
def test_compiled_model_trains_as_the_eager_one(trained, options):
    eager, compiled = trained(f'{SAM_ON} {options}'), trained(f'{AOT} {SAM_ON} {options}')
    assert compiled.log('Compiling ') and not eager.log('Compiling ')
    parts = 'filter' in options or not WHOLE_GRAPHS_WORK
    assert bool(compiled.log('SAM forward: one forward')) == parts
    assert largest_difference(state(compiled), state(eager)) < 2e-3
    plain = trained('')
    assert largest_difference(state(plain), state(eager)) > 2e-2


@pytest.mark.parametrize('options, fraction', [
    (NAFLEX, '--sam-ascent-fraction 0.5'), (f'{NAFLEX} --sam-m 4', ''),
    (f'{NAFLEX} --sam-m 4', '--sam-ascent-fraction 0.5'),
    (JSD, '--sam-ascent-fraction 0.5'), (f'{JSD} --sam-m 4', ''), (f'{JSD} --sam-m 3', '--sam-ascent-fraction 0.5')])
def test_passes_have_the_samples_that_they_should(run_train, options, fraction):
    sizes = []

    def note(module, args):
        if type(module).__name__ in ('ResNet', 'NaFlexVit') and module.training and torch.is_grad_enabled():
            input = args[0]['patches'] if isinstance(args[0], dict) else args[0]
            sizes.append(len(input))

    handle = register_module_forward_pre_hook(note)
    try:
        done = run_train(f'{SHORT} {options} {SAM_ON} {fraction}')
        assert done.code == 0, done.err[-2000:]
        passes = sizes[:]
        sizes.clear()
        run_train(f"{SHORT} {options.split('--sam-m')[0]} --experiment plain")
    finally:
        handle.remove()
    expected = []
    splits = 3 if '--aug-splits' in options else 1
    m = int(options.split('--sam-m ')[1]) if '--sam-m' in options else 10 ** 6
    for size in sizes:
        assert size % splits == 0
        for start in range(0, size // splits, m):
            chunk = min(m, size // splits - start)
            expected += [splits * (math.ceil(chunk / 2) if fraction else chunk), splits * chunk]
    assert passes == expected


# Averages and teachers

@pytest.mark.parametrize('options', ['', '--model-ema-warmup', '--grad-accum-steps 2', f'{JSD} --sam-m 4'])
def test_average_is_that_of_the_unperturbed_weights_after_each_update(run_train, monkeypatch, options):
    decay, seen, perturbed, averages = 0.8, [], [], []
    real_backward, real_update = SAM.backward, ClassificationTask.update_ema

    def backward(self, loss_fn, **kwargs):
        def spy():
            perturbed.append(clone(self._model))
            return loss_fn()
        if waiting.pop('first', False):  # the weights that an update starts from are those that the last one left
            seen.append(clone(self._model))
        return real_backward(self, spy, **kwargs)

    def update_ema(self, step):
        real_update(self, step=step)
        waiting['first'] = True
        averages.append(self.get_trainable_module(ema=True).get_decay(step))

    def clone(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    waiting = {'first': True}
    monkeypatch.setattr(SAM, 'backward', backward)
    monkeypatch.setattr(ClassificationTask, 'update_ema', update_ema)
    done = run_train(f'{SHORT} {SAM_ON} --model-ema --model-ema-decay {decay} {options}')
    assert done.code == 0, done.err[-2000:]
    seen.append(state(done))
    updates = 6 if 'accum' in options else 10
    assert len(seen) == updates + 1 and len(averages) == updates
    # timm's decay: 0 in the first update, which with warmup grows from update to update
    assert averages == [0] + [decay] * (updates - 1) if 'warmup' not in options else len(set(averages)) == updates

    expected = {name: value.double() for name, value in seen[0].items()}
    for decay, after in zip(averages, seen[1:]):
        for name, value in after.items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value.double()
            else:
                expected[name] = value.double()
    got = done.checkpoint()['state_dict_ema']
    assert largest_difference(got, expected) < 1e-5
    # the perturbed weights are further away than that
    assert largest_difference(perturbed[0], perturbed[1]) > 1e-3


@pytest.mark.parametrize('options', [
    f'{KD} logit', f'{KD} feature', f'{DEIT} {KD} token', f'{DEIT} {KD} token --kd-token-distill-type hard'])
@pytest.mark.parametrize('params', ['onlynorm', 'all'])
def test_teacher_teaches_and_stays_as_it_was(run_train, trained, teacher, monkeypatch, options, params):
    real_fit, teachers, selections = train.fit, [], []

    def fit(run, *rest):
        real_fit(run, *rest)
        teachers.append(run.task.teacher.model)
        selections.append({id(p) for _, p in run.update.selected})

    alone = trained(f"{DEIT if DEIT in options else ''} {SAM_ON} --sam-params {params}")
    monkeypatch.setattr(train, 'fit', fit)
    done = run_train(f'{SHORT} {SAM_ON} --sam-params {params} {options}'.format(teacher=teacher))
    assert done.code == 0, done.err[-2000:]
    saved = torch.load(teacher / 'pytorch_model.bin', weights_only=True)
    assert_identical(dict(teachers[0].state_dict()), saved)  # statistics included
    assert not selections[0] & {id(p) for p in teachers[0].parameters()}
    assert all(p.grad is None for p in teachers[0].parameters())
    assert {'head.weight', 'fc.weight'} & different(state(done), state(alone))


# Loss scales, clipping, autocast

class PoisonedLoss(BatchLoss):
    """A loss whose gradient overflows in the calls that are named, while its value does not."""

    def __init__(self, model, data, calls=()):
        def poison(loss):
            loss.register_hook(lambda grad: grad * math.inf)
            return loss
        super().__init__(model, data, on_call=dict.fromkeys(calls, poison))


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('ascent, descent', [(True, False), (False, True), (True, True)],
                         ids=['in the ascent', 'in the descent', 'in both'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_overflow_leaves_weights_finite_and_the_scaler_as_in_plain_training(variant, optimizer, ascent, descent):
    model, plain = TinyNet(), TinyNet()
    sam = SAM(OPTIMIZERS[optimizer](model), model, variant=variant, params='all', rho=0.1)
    base = OPTIMIZERS[optimizer](plain)
    scaler, plain_scaler = (torch.amp.GradScaler('cpu', init_scale=2.0 ** 16, growth_interval=2) for _ in range(2))
    scales = []
    for step in range(6):
        overflow = step in (1, 2)
        data = batch(step, dtype=torch.float32)
        calls = [call for call, poisoned in ((1, ascent), (2, descent)) if poisoned and overflow]
        before = weights(model)
        loss_fn = PoisonedLoss(model, data, calls)
        sam.zero_grad()
        sam.backward(loss_fn, scaler=scaler)
        assert_identical(weights(model), before)
        scaler.step(sam)
        scaler.update()
        scales.append(scaler.get_scale())
        assert len(loss_fn.weights_seen) == 2
        assert all(torch.isfinite(w).all() for w in (*loss_fn.weights_seen[1].values(), *weights(model).values()))
        moved = any(not torch.equal(w, before[name]) for name, w in loss_fn.weights_seen[1].items())
        assert moved != (overflow and ascent)
        assert all(torch.equal(w, before[name]) for name, w in weights(model).items()) == (overflow and descent)

        # the only backward of a plain step overflows where the descent does: only that one is the optimizer's
        base.zero_grad()
        plain_scaler.scale(PoisonedLoss(plain, data, [1] if descent and overflow else [])()).backward()
        plain_scaler.step(base)
        plain_scaler.update()
        assert scaler.state_dict() == plain_scaler.state_dict()
    assert min(scales) == 2.0 ** (14 if descent else 16) and len(set(scales)) > 1  # growth comes after two good steps
    assert sam.nonfinite == (2 if ascent else 0)


@pytest.mark.parametrize('params', SELECTIONS)
@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('mode, clip', [('norm', 0.3), ('value', 0.02), ('agc', 0.02)])
def test_clipping_is_that_of_the_true_gradient_at_the_restored_weights(mode, clip, scaled, params):
    model, twin = TinyNet().double(), TinyNet().double()
    optimizer, base = OPTIMIZERS['sgd'](model), OPTIMIZERS['sgd'](twin)
    args = parse_args(train.build_parser(), [
        '--device', 'cpu', '--data-dir', '.', '--clip-grad', str(clip), '--clip-mode', mode,
        '--sam-variant', 'sam', '--sam-rho', '0.5', '--sam-params', params])
    args.no_prefetcher = True
    x, y = (torch.cat(parts) for parts in zip(batch(1), batch(2), batch(3)))
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    run = run_around(
        args, ClassificationTask(model, criterion=torch.nn.CrossEntropyLoss()),
        Data(loader, None, None, 6.0, 'none', False), optimizer, SAM(optimizer, model, rho=0.5, params=params),
        scaler=torch.amp.GradScaler('cpu', init_scale=2.0 ** 10) if scaled else None, model_dtype=torch.float64,
        total_updates=3)
    clipped = []
    optimizer.register_step_pre_hook(
        lambda *_: clipped.append({name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.manual_seed(0)
    train_one_epoch(run, 0)

    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()  # a DataLoader draws a seed before the first batch
    for k in range(3):
        loss_fn = BatchLoss(twin, (x[6 * k:6 * k + 6], y[6 * k:6 * k + 6]))
        result = sam_gradients(twin, loss_fn, SELECTIONS[params], 'sam', 0.5)
        for name, p in twin.named_parameters():
            p.grad = result.descent[name].clone()
        parameters = list(twin.parameters())
        utils.dispatch_clip_grad(parameters[:-2] if mode == 'agc' else parameters, value=clip, mode=mode)
        expected = {name: p.grad.clone() for name, p in twin.named_parameters()}
        assert any(not torch.equal(expected[name], result.descent[name]) for name in expected)  # it does clip
        base.step()
        for name, grad in expected.items():
            torch.testing.assert_close(clipped[k][name], grad, rtol=1e-9, atol=1e-12)
    for name, w in weights(twin).items():
        torch.testing.assert_close(weights(model)[name], w, rtol=1e-9, atol=1e-12)


def autocast():
    return torch.autocast('cpu', dtype=torch.bfloat16)


def minimize(sam, loss_fn):
    return sam.minimize(loss_fn)


def closure(sam, loss_fn):
    def evaluate():
        sam.zero_grad()
        loss = loss_fn()
        loss.backward()
        return loss
    return sam.step(evaluate)


def two_passes_by_hand(model, optimizer, loss_fn, names, variant, rho):
    """A SAM step with none of SAM but the formula of eps; every forward in an autocast region of its own."""
    params = [p for name, p in model.named_parameters() if name in names]
    is_weight = [name.endswith('weight') for name, _ in model.named_parameters() if name in names]
    random_state = torch.get_rng_state()
    with autocast():
        loss = loss_fn()
    grads = torch.autograd.grad(loss, params)
    statistics = buffers(model)
    eps = perturbation(variant, params, list(grads), rho, VARIANTS[variant].eta, is_weight)[0]
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, e in zip(params, eps):
            p.add_(e.to(p.dtype))
    torch.set_rng_state(random_state)
    optimizer.zero_grad()
    with autocast():
        loss_perturbed = loss_fn()
    loss_perturbed.backward()
    with torch.no_grad():
        for p, value in zip(params, before):
            p.copy_(value)
        for name, b in model.named_buffers():
            b.copy_(statistics[name])
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize('way', [minimize, closure])
@pytest.mark.parametrize('around', ['loss', 'step'])
@pytest.mark.parametrize('params', SELECTIONS)
@pytest.mark.parametrize('variant', VARIANTS)
def test_step_under_autocast_is_bitwise_two_passes_by_hand(variant, params, around, way):
    model, twin = TinyNet(), TinyNet()
    sam = SAM(OPTIMIZERS['adamw'](model), model, variant=variant, params=params, rho=0.3)
    optimizer = OPTIMIZERS['adamw'](twin)
    types = []
    model.conv.register_forward_hook(lambda module, args, output: types.append(output.dtype))
    for step in range(3):
        loss_fn, twin_loss_fn = (BatchLoss(m, batch(step, dtype=torch.float32)) for m in (model, twin))

        def under_autocast(loss_fn=loss_fn):
            with autocast():
                return loss_fn()

        torch.manual_seed(step)
        if around == 'step':  # one region for both passes: casts of weights at w must not serve at w + eps
            with autocast():
                loss = way(sam, loss_fn)
        else:
            loss = way(sam, under_autocast)
        torch.manual_seed(step)
        expected = two_passes_by_hand(twin, optimizer, twin_loss_fn, SELECTIONS[params], variant, 0.3)
        assert torch.equal(loss, expected)
        assert_identical(weights(model), weights(twin))
        assert_identical(buffers(model), buffers(twin))
        assert_identical(loss_fn.weights_seen[1], twin_loss_fn.weights_seen[1])
    assert set(types) == {torch.bfloat16}
