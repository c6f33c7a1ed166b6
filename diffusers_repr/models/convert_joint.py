"""Checkpoints of HybViT and GenViT, in their authors' names, to `JointViTModel`: pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusers_repr.hub.components import check_config
from diffusers_repr.models.checkpoint import block_numbers, check_tensor_names, check_weights, some_of
from diffusers_repr.models.convert import ConvertedCheckpoint

# Where the authors' diffusion module, whose other tensors are tables of the schedule, keeps the network.
_NETWORK = "denoise_fn."
# Tensors from which sizes are read -> their dimensions.
_RANKS = {"to_patch_embedding.1.weight": 2, "pos_embedding": 3, "transformer.layers.0.1.fn.net.0.weight": 2,
          "mlp_head.1.weight": 2}  # fmt: skip
_SIGNS = ("to_patch_embedding.1.weight", "recon_head.0.weight", "time_mlp.1.weight")
# An average of a constant in float32 drifts by less.
_SCHEDULE_TOLERANCE = 1e-3


def is_joint_vit(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of HybViT's code.

    Args:
        weights: As `select_weights` gives them.
    """
    return any(_bare(key) in _SIGNS for key in weights)


def convert_joint_vit(
    weights: Mapping[str, Tensor], overrides: Mapping[str, Any] | None = None
) -> ConvertedCheckpoint:
    """From the authors' names to ours; sizes are read from the shapes.

    Args:
        weights: State dict of HybViT or GenViT (arXiv 2208.07791), of the network alone or of the diffusion module
            around it, whose schedule is then compared with the cosine one.
        overrides: Arguments of `JointViTModel` that shapes do not tell: `num_attention_heads` (the code's own choice
            for the width is taken), `modulate_mlp` (the code's default is taken, on), `sample_size` where it is no
            square, `id2label`.

    Raises:
        ValueError: For names that are unknown or missing, numbers that are not finite, another schedule, and what
            cannot be told.
    """
    overrides = dict(overrides or {})
    wrapped = any(key.startswith(_NETWORK) for key in weights)
    network = {_bare(key): value for key, value in weights.items() if not wrapped or key.startswith(_NETWORK)}
    check_weights(network, _RANKS)
    config = _sizes(network, overrides)
    check_config(config, "The checkpoint's network")
    _check_names(network, config)
    notes = []
    if "num_attention_heads" not in overrides:
        notes.append(
            f"Shapes do not tell the heads: {config['num_attention_heads']}, as the code has it at this width "
            "(--model_config '{\"num_attention_heads\": ...}' says otherwise)."
        )
    if "modulate_mlp" not in overrides:
        notes.append(
            "Taken as trained with the code's default --ffnt 1: the time acts before the MLPs too (--model_config "
            "'{\"modulate_mlp\": false}' says otherwise)."
        )
    scheduler = {"beta_schedule": "squaredcos_cap_v2", **_timesteps(weights.get("betas"))}
    return ConvertedCheckpoint(
        config | overrides,
        _renamed(network, config),
        architecture="hybvit",
        notes=tuple(notes),
        scheduler=scheduler,
    )


def _bare(key: str) -> str:
    return key.removeprefix(_NETWORK).removeprefix("module.")


def _sizes(weights: Mapping[str, Tensor], overrides: dict[str, Any]) -> dict[str, Any]:
    """The config, as far as shapes and overrides tell."""
    blocks = block_numbers(weights, "transformer.layers")
    needed = (*_SIGNS, "pos_embedding", "mlp_head.1.weight", "transformer.layers.0.1.fn.net.0.weight")
    if not blocks or any(name not in weights for name in needed):
        raise ValueError(
            f"This is no checkpoint of HybViT: it lacks {some_of(n for n in needed if n not in weights)}. It holds "
            f"{some_of(weights, 4)}."
        )
    width, values = weights["to_patch_embedding.1.weight"].shape
    channels, patch = _patch(values, overrides.get("in_channels"))
    return {
        "sample_size": overrides.get("sample_size") or _side(weights["pos_embedding"].shape[1] - 1) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": max(blocks) + 1,
        "hidden_size": width,
        "num_attention_heads": overrides.get("num_attention_heads", 12 if width % 12 == 0 else 8),
        "mlp_ratio": weights["transformer.layers.0.1.fn.net.0.weight"].shape[0] / width,
        "num_classes": weights["mlp_head.1.weight"].shape[0],
    }


