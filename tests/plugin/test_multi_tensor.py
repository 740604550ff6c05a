import itertools

import pytest
import torch

from timm_sam import multi_tensor
from timm_sam.multi_tensor import (
    PIECE,
    Backup,
    at_least_float32,
    by_factor,
    constants_like,
    converted,
    copy_,
    global_norm,
    inner,
    pieces,
    widest,
    zero_unless_,
)
from timm_sam.perturbation import VARIANTS, perturbation

KINDS = [(torch.float32, torch.float32), (torch.float32, torch.float64)]


@pytest.mark.parametrize('dtypes', KINDS, ids=['alike', 'mixed'])
def test_factor_takes_the_type_of_each_tensor(dtypes):
    tensors = [torch.arange(1, 5, dtype=dtype) for dtype in dtypes]
    quotients = by_factor(torch._foreach_div, tensors, torch.tensor(3.0, dtype=torch.float64))
    for quotient, t in zip(quotients, tensors):
        assert quotient.dtype == t.dtype
        assert torch.equal(quotient, t / torch.tensor(3.0, dtype=t.dtype))


@pytest.mark.parametrize('dtypes', KINDS, ids=['alike', 'mixed'])
@pytest.mark.parametrize('value', [1.5, -0.0, float('inf'), float('nan'), 1e-45])
def test_zero_unless_leaves_each_bit_or_none(value, dtypes):
    for condition in (True, False):
        tensors = [torch.full((2, 3), value, dtype=dtype) for dtype in dtypes]
        before = [t.clone() for t in tensors]
        zero_unless_(torch.tensor(condition), tensors)
        for t, b in zip(tensors, before):
            integers = torch.int32 if t.dtype == torch.float32 else torch.int64
            assert torch.equal(t.view(integers), b.view(integers) if condition else torch.zeros_like(b, dtype=integers))


def test_constants_have_shapes_strides_and_values_of_their_own():
    shapes = [torch.empty(3), torch.empty(()), torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
              torch.empty(4, 3).t(), torch.empty(0), torch.empty(2, 6)[:, ::2], torch.empty(7)]
    values = [torch.tensor(float(i + 1)) for i in range(len(shapes))]
    constants = constants_like(values, shapes)
    for constant, value, like in zip(constants, values, shapes):
        assert constant.shape == like.shape
        assert (constant == value).all()
    for i in (0, 1, 2, 3, 6):
        assert constants[i].stride() == shapes[i].stride()


def test_conversion_gives_back_what_has_its_type_already():
    tensors = [torch.tensor([1.5]), torch.tensor([2.5], dtype=torch.bfloat16), torch.tensor([3.5], dtype=torch.float64)]
    result = converted(tensors, [torch.float32, torch.float32, torch.bfloat16])
    assert result[0] is tensors[0]
    assert [r.dtype for r in result] == [torch.float32, torch.float32, torch.bfloat16]
    assert [float(r) for r in result] == [1.5, 2.5, 3.5]
    assert [t.dtype for t in at_least_float32(tensors)] == [torch.float32, torch.float32, torch.float64]


def test_copies_go_into_the_type_of_the_target():
    targets = [torch.zeros(2), torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.float64)]
    copy_(targets, [torch.ones(2), torch.full((3,), 4), torch.full((2,), 0.5)])
    assert [t.tolist() for t in targets] == [[1, 1], [4, 4, 4], [0.5, 0.5]]
    copy_([], [])


def test_widest_type_is_float64_where_there_is_one():
    assert [widest(torch.device(name)) for name in ('cpu', 'cuda:1', 'mps')] == [
        torch.float64, torch.float64, torch.float32]


def test_backup_restores_the_tensors_of_the_last_save_and_keeps_its_memory():
    backup, tensors = Backup(), [torch.ones(2), torch.zeros((), dtype=torch.int64)]
    backup.save(tensors)
    memory = [v.data_ptr() for v in backup.values]
    for t in tensors:
        t.add_(5)
    backup.restore()
    assert [t.tolist() for t in tensors] == [[1, 1], 0]
    backup.save(tensors)
    assert [v.data_ptr() for v in backup.values] == memory
    other = [torch.full((3,), 7.0)]
    backup.save(other)
    other[0].zero_()
    tensors[0].fill_(9)
    backup.restore()
    assert (other[0] == 7).all() and (tensors[0] == 9).all()


