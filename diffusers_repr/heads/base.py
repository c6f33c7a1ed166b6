"""What all heads are: diffusers models with checked files, float32 inside, in an open registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from diffusers import ConfigMixin, ModelMixin

from diffusers_repr.hub.registry import Registry
from diffusers_repr.models.mixin import ReprModelMixin


class Head(ReprModelMixin, ModelMixin, ConfigMixin):
    """Base of all heads: features to a prediction, float32 or wider whatever the dtype of weights and features.

    Subclass `PooledHead` for a head on a vector an image, `MapHead` for one on maps of named layers, and register it
    by `register_head`: then it is fitted by its name, and what was saved with it loads.

    Attributes:
        kind: The name it is registered by.
    """

    _no_split_modules: list[str] = []

    kind: ClassVar[str | None] = None


H = TypeVar("H", bound=type[Head])
_HEADS = Registry("head", Head, "register_head", one_name=True)


def register_head(kind: str) -> Callable[[H], H]:
    """Make a class of heads known by a name.

    Files name a head by its class alone, never by a place of code: only a registered class is ever loaded.

    Args:
        kind: What `Probe.fit(head=...)` and `fit_head(head=...)` call it.

    Raises:
        ValueError: If the name, or the name of the class, is taken by another class.
        TypeError: If the class is no `Head`.

    Example:
        >>> from diffusers_repr.heads import LinearHead
        >>> @register_head("centred")
        ... class CentredHead(LinearHead):
        ...     def classify(self, features):
        ...         return super().classify(features - features.mean(1, keepdim=True))
        >>> head_class("centred").__name__
        'CentredHead'
        >>> unregister_head("centred")
    """
    return _HEADS.register(kind)


def unregister_head(kind: str) -> None:
    """Forget a head; what was saved with it no longer loads."""
    del _HEADS[kind]


def list_heads(base: type[Head] | tuple[type[Head], ...] = Head) -> dict[str, type[Head]]:
    """The registered heads by name, of a subclass of `Head` if one or several are given.

    Example:
        >>> from diffusers_repr.heads import PooledHead
        >>> list(list_heads(PooledHead))
        ['knn', 'linear', 'mlp']
    """
    return _HEADS.subclasses(base)


def head_class(kind: str, base: type[Head] | tuple[type[Head], ...] = Head) -> type[Head]:
    """The class of a name.

    Raises:
        ValueError: With the names there are.
    """
    return _HEADS.find(kind, base)


__all__ = ["Head", "head_class", "list_heads", "register_head", "unregister_head"]
