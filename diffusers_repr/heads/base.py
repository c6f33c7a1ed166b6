"""What all heads are: diffusers models with checked files, float32 inside, in an open registry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ClassVar, TypeVar

from diffusers import ConfigMixin, ModelMixin

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
_HEADS: dict[str, type[Head]] = {}


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

    def add(cls: H) -> H:
        if not (inspect.isclass(cls) and issubclass(cls, Head)):
            raise TypeError(f"A head is a subclass of Head (PooledHead, MapHead); got {cls!r}.")
        for name, other in _HEADS.items():
            if name == kind or other.__name__ == cls.__name__:
                raise ValueError(
                    f"register_head({kind!r}) of {cls.__module__}.{cls.__name__}: {name!r} is the head "
                    f"{other.__module__}.{other.__name__} already. Choose another name for kind and class."
                )
        _HEADS[kind] = cls
        cls.kind = kind
        return cls

    return add


def unregister_head(kind: str) -> None:
    """Forget a head; what was saved with it no longer loads."""
    del _HEADS[kind]


def list_heads(base: type[Head] = Head) -> dict[str, type[Head]]:
    """The registered heads by name, of a subclass of `Head` if one is given.

    Example:
        >>> from diffusers_repr.heads import PooledHead
        >>> list(list_heads(PooledHead))
        ['knn', 'linear', 'mlp']
    """
    return {kind: cls for kind, cls in sorted(_HEADS.items()) if issubclass(cls, base)}


def head_class(kind: str, base: type[Head] = Head) -> type[Head]:
    """The class of a name.

    Raises:
        ValueError: With the names there are.
    """
    known = list_heads(base)
    if kind not in known:
        raise ValueError(
            f"Unknown head {kind!r}; expected one of {', '.join(known)}. `register_head` adds one of your own."
        )
    return known[kind]


__all__ = ["Head", "head_class", "list_heads", "register_head", "unregister_head"]
