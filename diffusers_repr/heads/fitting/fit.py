"""Features and labels to a fitted head, under a protocol."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.heads.base import head_class
from diffusers_repr.heads.fitting.closed_form import LinearFit, calibrate, fit_ridge
from diffusers_repr.heads.fitting.logistic import LogisticFit, fit_logistic_path
from diffusers_repr.heads.fitting.minibatch import train_head
from diffusers_repr.heads.fitting.protocols import (
    Classifier,
    KNNProtocol,
    LBFGSProtocol,
    MinibatchProtocol,
    Protocol,
    RidgeProtocol,
    classifier_class,
    get_protocol,
)
from diffusers_repr.heads.pooled.base import PooledHead
from diffusers_repr.heads.pooled.knn import KNNHead
from diffusers_repr.heads.pooled.linear import LinearHead

_HELD_OUT = 5  # every fifth row of a class validates where no validation set is given
_ROWS = 4096

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FitResult:
    """What fitting gives.

    Attributes:
        head: In eval mode, float32, on the features' device.
        protocol: Every field of the protocol, and under `chosen` what came of it: `l2`, `calibration`; of `lbfgs`
            the `gradient_norm` where it stopped, whether it `converged`, its `iterations`.
        validation_accuracy: On the validation set if one was given, else None.
    """

    head: Classifier
    protocol: Mapping[str, Any]
    validation_accuracy: float | None


@dataclass(frozen=True)
class _Inputs:
    """What a protocol is given: checked data, the source of its draws, and the head's kind and options."""

    features: Tensor
    labels: Tensor
    num_classes: int
    validation: Data | None
    generator: torch.Generator
    options: Mapping[str, Any]
    kind: str


