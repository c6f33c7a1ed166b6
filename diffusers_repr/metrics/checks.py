"""What measures of two feature matrices ask of them, and how they are brought to working precision."""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT_ROWS = 2000  # up to here float64 costs little


class UndefinedScoreError(ValueError):
    """A similarity of features without structure: there is no number to give."""


def check_rows(features: Tensor, name: str, least: int = 1) -> None:
    """Raise unless `features` is a finite real matrix `(N, D)` with at least `least` rows.

    Raises:
        TypeError: If it is no tensor.
        ValueError: For another shape, too few rows, complex numbers, NaN or infinity.
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"{name} must be a tensor (N, D); got {type(features).__name__}.")
    if features.ndim != 2 or not features.shape[1]:
        hint = " Pool tokens and maps first, e.g. `tokens.mean(1)`." if features.ndim > 2 else ""
        raise ValueError(f"{name} must be a matrix (N, D); got shape {tuple(features.shape)}.{hint}")
    if features.is_complex():
        raise ValueError(f"{name} must be real; got {features.dtype}.")
    if len(features) < least:
        raise ValueError(f"{name} has {len(features)} rows; at least {least} are needed.")
    bad = ~torch.isfinite(features).all(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {len(features)} rows of {name} are not finite (first: row {int(bad.nonzero()[0])}); "
            "check the images and the model's dtype."
        )


def check_pair(a: Tensor, b: Tensor, least: int) -> None:
    """Raise as `check_rows`, and ValueError if the two have not the same number of rows."""
    check_rows(a, "A", least)
    check_rows(b, "B", least)
    if len(a) != len(b):
        raise ValueError(f"A has {len(a)} rows and B has {len(b)}; row i of both must be the same sample.")


def check_varied(features: Tensor, name: str) -> None:
    """Raise UndefinedScoreError, a ValueError, if all rows are alike but for rounding."""
    spread = (features - features[0]).abs().max()
    if float(spread) <= 16 * torch.finfo(features.dtype).eps * float(features.abs().max()):
        raise UndefinedScoreError(f"All {len(features)} rows of {name} are alike; nothing can be compared with them.")


def working(features: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The features in float64 for up to 2000 rows, else in float32 (float64 stays); or in `dtype`.

    Raises:
        ValueError: For a `dtype` narrower than float32.
    """
    if dtype is None:
        small = len(features) <= _EXACT_ROWS or features.dtype == torch.float64
        dtype = torch.float64 if small else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}.")
    if features.device.type == "mps" and dtype == torch.float64:
        features = features.cpu()  # no float64 there
    return features.detach().to(dtype)


def clamp_outliers(features: Tensor, quantile: float) -> Tensor:
    """Clamp values to `[-q, q]`, where q is the quantile of all `|values|`.

    Huh et al. 2024 (arXiv 2405.07987) do so at 0.95 before they compare representations, since a few very large
    values of a language model would decide alone.

    Args:
        features: `(N, D)`.
        quantile: Above 0 and at most 1; 1 changes nothing.

    Raises:
        ValueError: For a quantile outside (0, 1].

    Example:
        >>> clamp_outliers(torch.tensor([[1.0, -2.0, 3.0, 100.0]]), 0.5)
        tensor([[ 1., -2.,  3.,  3.]])
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie above 0 and at most 1; got {quantile!r}.")
    size = features.numel()
    at = min(int(quantile * size), size - 1)
    limit = features.abs().flatten().kthvalue(at + 1).values
    return features.clamp(-limit, limit)
