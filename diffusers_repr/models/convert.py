"""Checkpoints of DiT, SiT, REPA and REG, as their authors name them, to `SiTTransformer2DModel`: pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from diffusers_repr.hub.components import check_config
from diffusers_repr.models.checkpoint import block_numbers, check_tensor_names, check_weights, heads_of, some_of
from diffusers_repr.models.class_token import without_class_token
from diffusers_repr.models.convert_relatives import RelativeParts, split_relatives
from diffusers_repr.models.sit_blocks import TIME_CHANNELS, grid_positions

Architecture = Literal["sit", "dit", "hybvit", "uvit"]

ARCHITECTURES: tuple[Architecture, ...] = ("sit", "dit")
# Width -> heads, of the named sizes.
ATTENTION_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# An average of a constant in float32 drifts by less; an unlike table differs by about 1.
_POSITION_TOLERANCE = 5e-3


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint in the form of this package.

    Attributes:
        config: Arguments of `SiTTransformer2DModel`, `JointViTModel` or `UViTTransformer2DModel`.
        transformer: Its state dict.
        projectors: State dict of each projector of REPA, weights and biases of the layers `0`, `2` and `4` of a
            sequence (iREPA: `RelativeParts.projectors`); none for the others.
        class_token: State dict of the `ClassTokenHead` of a REG; None for the others.
        architecture: `sit` predicts a velocity from t in [0, 1], `dit` noise from whole timesteps 0 to 999, `hybvit`
            noise and classes, `uvit` noise.
        notes: What was left out or assumed, a sentence each.
        scheduler: Arguments of its `DDPMScheduler`, of a `hybvit`, or of its `DDIMScheduler`, of a `uvit`.
        relatives: What iREPA, SRA and REPA-E have beside it.
    """

    config: dict[str, Any]
    transformer: dict[str, Tensor]
    projectors: list[dict[str, Tensor]] = field(default_factory=list)
    class_token: dict[str, Tensor] | None = None
    architecture: Architecture = "sit"
    notes: tuple[str, ...] = ()
    scheduler: dict[str, Any] = field(default_factory=dict)
    relatives: RelativeParts = field(default_factory=RelativeParts)


def convert_state_dict(
    weights: Mapping[str, Tensor], architecture: Architecture | None = None, overrides: Mapping[str, Any] | None = None
) -> ConvertedCheckpoint:
    """From the authors' names to ours; sizes are read from the shapes.

    The learned variances that SiT's networks compute and throw away are left out of their output layer. Positions are
    a formula (`grid_positions`): those of the file are compared with it, not taken.

    Args:
        weights: State dict of DiT (arXiv 2212.09748), SiT (arXiv 2401.08740), REPA (arXiv 2410.06940) or one of its
            relatives: REG (arXiv 2507.01467), iREPA (2512.10794), SRA (2505.02831), REPA-E (2504.10483).
        architecture: `sit` or `dit`. Their names and shapes are the same; None is for files that tell: those with
            projectors and those without a learned variance are `sit`, one of SRA with a learned variance is `dit`.
        overrides: Arguments of `SiTTransformer2DModel` that shapes do not tell, or tell wrong: `num_attention_heads`
            for widths of no named size, `class_dropout_prob`.

    Raises:
        ValueError: For names that are unknown or missing, numbers that are not finite, positions that are no sin-cos
            grid, and what cannot be told.
    """
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is one of {', '.join(ARCHITECTURES)}, or None; got {architecture!r}.")
    weights, notes = _present_names(weights)
    projected = any(key.startswith("projectors.") for key in weights)
    weights, idle = _without_idle_projectors(weights)
    notes += idle
    weights, relatives = split_relatives(weights)
    projected = projected or bool(relatives.projectors) or relatives.self_head is not None
    matrices = [key for key in weights if key.startswith("projectors.") and key.endswith(".weight")]
    check_weights(weights, _RANKS | dict.fromkeys(matrices, 2))
    weights, class_token = without_class_token(weights)
    config = _sizes(weights, dict(overrides or {}))
    check_config(config, "The checkpoint's network")
    _check_names(weights, config)
    if "pos_embed" in weights:
        _check_positions(weights["pos_embed"], config)
    outputs = weights["final_layer.linear.weight"].shape[0] // config["patch_size"] ** 2
    variance = outputs == 2 * config["in_channels"]
    projectors = _projectors(weights) or relatives.projectors
    if architecture is None and variance and relatives.self_head is not None:
        architecture = "dit"  # SRA's SiT predicts no variance
    if architecture is None:
        if variance and not projected:
            raise ValueError(
                "DiT and SiT checkpoints with a learned variance have the same names and shapes, but other timesteps "
                "and outputs: say which it is, --architecture dit or sit."
            )
        architecture = "sit"
        if not projected:
            notes.append("Taken for a SiT: it predicts no variance (--architecture dit says otherwise).")
    config |= {"out_channels": outputs, "time_divisor": 1.0 if architecture == "dit" else 1000.0}
    renamed = _renamed(weights, config)
    if architecture == "sit" and variance:
        config["out_channels"] = config["in_channels"]
        for name in ("proj_out.weight", "proj_out.bias"):
            # rows are (p, p, channels)
            rows = renamed[name].unflatten(0, (-1, outputs))
            renamed[name] = rows[:, : config["in_channels"]].flatten(0, 1).clone()
        notes.append("The learned variance, which SiT computes and throws away, was left out.")
    config |= overrides or {}
    return ConvertedCheckpoint(
        config, renamed, projectors, class_token, architecture, tuple(notes), relatives=relatives
    )


