"""Linear CKA, biased and unbiased, without an `N N` matrix where features are narrower than the data is long."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.checks import (
    UndefinedScoreError,
    check_pair,
    check_varied,
    clamp_outliers,
    working,
)

_BLOCK = 2**24  # entries of a kernel matrix that are held at a time
_NOTHING = 1e-12  # an HSIC below this share of its own terms is rounding


def cka(
    a: Tensor,
    b: Tensor,
    *,
    unbiased: bool = True,
    normalize_rows: bool = False,
    clamp_quantile: float | None = None,
    block_rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Centred kernel alignment of two representations with linear kernels (Kornblith et al. 2019, arXiv 1905.00414).

    `HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))` with `K = A A'`, `L = B B'`. The biased HSIC, `tr(K H L H)`, gives
    unrelated features a high score where N is not far above D; the unbiased one (Song et al. 2012, equation 5)
    does not, and is what to compare by.

    Sums over the kernel matrices come from `A' B` (size D by E) where that is cheaper than blocks of rows of K and L;
    the result is the same.

    Args:
        a: `(N, D)`, row i of both being the same sample.
        b: `(N, E)`.
        unbiased: Which HSIC; N is at least 4 for the unbiased one, 2 for the other.
        normalize_rows: Give every row length 1 first, as CKNNA does. Kornblith et al. do not.
        clamp_quantile: Clamp values before; see `clamp_outliers`.
        block_rows: Always work on kernel matrices, this many rows at a time. Changes rounding only.
        dtype: Of the products; float64 for up to 2000 rows, else float32, if None.

    Returns:
        1 for representations equal up to rotation and scale; unbiased, unrelated ones give 0 on average.

    Raises:
        ValueError: For too few rows, unequal N, NaN, or features whose rows are all alike (the score is undefined).

    Example:
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> round(cka(x, -2 * x), 6)
        1.0
    """
    check_pair(a, b, least=4 if unbiased else 2)
    if dtype is None:
        dtype = torch.promote_types(working(a).dtype, working(b).dtype)
    rows = [working(x, dtype) for x in (a, b.to(a.device))]
    if clamp_quantile is not None:
        rows = [clamp_outliers(x, clamp_quantile) for x in rows]
    if normalize_rows:
        rows = [torch.nn.functional.normalize(x, dim=1) for x in rows]
    for name, values in zip("AB", rows, strict=True):
        check_varied(values, name)
    if block_rows is not None:
        check_whole("block_rows", block_rows, 1)
    # Both HSICs do not change with the mean; without it no digits are lost.
    x, y = (values - values.double().mean(0).to(values.dtype) for values in rows)
    hsic = _unbiased if unbiased else _biased
    shared, of_a, of_b = (hsic(sums) for sums in _all_sums(x, y, block_rows))
    for name, value in (("A", of_a), ("B", of_b)):
        if value <= 0:
            raise UndefinedScoreError(f"CKA is undefined: the HSIC of {name} with itself is {value:.3g}.")
    return shared / (of_a**0.5 * of_b**0.5)


@dataclass(frozen=True)
class _Sums:
    """Sums over two kernel matrices P and Q, both symmetric, float64.

    Attributes:
        product: `sum(P * Q)`.
        diagonal: `(2, N)`, the diagonals.
        row: `(2, N)`, sums of the rows.
    """

    product: Tensor
    diagonal: Tensor
    row: Tensor


def _all_sums(x: Tensor, y: Tensor, block_rows: int | None) -> list[_Sums]:
    """Sums of (K, L), (K, K), (L, L)."""
    n, d, e = len(x), x.shape[1], y.shape[1]
    if block_rows is None and d * e + d * d + e * e <= n * (d + e):
        products = [_squares(x, y), _squares(x, x), _squares(y, y)]
    else:
        products = _block_products(x, y, block_rows or max(_BLOCK // n, 1))
    parts = [_diagonal_and_rows(x), _diagonal_and_rows(y)]
    pairs = ((0, 1), (0, 0), (1, 1))
    return [
        _Sums(product, *(torch.stack([parts[i][at], parts[j][at]]) for at in (0, 1)))
        for product, (i, j) in zip(products, pairs, strict=True)
    ]


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """`sum(XX' * YY') = ||X'Y||^2`."""
    return (x.T @ y).double().square().sum()


def _block_products(x: Tensor, y: Tensor, step: int) -> list[Tensor]:
    total = torch.zeros(3, dtype=torch.float64, device=x.device)
    for start in range(0, len(x), step):
        k, l = (values[start : start + step] @ values.T for values in (x, y))  # noqa: E741
        total += torch.stack([(p * q).sum(dtype=torch.float64) for p, q in ((k, l), (k, k), (l, l))])
    return list(total)


def _diagonal_and_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    return x.square().sum(1), x @ x.sum(0)


def _biased(sums: _Sums) -> float:
    """`tr(P H Q H)`; a common factor is left out."""
    n = sums.row.shape[1]
    total = sums.row.sum(1)
    return _unless_rounding([sums.product, -2 * (sums.row[0] @ sums.row[1]) / n, total[0] * total[1] / n**2])


def _unbiased(sums: _Sums) -> float:
    """Song et al. 2012, equation 5, on the matrices without their diagonals; a common factor is left out."""
    n = sums.row.shape[1]
    row = sums.row - sums.diagonal
    total = row.sum(1)
    product = sums.product - sums.diagonal[0] @ sums.diagonal[1]
    return _unless_rounding([product, total[0] * total[1] / ((n - 1) * (n - 2)), -2 * (row[0] @ row[1]) / (n - 2)])


def _unless_rounding(terms: list[Tensor]) -> float:
    stacked = torch.stack(terms).cpu()
    value = float(stacked.sum())
    return 0.0 if abs(value) <= _NOTHING * float(stacked.abs().sum()) else value
