import pytest
import torch
from torch.nn.functional import cosine_similarity

from diffusers_repr.objectives import alignment_loss
from diffusers_repr.objectives.cosine import PIECE, mean_cosine


def both(a, b, dtype=None):
    """Value and gradient of ours and of torch's."""
    out = []
    for function in (mean_cosine, lambda x, y: cosine_similarity(x.to(dtype or x.dtype), y.to(dtype or y.dtype)
                                                                 , dim=-1).mean()):  # fmt: skip
        x = a.clone().requires_grad_()
        value = function(x, b)
        (3 * value).backward()
        out.append((value.detach(), x.grad))
    return out


def test_several_pieces_equal_torch():
    rows = 3 * PIECE // 64 + 5
    a, b = torch.randn(rows, 64, dtype=torch.float64), torch.randn(rows, 64, dtype=torch.float64)
    (value, grad), (wanted, other) = both(a, b)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-14)
    assert torch.allclose(grad, other, atol=1e-16)


def test_finite_differences():
    a = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mean_cosine(x, b), a)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    a, b = (torch.randn(4, 7, 33) * 100).to(dtype), torch.randn(4, 7, 33)
    (value, grad), (wanted, other) = both(a, b, torch.float32)
    assert value.dtype == torch.float32
    assert grad.dtype == dtype
    assert value.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert torch.allclose(grad.float(), other.float(), rtol=1e-2, atol=1e-7)


def test_rows_of_zeros_are_finite():
    a, b = torch.randn(4, 6), torch.randn(4, 6)
    a[0], b[1] = 0, 0
    (value, grad), (wanted, other) = both(a, b)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-7)
    assert bool(torch.isfinite(grad).all())
    assert torch.allclose(grad[1:], other[1:], atol=1e-7)


def test_layouts_that_are_not_contiguous():
    a, b = torch.randn(2, 8, 6).transpose(1, 2), torch.randn(2, 6, 8)
    (value, grad), (wanted, other) = both(a, b)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-7)
    assert torch.allclose(grad, other, atol=1e-7)


def test_the_graph_may_be_walked_twice():
    a, b = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6)
    value = mean_cosine(a, b)
    one, two = (torch.autograd.grad(value, a, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_a_target_with_a_gradient_gets_one():
    a, b = torch.randn(2, 3, 6), torch.randn(2, 3, 6, requires_grad=True)
    alignment_loss(a, b).backward()
    assert b.grad.abs().max() > 0
