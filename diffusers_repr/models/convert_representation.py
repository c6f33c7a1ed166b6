"""RCG's representation diffusion models, as their authors name them, to `RepresentationMLPModel`: pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusers_repr.hub.components import check_config
from diffusers_repr.models.checkpoint import block_numbers, check_tensor_names, check_weights, some_of

# Of the authors' diffusion module: the trained network, its average (names without dots), the table of classes.
_NETWORK, _AVERAGE, _TABLE = "model.diffusion_model.", "model_ema.", "cond_stage_model.embedding.weight"
_PARTS = {
    "in_layers.0": "norm_in",
    "in_layers.2": "linear_in",
    "emb_layers.1": "time_proj",
    "context_layers.1": "class_proj",
    "out_layers.0": "norm_out",
    "out_layers.3": "linear_out",
}
_ENDS = {
    "time_embed.0": "time_embed.linear_1",
    "time_embed.2": "time_embed.linear_2",
    "input_proj": "proj_in",
    "out.0": "norm_out",
    "out.2": "proj_out",
}
_RANKS = {
    "input_proj.weight": 2,
    "time_embed.0.weight": 2,
    "res_blocks.0.in_layers.2.weight": 2,
    "res_blocks.0.context_layers.1.weight": 2,
    _TABLE: 2,
}
# Of RCG's configs: betas linear in their root, x_0 predicted; steps 1, 5, 9, ..., the last of them to alpha_bar_0.
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "prediction_type": "sample",
    "clip_sample": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@dataclass(frozen=True)
class ConvertedRepresentation:
    """A checkpoint in the form of this package.

    Attributes:
        config: Arguments of `RepresentationMLPModel`.
        weights: Its state dict.
        notes: What was left out or chosen, a sentence each.
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def is_representation_model(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of RCG's representation diffusion model.

    Args:
        weights: As `select_weights` gives them.
    """
    return f"{_NETWORK}res_blocks.0.in_layers.2.weight" in weights


def convert_representation(weights: Mapping[str, Tensor]) -> ConvertedRepresentation:
    """From the authors' names to ours; sizes are read from the shapes, and the moving average is taken.

    The table of classes is no part of that average in their code, and is taken as trained.

    Args:
        weights: State dict of RCG's representation diffusion (Li et al. 2023, arXiv 2312.03701).

    Raises:
        ValueError: For names that are unknown or missing, shapes that do not fit, and numbers that are not finite.
    """
    trained = {key.removeprefix(_NETWORK): value for key, value in weights.items() if key.startswith(_NETWORK)}
    averaged = {key: weights.get(_AVERAGE + f"diffusion_model.{key}".replace(".", "")) for key in trained}
    missing = [key for key, value in averaged.items() if value is None]
    own = trained if missing else {key: value for key, value in averaged.items() if value is not None}
    if missing and len(missing) < len(trained):
        raise ValueError(f"The average in this checkpoint of RCG lacks {some_of(missing)}.")
    classes = any(".context_layers." in key for key in own)
    table = {_TABLE: weights[_TABLE]} if classes and _TABLE in weights else {}
    check_weights({**own, **table}, _RANKS)
    config = _sizes(own, table.get(_TABLE))
    check_config(config, "The checkpoint's network")
    names = _names(config["num_layers"], classes)
    needed = {f"{name}.{end}" for name in names for end in ("weight", "bias")}
    absent = sorted(needed - own.keys()) + ([_TABLE] if classes and not table else [])
    check_tensor_names("RCG's representation diffusion", config, absent, sorted(own.keys() - needed))
    renamed = {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in own.items()}
    if classes:
        renamed["label_embed.weight"] = table[_TABLE]
    left = sorted({key.split(".")[0] for key in weights} - {"model", "model_ema", "cond_stage_model"})
    notes = [] if not missing else ["It holds no moving average; the trained weights were taken."]
    notes += [f"{some_of(left)} were left out."] if left else []
    return ConvertedRepresentation(config, renamed, tuple(notes))


def _sizes(own: Mapping[str, Tensor], table: Tensor | None) -> dict[str, Any]:
    """The config, as far as shapes tell."""
    needed = ("input_proj.weight", "time_embed.0.weight", "res_blocks.0.in_layers.2.weight")
    blocks = block_numbers(own, "res_blocks")
    if not blocks or any(name not in own for name in needed):
        raise ValueError(
            f"This is no representation diffusion model of RCG: it lacks {some_of(n for n in needed if n not in own)}."
        )
    width, channels = own["input_proj.weight"].shape
    return {
        "in_channels": channels,
        "hidden_size": width,
        "num_layers": max(blocks) + 1,
        "bottleneck_size": own["res_blocks.0.in_layers.2.weight"].shape[0],
        "time_embed_dim": own["time_embed.0.weight"].shape[0],
        "num_classes": 0 if table is None else table.shape[0],
        "class_embed_dim": 512 if table is None else table.shape[1],
        "null_class": table is None,
    }


def _names(depth: int, classes: bool) -> dict[str, str]:
    """Their name -> ours, without the ending."""
    names = dict(_ENDS)
    for at in range(depth):
        parts = {old: new for old, new in _PARTS.items() if classes or new != "class_proj"}
        names |= {f"res_blocks.{at}.{old}": f"blocks.{at}.{new}" for old, new in parts.items()}
    return names


__all__ = ["SCHEDULER", "ConvertedRepresentation", "convert_representation", "is_representation_model"]