def _present_names(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Early checkpoints of REPA count blocks behind the aligned one anew, as `decoder_blocks`; and a note of it."""
    behind = block_numbers(weights, "decoder_blocks")
    if not behind:
        return dict(weights), []
    depth = max(block_numbers(weights, "blocks"), default=-1) + 1

    def present(key: str) -> str:  # a key without a number stays, and is told as unknown
        return re.sub(r"^decoder_blocks\.(\d+)(?=\.)", lambda found: f"blocks.{int(found[1]) + depth}", key)

    note = f"An early checkpoint of REPA: its decoder_blocks are the blocks from {depth} on."
    return {present(key): value for key, value in weights.items()}, [note]


def _without_idle_projectors(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Leave out projectors to no channel, as REPA's code makes for its baseline (`z_dims=[0]`); and a note of it."""
    last = re.compile(r"(projectors\.\d{1,3}\.)4\.(weight|bias)")
    ends = [(match[1], value) for key, value in weights.items() if (match := last.fullmatch(key))]
    idle = tuple(sorted({prefix for prefix, value in ends if not value.shape[0]}))
    if not idle:
        return dict(weights), []
    note = "A baseline of REPA: its projector, which gives no channel, was left out."
    return {key: value for key, value in weights.items() if not key.startswith(idle)}, [note]


# Tensors from which sizes are read -> their dimensions.
_RANKS = {
    "x_embedder.proj.weight": 4,
    "final_layer.linear.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.attn.q_norm.weight": 1,
    "blocks.0.mlp.fc1.weight": 2,
    "t_embedder.mlp.0.weight": 2,
    "y_embedder.embedding_table.weight": 2,
    "pos_embed": 3,
}


def _sizes(weights: Mapping[str, Tensor], overrides: dict[str, Any]) -> dict[str, Any]:
    """The config, as far as shapes and overrides tell."""
    blocks = block_numbers(weights, "blocks")
    needed = ("x_embedder.proj.weight", "final_layer.linear.weight", "blocks.0.attn.qkv.weight")
    if not blocks or any(name not in weights for name in needed):
        raise ValueError(
            f"This is no checkpoint of DiT, SiT or REPA: it lacks {some_of(n for n in needed if n not in weights)}. "
            f"It holds {some_of(weights, 4)}."
        )
    width, channels, patch, _ = weights["x_embedder.proj.weight"].shape
    qk_norm = "blocks.0.attn.q_norm.weight" in weights
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0] if "blocks.0.mlp.fc1.weight" in weights else 4 * width
    table = weights.get("y_embedder.embedding_table.weight")
    return {
        "sample_size": overrides.get("sample_size") or _sample_size(weights.get("pos_embed"), patch),
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": max(blocks) + 1,
        "hidden_size": width,
        "num_attention_heads": overrides.get("num_attention_heads") or _heads(weights, width, qk_norm),
        "mlp_ratio": hidden / width,
        "num_classes": 0 if table is None else table.shape[0] - 1,
        "qk_norm": qk_norm,
    }


