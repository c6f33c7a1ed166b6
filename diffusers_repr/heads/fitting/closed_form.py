"""Linear classifiers and regressions in closed form, from sums that grow batch by batch; no features are stored.

One eigendecomposition serves every regulariser of a grid. All in float64. A leading dimension runs over cells (noise
levels of one layer), which are solved together.

scikit-learn has nothing of the kind: its `Ridge` and `LinearDiscriminantAnalysis` take the whole matrix, copy it in
float64 to the CPU, and solve anew for every penalty. They are the oracles of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Penalties on the squared norm of the weights, for standardised features and a loss that is a mean over rows.
PENALTIES: tuple[float, ...] = tuple(10 ** (power / 2) for power in range(-10, 3))
# A feature whose standard deviation is below this part of its size only holds rounding errors.
_CONSTANT = 1e-6


class Moments:
    """Count, sum, Gram matrix and feature-target sums of `cells` streams of features.

    Features are shifted by the mean of the first batch, so that a large mean costs no digits. The result does not
    depend on how rows are batched or ordered, up to rounding.

    Args:
        dim: Length of a feature D.
        targets: Columns of the targets K.
        cells: Streams.
        device: Where the sums are kept.
    """

    def __init__(self, dim: int, targets: int, cells: int = 1, device: str | torch.device = "cpu") -> None:
        self.dim, self.targets = dim, targets
        self.counts = [0] * cells
        self.shift = torch.zeros(cells, dim, dtype=torch.float64, device=device)
        # (D, D) Gram | (D, 1) sum | (D, K) cross sums: one matrix product a batch fills all three
        self.sums = torch.zeros(cells, dim, dim + 1 + targets, dtype=torch.float64, device=device)
        self.target_sums = torch.zeros(cells, targets, dtype=torch.float64, device=device)

    def add(self, features: Tensor, targets: Tensor, cell: int = 0) -> None:
        """Add rows: features `(n, D)`, targets `(n, K)` (one-hot for classes)."""
        features = features.to(self.sums.device).double()  # moved first: not every device has float64
        targets = targets.to(self.sums.device, torch.float64)
        if not self.counts[cell]:
            self.shift[cell] = features.mean(0)
        features = features - self.shift[cell]
        right = torch.cat([features, features.new_ones(len(features), 1), targets], dim=1)
        self.sums[cell].addmm_(features.T, right)
        self.target_sums[cell] += targets.sum(0)
        self.counts[cell] += len(features)

    def finite(self, cell: int = 0) -> bool:
        """Whether no NaN or infinite feature was added to a cell."""
        return bool(torch.isfinite(self.sums[cell]).all())

    def reduce(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of other processes, each of which has seen rows of its own.

        Args:
            total: The sum of a tensor over all processes; with one process, the tensor itself.
        """
        counts = torch.tensor(self.counts, dtype=torch.float64, device=self.sums.device)
        every = total(counts)
        if every is counts:
            return
        # Each process has shifted by its own mean d more than all do: sum (f + d)(f + d, 1, y)' from sum f(f, 1, y)'
        common = total(self.shift * counts[:, None]) / every[:, None]
        more = self.shift - common
        own = self.sums[..., self.dim].clone()
        beside = torch.cat([own, counts[:, None], self.target_sums], dim=1)
        self.sums.baddbmm_(more[:, :, None], beside[:, None])
        self.sums[..., : self.dim].baddbmm_((own + counts[:, None] * more)[:, :, None], more[:, None])
        self.sums, self.target_sums, self.shift = total(self.sums), total(self.target_sums), common
        self.counts = [int(count) for count in every]

    def take(self, columns: Sequence[int] | Tensor) -> Moments:
        """Moments of some of the features, in this order."""
        index = torch.as_tensor(columns, dtype=torch.long, device=self.sums.device)
        part = Moments(len(index), self.targets, len(self.counts), "meta")
        rest = torch.arange(self.dim, self.sums.shape[2], device=self.sums.device)
        part.sums = self.sums[:, index][:, :, torch.cat([index, rest])]
        part.shift, part.target_sums, part.counts = self.shift[:, index], self.target_sums, list(self.counts)
        return part


@dataclass(frozen=True)
class Standardised:
    """Second moments of features with mean 0 and variance 1; a constant feature is 0 throughout.

    Attributes:
        mean: `(cells, D)`.
        inverse_scale: One over the standard deviation, `(cells, D)`; 0 for a constant feature.
        correlation: `(cells, D, D)`.
        cross: Covariance with the targets, `(cells, D, K)`.
        target_mean: `(cells, K)`.
    """

    mean: Tensor
    inverse_scale: Tensor
    correlation: Tensor
    cross: Tensor
    target_mean: Tensor


