"""MAGE's networks, as their authors name them, to `MaskedTokenModel`: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.hub.components import check_config
from diffusers_repr.models.checkpoint import block_numbers, check_tensor_names, check_weights, heads_of, some_of

_WORDS, _PLACES = "token_emb.word_embeddings.weight", "token_emb.position_embeddings.weight"
_HEADS = {256: 4, 768: 12, 1024: 16, 1280: 16}  # of the encoder, by its width
_CLASSES = 1000  # ids between those of the tokenizer and the mask's, of which one is the class token's
_FAKE_CLASS = 76  # the class token's id is so many behind those of the tokenizer
_RANKS = {
    _WORDS: 2,
    _PLACES: 2,
    "decoder_embed.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "latent_prior_proj.weight": 2,
}
_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attn.to_qkv",
    "attn.proj": "attn.to_out.0",
    "norm2": "norm2",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_ENDS = {
    "token_emb.LayerNorm": "norm_in",
    "norm": "norm",
    "decoder_embed": "decoder_embed",
    "decoder_norm": "decoder_norm",
    "mlm_layer.fc": "head.proj",
    "mlm_layer.ln": "head.norm",
}
# In the authors' module and not used: of MAE, and fixed positions; the tokenizer and RCG's encoder are other networks.
_UNUSED = ("cls_token", "pos_embed", "patch_embed.", "mask_token", "decoder_pos_embed", "decoder_pred.",
           "token_emb.position_ids")  # fmt: skip
_TOKENIZER = "vqgan."
_OTHERS = (_TOKENIZER, "pretrained_encoder.", "rdm_sampler.")


@dataclass(frozen=True)
class ConvertedMAGE:
    """A checkpoint in the form of this package.

    Attributes:
        config: Arguments of `MaskedTokenModel`.
        weights: Its state dict.
        notes: What was left out or chosen, a sentence each.
        tokenizer: Arguments and state dict of the `MaskGITVQModel` in the file; None: it has none.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    tokenizer: tuple[dict[str, Any], dict[str, Tensor]] | None = None


def is_mage(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of MAGE, or of RCG's token generator.

    Args:
        weights: As `select_weights` gives them.
    """
    return _WORDS in weights and "mlm_layer.fc.weight" in weights


def convert_mage(weights: Mapping[str, Tensor], overrides: Mapping[str, Any] | None = None) -> ConvertedMAGE:
    """From the authors' names to ours; sizes are read from the shapes.

    Of the embeddings those of the tokenizer's ids, of the class token and of the mask are kept.

    Args:
        weights: State dict of MAGE (arXiv 2211.09117), or of RCG's generator with vectors (arXiv 2312.03701).
        overrides: `num_attention_heads` and `decoder_num_attention_heads`, which shapes do not tell.

    Raises:
        ValueError: For names that are unknown or missing, shapes that do not fit, numbers that are not finite, and a
            network that is conditioned on classes.
    """
    if "class_emb.weight" in weights:
        raise ValueError("This MAGE is conditioned on classes; MaskedTokenModel takes vectors or nothing.")
    own = {key: value for key, value in weights.items() if not key.startswith(_OTHERS)}
    vectors = "latent_prior_proj.weight" in own
    unused = _UNUSED if vectors else (*_UNUSED, "fake_latent")
    own = {k: v for k, v in own.items() if k == "decoder_pos_embed_learned" or not k.startswith(unused)}
    check_weights(own, _RANKS)
    config = _sizes(own, overrides or {})
    check_config(config, "The checkpoint's network")
    names = dict(_ENDS)
    for stack, depth in (("blocks", "num_layers"), ("decoder_blocks", "decoder_num_layers")):
        for at in range(config[depth]):
            names |= {f"{stack}.{at}.{old}": f"{stack}.{at}.{new}" for old, new in _BLOCK.items()}
    names |= {"latent_prior_proj": "condition_embed.proj"} if vectors else {}
    single = {_WORDS, _PLACES, "decoder_pos_embed_learned", "mlm_layer.bias", *(["fake_latent"] if vectors else [])}
    needed = {f"{name}.{end}" for name in names for end in ("weight", "bias")} | single
    check_tensor_names("MAGE", config, sorted(needed - own.keys()), sorted(own.keys() - needed))
    left = sorted({key.split(".")[0] for key in weights if key.startswith(_OTHERS[1:])})
    notes = [f"{some_of(left)} of the file: other networks, left out."] if left else []
    tokenizer = _tokenizer(weights, config)
    return ConvertedMAGE(config, _renamed(own, names, config, vectors), tuple(notes), tokenizer)


def _tokenizer(
    weights: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The tokenizer of a file, whose weights have our names already; sizes are read from the shapes."""
    held = {k.removeprefix(_TOKENIZER): v for k, v in weights.items() if k.startswith(_TOKENIZER)}
    if not held:
        return None
    check_weights(held, {"encoder.conv_in.weight": 4, "encoder.conv_out.weight": 4, "quantize.embedding.weight": 2})
    needed = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quantize.embedding.weight",
              "encoder.down.0.block.0.conv1.weight")  # fmt: skip
    if any(name not in held for name in needed):
        lacks = some_of(name for name in needed if name not in held)
        raise ValueError(f"The tokenizer (vqgan) in this checkpoint of MAGE lacks {lacks}.")
    levels = max(block_numbers(held, "encoder.down")) + 1
    first = [held.get(f"encoder.down.{at}.block.0.conv1.weight") for at in range(levels)]
    if any(value is None or value.ndim != 4 for value in first):
        raise ValueError(f"The tokenizer (vqgan) in this checkpoint of MAGE lacks levels; it has {levels}.")
    widths = [value.shape[0] for value in first if value is not None]
    codes, width = held["quantize.embedding.weight"].shape
    made = {
        "in_channels": held["encoder.conv_in.weight"].shape[1],
        "block_out_channels": widths,
        "layers_per_block": max(block_numbers(held, "encoder.down.0.block")) + 1,
        "latent_channels": width,
        "num_vq_embeddings": codes,
        "sample_size": config["sample_size"] * 2 ** (levels - 1),
        "norm_num_groups": min(32, *widths),
    }
    check_config(made, "The checkpoint's tokenizer")
    if codes != config["vocab_size"]:
        raise ValueError(f"The tokenizer (vqgan) has {codes} codes, and the network knows {config['vocab_size']}.")
    return made, held


