"""CKNNA: do two representations agree about who is near whom? Memory `N k`, not `N N`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.checks import (
    UndefinedScoreError,
    check_pair,
    check_rows,
    check_varied,
    clamp_outliers,
    working,
)

_BLOCK = 2**24  # similarities that are held at a time
_NOTHING = 1e-12  # an HSIC below this share of its own terms is rounding


def cknna(
    a: Tensor,
    b: Tensor,
    k: int = 10,
    *,
    symmetric: bool = True,
    unbiased: bool = True,
    normalize_rows: bool = True,
    eps: float = 0.0,
    clamp_quantile: float | None = None,
    block_rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Centred kernel alignment restricted to mutual nearest neighbours (Huh et al. 2024, arXiv 2405.07987).

    With L2-normalised rows, `K = A A'`, `L = B B'`, and `m_K[i, j] = 1` if j is among the k rows most similar to i
    (without i), `CKNNA = HSIC(m K, m L) / sqrt(HSIC(m_K K, m_K K) HSIC(m_L L, m_L L))` with `m = m_K m_L` and the
    unbiased HSIC of Song et al. 2012, equation 5. Equal representations give 1, whatever N; `k = N - 1` is unbiased
    CKA of the normalised rows. No constant is added to the denominator, unless asked.

    The number of the authors' own code (github.com/minyoungg/platonic-rep) is that of `symmetric=False, eps=1e-6`: it
    compares in one order, adds 1e-6, and its function leaves it to the caller to normalise the rows.

    Scores of unequal N or k say nothing about each other: unrelated features score about `k / N` and more.

    The masks are not symmetric matrices, so HSIC depends a little on which representation stands first; by default
    the mean of both orders is returned. Of equally similar rows those that stand first in the data count.

    Args:
        a: `(N, D)`, row i of both being the same sample; N is at least 4.
        b: `(N, E)`.
        k: Neighbours, 1 to N - 1.
        symmetric: False: the order (a, b) alone, as papers compute it.
        unbiased: False: HSIC as in the first CKA, `tr(K H L H)`, with each row among its own neighbours, as the
            authors' code has it; N is at least 2 then, and k up to N. Both orders are equal.
        normalize_rows: False: inner products of the rows as they are decide who is near, and enter K and L.
        eps: Added to the denominator.
        clamp_quantile: Clamp values at this quantile of their size before the normalisation; see `clamp_outliers`.
        block_rows: Rows compared with all others at a time; by a limit on memory if None. Changes rounding only.
        dtype: Of the similarities; float64 for up to 2000 rows, else float32, if None. Sums are float64 always.

    Returns:
        At most about 1; unrelated features come near 0 and may fall below.

    Raises:
        ValueError: For N below 4, k outside 1 to N - 1, unequal N, NaN, a negative eps, or features whose rows are
            all alike (the score is undefined).

    Example:
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> round(cknna(x, 3 * x.flip(1)), 6)
        1.0
    """
    check_pair(a, b, least=4 if unbiased else 2)
    settings: dict[str, Any] = {
        "unbiased": unbiased,
        "normalize_rows": normalize_rows,
        "clamp_quantile": clamp_quantile,
    }
    graphs = [neighbour_graph(x, k, **settings, block_rows=block_rows, dtype=dtype) for x in (a, b.to(a.device))]
    return compare_graphs(*graphs, symmetric=symmetric, eps=eps)


@dataclass(frozen=True)
class NeighbourGraph:
    """The k nearest rows of every row, and how similar they are.

    Attributes:
        columns: `(N, k)` int64, ascending in each row; never the row itself, if it is for the unbiased HSIC.
        values: `(N, k)` float64, similarities.
        unbiased: Which HSIC it is for.
    """

    columns: Tensor
    values: Tensor
    unbiased: bool = True

    @cached_property
    def keys(self) -> Tensor:
        """`(N k,)` int64, `row N + column` of every edge, ascending."""
        rows = torch.arange(len(self.columns), device=self.columns.device)
        return (rows[:, None] * len(self.columns) + self.columns).flatten()

    @cached_property
    def self_hsic(self) -> float:
        """HSIC of the masked similarities with themselves; 0 where nothing but rounding is left."""
        values = self.values.flatten()
        return edge_hsic(self.keys, values, values, len(self.columns), symmetric=False, unbiased=self.unbiased)