def test_small_tensors_as_one_give_what_each_by_itself_gives(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, *shape, generator=generator) for shape in ((4, 3), (4,), (1, 1, 5))]
    for variant, dtype, turned, masks, full, normalized in itertools.product(
            VARIANTS, (torch.float32, torch.float64, torch.bfloat16), (False, True), (False, True), (False, True),
            (1.0, 0.3)):
        params, grads = ([d[i].to(dtype) for d in draws] for i in range(2))
        params[0], grads[0] = params[0].t(), grads[0].t()  # strides do not matter
        wide = [g.float() if dtype == torch.bfloat16 else g for g in grads]
        direction = [g.cos() for g in wide] if turned else None
        masked = [torch.where(x > 0.2, x, 0.0) for x in direction or wide] if masks else None
        found = []
        for small in (0, 8192):
            monkeypatch.setattr(multi_tensor, 'SMALL', small)
            found.append(perturbation(variant, params, grads, 0.5, direction=direction, masked=masked, full_norm=full,
                                      normalized=normalized))
        (eps, norm), (other, other_norm) = found
        exact = 1e-14 if dtype == torch.float64 else 2e-6
        assert [e.shape for e in other] == [p.shape for p in params] and other_norm.dtype == norm.dtype
        assert float(other_norm) == pytest.approx(float(norm), rel=1e-14)
        assert all(a.dtype == b.dtype and torch.allclose(a, b, rtol=exact, atol=exact) for a, b in zip(eps, other))
        assert any(e.abs().sum() > 0 for e in eps)


def large(dtype, kind):
    """A tensor of more than two pieces, in one of the layouts that gradients and weights have."""
    torch.manual_seed(0)
    whole = torch.randn(9, 5, 41, 41, dtype=torch.float64).to(dtype)
    assert whole.numel() > 2 * PIECE
    return {'contiguous': whole, 'channels last': whole.to(memory_format=torch.channels_last),
            'transposed': whole.transpose(0, 2), 'part': whole[:, 1:4, 2:], 'from the middle': whole.flatten()[7:],
            'expanded': whole[:, :1].expand(9, 5, 41, 41)}[kind]


LAYOUTS = ['contiguous', 'channels last', 'transposed', 'part', 'from the middle', 'expanded']


@pytest.mark.parametrize('kind', LAYOUTS)
def test_pieces_hold_every_element_once(kind):
    tensor = large(torch.float32, kind)
    found = pieces([tensor, torch.ones(3)])
    assert len(found) > 2 and max(p.numel() for p in found) <= PIECE and torch.equal(found[-1], torch.ones(3))
    assert torch.equal(torch.cat(found[:-1]).sort().values, tensor.flatten().sort().values)
    assert pieces([tensor.double()])[0].shape == tensor.shape  # nothing to convert


@pytest.mark.parametrize('kind', LAYOUTS)
@pytest.mark.parametrize('other', LAYOUTS)
def test_sums_over_large_tensors_are_those_in_float64_whatever_their_layouts(kind, other):
    a = large(torch.float32, kind)
    b = large(torch.float32, other).flip(0)
    b = b if a.shape == b.shape else a.sin()
    few = torch.tensor([1e30, 2.0])
    norm = torch.cat([a.double().flatten(), few.double()]).norm()
    assert float(global_norm([a, few])) == pytest.approx(float(norm), rel=1e-13)
    assert float(global_norm([a])) == pytest.approx(float(a.double().norm()), rel=1e-13)
    product = float((a.double() * b.double()).sum())
    scale = float(a.double().norm() * b.double().norm())
    assert float(inner([a, few], [b, torch.tensor([0.0, 3.0])])) == pytest.approx(product + 6, abs=1e-9 * scale)
    assert inner([a], [b]).dtype == global_norm([a]).dtype == torch.float64
    assert float(inner([a], [b.double()])) == pytest.approx(product, abs=1e-9 * scale)