def fit_head(
    features: Tensor,
    labels: Tensor,
    num_classes: int | None = None,
    *,
    head: str = "linear",
    protocol: str | Protocol | None = None,
    validation: Data | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> FitResult:
    """Fit a head to pooled features.

    Closed-form and L-BFGS protocols tune their penalty on `validation`; without it, on every fifth row of each class,
    and then fit all rows again. Minibatch protocols follow their source and do not look at it.

    Memory: beside the features, L-BFGS holds them once in float64 on the CPU, ridge holds `D (D + K)` numbers.

    Args:
        features: `(N, D)`.
        labels: `(N,)` class ids from 0.
        num_classes: K; the largest label and one if None.
        head: `linear`, `mlp`, `knn`, or what `register_head` was given.
        protocol: A name of `PROTOCOLS`, a protocol of your own, or None for the head's default.
        validation: Features and labels to tune on; never those that are reported.
        generator: CPU generator of every draw, seeded with 0 if None; the global random state is not touched.
        **options: Further arguments of the head's class (`hidden_features`, `activation`, ...).

    Returns:
        The head, the protocol as it was run, and the accuracy on `validation`.

    Raises:
        ValueError: For features and labels that do not fit, are not finite or have fewer than two classes, an unknown
            head or protocol, or options the head does not have.

    Example:
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> fit_head(x, (x[:, 0] > 0).long()).head(x).shape
        torch.Size([60, 2])
    """
    head_class(head, PooledHead)  # those on maps have `fit_map_head`
    chosen = get_protocol(protocol, head)
    labels = torch.as_tensor(labels)
    if num_classes is None:
        num_classes = int(labels.max()) + 1 if len(labels) else 0
    check_training_set(features, labels, num_classes, "training")
    check_several_classes(labels)
    if validation is not None:
        validation = (validation[0], torch.as_tensor(validation[1]))
        check_training_set(*validation, num_classes, "validation", features.shape[1])
        check_several_classes(labels, validation[1])
    check_head_options(head, options)
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    task = _Inputs(features, labels, num_classes, validation, generator, options, head)
    with torch.no_grad():
        fitted, notes = _FITS[type(chosen)](chosen, task)
        fitted.eval()
        accuracy = None if validation is None else accuracy_of(fitted, *validation)
    return FitResult(fitted, {**chosen.describe(), "chosen": notes}, accuracy)


def check_training_set(features: Tensor, labels: Tensor, num_classes: int, what: str, size: int | None = None) -> None:
    """Raise ValueError unless features `(N, D)` and labels `(N,)` can be learned from."""
    if not isinstance(features, Tensor) or features.ndim != 2 or not len(features):
        shape = tuple(getattr(features, "shape", ())) or type(features).__name__
        raise ValueError(f"The {what} features must be a tensor (N, D) with rows; got {shape}.")
    if size is not None and features.shape[1] != size:
        raise ValueError(f"The {what} features have {features.shape[1]} values a row; training had {size}.")
    check_class_ids(labels, len(features), num_classes, what)
    bad = ~torch.isfinite(features).all(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {len(features)} rows of the {what} features are not finite (first: row "
            f"{int(bad.nonzero()[0])}); check the images and the model's dtype."
        )


def check_class_ids(labels: Tensor, rows: int, num_classes: int, what: str) -> None:
    """Raise ValueError unless labels are `(rows,)` class ids below `num_classes`."""
    if labels.ndim != 1 or len(labels) != rows or labels.is_floating_point():
        raise ValueError(
            f"The {what} labels must be {rows} class ids, one a row; got {tuple(labels.shape)} {labels.dtype}."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"The {what} labels run from {low} to {high}; class ids run from 0 to {num_classes - 1}.")


def check_several_classes(labels: Tensor, validation: Tensor | None = None) -> None:
    """Raise ValueError for labels of one class, to learn from or to be scored on."""
    if len(labels.unique()) < 2:
        raise ValueError(f"All {len(labels)} training labels are {int(labels[0])}; a classifier needs two classes.")
    if validation is not None and len(validation.unique()) < 2:
        raise ValueError(
            f"All {len(validation)} validation labels are {int(validation[0])}; a score on one class tells nothing "
            "apart."
        )


def accuracy_of(head: PooledHead, features: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is at the label."""
    hits = 0
    for x, y in zip(features.split(_ROWS), labels.split(_ROWS), strict=True):
        hits += int((head(x).argmax(1).cpu() == y.cpu()).sum())
    return hits / len(labels)


def check_head_options(head: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for arguments that the class of a head does not have."""
    cls = classifier_class(head)
    own = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", *_GIVEN)]
    for name in options:
        if name not in own:
            raise ValueError(
                f"{cls.__name__} has no option {name!r}; it has {', '.join(own) or 'none'}. What a protocol "
                "says is changed with `PROTOCOLS[name].replace(...)`."
            )


_GIVEN = (
    "in_features", "num_classes", "bank_size", "k", "temperature", "metric", "layers", "channels", "sizes", "levels",
)  # fmt: skip


def _statistics(features: Tensor) -> Data:
    """Mean and std over rows, float64."""
    std, mean = torch.std_mean(features.double(), dim=0, correction=0)
    return mean, torch.where(std <= 1e-7 * mean.abs(), torch.ones_like(std), std)


def _held_out(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
    """Rows to fit and rows to validate: every fifth of each class, at least one where a class has three or more."""
    order = torch.randperm(len(labels), generator=generator)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        rows = order[labels.cpu()[order] == label.cpu()]
        if len(rows) >= 3:
            held[rows[: max(len(rows) // _HELD_OUT, 1)]] = True
    return (~held, held) if bool(held.any()) else None


def _tune(
    protocol: RidgeProtocol | LBFGSProtocol,
    task: _Inputs,
    make: Callable[[Tensor, Tensor, Sequence[float]], list[LinearFit]],
    scale: Callable[[Tensor, Tensor], float],
) -> tuple[LinearFit, float, float]:
    """The fit of the best penalty, that penalty, and the factor on its logits that `scale` gives.

    Best is the highest accuracy, among equals the lowest cross-entropy, then the larger penalty.
    """
    features, labels, validation = task.features, task.labels, task.validation
    penalties = sorted(protocol.l2, reverse=True)
    split = _held_out(labels, task.generator) if validation is None and len(penalties) > 1 else None
    if validation is None and split is None:
        l2 = penalties[0] if len(penalties) == 1 else protocol.default_l2
        fit = make(features, labels, [l2])[0]
        return fit, l2, scale(fit.logits(features), labels)
    if split is not None:
        fits = make(features[split[0]], labels[split[0]], penalties)
        held = (features[split[1]], labels[split[1]])
    else:
        assert validation is not None
        fits, held = make(features, labels, penalties), (validation[0].to(features.device), validation[1])
    scored = []
    for l2, fit in zip(penalties, fits, strict=True):
        logits, target = fit.logits(held[0]), held[1].to(features.device).long()
        factor = scale(logits, target)
        loss = float(torch.nn.functional.cross_entropy(logits * factor, target))
        hits = float((logits.argmax(1) == target).double().mean())
        scored.append((hits, -loss, l2, factor, fit))
    _, _, l2, factor, fit = max(scored, key=lambda s: s[:3])
    if split is not None:
        fit = make(features, labels, [p for p in penalties if p >= l2])[-1]
    return fit, l2, factor


def _linear_head(fit: LinearFit, factor: float, task: _Inputs) -> LinearHead:
    if not task.options.get("bias", True):
        raise ValueError("bias=False is for minibatch protocols; closed forms and L-BFGS have a bias.")
    head = LinearHead(fit.weight.shape[1], task.num_classes).to(task.features.device)
    head.set_statistics(fit.mean, fit.std)
    head.linear.weight.copy_(fit.weight * factor)
    head.linear.bias.copy_(fit.bias * factor)
    return head


def _fit_ridge(protocol: RidgeProtocol, task: _Inputs) -> tuple[PooledHead, dict[str, Any]]:
    def make(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[LinearFit]:
        return fit_ridge(x, y, task.num_classes, penalties, _ROWS)

    fit, l2, factor = _tune(protocol, task, make, calibrate)
    return _linear_head(fit, factor, task), {"l2": l2, "calibration": factor}


def _fit_lbfgs(protocol: LBFGSProtocol, task: _Inputs) -> tuple[PooledHead, dict[str, Any]]:
    reached: dict[int, LogisticFit] = {}

    def make(x: Tensor, y: Tensor, penalties: Sequence[float]) -> list[LinearFit]:
        size = x.shape[1]
        mean, std = torch.zeros(size).double(), torch.ones(size).double()
        if protocol.standardize:
            mean, std = _statistics(x)
        mean, std = mean.to(x.device), std.to(x.device)
        z = (x.double() - mean) / std
        found = fit_logistic_path(z, y, task.num_classes, penalties, protocol.max_iter, protocol.tolerance)
        fits = [LinearFit(one.weight, one.bias, mean, std) for one in found]
        reached.update((id(fit), one) for fit, one in zip(fits, found, strict=True))
        return fits

    fit, l2, factor = _tune(protocol, task, make, lambda logits, labels: 1.0)
    end = reached[id(fit)]
    if not end.converged:
        warnings.warn(
            f"The logistic regression stopped after {end.iterations} iterations, short of its optimum (gradient norm "
            f"{end.gradient_norm:.2g} at l2 = {l2:g}): raise max_iter, "
            f"{'' if protocol.standardize else 'standardise the features, '}or leave weak penalties out "
            "(`PROTOCOLS['lbfgs'].replace(...)`).",
            stacklevel=4,
        )
    notes = {"gradient_norm": end.gradient_norm, "converged": end.converged, "iterations": end.iterations}
    return _linear_head(fit, factor, task), {"l2": l2, **notes}


def _fit_minibatch(protocol: MinibatchProtocol, task: _Inputs) -> tuple[PooledHead, dict[str, Any]]:
    features = task.features
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are not used
        head = head_class(task.kind, PooledHead)(features.shape[1], task.num_classes, **task.options)
        head = head.to(features.device)
    if protocol.standardize:
        head.set_statistics(*_statistics(features))
    assert isinstance(head, PooledHead)
    losses = train_head(head, features, task.labels, protocol, task.generator)
    return head, {"final_loss": losses[-1]}


def _fit_knn(protocol: KNNProtocol, task: _Inputs) -> tuple[PooledHead, dict[str, Any]]:
    features = task.features
    k = min(protocol.k, len(features))
    head = KNNHead(features.shape[1], task.num_classes, len(features), k, protocol.temperature, protocol.metric)
    head = head.to(features.device)
    if protocol.standardize:
        head.set_statistics(*_statistics(features))
    head.set_bank(features, task.labels)
    return head, {"k": k}


_FITS: dict[type[Protocol], Callable[..., tuple[PooledHead, dict[str, Any]]]] = {
    RidgeProtocol: _fit_ridge,
    LBFGSProtocol: _fit_lbfgs,
    MinibatchProtocol: _fit_minibatch,
    KNNProtocol: _fit_knn,
}
