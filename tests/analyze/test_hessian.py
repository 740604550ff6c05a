"""The top eigenvalue and the trace of the Hessian: closed forms, the whole matrix, and another library."""
import copy
import math
import re
import shlex

import pytest
import reference_analysis as reference
import timm
import torch
from scipy.sparse.linalg import eigsh
from support.running import in_process
from support.validating import BASE
from torch import nn
from torch.func import functional_call, hessian

from timm_sam.analyze import __main__ as analyze
from timm_sam.analyze.hessian import (
    flat,
    mean_and_error,
    probe,
    product,
    shaped,
    start_vector,
    top_eigenvalue,
    trace,
)
from timm_sam.analyze.objective import batch_loss

F64 = torch.float64


def multiplier(loss, weights):
    return lambda v: flat(product(loss, weights, shaped(v, weights)), F64)


def quadratic(sign=1.0):
    h = torch.tensor(reference.CURVATURES)
    weights = list(torch.tensor(reference.WEIGHTS).split(2))
    return multiplier(lambda x: sign * 0.5 * (h * torch.cat(x) ** 2).sum(), weights), h


def test_quadratic_loss_has_the_curvatures_that_it_has():
    multiply, h = quadratic()
    top = top_eigenvalue(multiply, start_vector(4, 0), 1e-9, 10)
    assert top.converged and top.value == pytest.approx(float(h.max()), rel=1e-12)
    assert top.steps == 4
    # of a diagonal matrix every probe gives the trace
    assert trace(multiply, probe(4, 0, 0)) == pytest.approx(float(h.sum()), rel=1e-12)


def test_concave_loss_has_the_eigenvalue_nearest_0():
    multiply, h = quadratic(-1.0)
    assert top_eigenvalue(multiply, start_vector(4, 0), 1e-9, 10).value == pytest.approx(-float(h.min()), rel=1e-12)


def test_linear_loss_has_none():
    multiply = multiplier(lambda x: x[0].sum() + 3 * x[1].sum(), [torch.ones(2, dtype=F64), torch.ones(2, dtype=F64)])
    top = top_eigenvalue(multiply, start_vector(4, 0), 0.01, 10)
    assert (top.value, top.converged, top.steps) == (0.0, True, 1)
    assert trace(multiply, probe(4, 0, 0)) == 0


def test_matrix_that_is_a_multiple_of_one_ends_at_once():
    top = top_eigenvalue(lambda v: 3 * v, start_vector(50, 0), 1e-6, 10)
    assert (top.converged, top.steps) == (True, 1) and top.value == pytest.approx(3)


def test_what_is_not_finite_is_nan_and_what_takes_too_long_says_so():
    assert math.isnan(top_eigenvalue(lambda v: v * math.inf, start_vector(4, 0), 0.01, 10).value)
    h = torch.linspace(0.99, 1, 200, dtype=F64)
    top = top_eigenvalue(lambda v: h * v, start_vector(200, 0), 1e-8, 3)
    assert not top.converged and top.steps == 3
    with pytest.raises(ValueError, match='start must not be 0'):
        top_eigenvalue(lambda v: v, torch.zeros(3, dtype=F64), 0.01, 10)