def _sample_size(positions: Tensor | None, patch: int) -> int:
    if positions is None:
        raise ValueError("The checkpoint has no pos_embed to read the size of x_0 from; give it: sample_size.")
    side = math.isqrt(positions.shape[-2])
    if side * side != positions.shape[-2]:
        raise ValueError(f"pos_embed has {positions.shape[-2]} places, no square; give the size of x_0: sample_size.")
    return side * patch


def _heads(weights: Mapping[str, Tensor], width: int, qk_norm: bool) -> int:
    if qk_norm:
        return width // weights["blocks.0.attn.q_norm.weight"].shape[0]
    return heads_of(width, ATTENTION_HEADS)


def _names(config: Mapping[str, Any]) -> dict[str, str]:
    """Their name -> ours, without the ending; `attn.qkv` is three of ours."""
    names = {
        "x_embedder.proj": "patch_embed",
        "t_embedder.mlp.0": "time_embed.linear_1",
        "t_embedder.mlp.2": "time_embed.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.modulation",
    }
    parts = {
        "attn.qkv": "attn.to_qkv",
        "attn.proj": "attn.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "modulation",
    }
    if config["qk_norm"]:
        parts |= {"attn.q_norm": "attn.norm_q", "attn.k_norm": "attn.norm_k"}
    for at in range(config["num_layers"]):
        names |= {f"blocks.{at}.{old}": f"blocks.{at}.{new}" for old, new in parts.items()}
    return names


def _check_names(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    needed = {f"{name}.{end}" for name in _names(config) for end in ("weight", "bias")}
    optional = {"pos_embed"}
    if config["num_classes"]:
        optional.add("y_embedder.embedding_table.weight")
    missing = sorted(needed - set(weights))
    unknown = [
        key
        for key in weights
        if key not in needed | optional and not re.fullmatch(r"projectors\.\d{1,3}\.\d\.\w+", key)
    ]
    check_tensor_names("DiT, SiT or REPA", config, missing, unknown)
    time = weights["t_embedder.mlp.0.weight"].shape[1]
    if time != TIME_CHANNELS:
        raise ValueError(f"t_embedder takes {time} channels; those of DiT, SiT and REPA take {TIME_CHANNELS}.")


def _check_positions(positions: Tensor, config: Mapping[str, Any]) -> None:
    size, patch = config["sample_size"], config["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    wanted = grid_positions(height // patch, width // patch, config["hidden_size"])
    given = positions.float().reshape(1, -1, positions.shape[-1])
    if given.shape != wanted.shape:
        raise ValueError(
            f"pos_embed is {tuple(positions.shape)}; sample_size {height} x {width} at patch {patch} makes "
            f"{tuple(wanted.shape)}."
        )
    away = float((given - wanted).abs().max())
    if not away <= _POSITION_TOLERANCE:
        raise ValueError(
            f"pos_embed is not the fixed sin-cos grid of DiT, SiT and REPA (it differs by {away:.3g}); positions that "
            "were learned, or of another formula, do not fit SiTTransformer2DModel."
        )


def _projectors(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in weights.items():
        if key.startswith("projectors."):
            _, at, rest = key.split(".", 2)
            found.setdefault(int(at), {})[rest] = value
    needed = {f"{layer}.{end}" for layer in (0, 2, 4) for end in ("weight", "bias")}
    for number, part in found.items():
        if set(part) != needed:
            raise ValueError(
                f"projectors.{number} has {some_of(sorted(part))}; a projector of REPA has {some_of(sorted(needed))}."
            )
    return [found[number] for number in sorted(found)]


def _renamed(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for old, new in _names(config).items():
        for end in ("weight", "bias"):
            value = weights[f"{old}.{end}"]
            if not new.endswith("to_qkv"):
                renamed[f"{new}.{end}"] = value
                continue
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{new.removesuffix('qkv')}{letter}.{end}"] = part.clone()
    if config["num_classes"]:
        renamed["label_embed.weight"] = weights["y_embedder.embedding_table.weight"]
    return renamed


__all__ = ["ARCHITECTURES", "Architecture", "ConvertedCheckpoint", "convert_state_dict"]