def neighbour_graph(
    features: Tensor,
    k: int = 10,
    *,
    unbiased: bool = True,
    normalize_rows: bool = True,
    clamp_quantile: float | None = None,
    block_rows: int | None = None,
    dtype: torch.dtype | None = None,
) -> NeighbourGraph:
    """The graph of nearest rows by cosine; made once, it can be compared with many others.

    Args:
        features: `(N, D)`, N at least 4.
        k: As in `cknna`.
        unbiased: As in `cknna`.
        normalize_rows: As in `cknna`.
        clamp_quantile: As in `cknna`.
        block_rows: As in `cknna`.
        dtype: As in `cknna`.

    Raises:
        ValueError: As `cknna`.
    """
    check_rows(features, "features", least=4 if unbiased else 2)
    count = len(features)
    check_whole("k", k, 1, count - 1 if unbiased else count)
    rows = working(features, dtype)
    if clamp_quantile is not None:
        rows = clamp_outliers(rows, clamp_quantile)
    if normalize_rows:
        rows = torch.nn.functional.normalize(rows, dim=1)
    check_varied(rows, "the features, scaled to length 1," if normalize_rows else "the features")
    step = max(_BLOCK // count, 1) if block_rows is None else check_whole("block_rows", block_rows, 1)
    columns, values = [], []
    for start in range(0, count, step):
        block = rows[start : start + step] @ rows.T
        if unbiased:  # the diagonal does not count, so no neighbour is spent on it
            block[torch.arange(len(block)), start + torch.arange(len(block))] = -torch.inf
        nearest = _nearest(block, k)
        columns.append(nearest)
        values.append(block.gather(1, nearest).double())
    return NeighbourGraph(torch.cat(columns), torch.cat(values), unbiased)


def _nearest(similar: Tensor, k: int) -> Tensor:
    """Columns `(n, k)` of the k largest of each row, ascending; of equal ones the first."""
    top = similar.topk(k, dim=1)
    columns, limit = top.indices, top.values[:, -1:]
    crowded = ((similar >= limit).sum(1) > k).nonzero().flatten()
    if len(crowded):  # which of equals `topk` takes is not specified
        part, limit = similar[crowded], limit[crowded]
        above, equal = part > limit, part == limit
        chosen = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        columns[crowded] = chosen.nonzero()[:, 1].view(-1, k)
    return columns.sort(dim=1).values


def compare_graphs(a: NeighbourGraph, b: NeighbourGraph, *, symmetric: bool = True, eps: float = 0.0) -> float:
    """CKNNA of two graphs of the same N and k, with `symmetric` and `eps` as in `cknna`.

    Raises:
        ValueError: For graphs of unequal N or k or of unlike estimators, a negative eps, or if one has no structure.
    """
    if not eps >= 0:
        raise ValueError(f"eps must not be negative; got {eps!r}.")
    if a.unbiased != b.unbiased:
        raise ValueError("One graph is for the unbiased HSIC and the other is not; make both with equal settings.")
    if a.columns.shape != b.columns.shape:
        raise ValueError(
            f"Graphs of (N, k) {tuple(a.columns.shape)} and {tuple(b.columns.shape)} cannot be compared; both must be "
            "equal."
        )
    for name, graph in (("A", a), ("B", b)):
        if graph.self_hsic <= 0:
            raise UndefinedScoreError(
                f"CKNNA is undefined: the neighbours of {name} carry no structure (their HSIC with themselves is "
                f"{graph.self_hsic:.3g}). Check the features, or take more rows."
            )
    other = torch.searchsorted(b.keys, a.keys).clamp(max=len(b.keys) - 1)
    common = b.keys[other] == a.keys
    p, q = a.values.flatten()[common], b.values.flatten()[other[common]]
    shared = edge_hsic(a.keys[common], p, q, len(a.columns), symmetric=symmetric, unbiased=a.unbiased)
    return shared / (a.self_hsic**0.5 * b.self_hsic**0.5 + eps)


def edge_hsic(keys: Tensor, p: Tensor, q: Tensor, count: int, *, symmetric: bool, unbiased: bool = True) -> float:
    """HSIC of two `(N, N)` matrices that are zero but for the same few entries, in O(entries).

    Unbiased: `[sum(P Q') + sum(P) sum(Q) / ((N-1)(N-2)) - 2 sum(P @ Q) / (N-2)] / (N (N-3))` with `sum(P @ Q) =
    colsum(P) . rowsum(Q)`; no entry lies on the diagonal. Biased: `tr(P H Q H) = sum(P * Q') - [sum(P @ Q) +
    sum(Q @ P)] / N + sum(P) sum(Q) / N^2`.

    Args:
        keys: `row N + column` of each entry, ascending.
        p: Entries of P, float64.
        q: Entries of Q, float64.
        count: N.
        symmetric: Mean of HSIC(P, Q) and HSIC(Q, P).
        unbiased: Which; the biased one is symmetric.

    Returns:
        The value; 0 if it is below the rounding of its terms.
    """
    if not len(keys):
        return 0.0
    n = count
    rows, columns = keys // n, keys % n
    mirrored = columns * n + rows
    at = torch.searchsorted(keys, mirrored).clamp(max=len(keys) - 1)
    both_ways = keys[at] == mirrored

    def added(where: Tensor, values: Tensor) -> Tensor:
        return torch.zeros(n, dtype=values.dtype, device=values.device).index_add_(0, where, values)

    product = (p * q[at])[both_ways].sum()
    crossed = added(columns, p) @ added(rows, q)
    if symmetric or not unbiased:
        crossed = (crossed + added(columns, q) @ added(rows, p)) / 2
    pairs, rest, whole = ((n - 1) * (n - 2), n - 2, n * (n - 3)) if unbiased else (n * n, n, 1)
    terms = torch.stack([product, p.sum() * q.sum() / pairs, -2 * crossed / rest]).cpu()
    value = float(terms.sum())
    return 0.0 if abs(value) <= _NOTHING * float(terms.abs().sum()) else value / whole