def _sizes(own: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The config, as far as shapes tell."""
    needed = (_WORDS, _PLACES, "decoder_embed.weight", "blocks.0.mlp.fc1.weight", "mlm_layer.bias")
    encoder, decoder = block_numbers(own, "blocks"), block_numbers(own, "decoder_blocks")
    if not encoder or not decoder or any(name not in own for name in needed):
        raise ValueError(f"This is no checkpoint of MAGE: it lacks {some_of(n for n in needed if n not in own)}.")
    rows, width = own[_WORDS].shape
    places, inner = own[_PLACES].shape[0] - 1, own["decoder_embed.weight"].shape[0]
    side = math.isqrt(places)
    vocabulary = rows - _CLASSES - 1
    if vocabulary < 1 or side * side != places:
        raise ValueError(
            f"MAGE has embeddings of its tokens, {_CLASSES} classes and a mask, and tokens of a square; got {rows} "
            f"embeddings and {places} tokens."
        )
    vector = own.get("latent_prior_proj.weight")
    return {
        "vocab_size": vocabulary,
        "sample_size": side,
        "hidden_size": width,
        "num_layers": max(encoder) + 1,
        "num_attention_heads": overrides.get("num_attention_heads") or heads_of(width, _HEADS),
        "decoder_hidden_size": inner,
        "decoder_num_layers": max(decoder) + 1,
        "decoder_num_attention_heads": 4 if width == 256 else 16,
        "mlp_ratio": own["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "condition_dim": 0 if vector is None else vector.shape[1],
        **overrides,
    }


def _renamed(
    own: Mapping[str, Tensor], names: Mapping[str, str], config: Mapping[str, Any], vectors: bool
) -> dict[str, Tensor]:
    size = config["vocab_size"]
    words = own[_WORDS]
    # As many ids as the tokenizer has, then the class token's and the mask's, which is the last.
    made = {
        "token_embed.weight": torch.cat([words[:size], words[size + _FAKE_CLASS][None], words[-1:]]),
        "positions": own[_PLACES][None].clone(),
        "decoder_positions": own["decoder_pos_embed_learned"].clone(),
        "logit_bias": own["mlm_layer.bias"].flatten()[:size].clone(),
    }
    for old, new in names.items():
        for end in ("weight", "bias"):
            value = own[f"{old}.{end}"]
            if not new.endswith("to_qkv"):
                made[f"{new}.{end}"] = value
                continue
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                made[f"{new.removesuffix('qkv')}{letter}.{end}"] = part.clone()
    return made | ({"condition_embed.null": own["fake_latent"].flatten().clone()} if vectors else {})


__all__ = ["ConvertedMAGE", "convert_mage", "is_mage"]
