"""Queries, keys and values of an attention call, by the module's own submodules, and what follows the weighted sum."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from diffusers_repr.denoiser import Family
from diffusers_repr.denoiser.attention_layouts import AttentionLayout, ProcessorRule

Needs = Literal["values", "queries"]

_FLOAT16_MAX = 65504.0


@dataclass(frozen=True)
class Projections:
    """What goes into the weighted sum of one attention call.

    Attributes:
        query: `(B, heads, S, D)`, normed and rotated as the processor does.
        key: As `query`.
        value: As `query`, without norm or rotation.
        image: Where the image tokens lie among the S tokens.
        text: Where the text tokens lie; empty for self-attention.
        scale: Factor of `query @ key^T`.
        mask: Added to the scores, broadcastable to `(B, heads, S, S)`, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    image: slice
    text: slice
    scale: float
    mask: Tensor | None = None


def check_supported(family: Family, module: nn.Module, path: str, needs: Needs = "queries") -> AttentionLayout:
    """The layout of an attention module whose attention can be perturbed or read.

    Where its processor is none of those that the layout spells out, or its projections are fused, the layout comes
    without `processors`: the module's own forward runs, and its softmax is replaced.

    Args:
        family: Of the network.
        module: An attention module.
        path: Its path.
        needs: `values` where values alone are used (linear attention will do), `queries` where the probabilities
            are.

    Raises:
        ValueError: As `Family.attention`; for attention that diffusers' own PAG has perturbed, sharded over devices,
            fused beside an image prompt, and linear where queries are needed. Names the path.
    """
    try:
        layout = family.attention(path, module)
    except ValueError as error:
        raise ValueError(f"Layer {path!r} {error}") from None
    processor: Any = getattr(module, "processor", None)
    name = type(processor).__name__
    if name.startswith("PAG"):
        raise ValueError(
            f"Layer {path!r} is already perturbed by diffusers' own PAG ({name}), which a PAG pipeline leaves behind "
            "when its call is broken off. Load the network anew."
        )
    # Private in diffusers: a processor says by nothing else that it sees a part of the tokens. If it goes, each device
    # would perturb its own part, and the guidance would be another one.
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(
            f"Layer {path!r} spreads its tokens over devices (context parallelism); no device sees all keys. Load the "
            "network without enable_parallelism()."
        )
    if layout.linear and needs == "queries":
        raise ValueError(
            f"Layer {path!r} is linear attention ({name}), which has no attention probabilities to read. "
            "PAG with perturbation='identity' or 'drop' takes the values only."
        )
    rule = layout.processors.get(name)
    if layout.linear:
        if rule is None:
            raise ValueError(
                f"Layer {path!r} ({layout.name}) runs the processor {name}; its values are known of "
                f"{', '.join(layout.processors)} alone."
            )
        return layout
    fused = rule is not None and rule.fused and module.fused_projections
    if rule is None or fused:
        if rule is not None and rule.image_prompt:
            raise ValueError(
                f"Layer {path!r} has fused projections beside an image prompt ({name}), more than one softmax in its "
                "own forward. Call unfuse_qkv_projections() on the network first."
            )
        return replace(layout, processors={})
    return layout


def rule_of(module: nn.Module, layout: AttentionLayout) -> ProcessorRule:
    """What the module's processor does."""
    return layout.processors[type(module.processor).__name__]


