"""Queries, keys and values of an attention call, by the module's own submodules, and what follows the weighted sum."""

from __future__ import annotations

import enum
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    AttnProcessorNPU,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
    XLAFlashAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor, nn

from diffusers_repr.models.sit_blocks import SiTAttnProcessor

Needs = Literal["values", "queries"]

_SCRATCH = 2**24  # scores held at once by default: 64 MiB in float32
_FLOAT16_MAX = 65504.0


class Kind(enum.Enum):
    """How an attention module is built, hence where its image and text tokens lie.

    `SELF`: self-attention of the image tokens alone. `JOINT`: image tokens, then text tokens of a second input (SD3).
    `DUAL`: text tokens of a second input, then image tokens (FLUX's two-stream blocks). `SINGLE`: text, then image
    tokens in one input (FLUX's single-stream blocks). `LINEAR`: Sana's self-attention, which has no probabilities.
    """

    SELF = "self-attention"
    JOINT = "joint attention, image first"
    DUAL = "joint attention, text first"
    SINGLE = "single-stream attention"
    LINEAR = "linear self-attention"


@dataclass(frozen=True)
class _Rule:
    """What a processor does around `softmax(q k^T scale) v`.

    Attributes:
        kinds: The modules it serves.
        qk_norm: It applies `norm_q` and `norm_k`.
        spatial_norm: It applies `spatial_norm`.
        own_scale: It scales by `module.scale`; else by `1 / sqrt(head width)`.
        upcast: It computes in float32 where `module.upcast_attention` or `upcast_softmax` says so.
    """

    kinds: tuple[Kind, ...] = (Kind.SELF,)
    qk_norm: bool = True
    spatial_norm: bool = True
    own_scale: bool = False
    upcast: bool = False


_RULES: dict[type, _Rule] = {
    AttnProcessor2_0: _Rule(),
    XLAFlashAttnProcessor2_0: _Rule(),
    AttnProcessorNPU: _Rule(qk_norm=False),
    AttnProcessor: _Rule(qk_norm=False, own_scale=True, upcast=True),
    SlicedAttnProcessor: _Rule(qk_norm=False, spatial_norm=False, own_scale=True, upcast=True),
    XFormersAttnProcessor: _Rule(qk_norm=False, own_scale=True),
    JointAttnProcessor2_0: _Rule((Kind.JOINT, Kind.SELF)),
    XFormersJointAttnProcessor: _Rule((Kind.JOINT, Kind.SELF), own_scale=True),
    SD3IPAdapterJointAttnProcessor2_0: _Rule((Kind.JOINT, Kind.SELF)),
    FluxAttnProcessor: _Rule((Kind.DUAL, Kind.SINGLE)),
    FluxIPAdapterAttnProcessor: _Rule((Kind.DUAL, Kind.SINGLE)),
    SanaLinearAttnProcessor2_0: _Rule((Kind.LINEAR,)),
    SiTAttnProcessor: _Rule(spatial_norm=False),
}
_MASKLESS = (JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0)
_FUSED = (FusedAttnProcessor2_0, FusedJointAttnProcessor2_0)


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


def kind_of(module: nn.Module) -> Kind:
    """How an attention module is built.

    Raises:
        ValueError: For cross-attention, attention with added text keys (`added_kv_proj_dim` without own text queries)
            and classes other than diffusers' `Attention` and `FluxAttention`.

    Example:
        >>> kind_of(Attention(8, heads=2, dim_head=4)).value
        'self-attention'
    """
    if isinstance(module, FluxAttention):
        return Kind.SINGLE if module.added_kv_proj_dim is None else Kind.DUAL
    if not isinstance(module, Attention):
        raise ValueError(
            f"is a {type(module).__name__}; known are diffusers' Attention and FluxAttention. Name the paths of "
            "self-attention modules of a supported network."
        )
    if module.is_cross_attention:
        raise ValueError(
            "is cross-attention (keys and values come from the condition); only attention among image tokens can be "
            "perturbed. In a transformer block that is attn1 (or attn)."
        )
    if module.added_kv_proj_dim is not None:
        if getattr(module, "add_q_proj", None) is None:
            raise ValueError(
                "mixes added text keys and values into image attention (added_kv_proj_dim); no perturbation is "
                "defined for it. Take another layer or another network."
            )
        return Kind.JOINT
    return Kind.LINEAR if isinstance(module.processor, SanaLinearAttnProcessor2_0) else Kind.SELF


