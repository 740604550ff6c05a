"""What an update costs, in counted operations: FLOPs, host reads, graphs, kept tensors. No clock."""
import importlib.util
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from support.models import BatchLoss, TinyNet, assert_identical, batch, flops, sam_on, whole_graphs
from support.places import ROOT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_sam import SAM, VARIANTS, compile_split, multi_tensor

BENCHMARK = ROOT / 'benchmarks' / 'step_cost.py'
LATE = {'resnet50': 'layer4', 'vit_small_patch32_224': r'blocks\.(8|9|10|11)\.'}
LATE_HALF = {'resnet50': 'layer[34]', 'vit_small_patch32_224': r'blocks\.([4-9]|1[01])\.'}


@pytest.fixture(scope='module', params=LATE)
def measured(request) -> tuple[str, nn.Module, int]:
    torch.manual_seed(0)
    model = timm.create_model(request.param).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def plain() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

    return request.param, model, flops(plain)


def loss_of(model: nn.Module, samples: int = 4) -> Tensor:
    x = torch.ones(samples, 3, 224, 224) + torch.arange(samples)[:, None, None, None]
    return F.cross_entropy(model(x), torch.arange(samples))


@pytest.mark.full
@pytest.mark.parametrize('form, bounds', [
    ('all', (2.00, 2.00)),
    ('onlynorm, two forwards', (1.663, 1.661)),
    ('late, two forwards', (1.386, 1.446)),
    ('late', (1.117, 1.215)),
    ('late half', (1.358, 1.429)),
    ('quarter', (1.17, 1.17)),
])
def test_flops_over_a_plain_update_are_what_the_arithmetic_needs(measured, form, bounds):
    name, model, plain = measured
    options = {
        'all': {'params': 'all'},
        'onlynorm, two forwards': {'share_forward': False},
        'late, two forwards': {'filter': LATE[name], 'share_forward': False},
        'late': {'filter': LATE[name]},
        'late half': {'filter': LATE_HALF[name]},
        'quarter': {},
    }[form]
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=0.05, **options)
    ascent = {'ascent_fn': lambda: loss_of(model, 1)} if form == 'quarter' else {}
    if options.get('share_forward', True) and not ascent:
        sam.minimize(lambda: loss_of(model))  # checks the shared forward once
    ratio = flops(lambda: sam.minimize(lambda: loss_of(model), **ascent)) / plain
    bound = bounds[list(LATE).index(name)]
    # a little less: convolutions between the start of the first perturbed block and its first norm layer are shared too
    assert bound * 0.985 < ratio < bound * 1.002


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default,
                               torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('params', ['onlynorm', 'all'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_update_reads_nothing_from_the_device(variant, params):
    model = TinyNet()
    sam = sam_on(model, variant=variant, params=params)
    loss = BatchLoss(model, batch(0, dtype=torch.float32))
    sam.minimize(loss)  # checks the shared forward, which reads
    with Reads() as reads:
        sam.minimize(loss)
    assert reads.count == 0
    with Reads() as reads:
        float(sam.stats.loss)
    assert reads.count == 1


def test_gradients_with_a_loss_scale_read_nothing_from_the_device():
    model = TinyNet()
    sam, scaler = sam_on(model), torch.amp.GradScaler('cpu')
    loss = BatchLoss(model, batch(0, dtype=torch.float32))
    sam.backward(loss, scaler=scaler)
    with Reads() as reads:
        sam.backward(loss, scaler=scaler)
    assert reads.count == 0


def test_only_the_selected_parameters_and_running_statistics_are_copied():
    model = TinyNet()
    sam = sam_on(model)
    sam.minimize(BatchLoss(model, batch(0, dtype=torch.float32)))
    own = {id(t) for t in (*model.parameters(), *model.buffers(), *tensors_in(sam.optimizer))}
    scalars = {id(t) for t in (sam.nonfinite, *sam.stats)}
    held = [t for t in tensors_in(sam) if id(t) not in own | scalars]
    copied = sum(p.numel() for _, p in sam.selected) + sum(b.numel() for b in model.buffers())
    assert sum(t.numel() for t in held) == copied


def tensors_in(thing, seen=None) -> list[Tensor]:
    """All tensors that our objects, the base optimizer and collections in them refer to."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return []
    seen[id(thing)] = thing
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        inner = list(thing)
    elif type(thing).__module__.startswith('timm_sam') or isinstance(thing, torch.optim.Optimizer):
        inner = list(vars(thing).values())
    else:
        return []
    return [t for item in inner for t in tensors_in(item, seen)]


def both_passes(sam, grads, keep=False) -> list[Tensor]:
    """Both passes without a network; returns the weights of the second if they are to be kept."""
    with sam.ascent(torch.tensor(8.0)):
        for (_, p), grad in zip(sam.selected, grads):
            p.grad = grad
    with sam.perturbed():
        return [p.detach().clone() for _, p in sam.selected] if keep else []


class Kernels(TorchDispatchMode):
    """Counts the kernels that an accelerator would run: one for a list of tensors where torch has one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.startswith('aten::_foreach'):
            self.count += 1 if self.takes_one(func, args) else len(args[0])
        else:
            is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
            self.count += not is_view and not func._schema.name.startswith('aten::empty')
        return func(*args, **(kwargs or {}))

    @staticmethod
    def takes_one(func, args) -> bool:
        """The conditions of torch's ForeachUtils.h."""
        lists = [a for a in args if isinstance(a, (list, tuple)) and isinstance(a[0], Tensor)]
        factors = [a for a in args if isinstance(a, Tensor)]
        every = [t for tensors in lists for t in tensors] + factors
        dtypes = {t.dtype for t in every}
        if func is torch.ops.aten._foreach_copy_.default:  # may convert
            dtypes = max(({t.dtype for t in tensors} for tensors in lists), key=len)
        return (len(dtypes) == 1 and len({t.device for t in every}) == 1
                and all(torch.ops.aten.is_non_overlapping_and_dense(t) for t in every)
                and all(len({t.stride() for t in tensors}) == 1 for tensors in zip(*lists)))


def convolutions_and_norms(layers: int, dtype: torch.dtype) -> nn.Module:
    parts = [part for _ in range(layers) for part in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))]
    return nn.Sequential(*parts).to(dtype=dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('params', ['onlynorm', 'all'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_kernels_between_the_passes_do_not_grow_in_number_with_the_layers(variant, params, dtype, monkeypatch):
    monkeypatch.setattr(multi_tensor, 'SMALL', 0)  # only on the CPU small ones are computed with as one
    counts = []
    for layers in (3, 30):
        model = convolutions_and_norms(layers, dtype)
        sam = sam_on(model, variant=variant, params=params)
        grads = [torch.randn_like(p) for _, p in sam.selected]
        with Kernels() as kernels:
            both_passes(sam, grads)
        before = [p.detach().clone() for _, p in sam.selected]
        moved = both_passes(sam, grads, keep=True)
        assert any(not torch.equal(a, b) for a, b in zip(before, moved))
        counts.append(kernels.count)
    assert counts[0] == counts[1] < 50


class Graphs:
    """A backend for torch.compile that counts the graphs it is given, and runs their gradients as AOTAutograd does."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, gm, inputs):
        self.count += 1
        return torch._dynamo.lookup_backend('aot_eager')(gm, inputs)


def compiled_run(compile_model, filter: str | None, every: int = 1) -> tuple[list, dict[str, Tensor], list[int]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model('test_vit', img_size=32, num_classes=5)
    backend = Graphs()
    called = compile_model(model, backend)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), called, rho=0.5, filter=filter)
    generator = torch.Generator().manual_seed(1)
    measured, graphs = [], []
    for step in range(6):
        x, y = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(5, (4,), generator=generator)

        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(called(x), y)

        if step % every == 0:
            sam.minimize(loss)
        else:
            sam.zero_grad()
            loss().backward()
            sam.optimizer.step()
        measured.append([float(v) for v in sam.stats])
        graphs.append(backend.count)
        if step == 3:  # dynamo has been seen to reuse the graph of another requires_grad (pytorch issue 139476)
            called.eval()
            with torch.no_grad():
                called(x)
            called.train()
            backend.count = graphs[-1]
    return measured, {n: p.detach().clone() for n, p in model.named_parameters()}, graphs


WAYS = {
    'whole': lambda model, backend: torch.compile(model, backend=backend),
    'split': lambda model, backend: compile_split(model, backend=backend) or model,
}


@pytest.mark.full
@pytest.mark.parametrize('every', [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize('way, filter', [
    pytest.param('whole', None, marks=[whole_graphs, pytest.mark.slow]),
    pytest.param('whole', r'blocks\.[45]', marks=whole_graphs),
    ('split', r'blocks\.[45]'), pytest.param('split', None, marks=pytest.mark.slow)])
def test_compiled_passes_equal_eager_ones_and_nothing_recompiles_after_two_updates(way, filter, every):
    expected, expected_weights, _ = compiled_run(lambda model, backend: model, filter, every)
    measured, weights, graphs = compiled_run(WAYS[way], filter, every)
    torch.testing.assert_close(torch.tensor(measured), torch.tensor(expected), rtol=1e-4, atol=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=1e-5)
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1]


@pytest.mark.parametrize('compile_model', [
    lambda model: torch.compile(model, backend='eager'), lambda model: model.compile(backend='eager') or model])
def test_model_compiled_as_a_whole_is_refused_where_torch_gets_it_wrong(monkeypatch, compile_model):
    monkeypatch.setattr(importlib.import_module('timm_sam.arguments'), 'WHOLE_GRAPHS_WORK', False)
    for model in (compile_model(TinyNet()), nn.Sequential(compile_model(TinyNet()))):
        with pytest.raises(ValueError, match=r'compile it by timm_sam.compile_split\(model\), or use torch >= 2.12'):
            SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.1)
    split = TinyNet()
    compile_split(split, backend='eager')
    SAM(torch.optim.SGD(split.parameters(), lr=0.1), split, rho=0.1)


def test_compiled_module_around_the_model_of_sam_is_refused_where_torch_gets_it_wrong(monkeypatch):
    monkeypatch.setattr(importlib.import_module('timm_sam.first_update'), 'WHOLE_GRAPHS_WORK', False)
    model = TinyNet().double()
    called, before = torch.compile(model, backend='eager'), {n: p.detach().clone() for n, p in model.named_parameters()}
    sam = sam_on(model)
    with pytest.raises(ValueError, match=r'compile it by timm_sam.compile_split\(model\), or use torch >= 2.12'):
        sam.minimize(BatchLoss(called, batch(0)))
    assert_identical(dict(model.named_parameters()), before)


@pytest.mark.full
@whole_graphs
def test_split_graph_shares_the_forward_and_a_whole_graph_says_why_not():
    torch._dynamo.reset()
    sharing = {}
    for way, compile_model in WAYS.items():
        model = timm.create_model('test_vit', img_size=32, num_classes=5)
        called = compile_model(model, Graphs())
        sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), called, rho=0.5, filter=r'blocks\.[45]')
        sam.minimize(lambda called=called: called(torch.ones(2, 3, 32, 32)).square().mean())
        sharing[way] = sam.sharing
    assert sharing['split'].startswith('one forward for both passes')
    assert sharing['whole'] == 'two full forwards per update: the model is compiled as a whole'


@pytest.mark.full
@whole_graphs
def test_ascent_graph_has_no_gradients_of_weights_that_are_not_perturbed():
    """In what is compiled for the pass at w, too: counted as outputs of its backward graph."""
    torch._dynamo.reset()
    outputs = []

    def backward_compiler(gm, inputs):
        outputs.append(sum(n is not None for n in next(iter(reversed(gm.graph.nodes))).args[0]))
        return gm

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    backend = aot_autograd(fw_compiler=lambda gm, inputs: make_boxed_func(gm.forward),
                           bw_compiler=lambda gm, inputs: make_boxed_func(backward_compiler(gm, inputs).forward))
    model = timm.create_model('test_vit', img_size=32, num_classes=5)
    called = torch.compile(model, backend=backend)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), called, rho=0.5)
    sam.minimize(lambda: called(torch.ones(2, 3, 32, 32)).square().mean())
    assert outputs == [len(sam.selected), len(list(model.parameters()))]


@pytest.mark.full
def test_benchmark_prints_every_form_and_memory_stays_that_of_a_plain_update(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location('step_cost', BENCHMARK)
    step_cost = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'step_cost', step_cost)
    spec.loader.exec_module(step_cost)
    monkeypatch.setattr(sys, 'argv', [
        'step_cost.py', '--model', 'test_vit', '--img-size', '32', '--batch-size', '4', '--late', r'blocks\.5',
        '--rounds', '1', '--warmup', '0', '--markdown', str(tmp_path / 'table.md')])
    assert step_cost.main() == 0
    text = capsys.readouterr().out
    rows = [line.split('|')[1:-1] for line in text.splitlines() if line.startswith('|')][2:]
    assert len(rows) >= 6
    for row in rows:
        assert float(row[-1].strip().rstrip('x')) <= 1.02
    assert text.strip() in (tmp_path / 'table.md').read_text()
