"""Pipelines with a `guidance=` argument: the stock class and no copy of its call."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.configuration_utils import ConfigMixin

from diffusers_repr.guidance.base import Guidance
from diffusers_repr.guidance.guide import guide
from diffusers_repr.guidance.stats import GuidanceStats

_ENTRY = """    guidance (`Guidance` or a list of them, *optional*):
        What `diffusers_repr.guide` takes, such as `[PAG(3.0), SAG(0.75)]`; None or an empty list is the stock call.
"""


class GuidedPipelineMixin(ConfigMixin):
    """Base, before a pipeline class of diffusers, of a pipeline whose call takes guidance.

    A subclass sets `__call__ = with_guidance(Stock.__call__)`, or writes its own call around `with self.guided(...)`.
    A folder it saves names the stock class, so it loads with or without this one.

    Attributes:
        guidance_stats: Lanes, passes and backward passes of the newest guided call; None after one without guidance.
    """

    guidance_stats: GuidanceStats | None = None

    @contextmanager
    def guided(self, guidance: Guidance | Sequence[Guidance] | None) -> Iterator[None]:
        """Guidance in the block, as of `guide(self, guidance)`; nothing for None and for an empty list.

        Raises:
            TypeError: For what is no guidance.
            ValueError: As `guide`; also if the pipeline is guided from outside already.
        """
        configs = _configs(guidance)
        self.guidance_stats = None
        if not configs:
            yield
            return
        with guide(self, configs) as handle:
            self.guidance_stats = handle.stats
            yield

    def to_json_string(self) -> str:
        """The `model_index.json`, under the name of the stock class."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = self._folder_class()
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _folder_class(self) -> str:
        """Class that a saved folder is of."""
        return next(cls.__name__ for cls in type(self).__mro__ if cls.__module__.split(".")[0] == "diffusers")


def with_guidance(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call of a stock pipeline with one more argument, `guidance`, by keyword.

    Args:
        call: `__call__` of a pipeline class.

    Returns:
        The `__call__` of a subclass with `GuidedPipelineMixin`; its signature and docstring are those of `call` and
        the new argument.
    """

    @functools.wraps(call)
    def guided_call(
        self: GuidedPipelineMixin,
        *args: Any,
        guidance: Guidance | Sequence[Guidance] | None = None,
        **kwargs: Any,
    ) -> Any:
        with self.guided(guidance):
            return call(self, *args, **kwargs)

    signature = inspect.signature(call)
    parameters = list(signature.parameters.values())
    kind = inspect.Parameter.KEYWORD_ONLY
    new = inspect.Parameter("guidance", kind, default=None, annotation=Guidance | Sequence[Guidance] | None)
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, new)
    guided_call.__dict__["__signature__"] = signature.replace(parameters=parameters)
    guided_call.__doc__ = inspect.cleandoc(call.__doc__ or "").replace("Args:\n", "Args:\n" + _ENTRY, 1)
    return guided_call


def _configs(guidance: Any) -> list[Guidance]:
    """Guidance as a list; `guide` looks at its elements."""
    if guidance is None:
        return []
    if isinstance(guidance, Guidance):
        return [guidance]
    if isinstance(guidance, str) or not isinstance(guidance, Sequence):
        raise TypeError(
            f"guidance is a config such as PAG(3.0), or a list of them; got {guidance!r} ({type(guidance).__name__}). "
            "The scale of classifier-free guidance is guidance_scale."
        )
    return list(guidance)


__all__ = ["GuidedPipelineMixin", "with_guidance"]