def standardise(moments: Moments) -> Standardised:
    """Standardise from the sums alone.

    Raises:
        ValueError: With fewer than two rows.
    """
    if min(moments.counts) < 2:
        raise ValueError(f"A linear fit needs at least 2 rows; got {min(moments.counts)}.")
    count = torch.tensor(moments.counts, dtype=torch.float64, device=moments.sums.device)[:, None]
    dim = moments.dim
    gram, total, cross = moments.sums.split([dim, 1, moments.targets], dim=2)
    mean, target_mean = total[..., 0] / count, moments.target_sums / count
    covariance = torch.baddbmm(gram / count[..., None], mean[:, :, None], mean[:, None, :], alpha=-1)
    variance = covariance.diagonal(dim1=1, dim2=2).clamp(min=0)
    shifted = mean + moments.shift
    constant = variance <= _CONSTANT**2 * (shifted**2 + variance)
    inverse = torch.where(constant, 0.0, variance.rsqrt())
    covariance *= inverse[:, :, None]
    covariance *= inverse[:, None, :]
    cross = (cross / count[..., None] - mean[:, :, None] * target_mean[:, None, :]) * inverse[:, :, None]
    return Standardised(shifted, inverse, covariance, cross, target_mean)


@dataclass(frozen=True)
class LinearPath:
    """A linear model for every penalty of a grid, held by one eigenbasis.

    Attributes:
        mean: Of the features, `(cells, D)`.
        inverse_scale: `(cells, D)`.
        basis: Eigenvectors, `(cells, D, D)`.
        spectrum: Eigenvalues, `(cells, D)`.
        loading: Right-hand side in the eigenbasis, `(cells, D, K)`.
        intercept: `(cells, P, K)`.
        penalties: The grid, P values.
    """

    mean: Tensor
    inverse_scale: Tensor
    basis: Tensor
    spectrum: Tensor
    loading: Tensor
    intercept: Tensor
    penalties: tuple[float, ...]

    def predict(self, features: Tensor, cell: int = 0) -> Tensor:
        """Outputs `(P, n, K)` float64 for features `(n, D)`, one plane a penalty."""
        features = features.to(self.basis.device).double()
        rotated = ((features - self.mean[cell]) * self.inverse_scale[cell]) @ self.basis[cell]
        damped = self._damping(cell)[:, :, None] * self.loading[cell]  # (P, D, K)
        flat = damped.transpose(0, 1).flatten(1)  # one product for all penalties
        out = (rotated @ flat).unflatten(1, (len(self.penalties), -1)).transpose(0, 1)
        return out + self.intercept[cell][:, None]

    def coefficients(self, penalty: int, cell: int = 0) -> tuple[Tensor, Tensor]:
        """`(weight (K, D), bias (K,))` for features as they come, at the penalty with this index."""
        inner = self.basis[cell] @ (self._damping(cell)[penalty][:, None] * self.loading[cell])
        weight = inner * self.inverse_scale[cell][:, None]
        return weight.T, self.intercept[cell][penalty] - self.mean[cell] @ weight

    def _damping(self, cell: int) -> Tensor:
        return _damping(self.spectrum[cell], self.penalties)


def _damping(spectrum: Tensor, penalties: Sequence[float]) -> Tensor:
    """`1 / (e + penalty)`, `(..., P, D)`."""
    grid = torch.tensor(penalties, dtype=spectrum.dtype, device=spectrum.device)
    return 1 / (spectrum[..., None, :] + grid[:, None])


def check_penalties(penalties: Sequence[float]) -> tuple[float, ...]:
    """The grid in ascending order.

    Raises:
        ValueError: If it is empty or holds a value that is not positive and finite.
    """
    grid = tuple(sorted(float(value) for value in penalties))
    if not grid or not 0 < grid[0] <= grid[-1] < float("inf"):
        raise ValueError(f"penalties must be positive finite numbers; got {list(penalties)}.")
    return grid


