"""Checkpoints of U-ViT, in their authors' names, to `UViTTransformer2DModel`: pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffusers_repr.hub.components import check_config
from diffusers_repr.models.checkpoint import block_numbers, check_tensor_names, check_weights, heads_of, some_of
from diffusers_repr.models.convert import ConvertedCheckpoint

Process = Literal["continuous", "discrete"]
# Width -> heads, of the published networks.
ATTENTION_HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}
_SIGNS = ("mid_block.attn.qkv.weight", "decoder_pred.weight", "pos_embed")
# Tensors from which sizes are read -> their dimensions.
_RANKS = {
    "patch_embed.proj.weight": 4,
    "decoder_pred.weight": 2,
    "pos_embed": 3,
    "label_emb.weight": 2,
    "context_embed.weight": 2,
    "mid_block.mlp.fc1.weight": 2,
}
_IMAGENET = 1000  # classes; a table of as many has no null class


def is_uvit(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of U-ViT's code.

    Args:
        weights: As `select_weights` gives them.
    """
    return all(name in weights for name in _SIGNS)


def convert_uvit(
    weights: Mapping[str, Tensor], process: Process | None = None, overrides: Mapping[str, Any] | None = None
) -> ConvertedCheckpoint:
    """From the authors' names to ours; sizes are read from the shapes.

    Args:
        weights: State dict of U-ViT (arXiv 2209.12152): without classes, with classes, or with text.
        process: What it was trained on: `continuous`, the variance preserving SDE with beta from 0.1 to 20 (pixels,
            L/2 and L/4), or `discrete`, the thousand steps of Stable Diffusion (H/2, H/4, text). None: by its size.
        overrides: Arguments of `UViTTransformer2DModel` that shapes do not tell, or tell wrong: `num_attention_heads`
            for widths of no named size, `sample_size` of images that are no squares, `num_classes`.

    Returns:
        With the arguments of a `DDIMScheduler` as `scheduler`.

    Raises:
        ValueError: For names that are unknown or missing, numbers that are not finite, and what cannot be told.
    """
    if process is not None and process not in get_args(Process):
        raise ValueError(f"process is one of {', '.join(get_args(Process))}, or None; got {process!r}.")
    check_weights(weights, _RANKS)
    overrides = dict(overrides or {})
    config = _sizes(weights, overrides)
    names = _names(config)
    needed = {f"{old}.{end}" for old, ends in names.items() for end in ends} | {"pos_embed"}
    table = {"label_emb.weight"} if config["num_classes"] else set()
    missing, unknown = sorted(needed - set(weights)), [key for key in weights if key not in needed | table]
    check_tensor_names("U-ViT", config, missing, unknown)
    notes = []
    if process is None:
        latent = config["in_channels"] != 3
        process = "discrete" if latent and (config["hidden_size"] == 1152 or config["text_dim"]) else "continuous"
        notes.append(
            f"Taken for {process} time by its size, as the published networks are (--process says otherwise)."
        )
    config["time_offset"] = 1.0 if process == "discrete" else 0.0
    renamed = {"positions": _positions(weights["pos_embed"], config)}
    for old, ends in names.items():
        for end in ends:
            value, new = weights[f"{old}.{end}"], names[old][end]
            if not new.endswith(f"to_qkv.{end}"):
                renamed[new] = value
                continue
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[new.replace("to_qkv", f"to_{letter}")] = part.clone()
    if config["text_dim"]:
        notes.append(
            "It takes text tokens (encoder_hidden_states), which SiTPipeline does not give: call the network."
        )
    if table:
        renamed["label_embed.weight"], note = _labels(weights["label_emb.weight"], config["num_classes"])
        notes += note
    config |= overrides
    return ConvertedCheckpoint(
        config, renamed, architecture="uvit", notes=tuple(notes), scheduler=scheduler_arguments(process)
    )


def scheduler_arguments(process: Process) -> dict[str, Any]:
    """Arguments of a diffusers scheduler with exactly the process that a published U-ViT was trained on.

    `continuous`: timestep i of 0 to 999 is t = i / 999 of `alpha_bar(t) = exp(-0.1 t - 9.95 t^2)`, and the network is
    told i, as in training. There t = 0 is the clean image, which no scheduler has as a step; timestep 0 is t = 1e-4.
    `discrete`: the betas of Stable Diffusion; the network is told the number of steps, i + 1 (`time_offset`).

    Args:
        process: Which of them.
    """
    common = {"num_train_timesteps": 1000, "clip_sample": False, "prediction_type": "epsilon"}
    if process == "discrete":
        return {**common, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                "set_alpha_to_one": True}  # fmt: skip
    times = torch.linspace(0, 1, 1000, dtype=torch.float64)
    times[0] = 1e-4
    logs = -0.1 * times - 9.95 * times**2
    betas = -torch.expm1(torch.cat([logs[:1], logs.diff()]))
    return {**common, "trained_betas": betas.tolist(), "set_alpha_to_one": True}


