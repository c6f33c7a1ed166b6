"""The registry of families: which adapter serves which model class; users add theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from diffusers_repr.denoiser.block_outputs import register_block_output
from diffusers_repr.denoiser.family import Family
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.hub.registry import Registry

# Model class -> adapter; `families` fills it with ours.
_FAMILIES = Registry("family adapter", Family, "register_family")


def register_family(*class_names: str) -> Callable[[type[Family]], type[Family]]:
    """Register an adapter for model classes, by name.

    Raises:
        ValueError: If a class has an adapter already, or another family reads the output of a block otherwise.
    """

    def register(cls: type[Family]) -> type[Family]:
        registered = _FAMILIES.register(*class_names)(cls)
        for block, index in cls.block_outputs.items():
            register_block_output(block, index)
        return registered

    return register


def list_families() -> list[str]:
    """Model classes with an adapter."""
    return sorted(_FAMILIES)


def family_by_name(*class_names: str) -> Family | None:
    """The adapter of the first class name that has one, bound to no config."""
    for name in class_names:
        if name in _FAMILIES:
            return _FAMILIES[name]()
    return None


def family_of(model: nn.Module) -> Family:
    """The adapter of a model, by its class or a parent class, bound to its config.

    Raises:
        TypeError: If there is none; says how to add one.
    """
    inner: Any = plain_module(model)
    family = family_by_name(*(cls.__name__ for cls in type(inner).__mro__))
    if family is None:
        name = type(inner).__name__
        raise TypeError(
            f"No family adapter for {name}. Known: {', '.join(list_families())}. "
            f"Write one (docs/adding_a_family.md):\n    @register_family({name!r})\n    class MyFamily(Family): ...\n"
            "or call any nn.Module through Denoiser(model, scheduler, family=GenericFamily(sample='x', timestep='t'))."
        )
    return family.bound_to(getattr(inner, "config", {}))


def family_of_or_base(model: nn.Module) -> Family:
    """The adapter of a model; the base class, which knows what the module tree tells, where there is none."""
    inner: Any = plain_module(model)
    family = family_by_name(*(cls.__name__ for cls in type(inner).__mro__)) or Family()
    return family.bound_to(getattr(inner, "config", {}))


__all__ = ["family_by_name", "family_of", "family_of_or_base", "list_families", "register_family"]
