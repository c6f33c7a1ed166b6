"""SSIM: the formula in loops over windows in float64, torchmetrics, and the traps of its range."""

import math

import pytest
import torch

from diffusers_repr.metrics import ssim, ssim_map


def mirrored(i, size):
    """Index i of an image mirrored at its first and last pixel, which are not repeated."""
    i = abs(i)
    return 2 * (size - 1) - i if i >= size else i


def by_loops(a, b, window, sigma, edges):
    """One channel as nested lists: the paper's formula at each pixel, centred second moments, in float64."""
    h, w, r = len(a), len(a[0]), window // 2
    steps = range(-r, r + 1)
    weights = {(i, j): math.exp(-(i * i + j * j) / (2 * sigma**2)) for i in steps for j in steps}
    total = sum(weights.values())
    inside = 0 if edges == "reflect" else r
    rows = []
    for y in range(inside, h - inside):
        row = []
        for x in range(inside, w - inside):
            at = {(i, j): (mirrored(y + i, h), mirrored(x + j, w)) for i, j in weights}
            m_a = sum(weights[k] * a[p][q] for k, (p, q) in at.items()) / total
            m_b = sum(weights[k] * b[p][q] for k, (p, q) in at.items()) / total
            v_a = sum(weights[k] * (a[p][q] - m_a) ** 2 for k, (p, q) in at.items()) / total
            v_b = sum(weights[k] * (b[p][q] - m_b) ** 2 for k, (p, q) in at.items()) / total
            c = sum(weights[k] * (a[p][q] - m_a) * (b[p][q] - m_b) for k, (p, q) in at.items()) / total
            row.append(
                (2 * m_a * m_b + 1e-4) * (2 * c + 9e-4) / ((m_a**2 + m_b**2 + 1e-4) * (v_a + v_b + 9e-4)),
            )
        rows.append(row)
    return rows


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return a, (a + 0.3 * torch.randn(a.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)


@pytest.mark.parametrize("edges", ["valid", "reflect"])
@pytest.mark.parametrize(("window", "sigma"), [(5, 1.5), (3, 0.7)])
def test_every_pixel_is_the_formula_in_loops(window, sigma, edges):
    a, b = pair(2, 2, 6, 7)
    ours = ssim_map(a, b, window, sigma, edges)
    for n in range(2):
        for c in range(2):
            expected = torch.tensor(by_loops(a[n, c].tolist(), b[n, c].tolist(), window, sigma, edges))
            torch.testing.assert_close(ours[n, c], expected.double(), atol=1e-6, rtol=1e-6)
    in_float32 = ssim(a.float(), b.float(), window, sigma, edges)
    assert in_float32.dtype == torch.float32
    torch.testing.assert_close(in_float32.double(), ours.mean((1, 2, 3)), atol=1e-5, rtol=1e-5)


def test_with_mirrored_edges_it_is_that_of_torchmetrics():
    image = pytest.importorskip("torchmetrics.functional.image")
    a, b = pair(3, 3, 16, 13, seed=1)
    theirs = image.structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b, edges="reflect"), theirs, atol=1e-9, rtol=1e-7)


def test_equal_images_negatives_and_symmetry():
    a, b = pair(4, 1, 8, 8)
    assert torch.equal(ssim(a, a, 5).float(), torch.ones(4))
    assert bool((ssim(a, 1 - a, 5) < 0).all())
    torch.testing.assert_close(ssim(a, b, 5), ssim(b, a, 5))
    signed = 2 * a - 1
    assert bool((ssim_map(signed, -signed, 5).mean((1, 2, 3)) > ssim(a, 1 - a, 5) + 0.5).all()), "why [0, 1]"


def test_gradients_are_right_and_finite():
    a, b = pair(1, 1, 6, 6)
    torch.autograd.gradcheck(lambda x: ssim_map(x, b, 5, edges="reflect"), a.requires_grad_(True))
    flat = torch.full((2, 1, 6, 6), 0.5, requires_grad=True)
    ssim_map(flat, torch.full_like(flat, 0.5), 5).mean().backward()
    assert bool(torch.isfinite(flat.grad).all())


def test_autocast_and_half_precision_do_not_round_the_moments():
    a, b = (x.float() for x in pair(2, 1, 12, 12))
    exact = ssim(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ssim(a, b), exact)
    assert ssim(a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_what_cannot_be_compared_is_refused():
    a, b = (x.float() for x in pair(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"a goes from -.* to 0\.9.*\(x \+ 1\) / 2"):
        ssim((2 * a - 1).clamp(max=0.9), b, 5)
    with pytest.raises(ValueError, match="b goes from nan"):
        ssim(a, b * torch.nan, 5)
    with pytest.raises(ValueError, match="11 pixels does not fit images of 8 x 8; take one of at most 7, or edges"):
        ssim(a, b)
    with pytest.raises(ValueError, match="17 pixels does not fit images of 8 x 8; take one of at most 15"):
        ssim(a, b, 17, edges="reflect")
    for wrong, said in (
        ({"window": 4}, "odd"),
        ({"window": 0}, "whole number from 1"),
        ({"window": 5, "sigma": 0.0}, "sigma"),
        ({"window": 5, "edges": "same"}, "valid, reflect"),
    ):
        with pytest.raises(ValueError, match=said):
            ssim(a, b, **wrong)
    with pytest.raises(ValueError, match="of one shape"):
        ssim(a, b[..., :7], 5)