def check_supported(module: nn.Module, path: str, needs: Needs = "queries") -> Kind:
    """The kind of an attention module whose attention can be recomputed exactly.

    Args:
        module: An attention module.
        path: Its name, for the message.
        needs: `values` where values alone are used (linear attention will do), `queries` where the probabilities
            are.

    Raises:
        ValueError: As `kind_of`; for fused projections, unknown processors, attention sharded over devices, and linear
            attention where queries are needed. Names the path and says what to do.
    """
    try:
        kind = kind_of(module)
    except ValueError as error:
        raise ValueError(f"Layer {path!r} {error}") from None
    processor: Any = module.processor
    name = type(processor).__name__
    reads_fused = isinstance(module, FluxAttention) or isinstance(processor, SiTAttnProcessor)
    if isinstance(processor, _FUSED) or (reads_fused and module.fused_projections):
        raise ValueError(
            f"Layer {path!r} has fused projections ({name}), which hide q, k and v. Call unfuse_qkv_projections() on "
            "the pipeline or model first."
        )
    if name.startswith("PAG"):
        raise ValueError(
            f"Layer {path!r} is already perturbed ({name}). Use the pipeline without diffusers' own PAG, or call "
            "set_default_attn_processor()."
        )
    rule = _RULES.get(type(processor))
    if rule is None or kind not in rule.kinds:
        raise ValueError(
            f"Layer {path!r} ({kind.value}) runs the processor {name}, which hides q and k; known for it are "
            f"{', '.join(known.__name__ for known, rule in _RULES.items() if kind in rule.kinds)}. Call "
            "set_default_attn_processor() or set_attn_processor(...) with one of them."
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise ValueError(
            f"Layer {path!r} spreads its tokens over devices (context parallelism); no device sees all keys. Turn it "
            "off."
        )
    if needs == "queries" and kind is Kind.LINEAR:
        raise ValueError(
            f"Layer {path!r} is linear attention ({name}), which has no attention probabilities to read. "
            "PAG with perturbation='identity' or 'drop' takes the values only."
        )
    return kind


def named_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of an attention module by name.

    Example:
        >>> sorted(named_arguments(Attention(8, heads=2, dim_head=4), (1, None), {"temb": 2}))
        ['encoder_hidden_states', 'hidden_states', 'temb']
    """
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    named = dict(list(bound.items())[1:])
    for name, parameter in inspect.signature(type(module).forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named


def project(module: nn.Module, arguments: Mapping[str, Any], text_tokens: int = 0) -> Projections:
    """Queries, keys and values of one call, as the module's processor makes them.

    Args:
        module: Any kind but `LINEAR`.
        arguments: The call's arguments by name (`named_arguments`).
        text_tokens: How many text tokens stand first in `hidden_states`; for `SINGLE` only, where it must be given.
            It is the second dimension of the `encoder_hidden_states` that the enclosing block takes.

    Raises:
        ValueError: Text tokens that the kind has not, or has and were not given; a call as cross-attention; masks in
            joint attention.
    """
    kind, rule = kind_of(module), _RULES[type(module.processor)]
    if kind is Kind.LINEAR:
        raise ValueError("Linear attention has no queries and keys in the sense of softmax attention.")
    hidden, text = normed(module, arguments), arguments.get("encoder_hidden_states")
    _check_text(kind, text, text_tokens, hidden.shape[1])
    streams = [_stream(module, hidden, ("to_q", "to_k", "to_v"), rule.qk_norm, "norm_q", "norm_k")]
    if kind in (Kind.JOINT, Kind.DUAL) and text is not None:
        names = ("add_q_proj", "add_k_proj", "add_v_proj")
        streams.append(_stream(module, text, names, rule.qk_norm, "norm_added_q", "norm_added_k"))
    if kind is Kind.DUAL:
        streams.reverse()
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
    rotary = arguments.get("image_rotary_emb")
    if kind in (Kind.DUAL, Kind.SINGLE) and rotary is not None:
        query = cast(Tensor, apply_rotary_emb(query, rotary, sequence_dim=2))
        key = cast(Tensor, apply_rotary_emb(key, rotary, sequence_dim=2))
    if rule.upcast and (module.upcast_attention or module.upcast_softmax):
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    tokens = query.shape[2]
    length = text_tokens if kind is Kind.SINGLE else tokens - hidden.shape[1]
    text_first = kind in (Kind.DUAL, Kind.SINGLE)
    image = slice(length, tokens) if text_first else slice(0, tokens - length)
    where = slice(0, length) if text_first else slice(tokens - length, tokens)
    scale = float(module.scale) if rule.own_scale else 1 / math.sqrt(query.shape[-1])  # type: ignore[arg-type]
    return Projections(query, key, value, image, where, scale, _mask(module, kind, arguments, hidden))


def project_values(module: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Values `(B, T, heads * D)` of self-attention (`SELF` or `LINEAR`), without queries and keys."""
    hidden = normed(module, arguments)
    _check_text(kind_of(module), arguments.get("encoder_hidden_states"), 0, hidden.shape[1])
    return module.to_v(hidden)  # type: ignore[operator]


def normed(module: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """The call's `hidden_states` as tokens `(B, T, C)`, after the module's spatial and group norm."""
    hidden = arguments["hidden_states"]
    if isinstance(module, FluxAttention):
        return hidden
    if module.spatial_norm is not None and _RULES[type(module.processor)].spatial_norm:
        hidden = module.spatial_norm(hidden, arguments.get("temb"))  # type: ignore[operator]
    if hidden.ndim == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    if module.group_norm is not None:
        hidden = module.group_norm(hidden.transpose(1, 2)).transpose(1, 2)  # type: ignore[operator]
    return hidden


def finish(
    module: nn.Module, arguments: Mapping[str, Any], attended: Tensor, image: slice | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """The module's output from the weighted sum of values: what its processor does after it.

    Args:
        module: The attention module.
        arguments: The call's arguments by name.
        attended: `(B, S, heads * D)`, all tokens in the processor's order.
        image: Where the image tokens lie; needed where the text is a second input.

    Returns:
        As the module's own forward: `(B, T, C)` or `(B, C, h, w)`; `(image, text)` where the text is a second input.
    """
    kind, hidden = kind_of(module), arguments["hidden_states"]
    attended = attended.to(hidden.dtype)
    text = arguments.get("encoder_hidden_states")
    if kind in (Kind.DUAL, Kind.SINGLE) and text is None:
        return attended
    layers: Any = module.to_out
    if kind in (Kind.JOINT, Kind.DUAL) and text is not None:
        assert image is not None
        own = slice(0, image.start) if kind is Kind.DUAL else slice(image.stop, attended.shape[1])
        words = attended[:, own]
        if kind is Kind.DUAL or not module.context_pre_only:
            words = module.to_add_out(words.contiguous())  # type: ignore[operator]
        return layers[1](layers[0](attended[:, image].contiguous())), words
    out = layers[1](layers[0](attended))
    if kind is Kind.LINEAR:
        return out.clip(-_FLOAT16_MAX, _FLOAT16_MAX) if hidden.dtype == torch.float16 else out
    if hidden.ndim == 4:
        out = out.transpose(1, 2).reshape(hidden.shape)
    if module.residual_connection:
        out = out + hidden
    return out / module.rescale_output_factor


def attention_received(module: nn.Module, arguments: Mapping[str, Any], chunk: int | None = None) -> Tensor:
    """How much attention each token receives: `a_j = sum_i mean_heads A[i, j]` (SAG, arXiv 2210.00939).

    The map is never held: probabilities are made for some query rows at a time, in float32 or wider.

    Args:
        module: Self-attention (`SELF`).
        arguments: The call's arguments by name.
        chunk: Query rows at once; about 64 MiB of scores if None.

    Returns:
        `(B, T)`, float32 (float64 for a float64 module); the mean over T is 1.

    Raises:
        ValueError: For other kinds of attention.
    """
    if kind_of(module) is not Kind.SELF:
        raise ValueError(f"Attention received is defined for self-attention; this is {kind_of(module).value}.")
    calls = project(module, arguments)
    wide = torch.promote_types(calls.query.dtype, torch.float32)
    batch, heads, tokens, _ = calls.query.shape
    step = chunk or max(1, _SCRATCH // (batch * heads * tokens))
    keys = calls.key.to(wide).transpose(-1, -2)
    received = torch.zeros(batch, tokens, dtype=wide, device=keys.device)
    for start in range(0, tokens, step):
        scores = calls.query[:, :, start : start + step].to(wide) @ keys * calls.scale
        if calls.mask is not None:
            rows = slice(start, start + step) if calls.mask.shape[-2] > 1 else slice(None)
            scores = scores + calls.mask[..., rows, :].to(wide)
        received = received + scores.softmax(-1).sum(-2).mean(1)
    return received


def merge_heads(attended: Tensor) -> Tensor:
    """`(B, heads, S, D)` -> `(B, S, heads * D)`."""
    return attended.transpose(1, 2).flatten(2)


def _stream(
    module: nn.Module, tokens: Tensor, names: tuple[str, str, str], norm: bool, norm_q: str, norm_k: str
) -> tuple[Tensor, Tensor, Tensor]:
    parts = [getattr(module, name)(tokens) for name in names]
    # A FLUX module split over devices holds fewer heads than `heads` says; its head width is stated.
    split = (-1, module.head_dim) if isinstance(module, FluxAttention) else (module.heads, -1)
    query, key, value = (part.unflatten(-1, split).transpose(1, 2) for part in parts)
    for_q, for_k = getattr(module, norm_q, None), getattr(module, norm_k, None)
    if norm and for_q is not None:
        query = for_q(query)
    if norm and for_k is not None:
        key = for_k(key)
    return query, key, value


def _check_text(kind: Kind, text: Tensor | None, text_tokens: int, tokens: int) -> None:
    if kind in (Kind.SELF, Kind.LINEAR) and text is not None:
        raise ValueError("Self-attention was called with encoder_hidden_states: it works as cross-attention here.")
    if kind is Kind.SINGLE and not 0 < text_tokens < tokens:
        raise ValueError(
            f"Single-stream attention takes text and image tokens in one input ({tokens} tokens); text_tokens must "
            f"say how many are text; got {text_tokens}."
        )
    if kind is not Kind.SINGLE and text_tokens and (text is None or text_tokens != text.shape[1]):
        raise ValueError(f"text_tokens={text_tokens} is for single-stream attention; this is {kind.value}.")


def _mask(module: nn.Module, kind: Kind, arguments: Mapping[str, Any], hidden: Tensor) -> Tensor | None:
    mask = arguments.get("attention_mask")
    if mask is None or isinstance(module.processor, _MASKLESS):
        return None
    if kind is not Kind.SELF:
        raise ValueError("Attention masks in joint attention are not supported under a perturbation.")
    batch, tokens, _ = hidden.shape
    mask = module.prepare_attention_mask(mask, tokens, batch)  # type: ignore[operator]
    return mask.view(batch, module.heads, -1, mask.shape[-1])
