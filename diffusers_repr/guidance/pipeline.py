"""Pipelines with a `guidance=` argument: the stock class and no copy of its call."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.configuration_utils import ConfigMixin

from diffusers_repr.denoiser import sampling
from diffusers_repr.guidance.base import Guidance
from diffusers_repr.guidance.engine.stats import GuidanceStats
from diffusers_repr.guidance.guide import guide
from diffusers_repr.hub.checked_loading import CheckedLoadingMixin
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.local_module import LocalModuleMixin

_ENTRY = """    guidance (`Guidance` or a list of them, *optional*):
        What `diffusers_repr.guide` takes, such as `[PAG(3.0), SAG(0.75)]`; None or an empty list is the stock call.
"""


class GuidedPipelineMixin(CheckedLoadingMixin, LocalModuleMixin, ConfigMixin):
    """Base, before a pipeline class of diffusers, of a pipeline whose call takes guidance.

    A subclass sets `__call__ = with_guidance(Stock.__call__)`, or writes its own call around `with self.guided(...)`.
    A folder it saves names the stock class, so it loads with or without this one.

    What a stock call takes without a word, or fails of deep inside, is refused before: see `check_call`.

    Attributes:
        guidance_stats: Lanes, passes and backward passes of the newest guided call; None after one without guidance.
    """

    guidance_stats: GuidanceStats | None = None
    # What the stock call can return.
    _output_types: Sequence[str] = sampling.OUTPUT_TYPES

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
        given = signature.bind_partial(self, *args, **kwargs)
        given.apply_defaults()
        check_call(self, given.arguments)
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


def check_call(pipe: Any, given: Mapping[str, Any]) -> None:
    """Refuse arguments of a stock pipeline's call that can give no image, or only noise.

    Args:
        pipe: With a `unet` or a `transformer`.
        given: Arguments by name, those of no meaning here included.

    Raises:
        TypeError: For numbers and labels that are none.
        ValueError: For numbers outside of their ranges, classes that the network does not have, latents that do not
            fit or are not finite, another `output_type` than the pipeline returns, and a scheduler made from the
            config of another noise process.
    """
    network = getattr(pipe, "unet", None) or pipe.transformer
    for name in ("num_inference_steps", "num_images_per_prompt", "height", "width"):
        if given.get(name) is not None:
            check_whole(name, given[name])
    if given.get("guidance_scale") is not None:
        sampling.check_number("guidance_scale", given["guidance_scale"])
    for name in ("eta", "guidance_rescale", "denoising_end"):
        if given.get(name) is not None:
            sampling.check_number(name, given[name], 0, 1)
    if given.get("latents") is not None:
        sampling.check_latents(given["latents"], network.config.in_channels)
    if given.get("class_labels") is not None:
        _check_labels(given["class_labels"], network.config.num_embeds_ada_norm)
    sampling.check_generator(given.get("generator"))
    sampling.check_output_type(given["output_type"], pipe._output_types)
    sampling.check_process(pipe.scheduler)


def _check_labels(labels: Any, classes: int) -> None:
    """Ids of classes from 0, the null class after them included."""
    if isinstance(labels, str) or not hasattr(labels, "__len__") or not len(labels):
        raise TypeError(f"class_labels is a list of class ids, one a sample; got {labels!r}.")
    for label in labels:
        check_whole("A class label", label, 0, classes)


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


__all__ = ["GuidedPipelineMixin", "check_call", "with_guidance"]
