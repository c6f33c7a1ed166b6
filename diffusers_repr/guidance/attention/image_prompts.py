"""The image prompt's part (IP-Adapter) of a joint attention call, beside its text and image part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.denoiser.attention_layouts import AttentionLayout
from diffusers_repr.guidance.attention.projections import Projections, merge_heads, rule_of


def image_prompt(
    module: nn.Module, layout: AttentionLayout, arguments: Mapping[str, Any]
) -> Literal["inside", "beside"] | None:
    """Where the module's processor adds an image prompt to this call; None where it adds none."""
    processor: Any = module.processor
    where = rule_of(module, layout).image_prompt
    if where == "beside":
        return where if arguments.get("encoder_hidden_states") is not None else None
    return where if where and processor.scale != 0 and arguments.get("ip_hidden_states") is not None else None


def prompt_beside(module: Any, arguments: Mapping[str, Any]) -> Tensor:
    """What FLUX's image queries take from the image prompts: `(B, T, C)`, the third output of its attention.

    It holds no attention among image tokens, so no perturbation touches it. Queries are normed, not rotated.
    """
    processor, hidden = module.processor, arguments["hidden_states"]
    query = module.norm_q(module.to_q(hidden).unflatten(-1, (module.heads, -1))).transpose(1, 2)
    out = torch.zeros_like(hidden)
    prompts = zip(arguments["ip_hidden_states"], processor.scale, processor.to_k_ip, processor.to_v_ip, strict=True)
    for prompt, scale, to_k, to_v in prompts:
        key, value = (
            part(prompt).reshape(len(hidden), -1, module.heads, module.head_dim).transpose(1, 2)
            for part in (to_k, to_v)
        )
        out = out + scale * merge_heads(functional.scaled_dot_product_attention(query, key, value)).to(out.dtype)
    return out


def prompt_inside(module: Any, arguments: Mapping[str, Any]) -> Projections:
    """The second attention of SD3's image queries, over the image tokens and the image prompt's.

    Its image-image part is perturbed as that of the first one: the prompt's tokens stand where text tokens stand, but
    ask nothing, so its result `(B, heads, T, D)` has image rows only. Times `processor.scale`, it is added to the
    first before `to_out`.
    """
    processor, hidden = module.processor, arguments["hidden_states"]
    prompt = processor.norm_ip(arguments["ip_hidden_states"], temb=arguments.get("temb"))
    parts = [layer(hidden) for layer in (module.to_q, module.to_k, module.to_v)]
    parts += [layer(prompt) for layer in (processor.to_k_ip, processor.to_v_ip)]
    query, key, value, prompt_key, prompt_value = (
        part.unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in parts
    )
    key = torch.cat([processor.norm_k(key), processor.norm_ip_k(prompt_key)], dim=2)
    value, tokens = torch.cat([value, prompt_value], dim=2), hidden.shape[1]
    image, rest = slice(0, tokens), slice(tokens, key.shape[2])
    return Projections(processor.norm_q(query), key, value, image, rest, query.shape[-1] ** -0.5)