@pytest.fixture(scope='module')
def small():
    """A network of two layers with 50 weights, its loss, and its whole Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    for p in model.parameters():
        nn.init.normal_(p)
    model[2].bias = None
    assert sum(p.numel() for p in model.parameters()) == 42
    x, y = torch.randn(20, 4, dtype=F64), torch.randint(0, 2, (20,))
    names, weights = map(list, zip(*((name, p.detach()) for name, p in model.named_parameters())))

    def of_row(row):
        return nn.functional.cross_entropy(functional_call(model, dict(zip(names, shaped(row, weights))), (x,)), y)
    return multiplier(batch_loss(model, names, x, y, False), weights), hessian(of_row)(flat(weights, F64))


def test_small_network_has_the_top_eigenvalue_of_its_whole_matrix(small):
    multiply, matrix = small
    exact = torch.linalg.eigvalsh(matrix)
    assert exact[0] < 0 < exact[-1]
    v = start_vector(len(matrix), 1)
    assert torch.allclose(multiply(v), matrix @ v, atol=1e-12)
    for tolerance in (0.01, 1e-5):
        top = top_eigenvalue(multiply, start_vector(len(matrix), 0), tolerance, 50)
        assert top.converged and top.value == pytest.approx(float(exact[-1]), rel=1e-3)
        assert float((exact - top.value).abs().min()) <= top.residual + 1e-12
    # and with all signs the other way round
    top = top_eigenvalue(lambda v: -multiply(v), start_vector(len(matrix), 0), 1e-5, 50)
    assert top.value == pytest.approx(-float(exact[0]), rel=1e-3)


def test_trace_lies_within_its_error(small):
    multiply, matrix = small
    mean, error = mean_and_error([trace(multiply, probe(len(matrix), 3, i)) for i in range(200)])
    assert abs(mean - float(matrix.trace())) < 4 * error
    # the variance of an estimate by signs is twice the sum of squares off the diagonal
    variance = 2 * float((matrix - matrix.diag().diag()).square().sum())
    assert error == pytest.approx(math.sqrt(variance / 200), rel=0.2)


def test_probes_are_signs_that_differ():
    first, second = probe(1000, 0, 0), probe(1000, 0, 1)
    assert set(first.tolist()) == {-1.0, 1.0} and abs(float(first @ second)) < 150
    assert torch.equal(first, probe(1000, 0, 0)) and not torch.equal(first, probe(1000, 1, 0))


@pytest.mark.full
@pytest.mark.parametrize('name', ['batch_norm', 'vit'])
@pytest.mark.filterwarnings('ignore')  # of the other library
def test_another_library_finds_the_same(name):
    from curvlinops import HessianLinearOperator

    torch.manual_seed(0)
    if name == 'vit':
        model = timm.create_model('test_vit', num_classes=5, img_size=32, global_pool='avg', depth=2)
        data = [(torch.randn(6, 3, 32, 32, dtype=F64), torch.randint(0, 5, (6,))) for _ in range(2)]
        assert any(getattr(m, 'fused_attn', False) for m in model.modules())
    else:
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                              nn.Linear(24, 5))
        data = [(torch.randn(n, 3, 8, 8, dtype=F64), torch.randint(0, 5, (n,))) for n in (6, 4)]
        with torch.no_grad():
            for x, _ in data:  # its statistics
                model(x.float())
    model = model.double().eval()
    before = copy.deepcopy(model.state_dict())
    fused = [getattr(m, 'fused_attn', None) for m in model.modules()]
    # the other library goes forward through the backward pass, where torch 2.12 is wrong for scales of LayerNorm: the
    # test with finite differences has these
    moving = {key: p for key, p in model.named_parameters() if not re.search(r'norm\d?\.weight', key)}
    names, weights = list(moving), [p.detach() for p in moving.values()]
    size, images = sum(w.numel() for w in weights), sum(len(labels) for _, labels in data)

    def multiply(v):
        points = shaped(v, weights)
        return sum(len(labels) / images * flat(product(
            batch_loss(model, names, x, labels, False), weights, points), F64) for x, labels in data)

    top = top_eigenvalue(multiply, start_vector(size, 0), 1e-4, 60)
    assert top.converged and all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert fused == [getattr(m, 'fused_attn', None) for m in model.modules()]
    for m in model.modules():  # the other library needs it
        if hasattr(m, 'fused_attn'):
            m.fused_attn = False
    theirs = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(moving.values()), data, check_deterministic=False)
    v = start_vector(size, 1)
    assert torch.allclose(multiply(v), (theirs @ v).detach(), rtol=1e-6, atol=1e-9 * float(v.norm()))
    largest = eigsh(theirs.to_scipy(), k=1, which='LA', tol=1e-5, return_eigenvectors=False)[0]
    assert top.value == pytest.approx(float(largest), rel=1e-3)


def test_products_are_differences_of_gradients():
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=5, img_size=32).double().eval()
    x, y = torch.randn(2, 3, 32, 32, dtype=F64), torch.randint(0, 5, (2,))
    names, weights = map(list, zip(*((key, p.detach()) for key, p in model.named_parameters())))
    loss, v = batch_loss(model, names, x, y, True), start_vector(sum(w.numel() for w in weights), 1)
    v /= v.norm()
    found, h = multiplier(loss, weights)(v), 1e-5

    def gradient(row):
        points = [p.requires_grad_() for p in shaped(row, weights)]
        return flat(torch.autograd.grad(loss(points), points), F64)
    w = flat(weights, F64)
    expected = (gradient(w + h * v) - gradient(w - h * v)) / (2 * h)
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())


@pytest.mark.parametrize('more, words', [
    ('--probes 1', '--probes 1 must be >= 2'), ('--tolerance 1', '--tolerance 1.0'),
    ('--params nonorm --filter norm', '--params nonorm --filter norm: '),
    ('--num-images 10000', '--num-images 10000'),
    ('--iterations 1', '--iterations 1: the top eigenvalue of')])
def test_what_cannot_be_is_one_line(fitted, tmp_path, more, words):
    done = in_process(analyze.main, shlex.split(
        f'hessian {BASE} --num-classes 6 --data-dir {fitted.data} --checkpoint {fitted.checkpoint} --num-images 12 '
        f'--out out {more}'), tmp_path)
    assert done.code == 2 and words in done.err.strip().splitlines()[-1] and 'Traceback' not in done.err, done.err
    assert not list(tmp_path.glob('out/hessian.md'))