def _patch(values: int, channels: int | None) -> tuple[int, int]:
    """Channels and side of a patch of so many values; a number is never both p p and 3 p p."""
    for count in (1, 3) if channels is None else (channels,):
        side = math.isqrt(values // count)
        if side * side * count == values:
            return count, side
    raise ValueError(f"Patches of {values} values are no squares of 1 or 3 channels; give in_channels.")


def _side(patches: int) -> int:
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"pos_embedding has {patches} patches, no square; give the size of the image: sample_size.")
    return side


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """Their name -> ours, without the ending; `attn.fn.to_qkv` is three of ours."""
    names = {
        "to_patch_embedding.1": "patch_embed",
        "time_mlp.1": "time_embed.linear_1",
        "time_mlp.3": "time_embed.linear_2",
        "mlp_head.0": "classifier.0",
        "mlp_head.1": "classifier.1",
        "recon_head.0": "proj_out",
    }
    for at in range(config["num_layers"]):
        ours, theirs = f"blocks.{at}", f"transformer.layers.{at}"
        names |= {
            f"transformer.time_layers.{at}.1": f"{ours}.modulation",
            f"{theirs}.0.norm": f"{ours}.norm1",
            f"{theirs}.0.fn.to_out.0": f"{ours}.attn.to_out.0",
            f"{theirs}.1.norm": f"{ours}.norm2",
            f"{theirs}.1.fn.net.0": f"{ours}.ff.net.0.proj",
            f"{theirs}.1.fn.net.3": f"{ours}.ff.net.2",
        }
    return names


def _check_names(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    joined = {f"transformer.layers.{at}.0.fn.to_qkv.weight" for at in range(config["num_layers"])}
    needed = {f"{name}.{end}" for name in _names(config) for end in ("weight", "bias")}
    needed |= joined | {"cls_token", "pos_embedding"}
    missing, unknown = sorted(needed - set(weights)), sorted(set(weights) - needed)
    remark = " Its variants with shifted patches (--SPT) and local attention (--LSA) have no counterpart here."
    check_tensor_names("HybViT", config, missing, unknown, remark)
    width = config["hidden_size"]
    wrong = [key for key in sorted(joined) if tuple(weights[key].shape) != (3 * width, width)]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is {tuple(weights[wrong[0]].shape)}; heads that make up the width have {(3 * width, width)}."
        )


def _renamed(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed = {"class_token": weights["cls_token"], "positions": weights["pos_embedding"]}
    for old, new in _names(config).items():
        renamed |= {f"{new}.{end}": weights[f"{old}.{end}"] for end in ("weight", "bias")}
    for at in range(config["num_layers"]):
        parts = weights[f"transformer.layers.{at}.0.fn.to_qkv.weight"].chunk(3, dim=0)
        renamed |= {
            f"blocks.{at}.attn.to_{letter}.weight": part.clone() for letter, part in zip("qkv", parts, strict=True)
        }
    return renamed


def _timesteps(betas: Tensor | None) -> dict[str, int]:
    if betas is None:
        return {}
    wanted = DDPMScheduler(len(betas), beta_schedule="squaredcos_cap_v2").betas
    if not torch.allclose(betas.float(), wanted, rtol=_SCHEDULE_TOLERANCE, atol=_SCHEDULE_TOLERANCE):
        raise ValueError(
            f"The checkpoint's {len(betas)} betas are not those of the cosine schedule, the only one that the code of "
            "HybViT trains with; give its network alone, without the diffusion module around it."
        )
    return {"num_train_timesteps": len(betas)}


__all__ = ["convert_joint_vit", "is_joint_vit"]
