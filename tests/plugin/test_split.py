"""Models compiled in two parts: the updates of eager ones, with one forward below the first perturbed parameter."""
import copy
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from support.models import weights
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from timm_sam import SAM, compile_split

pytestmark = pytest.mark.full

# model, filter, constructor options, image size
ARCHITECTURES = {
    'resnet': ('test_resnet', 'layer4', {'drop_path_rate': 0.2, 'drop_rate': 0.1}, 32),
    'vit': ('test_vit', r'blocks\.[45]', {'img_size': 32, 'drop_path_rate': 0.2, 'proj_drop_rate': 0.1}, 32),
    'convnext': ('test_convnext', r'stages\.3', {'drop_path_rate': 0.2}, 32),
    'efficientnet': ('test_efficientnet', r'blocks\.4', {'drop_path_rate': 0.2}, 32),
}


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    torch.compiler.reset()


class Runs:
    """A backend that counts the graphs it is given, and how often each runs forward."""

    def __init__(self) -> None:
        self.runs: Counter[int] = Counter()

    def __call__(self, gm, inputs):
        compiled, number = torch._dynamo.lookup_backend('aot_eager')(gm, inputs), len(self.runs)
        self.runs[number] = 0

        def run(*args):
            self.runs[number] += 1
            return compiled(*args)

        return run


def updates(model: nn.Module, batches: list, compiled: bool, backend=None, context=None, **options) -> tuple[dict, SAM]:
    """Weights, buffers and what was measured, after an update on each batch."""
    if compiled:
        compile_split(model, backend=backend or 'aot_eager')
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), model, rho=0.5, **options)
    torch.manual_seed(1)
    result = {}
    for i, (x, y) in enumerate(batches):
        def loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            if context is None:
                return F.cross_entropy(model(x), y)
            with context():
                return F.cross_entropy(model(x), y)

        sam.minimize(loss)
        result |= {f'{i} {name}': value.reshape(()) for name, value in sam.stats._asdict().items()}
    return result | weights(model) | {n: b.clone() for n, b in model.named_buffers()}, sam


def images(sizes: list[int], size: int = 32, dtype: torch.dtype = torch.float64, classes: int = 7) -> list:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 3, size, size, generator=generator, dtype=dtype),
             torch.randint(classes, (n,), generator=generator)) for n in sizes]


def assert_same(actual: dict, expected: dict, tolerance: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize('family', [
    pytest.param(family, marks=() if family in ('resnet', 'vit') else pytest.mark.slow) for family in ARCHITECTURES])
def test_compiled_updates_equal_eager_ones_with_two_forwards(family):
    name, filter, options, size = ARCHITECTURES[family]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=7, **options).double().train()

    batches = images([4, 4, 4], size)
    actual, sam = updates(model(), batches, compiled=True, filter=filter)
    expected, other = updates(model(), batches, compiled=False, filter=filter, share_forward=False)
    assert sam.sharing.startswith('one forward for both passes through 1 compiled graph, ')
    assert other.sharing == 'two full forwards per update: sharing is off'
    assert_same(actual, expected)


def small(*, where: str = '') -> nn.Module:
    torch.manual_seed(0)
    return Small(where).double().train()


