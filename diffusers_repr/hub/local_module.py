"""One module for all local pipeline folders: how diffusers loads them, and the refusal of a second."""

from __future__ import annotations

import sys
from typing import Any


class LocalModuleMixin:
    """Base of pipelines that are loaded from local folders by `custom_pipeline=`.

    diffusers runs the `pipeline.py` of every local folder in one module, `diffusers_modules.local.pipeline`. A second
    folder finds the first one's class there, and what is loaded is one or the other's, or an error that names neither.

    Raises:
        ImportError: Where a subclass is made in such a module beside another pipeline's.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.__module__.startswith("diffusers_modules."):
            return
        for name, value in vars(sys.modules[cls.__module__]).items():
            if name != cls.__name__ and getattr(value, "__module__", None) == cls.__module__ and _is_pipeline(value):
                raise ImportError(
                    f"{cls.__name__} cannot be loaded from a folder here: diffusers runs the pipeline.py of every "
                    f"local folder in one module, {cls.__module__!r}, and {name} is loaded there already. Import it, "
                    f"which needs no remote code (`from diffusers_repr.pipelines.<folder> import {cls.__name__}`), "
                    "take it by its Hub id, or load it in another process."
                )


def _is_pipeline(value: Any) -> bool:
    return isinstance(value, type) and any(base.__name__ == "DiffusionPipeline" for base in value.__mro__[1:])


__all__ = ["LocalModuleMixin"]
