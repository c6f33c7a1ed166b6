"""What to do about attention whose softmax no one sees: what leaves its output as it was, or nothing."""

from __future__ import annotations

from typing import Any

from torch import nn

_NATIVE = "native"


def softmax_remedy(module: nn.Module) -> str:
    """A sentence that tells how to make a module call `scaled_dot_product_attention`; empty where none is known.

    Args:
        module: An attention module that made no such call.
    """
    processor: Any = getattr(module, "processor", None)
    name = type(processor).__name__
    if name.startswith("Sliced"):
        return " Its attention is sliced: call disable_attention_slicing() on the pipeline."
    if name.startswith("XFormers"):
        return " Call disable_xformers_memory_efficient_attention() on the pipeline."
    if name == "AttnProcessor" and _same_without_upcast(module):
        return " Give it the processor that does: get_submodule(path).set_processor(AttnProcessor2_0())."
    if hasattr(processor, "_attention_backend") and _backend(processor) != _NATIVE:
        return (
            f" Its backend {_backend(processor)!r} hides it: call set_attention_backend({_NATIVE!r}) on the network."
        )
    return ""


def _same_without_upcast(module: Any) -> bool:
    """Whether `AttnProcessor2_0` computes what `AttnProcessor` does: the same scale, no norms, no other precision."""
    normed = any(getattr(module, name, None) is not None for name in ("norm_q", "norm_k"))
    return bool(module.scale_qk) and not normed and not module.upcast_attention and not module.upcast_softmax


def _backend(processor: Any) -> str:
    # Private in diffusers: which of its backends computes attention is told by nothing else. If the names go, the
    # sentence above is left out or names no backend; nothing is computed otherwise.
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    chosen = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(chosen, "value", chosen))


__all__ = ["softmax_remedy"]