class Small(nn.Module):
    """A stem, a perturbed norm layer and a head, with something unusual at a place."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2))
        self.second = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == 'autocast around the boundary':
            with torch.autocast('cpu', torch.bfloat16):
                return self._rest(self.stem(x.float()))
        if self.where == 'first norm layer in eager mode':
            x = torch.compiler.disable(lambda x: self.stem[1](x).relu())(self.stem[0](x))
            return self.head(self.norm(x).relu().mean((2, 3)))
        x = self.stem(x)
        if self.where == 'break below':
            torch._dynamo.graph_break()
        return self._rest(x)

    def _rest(self, x: Tensor) -> Tensor:
        x = self.second(x)
        if self.where == 'no_grad below':
            with torch.no_grad():
                x = x + x.mean()
        if self.where == 'parameter without its module':
            y = F.batch_norm(x, None, None, self.norm.weight, self.norm.bias, training=True)
        elif self.where == 'norm layer in eager mode':
            y = torch.compiler.disable(self.norm.forward)(x)
        else:
            y = self.norm(x.clone() if self.where == 'in place above' else x)
        if self.where == 'in place above':
            x.mul_(2)
            y = x + y
        if self.where == 'break above':
            torch._dynamo.graph_break()
        if self.where == 'skip connection':
            y = y + x
        return self.head(y.relu().mean((2, 3)))


# dynamo looks at the .grad of what comes out of a graph and goes into the next
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning')
@pytest.mark.parametrize('where, sharing', [
    ('', 'one forward for both passes through 1 compiled graph, '),
    ('skip connection', 'one forward for both passes through 1 compiled graph, '),
    ('parameter without its module', 'one forward for both passes through 1 compiled graph, '),
    ('break below', 'one forward for both passes'),
    ('break above', 'one forward for both passes'),
    ('no_grad below', 'one forward for both passes through 1 compiled graph, '),
    ('norm layer in eager mode', 'two full forwards per update: perturbed parameters are used without calling'),
    ('first norm layer in eager mode', 'two full forwards per update: perturbed parameters are used without calling'),
    ('in place above', 'two full forwards per update: what lies below the first perturbed layer is changed in place'),
])
def test_compiled_updates_equal_eager_ones_whatever_dynamo_makes_of_the_model(where, sharing):
    batches = images([4, 4, 4], 8)
    filter = r'^norm|^stem\.1' if where.startswith('first') else '^norm'
    actual, sam = updates(small(where=where), batches, compiled=True, filter=filter)
    expected, _ = updates(small(where=where), batches, compiled=False, filter=filter, share_forward=False)
    assert_same(actual, expected)
    assert sam.sharing.startswith(sharing)


def test_autocast_region_that_reaches_over_the_boundary_is_left_whole():
    where = 'autocast around the boundary'
    batches = images([4, 4, 4], 8)
    actual, sam = updates(small(where=where).float(), batches, compiled=True, filter='^norm')
    expected, _ = updates(small(where=where).float(), batches, compiled=False, filter='^norm', share_forward=False)
    assert_same(actual, expected, 1e-2)
    assert sam.sharing.startswith('two full forwards per update: ')


def test_autocast_around_the_model_is_that_of_the_parts():
    def context():
        return torch.autocast('cpu', torch.bfloat16)

    batches = images([4, 4, 4], 8, torch.float32)
    actual, sam = updates(small().float(), batches, compiled=True, filter='^norm', context=context)
    expected, _ = updates(small().float(), batches, compiled=False, filter='^norm', context=context)
    full, _ = updates(small().float(), batches, compiled=False, filter='^norm')
    assert sam.sharing.startswith('one forward')
    assert_same(actual, expected, 2e-2)
    loss = '0 loss'
    assert abs(actual[loss] - expected[loss]) < abs(full[loss] - expected[loss]) / 4


class Repeated(nn.Module):
    """Blocks for which dynamo has one graph; the last one is perturbed, and its parameters are read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({'norm': nn.BatchNorm2d(3), 'conv': nn.Conv2d(3, 3, 3, padding=1)})
                                    for _ in range(3))
        self.head = nn.Linear(3, 7)

    def block(self, x: Tensor, norm: nn.Module, conv: nn.Module) -> Tensor:
        y = conv(norm(x))
        torch._dynamo.graph_break()
        return x + y.relu()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.block(x, block['norm'], block['conv'])
        norm = self.blocks[2]['norm']
        return self.head(x.relu().mean((2, 3))) + norm.weight.square().sum() * norm.bias.exp().sum()


