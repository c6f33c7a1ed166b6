"""Caches of activations between calls of a network, under which hooks see other values than the call's own."""

from __future__ import annotations

from torch import nn

from diffusers_repr.denoiser.hooks import hooks_of_diffusers

# Names that diffusers' caches register their hooks under, one for each kind that is there. Private: of a cache set by
# its function diffusers tells nothing else. One that is renamed is not refused, and lanes mix.
_CACHES = (
    "faster_cache",
    "fbc",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
    "text_kv_cache",
)


def refuse_caches(model: nn.Module, why: str) -> None:
    """Raise ValueError if a network, or a part of it, uses activations of earlier calls.

    Args:
        model: The network.
        why: What comes of it, such as "which lanes would mix".

    Raises:
        ValueError: For a cache of diffusers, set by `enable_cache` or by its function.
    """
    name, enabled = type(model).__name__, bool(getattr(model, "is_cache_enabled", False))
    for path, module in model.named_modules():
        hooks = hooks_of_diffusers(module)
        found = next((hook for hook in hooks if hook.startswith(_CACHES)), None)
        if found is not None and not enabled:
            raise ValueError(
                f"{path or 'The network'} of this {name} caches activations between steps ({found}), {why}; remove "
                "its hooks, or load the network anew."
            )
    if enabled:
        raise ValueError(f"{name} caches activations between steps, {why}; call its disable_cache() first.")


__all__ = ["refuse_caches"]
