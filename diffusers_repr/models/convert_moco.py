"""Checkpoints of MoCo v3's vision transformers, as their authors name them, to `ViTModel` of transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.hub.components import check_config
from diffusers_repr.models.checkpoint import block_numbers, check_tensor_names, check_weights, heads_of, some_of

# Width -> heads, of the networks in the authors' code (small, base) and in REPA's (large too).
ATTENTION_HEADS = {384: 12, 768: 12, 1024: 16}
_PREFIX, _OTHERS = "base_encoder.", ("momentum_encoder.", "predictor.", "base_encoder.head.")
# Released files of the large network have names in two blocks to which the block's number stuck (REPA mends them too).
_MISNAMED = {
    r"blocks\.13\.norm13\.": "blocks.13.norm1.",
    r"blocks\.13\.mlp\.fc13\.": "blocks.13.mlp.fc1.",
    r"blocks\.14\.norm14\.": "blocks.14.norm2.",
    r"blocks\.14\.mlp\.fc14\.": "blocks.14.mlp.fc2.",
}
_RANKS = {"patch_embed.proj.weight": 4, "pos_embed": 3, "cls_token": 3, "blocks.0.mlp.fc1.weight": 2}
_POSITION_TOLERANCE = 1e-3
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class ConvertedEncoder:
    """A checkpoint as a folder of transformers holds it.

    Attributes:
        config: `config.json`.
        weights: State dict, in the names that the Hub's ViT have.
        processor: `preprocessor_config.json`.
        notes: What was left out, a sentence each.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    processor: dict[str, Any]
    notes: tuple[str, ...] = ()


def is_moco_v3(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of MoCo v3's code.

    Args:
        weights: As `select_weights` gives them.
    """
    return any(key.startswith(_PREFIX) for key in weights)


def convert_moco_v3(weights: Mapping[str, Tensor], num_attention_heads: int | None = None) -> ConvertedEncoder:
    """From the authors' names to those of transformers; sizes are read from the shapes.

    The encoder that was trained is taken, as its authors evaluate it and REPA uses it, not its moving average. Its
    positions are a formula: those of the file are compared with it, and kept.

    Args:
        weights: State dict of MoCo v3 (Chen et al. 2021, arXiv 2104.02057), a vision transformer.
        num_attention_heads: Of widths that are none of the authors' (384, 768) or of REPA's (1024).

    Raises:
        ValueError: For a ResNet, a convolutional stem, names that are unknown or missing, numbers that are not finite,
            and positions of another formula.
    """
    own = {_mended(key): value for key, value in weights.items() if key.startswith(_PREFIX) and not _other(key)}
    if "patch_embed.proj.weight" not in own or "pos_embed" not in own:
        kind = "a convolutional stem" if "patch_embed.proj.0.weight" in own else "no vision transformer"
        raise ValueError(
            f"This checkpoint of MoCo v3 has {kind}; only its plain vision transformers (vit_small, vit_base, "
            f"vit_large) are read. It holds {some_of(own, 4)}."
        )
    check_weights(own, _RANKS)
    config = _config(own, num_attention_heads)
    check_config(config, "The checkpoint's network")
    names = _names(config)
    needed = {f"{name}.{end}" for name in names for end in ("weight", "bias")}
    missing = sorted(needed - own.keys() | {"cls_token"} - own.keys())
    sizes = {"num_layers": config["num_hidden_layers"], "hidden_size": config["hidden_size"]}
    check_tensor_names("MoCo v3", sizes, missing, sorted(own.keys() - needed - {"cls_token", "pos_embed"}))
    _check_shapes(own, config)
    _check_positions(own["pos_embed"], config["hidden_size"])
    side = {"height": config["image_size"], "width": config["image_size"]}
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": 2,  # bilinear, as torchvision's Resize, by which its authors evaluate
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    left = sorted({key.split(".")[0] for key in weights if not key.startswith(_PREFIX)})
    notes = ("Its projection head" + "".join(f", {name}" for name in left) + " were left out.",)
    return ConvertedEncoder(config, _renamed(own, names), processor, notes)


def _other(key: str) -> bool:
    return key.startswith(_OTHERS)


def _mended(key: str) -> str:
    key = key.removeprefix(_PREFIX)
    for wrong, right in _MISNAMED.items():
        key = re.sub(f"^{wrong}", right, key)
    return key


def _config(own: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    """`config.json`, as far as shapes tell."""
    width, channels, patch, _ = own["patch_embed.proj.weight"].shape
    side = math.isqrt(own["pos_embed"].shape[1] - 1)
    if side * side != own["pos_embed"].shape[1] - 1:
        raise ValueError(f"pos_embed has {own['pos_embed'].shape[1]} places, no square and one.")
    hidden = own["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in own else 4 * width
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": max(block_numbers(own, "blocks"), default=-1) + 1,
        "num_attention_heads": heads or heads_of(width, ATTENTION_HEADS),
        "intermediate_size": hidden,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": True,
    }


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """Their name -> that of the Hub's ViT, without the ending; `attn.qkv` is three there."""
    names = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    parts = {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.qkv": "attention.attention.qkv",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for at in range(config["num_hidden_layers"]):
        names |= {f"blocks.{at}.{old}": f"encoder.layer.{at}.{new}" for old, new in parts.items()}
    return names


def _renamed(own: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {"embeddings.cls_token": own["cls_token"], "embeddings.position_embeddings": own["pos_embed"]}
    for old, new in names.items():
        for end in ("weight", "bias"):
            value = own[f"{old}.{end}"]
            if not new.endswith("qkv"):
                renamed[f"{new}.{end}"] = value
                continue
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{new.removesuffix('qkv')}{name}.{end}"] = part
    return {name: value.clone().contiguous() for name, value in renamed.items()}


def _check_shapes(own: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    width, hidden, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    if width % heads:
        raise ValueError(f"num_attention_heads is {heads}, which does not divide the width, {width}.")
    ends = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm1": (width,), "norm2": (width,)}
    ends |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden), "norm": (width,)}
    for key, value in own.items():
        name, _, end = key.rpartition(".")
        wanted = ends.get(re.sub(r"^blocks\.\d+\.", "", name), (width,))
        if end == "bias":
            wanted = wanted[:1]
        elif key in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
            wanted = {"cls_token": (1, 1, width)}.get(key, tuple(value.shape))
        if tuple(value.shape) != wanted:
            raise ValueError(f"The checkpoint's tensor {key!r} is {tuple(value.shape)}; its others ask for {wanted}.")


def moco_positions(side: int, width: int) -> Tensor:
    """MoCo v3's fixed positions of a square grid, `(1, 1 + side * side, width)`; the class token has none.

    Quarters of the channels are sine and cosine of the row, then of the column, times `10000^(-i / (width / 4))`.
    """
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    places = torch.cat([rows, columns], 2).flatten(0, 1)
    return torch.cat([places.new_zeros(1, 1, width), places[None]], 1).float()


def _check_positions(table: Tensor, width: int) -> None:
    if width % 4 or table.shape[0] != 1 or table.shape[2] != width:
        raise ValueError(
            f"pos_embed is {tuple(table.shape)}; (1, places, {width}) is needed, the width a multiple of 4."
        )
    away = float((table.float() - moco_positions(math.isqrt(table.shape[1] - 1), width)).abs().max())
    if not away <= _POSITION_TOLERANCE:
        raise ValueError(
            f"pos_embed is not the fixed sin-cos grid of MoCo v3 (it differs by {away:.3g}); this is another network."
        )


__all__ = ["ATTENTION_HEADS", "ConvertedEncoder", "convert_moco_v3", "is_moco_v3", "moco_positions"]