def ridge_path(moments: Moments, penalties: Sequence[float] = PENALTIES) -> LinearPath:
    """Ridge regression onto the targets for a grid of penalties, intercept not penalised.

    Minimises `mean_i |y_i - b - W z_i|^2 + penalty |W|^2` over standardised features z: scikit-learn's `Ridge` with
    `alpha = n penalty`. With one-hot targets the largest output is the predicted class.

    Raises:
        ValueError: With fewer than two rows, or for a penalty that is not positive.
    """
    grid, standard = check_penalties(penalties), standardise(moments)
    spectrum, basis = torch.linalg.eigh(standard.correlation)
    loading = basis.transpose(1, 2) @ standard.cross
    intercept = standard.target_mean[:, None].expand(-1, len(grid), -1)
    return LinearPath(standard.mean, standard.inverse_scale, basis, spectrum.clamp(min=0), loading, intercept, grid)


def lda_path(moments: Moments, penalties: Sequence[float] = PENALTIES) -> LinearPath:
    """Linear discriminant analysis for a grid of penalties added to the within-class covariance.

    A softmax over the outputs is the posterior: multinomial logistic regression with the coefficients that Gaussian
    classes of one covariance imply, so that sums are enough. Targets must be one-hot. With `S` the within-class
    covariance of the standardised features: `w_k = (S + penalty)^-1 m_k`, `b_k = log p_k - m_k w_k / 2`.

    Raises:
        ValueError: With fewer than two rows, for a penalty that is not positive, or a class without rows.
    """
    grid, standard = check_penalties(penalties), standardise(moments)
    share = standard.target_mean
    if bool((share <= 0).any()):
        raise ValueError("LDA needs rows of every class; a class has none.")
    centres = standard.cross / share[:, None]  # class means of standardised features, (cells, D, K)
    within = standard.correlation - (centres * share[:, None]) @ centres.transpose(1, 2)
    spectrum, basis = torch.linalg.eigh(within)
    spectrum, loading = spectrum.clamp(min=0), basis.transpose(1, 2) @ centres
    quadratic = _damping(spectrum, grid) @ loading**2
    intercept = share.log()[:, None] - quadratic / 2
    return LinearPath(standard.mean, standard.inverse_scale, basis, spectrum, loading, intercept, grid)


CRITERIA: dict[str, Callable[[Moments, Sequence[float]], LinearPath]] = {"ridge": ridge_path, "lda": lda_path}


@dataclass(frozen=True)
class LinearFit:
    """A fitted linear classifier, in standardised features: `W (x - mean) / std + b`; all float64.

    Attributes:
        weight: `(K, D)`.
        bias: `(K,)`.
        mean: `(D,)`.
        std: `(D,)`.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """`(B, K)` float64 of features `(B, D)`."""
        return ((features.double() - self.mean) / self.std) @ self.weight.T + self.bias


def fit_ridge(
    features: Tensor, labels: Tensor, num_classes: int, penalties: Sequence[float], rows: int = 4096
) -> list[LinearFit]:
    """Minimise `mean ||W z + b - onehot(y)||^2 + l2 ||W||^2` over standardised features z, for each penalty.

    The same sums as for features that come batch by batch: `D (D + K)` numbers are held besides the features.

    Args:
        features: `(N, D)`.
        labels: `(N,)` class ids.
        num_classes: K.
        penalties: Values of l2, above 0; the bias has none.
        rows: Rows added to the sums at a time.
    """
    moments = Moments(features.shape[1], num_classes, device=features.device)
    for x, y in zip(features.split(rows), labels.split(rows), strict=True):
        moments.add(x, torch.nn.functional.one_hot(y.to(x.device).long(), num_classes))
    path = ridge_path(moments, penalties)
    mean, inverse = path.mean[0], path.inverse_scale[0]
    std = torch.where(inverse > 0, 1 / inverse, torch.ones_like(inverse))
    fits = {}
    for at, l2 in enumerate(path.penalties):
        weight, bias = path.coefficients(at)
        fits[l2] = LinearFit(weight * std, bias + weight @ mean, mean, std)
    return [fits[float(l2)] for l2 in penalties]


def calibrate(logits: Tensor, labels: Tensor) -> float:
    """The factor on logits `(N, K)` that makes their cross-entropy smallest, between 1e-3 and 1e3.

    Scores of a regression on one-hot targets lie near 0 and 1, so their softmax is almost flat; a factor makes
    probabilities of it and changes no prediction. The cross-entropy is convex in the factor; golden-section search.
    """
    logits, labels = logits.double(), labels.to(logits.device).long()

    def loss(log_factor: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits * 10**log_factor, labels))

    low, high, ratio = -3.0, 3.0, (5**0.5 - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = loss(a), loss(b)
    while high - low > 1e-4:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = loss(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = loss(b)
    return 10 ** ((low + high) / 2)
