"""Who calls a network: the pipeline whose `__call__` is running, and whether its network can be guided."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from diffusers_repr.capture.caches import cache_kinds, refuse_caches, refuse_shared_caches
from diffusers_repr.capture.capture import refuse_compiled
from diffusers_repr.denoiser.parts import COMPONENTS
from diffusers_repr.guidance.base import GuidanceTerm
from diffusers_repr.hub.compiled import is_compiled_in_place, plain_module

_PLAIN = "Guide the plain module: pipe.unet = pipe.unet._orig_mod (or transformer), or load it anew."
_OTHERS = (
    "A compiled block may be guided around, not in: load the network anew, and compile the blocks that no guidance "
    "changes or reads (block.compile() for each of them)."
)
COMPILED_SINCE = (
    "It was not when it was guided: remove the guidance (handle.remove()) before a part of its network is compiled, "
    "and guide the plain module."
)


def calling_pipeline(model: nn.Module) -> Any:
    """The pipeline in whose `__call__` the network is being called; None outside of one."""
    return _running_call(model).get("self")


def is_off(pipe: Any, model: nn.Module) -> bool:
    """Whether the running call of a pipeline does without its own guidance: its `guidance_scale` is up to 1.

    For the pipelines that have no `do_classifier_free_guidance` (DiT, PixArt): False is said for all others.
    """
    if getattr(pipe, "do_classifier_free_guidance", None) is not None:
        return False
    scale = _running_call(model).get("guidance_scale")
    return isinstance(scale, int | float) and scale <= 1


def running_argument(model: nn.Module, name: str) -> Any:
    """A local of the pipeline's running `__call__` by its name; None outside of one, and where there is none."""
    return _running_call(model).get(name)


def _running_call(model: nn.Module) -> Mapping[str, Any]:
    """Arguments of the pipeline's `__call__` in which the network is being called; none outside of one."""
    from diffusers import DiffusionPipeline

    # Private ground, the locals of frames: a pipeline does not say that it is running, and only the locals of their
    # `__call__` say whether DiT and PixArt guide by themselves. Without them another pipeline's calls of a shared
    # network would be guided too, and which rows of a call have the condition would not be known.
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline) and component_of(owner, model) is not None:
                return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def component_of(pipe: Any, model: nn.Module) -> str | None:
    """Name of the pipeline's component that is the network, or its compiled wrapper."""
    for name in COMPONENTS:
        component = getattr(pipe, name, None)
        if component is not None and plain_module(component) is model:
            return name
    return None


def check_plain(model: nn.Module, touched: Collection[str] = (), remedy: str | None = None) -> None:
    """Raise unless hooks on a network act.

    Args:
        model: The network.
        touched: Paths of the parts that guidances change or read; the network itself always is.
        remedy: What to do about compiled ones.

    Raises:
        RuntimeError: If one of them is compiled, or a part of the network that holds it.
    """
    refuse_compiled(model, remedy or _PLAIN, ())
    refuse_compiled(model, remedy or _OTHERS, touched)


def check_caches(model: nn.Module, terms: Sequence[GuidanceTerm]) -> None:
    """Raise ValueError for guidances that cannot act beside the caches of activations on a network.

    A perturbed lane then is a pass of its own with caches of its own; what reads activations may find none, or those
    of an earlier step.
    """
    if not cache_kinds(model) and not getattr(model, "is_cache_enabled", False):
        return
    for term in terms:
        if term.observers:
            refuse_caches(model, f"and {term.label} reads attention that is not computed in every step")
        if term.gradient is not None and term.gradient.reads_network:
            refuse_caches(
                model, f"and {term.label} differentiates through activations, which may be those of an earlier step"
            )
        if term.lane is not None:
            refuse_shared_caches(model, term.label)


def refuse_own_guidance(pipe: Any) -> None:
    """Raise ValueError for a pipeline that adds lanes of its own to the batch, or denoises more than the image."""
    if getattr(pipe, "class_token", None) is not None:
        raise ValueError(
            f"This {type(pipe).__name__} denoises a class token together with the image (REG), guidance would move "
            "the image alone. Use the guidance_scale of its call, which moves both."
        )
    name = type(pipe).__name__
    if "SAG" in name or "InstructPix2Pix" in name or "Perp" in name:
        raise ValueError(f"{name} has more than a conditional and a null lane; use the plain pipeline and guide that.")


def check_seen(pipe: Any, model: nn.Module, *, called: bool) -> None:
    """Raise RuntimeError if the pipeline's network is not the one that is guided, or was compiled since.

    Args:
        pipe: The pipeline.
        model: What is guided.
        called: Whether it has been called for this step.
    """
    name = component_of(pipe, model)
    gone = name is None and not called
    compiled = is_compiled_in_place(model) or (name is not None and getattr(pipe, name) is not model)
    if gone or compiled:
        why = "has another network than was guided" if gone else "compiled its network after it was guided"
        raise RuntimeError(
            f"{type(pipe).__name__} {why}, and nothing would be guided. Remove the guidance (handle.remove()) before "
            "a network is replaced or compiled, and guide the plain module."
        )
