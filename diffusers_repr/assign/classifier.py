"""`ClassifierAssigner`: classes from few labels, the pseudo-labels of dual pseudo training."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusers_repr.assign.base import Assigner, register_assigner
from diffusers_repr.heads.fitting.logistic import fit_logistic_path
from diffusers_repr.hub.checks import check_sizes


@register_assigner("classifier")
class ClassifierAssigner(Assigner):
    """Multinomial logistic regression without intercept (You et al. 2023, arXiv 2302.10586, stage 1); the null is K.

    `min_W 1/n sum_i CE(softmax(W z_i), y_i) + l2 / (2 n) ||W||^2` over the n labelled rows, to its optimum by L-BFGS
    in float64. Each row is centred (its own mean is taken off) and scaled to length 1 first, at fit and at
    assign alike.

    Args:
        in_features: D of the features.
        num_classes: K.
        normalize: Scale rows to length 1.
        center: Take each row's own mean off.
        l2: Of the penalty, divided by n; the paper's.

    Attributes:
        gradient_norm: Of the objective at the fit.

    Example:
        >>> features = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0], [4.0, 1.0, 0.0], [1.0, 6.0, 0.0]])
        >>> assigner = ClassifierAssigner(3, 2).fit(features, labels=torch.tensor([0, 1, -1, -1]))
        >>> assigner.assign(features)
        tensor([0, 1, 0, 1])
    """

    gives = "class"

    weight: Tensor

    @register_to_config
    def __init__(
        self, in_features: int, num_classes: int, normalize: bool = True, center: bool = True, l2: float = 0.0025
    ) -> None:
        super().__init__()
        self.make_state(in_features, normalize)
        check_sizes(num_classes=num_classes)
        if num_classes < 2:
            raise ValueError(f"A classifier has 2 classes or more; got num_classes={num_classes}.")
        if not l2 > 0:
            raise ValueError(f"l2 is a penalty above 0; got {l2}.")
        self.num_classes, self.gradient_norm = num_classes, float("nan")
        self.register_buffer("weight", torch.zeros(num_classes, in_features, dtype=torch.float32))

    def prepare(self, features: Tensor) -> Tensor:
        """As `Assigner.prepare`, each row centred before it is scaled."""
        if self.config["center"] and isinstance(features, Tensor) and features.ndim == 2:
            features = features.float() - features.float().mean(1, keepdim=True)
        return super().prepare(features)

    @torch.no_grad()
    def fit(
        self, features: Tensor, generator: torch.Generator | None = None, labels: Tensor | None = None
    ) -> ClassifierAssigner:
        """Learn from the images that have a label.

        Args:
            features: `(N, in_features)`.
            generator: Not used; the optimum is the only one.
            labels: `(N,)` class ids; -1 for images without.

        Raises:
            ValueError: Without labels, for another number of them, ids that are no classes, and a class without any.
        """
        if labels is None:
            raise ValueError("A classifier learns from labels: fit(features, labels=...), -1 for images without one.")
        labels = torch.as_tensor(labels).reshape(-1)
        if len(labels) != len(features) or labels.is_floating_point():
            raise ValueError(
                f"labels are {len(features)} whole numbers, one a feature; got {len(labels)} of {labels.dtype}."
            )
        if int(labels.min()) < -1 or int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"labels go from {int(labels.min())} to {int(labels.max())}; classes are 0 to {self.num_classes - 1}, "
                "and -1 is an image without label."
            )
        held = torch.bincount(labels[labels >= 0], minlength=self.num_classes)
        if not bool((held > 0).all()):
            gone = (held == 0).nonzero()[:, 0].tolist()
            raise ValueError(f"No image has the class {', '.join(map(str, gone[:10]))}; label one of each class.")
        prepared, known = self.prepare(features), labels >= 0
        rows, n = prepared[known.to(prepared.device)], int(known.sum())
        found = fit_logistic_path(rows, labels[known], self.num_classes, [self.config["l2"] / n], intercept=False)[0]
        self.gradient_norm = found.gradient_norm
        self.weight.copy_(found.weight)
        self.fitted.fill_(True)
        return self

    def assign_prepared(self, features: Tensor) -> Tensor:
        """Ids `(B,)`, int64."""
        return self._logits(features).argmax(1)

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """`(B, K)`, float64, of features that go through the same transform.

        Raises:
            RuntimeError: Before `fit`.
            ValueError: As `prepare`.
        """
        self._check_fitted()
        return self._logits(self.prepare(features)).softmax(1)

    def _logits(self, features: Tensor) -> Tensor:
        """In float64, so that a class does not depend on the batch around it."""
        return features.double() @ self.weight.double().T

    @property
    def null(self) -> Tensor:
        """K."""
        return torch.tensor(self.num_classes)


__all__ = ["ClassifierAssigner"]