def _sizes(weights: Mapping[str, Tensor], overrides: dict[str, Any]) -> dict[str, Any]:
    """The config, as far as shapes and overrides tell."""
    needed = ("patch_embed.proj.weight", "decoder_pred.weight", "mid_block.mlp.fc1.weight", "pos_embed")
    if any(name not in weights for name in needed):
        raise ValueError(
            f"This is no checkpoint of U-ViT: it lacks {some_of(n for n in needed if n not in weights)}. It holds "
            f"{some_of(weights, 4)}."
        )
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    half = max(block_numbers(weights, "in_blocks"), default=-1) + 1
    table, text = weights.get("label_emb.weight"), weights.get("context_embed.weight")
    rows = 0 if table is None else len(table)
    size = overrides.get("sample_size")
    sides = (size, size) if isinstance(size, int) else size
    places = weights["pos_embed"].shape[-2]
    image = None if sides is None else (sides[0] // patch) * (sides[1] // patch)
    if image is None:
        # time, and a class or 77 text tokens of CLIP
        image = places - 1 - (table is not None) - (77 if text is not None else 0)
        side = math.isqrt(max(image, 0))
        if side * side != image or not image:
            raise ValueError(
                f"pos_embed has {places} places, not those of a square; give the size of x_0: sample_size."
            )
        size = side * patch
    config = {
        "sample_size": size,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": 2 * half + 1,
        "hidden_size": width,
        "num_attention_heads": overrides.get("num_attention_heads") or heads_of(width, ATTENTION_HEADS),
        "mlp_ratio": weights["mid_block.mlp.fc1.weight"].shape[0] / width,
        "attention_bias": "mid_block.attn.qkv.bias" in weights,
        "num_classes": overrides.get("num_classes", rows if rows in (0, _IMAGENET) else rows - 1),
        "text_dim": None if text is None else text.shape[1],
        "time_mlp": "time_embed.0.weight" in weights,
        "final_conv": "final_layer.weight" in weights,
    }
    if text is not None:
        config["text_tokens"] = places - 1 - image
    check_config(config, "The checkpoint's network")
    return config


def _names(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Their name without its ending -> each ending and our name; `attn.qkv` is three of ours."""
    names = {"patch_embed.proj": "patch_embed", "norm": "norm_out", "decoder_pred": "proj_out"}
    if config["final_conv"]:
        names["final_layer"] = "conv_out"
    if config["time_mlp"]:
        names |= {"time_embed.0": "time_embed.linear_1", "time_embed.2": "time_embed.linear_2"}
    if config["text_dim"]:
        names["context_embed"] = "text_embed"
    parts = {
        "norm1": "norm1",
        "attn.qkv": "attn.to_qkv",
        "attn.proj": "attn.to_out.0",
        "norm2": "norm2",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    half = config["num_layers"] // 2
    for at in range(config["num_layers"]):
        old = f"in_blocks.{at}" if at < half else f"out_blocks.{at - half - 1}" if at > half else "mid_block"
        joined = {"skip_linear": "skip_proj"} if at > half else {}
        names |= {f"{old}.{theirs}": f"blocks.{at}.{ours}" for theirs, ours in {**parts, **joined}.items()}
    plain = ("weight",) if not config["attention_bias"] else ("weight", "bias")
    return {
        old: {end: f"{new}.{end}" for end in (plain if old.endswith("attn.qkv") else ("weight", "bias"))}
        for old, new in names.items()
    }


def _positions(given: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Theirs are class, time, image; ours time, class, image. With text both have the time first."""
    if not config["num_classes"]:
        return given
    return torch.cat([given[:, 1:2], given[:, :1], given[:, 2:]], dim=1)


def _labels(table: Tensor, classes: int) -> tuple[Tensor, list[str]]:
    """The table with a row for the null class, and a note where it had none."""
    if len(table) == classes + 1:
        return table, []
    if len(table) != classes:
        raise ValueError(f"label_emb has {len(table)} rows; {classes} classes have as many, or one more for the null.")
    note = (
        f"It was trained on {classes} classes without a null class: that row is the mean of the others, and guidance "
        "away from it is not what the paper does."
    )
    return torch.cat([table, table.mean(0, keepdim=True)]), [note]


__all__ = ["ATTENTION_HEADS", "Process", "convert_uvit", "is_uvit", "scheduler_arguments"]
