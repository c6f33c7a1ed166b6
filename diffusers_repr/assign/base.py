"""What every assigner is: from a representation to a condition, with one transform at fit and at assign."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.hub.identity import config_hash, weights_hash
from diffusers_repr.hub.registry import Registry
from diffusers_repr.hub.schema import shown
from diffusers_repr.models.mixin import ReprModelMixin

Gives = Literal["class", "vector", "neighbours"]


class Assigner(ReprModelMixin, ModelMixin, ConfigMixin):
    """Base of assigners `c = f(z)`: features of images to what a diffusion model is conditioned on.

    A subclass takes `in_features` first, registers its arguments by `register_to_config`, calls `make_state`, and
    writes `fit_prepared`, `assign_prepared` and `null`. What it learns are buffers, so it is saved and loaded as a
    head is: config and safetensors, checked.

    Attributes:
        kind: The name it is registered by.
        most_rows: Features that a fit looks at, drawn at random of more; None: all.
        gives: `class`: ids `(B,)` from 0 to `num_classes - 1`, int64; `vector`: `(B, D)`, float32; `neighbours`: rows
            `(B, k)` of the set it was fitted on, nearest first, int64.
    """

    _no_split_modules: list[str] = []

    kind: ClassVar[str | None] = None
    gives: ClassVar[Gives]
    most_rows: int | None = None

    fitted: Tensor

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' own; a config that names another class is refused, for its buffers may have the same names.

        Raises:
            ValueError: With both classes.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        name = config.get("_class_name")
        if name not in (None, cls.__name__):
            raise ValueError(
                f"{str(pretrained_model_name_or_path)!r} holds a {shown(name)}, not a {cls.__name__}; load it by the "
                "class that its config.json names."
            )
        return loaded

    def make_state(self, in_features: int, normalize: bool = False) -> None:
        """Make the buffers that all assigners have.

        Args:
            in_features: D of the features.
            normalize: Scale features to length 1 first, so that distances go by the cosine.

        Raises:
            ValueError: If a size is not a whole number from 1.
        """
        check_sizes(in_features=in_features)
        self.in_features, self.normalize = in_features, normalize
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def prepare(self, features: Tensor) -> Tensor:
        """Features `(B, in_features)` in float32 on the assigner's device; the same before fitting and assigning.

        Raises:
            ValueError: For another shape, and values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.in_features or not len(features):
            raise ValueError(
                f"{type(self).__name__} takes features (B, {self.in_features}); got {tuple(features.shape)}."
            )
        features = features.detach().to(self.fitted.device, torch.float32)
        if not bool(features.isfinite().all()):
            raise ValueError(f"The features for this {type(self).__name__} have NaN or infinite values.")
        return torch.nn.functional.normalize(features, dim=1) if self.normalize else features

    @torch.no_grad()
    def fit(self, features: Tensor, generator: torch.Generator | None = None) -> Assigner:
        """Learn from the features of the training images, `(N, in_features)`.

        Args:
            features: All of them, or what they are learned from.
            generator: Of whatever is drawn; seed 0 if None.

        Returns:
            Itself.

        Raises:
            ValueError: As `prepare`, and for fewer features than it takes.
        """
        self.fit_prepared(self.prepare(features), generator or torch.Generator().manual_seed(0))
        self.fitted.fill_(True)
        return self

    @torch.no_grad()
    def assign(self, features: Tensor) -> Tensor:
        """Conditions of features `(B, in_features)`; each row's whatever the others are.

        Raises:
            RuntimeError: Before `fit`.
            ValueError: As `prepare`.
        """
        self._check_fitted()
        return self.assign_prepared(self.prepare(features))

    def _check_fitted(self) -> None:
        if not bool(self.fitted):
            raise RuntimeError(f"This {type(self).__name__} is not fitted; call fit(features) or load a fitted one.")

    def fit_prepared(self, features: Tensor, generator: torch.Generator) -> None:
        """Learn from prepared features: set the buffers."""
        raise NotImplementedError

    def assign_prepared(self, features: Tensor) -> Tensor:
        """Conditions of prepared features."""
        raise NotImplementedError

    @property
    def null(self) -> Tensor:
        """The condition of no image, one row without its batch dimension: an id beyond the classes, or a vector."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """All that decides what is assigned, as JSON: the record of a store of assignments."""
        return {"assigner": self.kind, "config": config_hash(dict(self.config)), "weights": weights_hash(self)}

    def forward(self, features: Tensor) -> Tensor:
        """As `assign`."""
        return self.assign(features)


A = TypeVar("A", bound=type[Assigner])
_ASSIGNERS = Registry("assigner", Assigner, "register_assigner", one_name=True)


def register_assigner(kind: str) -> Callable[[A], A]:
    """Make a class of assigners known by a name; files name it by its class alone.

    Raises:
        TypeError: If the class is no `Assigner`.
        ValueError: If the name, or the name of the class, is taken by another class, or `gives` is none of the three.
    """

    def add(cls: A) -> A:
        if issubclass(cls, Assigner) and getattr(cls, "gives", None) not in ("class", "vector", "neighbours"):
            raise ValueError(f"{cls.__name__}.gives tells what it gives: 'class', 'vector' or 'neighbours'.")
        return _ASSIGNERS.register(kind)(cls)

    return add


def list_assigners() -> dict[str, type[Assigner]]:
    """The registered assigners by name.

    Example:
        >>> list(list_assigners())
        ['classifier', 'identity', 'kmeans', 'neighbours', 'sinkhorn']
    """
    return _ASSIGNERS.subclasses()


def assigner_class(kind: str) -> type[Assigner]:
    """The class of a name.

    Raises:
        ValueError: With the names there are.
    """
    return _ASSIGNERS.find(kind)


__all__ = ["Assigner", "Gives", "assigner_class", "list_assigners", "register_assigner"]