class Views(Small):
    """A tensor and a view of it cross the boundary, and one is changed in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.stem(x))
        view = x.flatten(2)
        y = self.norm(x.clone())
        x.mul_(2)
        return self.head((y.flatten(2) + view).relu().mean(2))


@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning')
@pytest.mark.parametrize('kind, filter', [(Repeated, r'blocks\.2'), (lambda: Views(''), '^norm')])
def test_graphs_for_several_modules_and_views_over_the_boundary_equal_eager_ones(kind, filter):
    results = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = kind().double().train()
        results.append(updates(model, images([4] * 3, 8), compiled, filter=filter, share_forward=compiled)[0])
    assert_same(*results)


def test_batches_of_other_sizes_equal_eager_ones():
    batches = images([4, 4, 6, 3, 4, 5], 8)
    actual, sam = updates(small(), batches, compiled=True, filter='^norm')
    expected, _ = updates(small(), batches, compiled=False, filter='^norm', share_forward=False)
    assert sam.sharing.startswith('one forward')
    assert_same(actual, expected)


def test_lower_part_runs_once_per_update_and_nothing_is_compiled_after_the_first():
    backend = Runs()
    model = small()
    _, sam = updates(model, images([4], 8), compiled=True, backend=backend, filter='^norm')
    assert list(backend.runs.values()) == [2, 1, 1]  # the first update checks the lower part; two ways of the upper
    x, y = images([4], 8)[0]
    for _ in range(3):
        sam.minimize(lambda: F.cross_entropy(model(x), y))
    assert list(backend.runs.values()) == [5, 4, 4]


def test_check_without_memory_for_a_second_graph_keeps_none():
    grad_modes = []

    def backend(gm, inputs):
        compiled, runs = torch._dynamo.lookup_backend('aot_eager')(gm, inputs), []

        def run(*args):
            runs.append(1)
            if not grad_modes:  # the first run of the first graph, in the pass at w
                grad_modes.append('recorded')
                run.recorded = True
            elif getattr(run, 'recorded', False) and len(runs) == 2:
                grad_modes.append('no memory')
                raise torch.OutOfMemoryError('CUDA out of memory')
            elif not torch.is_grad_enabled():
                grad_modes.append('without a graph')
            return compiled(*args)

        return run

    batches = images([4, 4], 8)
    expected, _ = updates(small(), batches, compiled=False, filter='^norm', share_forward=False)
    actual, sam = updates(small(), batches, compiled=True, backend=backend, filter='^norm')
    assert sam.sharing.startswith('one forward for both passes')
    assert grad_modes == ['recorded', 'no memory', 'without a graph']
    assert_same(actual, expected)


def test_ascent_computes_no_gradient_below_the_first_perturbed_parameter():
    outputs = []

    def backward_compiler(gm, inputs):
        outputs.append(sum(n is not None for n in gm.graph.find_nodes(op='output')[0].args[0]))
        return make_boxed_func(gm.forward)

    backend = aot_autograd(fw_compiler=lambda gm, inputs: make_boxed_func(gm.forward), bw_compiler=backward_compiler)
    updates(small(), images([4], 8), compiled=True, backend=backend, filter='^norm')
    # the upper part at w: norm; at w + eps: norm, head, and what comes from below; the lower part: stem and second
    assert outputs == [2, 5, 6]


def test_loss_function_that_takes_another_batch_each_time_is_found_out():
    model = small()
    compile_split(model, backend='aot_eager')
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.01), model, rho=0.5, filter='^norm')
    batches = iter(images([4] * 6, 8))

    def loss() -> Tensor:
        x, y = next(batches)
        return F.cross_entropy(model(x), y)

    sam.minimize(loss)
    assert sam.sharing == 'two full forwards per update: Part does not repeat its output'
    sam.minimize(loss)


def test_evaluation_and_exceptions_between_the_passes_leave_nothing_behind():
    model, twin = small(), small()
    compile_split(model, backend='aot_eager')
    x, y = images([4], 8)[0]
    other = images([5], 8)[0][0]
    outputs = []
    for m, options in ((model, {}), (twin, {'share_forward': False})):
        sam = SAM(torch.optim.SGD(m.parameters(), lr=0.01), m, rho=0.5, filter='^norm', **options)
        outputs.append([])
        torch.manual_seed(1)

        def evaluating(m: nn.Module = m, seen: list = outputs[-1]) -> Tensor:
            loss = F.cross_entropy(m(x), y)
            m.eval()
            with torch.no_grad():
                seen.append(m(other))
            m.train()
            return loss

        def failing(m: nn.Module = m) -> Tensor:
            raise RuntimeError(f'{F.cross_entropy(m(x * 7), y):.3f}')

        sam.minimize(evaluating)
        with pytest.raises(RuntimeError):
            sam.minimize(failing)
        sam.minimize(evaluating)
    # in the second pass statistics of shared layers have moved once, not twice, until they are put back
    for a, b in zip(outputs[0][::2], outputs[1][::2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert_same(weights(model), weights(twin))


def test_selection_that_begins_with_the_first_layer_is_compiled_whole():
    batches = images([4, 4], 8)
    actual, sam = updates(small(), batches, compiled=True, params='all')
    expected, _ = updates(small(), batches, compiled=False, params='all')
    assert sam.sharing == 'two full forwards per update: the first layer is perturbed'
    assert_same(actual, expected)


def test_plain_updates_and_another_sam_of_the_same_model_are_right():
    model, twin = small(), small()
    compile_split(model, backend='aot_eager')
    x, y = images([4], 8)[0]
    for m in (model, twin):
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        for filter in ('^norm', r'^stem\.1', None):
            if filter:
                sam = SAM(optimizer, m, rho=0.5, filter=filter, share_forward=m is model)
                for _ in range(2):
                    sam.minimize(lambda m=m: F.cross_entropy(m(x), y))
            optimizer.zero_grad()
            F.cross_entropy(m(x), y).backward()
            optimizer.step()
    assert_same(weights(model), weights(twin))


def test_copies_of_a_compiled_model_are_not_compiled_and_names_stay():
    model = small()
    names = list(model.state_dict())
    compile_split(model, backend='aot_eager')
    assert list(model.state_dict()) == names
    assert model._compiled_call_impl is not None and copy.deepcopy(model)._compiled_call_impl is None
