"""Which layers each method acts on by default, by architecture, and where that comes from."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from diffusers_repr.denoiser import Denoiser


@dataclass(frozen=True)
class LayerDefault:
    """Default layers of a method for one architecture.

    Attributes:
        layers: Full module paths.
        source: Where the choice comes from.
    """

    layers: tuple[str, ...]
    source: str


def self_attentions(model: nn.Module) -> list[str]:
    """Paths of the self-attention modules over image tokens, in module order; joint attention counts."""
    found = []
    for path, module in model.named_modules():
        joint = getattr(module, "add_k_proj", None) is not None or type(module).__name__ == "FluxAttention"
        if hasattr(module, "to_q") and hasattr(module, "processor") and (joint or not _crosses(path, module)):
            found.append(path)
    return found


def _crosses(path: str, module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or path.endswith(".attn2") and _has_sibling(module)


def _has_sibling(module: nn.Module) -> bool:
    # The second attention of a basic block crosses to text; SD3.5's second one (attn2) is over the image.
    return getattr(module, "cross_attention_dim", None) != getattr(module, "query_dim", None)


def resolve_layers(
    model: nn.Module, layers: str | Sequence[str], allowed: Callable[[nn.Module], Sequence[str]] = self_attentions
) -> tuple[str, ...]:
    """Exact paths or whole-path shell patterns, of self-attention modules.

    Raises:
        TypeError: For a layer that is no string.
        ValueError: For a pattern that matches nothing, or nothing but cross-attention; names candidates.
    """
    several = isinstance(layers, Sequence) and not isinstance(layers, str | bytes)
    patterns = list(layers) if several else [layers]
    known = [path for path, _ in model.named_modules() if path]
    candidates = list(allowed(model))
    found: dict[str, None] = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"A layer is a full module path such as {candidates[0] if candidates else 'mid_block'!r}, or a "
                f"pattern of one; got {pattern!r} ({type(pattern).__name__})."
            )
        matched = [path for path in known if fnmatch.fnmatchcase(path, pattern)]
        good = [path for path in matched if path in candidates]
        if not good:
            near = [path for path in candidates if pattern.strip(".*") in path][:3]
            near = near or difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.3) or candidates[:3]
            attentions = [path for path in matched if hasattr(model.get_submodule(path), "to_q")]
            why = (
                f"matches cross-attention only ({attentions[0]})"
                if attentions
                else "is no attention module"
                if matched
                else "matches nothing"
            )
            example = near[0].split(".")[0] + ".*" if near else "mid_block.*"
            raise ValueError(
                f"Layer {pattern!r} of {type(model).__name__} {why}. Self-attention: {near}. Give full paths, or "
                f"patterns of them such as {example!r}."
            )
        found.update(dict.fromkeys(good))
    if not found:
        raise ValueError(f"No layers were given; self-attention of {type(model).__name__}: {candidates[:3]}.")
    return tuple(path for path in candidates if path in found)


def _mid(model: nn.Module) -> tuple[str, ...]:
    return tuple(path for path in self_attentions(model) if path.startswith("mid_block"))


def pag_layers(denoiser: Denoiser) -> LayerDefault:
    """Layers that PAG perturbs by default.

    Raises:
        ValueError: If the model has no self-attention where the default lies, or no default is known.
    """
    model, name = denoiser.model, type(denoiser.family).__name__
    attentions = self_attentions(model)
    if name == "UNet2DFamily":
        adm = tuple(f"down_blocks.{at}" for at in ("4.attentions.1", "5.attentions.0", "5.attentions.1"))
        if len(getattr(model, "down_blocks", ())) == 6 and all(path in attentions for path in adm):
            return LayerDefault((*adm, *_mid(model)), "ImageNet 256 configuration of the paper's code")
    if name in ("UNet2DFamily", "UNet2DConditionFamily"):
        return _some(model, _mid(model), "middle block: the paper's Stable Diffusion setting and diffusers' default")
    if name in ("SD3Family", "PixArtFamily"):
        one = tuple(path for path in attentions if path.startswith("transformer_blocks.1."))
        return _some(model, one, "transformer_blocks.1, diffusers' default (blocks.1)")
    return _some(model, attentions[len(attentions) // 2 :][:1], "half of the depth; no published default (ours)")


def sag_layer(denoiser: Denoiser) -> LayerDefault:
    """Layer whose attention SAG reads by default.

    Raises:
        ValueError: If the model has no self-attention where the default lies, or no default is known.
    """
    model, name = denoiser.model, type(denoiser.family).__name__
    if name == "UNet2DFamily":
        adm = "up_blocks.0.attentions.2"
        if len(getattr(model, "down_blocks", ())) == 6 and adm in self_attentions(model):
            return LayerDefault((adm,), "ImageNet 256 configuration of the paper's code")
    if name in ("UNet2DFamily", "UNet2DConditionFamily"):
        return _some(model, _mid(model)[:1], "middle block: diffusers' Stable Diffusion SAG pipeline")
    attentions = self_attentions(model)
    return _some(model, attentions[len(attentions) // 2 :][:1], "half of the depth; no published default (ours)")


def _some(model: nn.Module, layers: Sequence[str], source: str) -> LayerDefault:
    if not layers:
        near = self_attentions(model)[:3]
        raise ValueError(
            f"{type(model).__name__} has no self-attention at the default place ({source}); pass layers=. "
            f"Self-attention: {near or 'none in the whole network'}."
        )
    return LayerDefault(tuple(layers), source)
