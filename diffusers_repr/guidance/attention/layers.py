"""Which self-attention layers a path or a pattern means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from diffusers_repr.capture.attention import is_attention
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub.compiled import plain_path


def resolve_attentions(denoiser: Denoiser, layers: str | Sequence[str]) -> tuple[str, ...]:
    """Exact paths or whole-path shell patterns, of self-attention modules.

    Raises:
        TypeError: For a layer that is no string.
        ValueError: For a pattern that matches nothing, or nothing but cross-attention; names candidates.
    """
    model = denoiser.model
    several = isinstance(layers, Sequence) and not isinstance(layers, str | bytes)
    patterns = list(layers) if several else [layers]
    known = [path for path, _ in model.named_modules() if path]
    candidates = denoiser.family.self_attentions(model)
    found: dict[str, None] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"A layer is a full module path such as {candidates[0] if candidates else 'mid_block'!r}, or a "
                f"pattern of one; got {pattern!r} ({type(pattern).__name__})."
            )
        matched = [path for path in known if any(fnmatch.fnmatchcase(p, pattern) for p in (path, plain_path(path)))]
        good = [path for path in matched if path in candidates]
        if not good:
            near = [path for path in candidates if pattern.strip(".*") in path][:3]
            near = near or difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.3) or candidates[:3]
            attentions = [path for path in matched if is_attention(model.get_submodule(path))]
            why = (
                f"matches cross-attention only ({attentions[0]})"
                if attentions
                else "is no attention module"
                if matched
                else "matches nothing"
            )
            if not near:
                raise ValueError(
                    f"Layer {pattern!r} of {type(model).__name__} {why}. The network has no self-attention that its "
                    f"family, {type(denoiser.family).__name__}, knows."
                )
            raise ValueError(
                f"Layer {pattern!r} of {type(model).__name__} {why}. Self-attention: {near}. Give full paths, or "
                f"patterns of them such as {near[0].split('.')[0] + '.*'!r}."
            )
        found.update(dict.fromkeys(good))
    if not found:
        raise ValueError(f"No layers were given; self-attention of {type(model).__name__}: {candidates[:3]}.")
    return tuple(path for path in candidates if path in found)


__all__ = ["resolve_attentions"]