def named_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of an attention module by name.

    Example:
        >>> from diffusers.models.attention_processor import Attention
        >>> sorted(named_arguments(Attention(8, heads=2, dim_head=4), (1, None), {"temb": 2}))
        ['encoder_hidden_states', 'hidden_states', 'temb']
    """
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    named = dict(list(bound.items())[1:])
    for name, parameter in inspect.signature(type(module).forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def project(
    module: nn.Module, layout: AttentionLayout, arguments: Mapping[str, Any], image: slice | None = None
) -> Projections:
    """Queries, keys and values of one call, as the module's processor makes them.

    Args:
        module: With a processor that its layout names.
        layout: Any but a linear one.
        arguments: The call's arguments by name (`named_arguments`).
        image: Where the image tokens lie in `hidden_states`; for a single-stream layout, where it must be given.

    Raises:
        ValueError: A single stream of which that is not told; a call as cross-attention; masks in joint attention.
    """
    rule = rule_of(module, layout)
    if layout.linear:
        raise ValueError("Linear attention has no queries and keys in the sense of softmax attention.")
    hidden, text = normed(module, layout, arguments), arguments.get("encoder_hidden_states")
    _check_text(layout, text, image, hidden.shape[1])
    streams = [_stream(module, hidden, ("to_q", "to_k", "to_v"), rule.qk_norm, "norm_q", "norm_k")]
    if layout.text_input is not None and text is not None:
        names = ("add_q_proj", "add_k_proj", "add_v_proj")
        streams.append(_stream(module, text, names, rule.qk_norm, "norm_added_q", "norm_added_k"))
        if layout.text == "first":
            streams.reverse()
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
    rotary = arguments.get("image_rotary_emb")
    if rule.rotary and rotary is not None:
        query = cast(Tensor, apply_rotary_emb(query, rotary, sequence_dim=2))
        key = cast(Tensor, apply_rotary_emb(key, rotary, sequence_dim=2))
    if rule.upcast and (module.upcast_attention or module.upcast_softmax):
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    image, rest = split_tokens(layout, query.shape[2], hidden.shape[1], image)
    scale = float(module.scale) if rule.own_scale else 1 / math.sqrt(query.shape[-1])  # type: ignore[arg-type]
    return Projections(query, key, value, image, rest, scale, _mask(module, layout, arguments, hidden))


def split_tokens(layout: AttentionLayout, tokens: int, own: int, image: slice | None = None) -> tuple[slice, slice]:
    """Where the image tokens and the others lie among the `tokens` of one softmax.

    Args:
        layout: Of the attention.
        tokens: All tokens.
        own: Those of `hidden_states`.
        image: Of a single stream: where the image is in it.
    """
    if layout.single:
        assert image is not None
        other = slice(0, image.start) if layout.text == "first" else slice(image.stop, tokens)
        return image, other
    if layout.text == "first":
        return slice(tokens - own, tokens), slice(0, tokens - own)
    return slice(0, own), slice(own, tokens)


def project_values(module: nn.Module, layout: AttentionLayout, arguments: Mapping[str, Any]) -> Tensor:
    """Values `(B, T, heads * D)` of self-attention, softmax or linear, without queries and keys."""
    hidden = normed(module, layout, arguments)
    _check_text(layout, arguments.get("encoder_hidden_states"), None, hidden.shape[1])
    return module.to_v(hidden)  # type: ignore[operator]


def normed(module: nn.Module, layout: AttentionLayout, arguments: Mapping[str, Any]) -> Tensor:
    """The call's `hidden_states` as tokens `(B, T, C)`, after the module's spatial and group norm."""
    hidden = arguments["hidden_states"]
    if getattr(module, "spatial_norm", None) is not None and rule_of(module, layout).spatial_norm:
        hidden = module.spatial_norm(hidden, arguments.get("temb"))  # type: ignore[operator]
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    if getattr(module, "group_norm", None) is not None:
        hidden = module.group_norm(hidden.transpose(1, 2)).transpose(1, 2)  # type: ignore[operator]
    return hidden


def finish(
    module: nn.Module,
    layout: AttentionLayout,
    arguments: Mapping[str, Any],
    attended: Tensor,
    image: slice | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The module's output from the weighted sum of values: what its processor does after it.

    Args:
        module: The attention module.
        layout: Its own.
        arguments: The call's arguments by name.
        attended: `(B, S, heads * D)`, all tokens in the processor's order.
        image: Where the image tokens lie; needed where the text is a second input.

    Returns:
        As the module's own forward: `(B, T, C)` or `(B, C, h, w)`; `(image, text)` where the text is a second input.
    """
    hidden = arguments["hidden_states"]
    attended = attended.to(hidden.dtype)
    text = arguments.get("encoder_hidden_states")
    if layout.text == "first" and text is None:  # FLUX's single-stream blocks project by themselves
        return attended
    layers: Any = module.to_out
    if layout.text_input is not None and text is not None:
        assert image is not None
        own = slice(0, image.start) if layout.text == "first" else slice(image.stop, attended.shape[1])
        words = attended[:, own]
        if layout.text == "first" or not module.context_pre_only:
            words = module.to_add_out(words.contiguous())  # type: ignore[operator]
        return layers[1](layers[0](attended[:, image].contiguous())), words
    out = layers[1](layers[0](attended))
    if layout.linear:
        return out.clip(-_FLOAT16_MAX, _FLOAT16_MAX) if hidden.dtype == torch.float16 else out
    if hidden.ndim == 4:
        out = out.transpose(1, 2).reshape(hidden.shape)
    if module.residual_connection:
        out = out + hidden
    return out / module.rescale_output_factor


def merge_heads(attended: Tensor) -> Tensor:
    """`(B, heads, S, D)` -> `(B, S, heads * D)`."""
    return attended.transpose(1, 2).flatten(2)


def _stream(
    module: nn.Module, tokens: Tensor, names: tuple[str, str, str], norm: bool, norm_q: str, norm_k: str
) -> tuple[Tensor, Tensor, Tensor]:
    parts = [getattr(module, name)(tokens) for name in names]
    # A FLUX module split over devices holds fewer heads than `heads` says; its head width is stated.
    split = (-1, module.head_dim) if hasattr(module, "head_dim") else (module.heads, -1)
    query, key, value = (part.unflatten(-1, split).transpose(1, 2) for part in parts)
    for_q, for_k = getattr(module, norm_q, None), getattr(module, norm_k, None)
    if norm and for_q is not None:
        query = for_q(query)
    if norm and for_k is not None:
        key = for_k(key)
    return query, key, value


def _check_text(layout: AttentionLayout, text: Tensor | None, image: slice | None, tokens: int) -> None:
    if layout.text is None and text is not None:
        raise ValueError("Self-attention was called with encoder_hidden_states: it works as cross-attention here.")
    if layout.single and (image is None or not 0 <= image.start < image.stop <= tokens or image == slice(0, tokens)):
        raise ValueError(
            f"Single-stream attention takes text and image tokens in one input ({tokens} tokens); which are the "
            f"image's must be told; got {image}."
        )


def _mask(module: nn.Module, layout: AttentionLayout, arguments: Mapping[str, Any], hidden: Tensor) -> Tensor | None:
    mask = arguments.get("attention_mask")
    if mask is None or not rule_of(module, layout).masks:
        return None
    if layout.text is not None:
        raise ValueError("Attention masks in joint attention are not supported under a perturbation.")
    batch, tokens, _ = hidden.shape
    mask = module.prepare_attention_mask(mask, tokens, batch)  # type: ignore[operator]
    return mask.view(batch, module.heads, -1, mask.shape[-1])
