"""`DreamTeacherObjective`: a backbone of several scales regresses what a denoiser's decoder gives at each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.config.recipe import setting
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.layers import Layer
from diffusers_repr.encoders.stages import Stage
from diffusers_repr.models.feature_interpreter import FeatureInterpreter
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.objectives.artifacts import Artifact
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.distillation.distances import attention_transfer, normalized, soft_cross_entropy
from diffusers_repr.objectives.distillation.interpreter import check_interpreter
from diffusers_repr.objectives.distillation.pyramid import PyramidRegressor
from diffusers_repr.objectives.distillation.student import Student
from diffusers_repr.objectives.distillation.teacher import DenoiserTeacher, decoder_layers
from diffusers_repr.objectives.frozen_base import FrozenBaseConfig


@dataclasses.dataclass(frozen=True)
class DreamTeacherConfig(FrozenBaseConfig):
    """The teacher, its layers and level, and the losses; the fields are keys of a recipe.

    Raises:
        ValueError: If a number is out of range.
    """

    layers: list[str] | None = setting(None, "full module paths, one a stride; default: of a U-Net its way up")
    timestep: float = setting(150.0, "level of the noise that the teacher sees")
    noise: Literal["match_t", "none"] = setting("match_t", "match_t: fresh noise of that level; none: the clean image")
    width: int = setting(256, "channels of the feature pyramid")
    target_norm: Literal["image", "channels"] = setting(
        "image", "the target's layer norm: over channels and places, or over channels alone"
    )
    attention_weight: float = setting(10.0, "of attention transfer; 0: without")
    attention_power: float = setting(2.0, "p of attention transfer")
    interpreter: str | None = setting(None, "folder of a feature interpreter, whose labels are learned too")
    label_weight: float = setting(1.0, "of the interpreter's labels")
    label_temperature: float = setting(4.0, "tau of the interpreter's labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_weight < 0 or self.label_weight < 0:
            raise ValueError(
                f"Weights are 0 or more; got attention_weight={self.attention_weight} and "
                f"label_weight={self.label_weight}."
            )
        if self.width < 1 or not self.attention_power >= 1 or not self.label_temperature > 0:
            raise ValueError(
                "`width` and `attention_power` are 1 or more, `label_temperature` is positive; got "
                f"{self.width}, {self.attention_power} and {self.label_temperature}."
            )


class DreamTeacherObjective(Objective):
    """DreamTeacher (arXiv 2307.07487): `L_MSE + 10 L_AT`, and with an interpreter `+ L_ld`.

    `L_MSE = mean_l ||r_l - LN(g_l)||^2` per element, r of a feature pyramid on the student's stages, g of the
    teacher's decoder, LN without parameters; `L_AT` compares where both are strong. The denoiser sees each image with
    fresh noise of one level, and its forward ends at the finest layer. With an interpreter of the teacher's features
    a head like it, which starts from its weights, reads the pyramid and learns its softened classes.

    Logs `mse`, `attention`, `labels`, and `mse_<stride>` and `attention_<stride>` of each level.

    Args:
        denoiser: The teacher.
        student: The backbone.
        config: Settings.

    Raises:
        ValueError: For layers and a timestep that do not exist, layers of a stride that no stage of the student has,
            two of one stride, and an interpreter of other layers.

    Attributes:
        levels: The teacher's layers with the student's stages, finest first.
    """

    discarded = ("regressor", "label_head")

    def __init__(self, denoiser: Denoiser, student: Student, config: DreamTeacherConfig) -> None:
        super().__init__()
        self.config, self.backbone = config, student
        self.freeze_base(denoiser)
        named = config.layers is not None
        teacher = DenoiserTeacher(denoiser, config.layers or decoder_layers(denoiser), config.noise)
        self.levels = matched_levels(teacher.layers, student.stages, every=named)
        self.teacher = DenoiserTeacher(denoiser, [layer.path for layer, _ in self.levels], config.noise)
        self.level = denoiser.level(config.timestep)
        student.use([stage for _, stage in self.levels])
        self.student = student.module
        channels = [stage.channels for _, stage in self.levels]
        self.regressor = PyramidRegressor(channels, [layer.channels for layer, _ in self.levels], config.width)
        if config.interpreter is not None and config.label_weight:
            interpreter = FeatureInterpreter.from_pretrained(config.interpreter, use_safetensors=True)
            read = {"timestep": config.timestep, "noise": config.noise, "target_norm": config.target_norm}
            check_interpreter(interpreter, [layer for layer, _ in self.levels], read, config.interpreter)
            self.label_head = FeatureInterpreter.from_config(interpreter.config)
            self.label_head.load_state_dict(interpreter.state_dict())
            self.freeze("interpreter", interpreter)
        text = f"A student of `{type(denoiser.model).__name__}` by DreamTeacher (arXiv 2307.07487): "
        text += '`Encoder.from_pretrained("{folder}")` of diffusers-repr gives its features.'
        base = config.public_base
        self.card = {
            "kind": f"`{type(student.module).__name__}`", "library_name": "transformers",
            "pipeline_tag": "image-feature-extraction", "tags": ["vision", "distillation", "dreamteacher"],
            "text": text, **({"base_model": base} if base else {}),
        }  # fmt: skip

    @property
    def interpreter(self) -> FeatureInterpreter | None:
        """Of the teacher's features, frozen; None without label distillation."""
        return self.frozen.get("interpreter")

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss; `time` (B,), in timesteps, and `noise` of a batch are taken, not drawn."""
        pixels, generator = batch["pixel_values"].float(), batch.get("generator")
        level = self.teacher.denoiser.level(batch["time"]).to(pixels.device) if "time" in batch else self.level
        read = self.teacher.read(pixels, level, generator, batch.get("noise"))
        targets = [normalized(value, self.config.target_norm == "channels") for value in read]
        found = self.regressor(self.backbone.maps(pixels))
        return self.losses(found, read, targets)

    def losses(self, found: Sequence[Tensor], read: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """The loss and its terms.

        Args:
            found: Of the regressor, `(B, C_l, h_l, w_l)`.
            read: The teacher's maps.
            targets: These, normalised.
        """
        config = self.config
        each = {"mse": [F.mse_loss(a.float(), b) for a, b in zip(found, targets, strict=True)]}
        if config.attention_weight:
            each["attention"] = [
                attention_transfer(a, b, config.attention_power) for a, b in zip(found, read, strict=True)
            ]
        terms = {name: torch.stack(values).mean() for name, values in each.items()}
        if self.interpreter is not None:
            with torch.no_grad():
                classes = self.interpreter([value.to(self.interpreter.dtype) for value in targets])
            terms["labels"] = soft_cross_entropy(self.label_head(found), classes, config.label_temperature)
        out = weighted_sum(terms, {"attention": config.attention_weight, "labels": config.label_weight})
        strides = [f"{layer.stride:g}" for layer, _ in self.levels]
        more = {
            f"{name}_{stride}": value.detach()
            for name, values in each.items()
            for stride, value in zip(strides, values, strict=True)
        }
        return {**out, **more}

    def reading_level(self) -> NoiseLevel:
        """The level at which the teacher is read."""
        return self.level

    def identity(self) -> dict[str, Any]:
        """With the teacher's layers and the student's stages."""
        return {"layers": [layer.path for layer, _ in self.levels], **self.backbone.describe()}

    def artifacts(self) -> list[Artifact]:
        """The student, with its preprocessing."""
        return self.backbone.artifacts("student")


def matched_levels(layers: Sequence[Layer], stages: Sequence[Stage], every: bool = True) -> list[tuple[Layer, Stage]]:
    """Each layer of the teacher with the student's stage of its stride, finest first.

    Args:
        layers: Of the teacher.
        stages: Of the student.
        every: Whether each layer needs a stage; if not, those without one are left out.

    Raises:
        ValueError: If a layer has no stage, two have one stride, or none is left.
    """
    by_stride: Mapping[float, Stage] = {float(stage.stride): stage for stage in stages}
    found = [(layer, by_stride[layer.stride]) for layer in layers if layer.stride in by_stride]
    strides = [layer.stride for layer in layers]
    if not found or every and len(found) < len(layers):
        raise ValueError(
            f"The teacher's layers have strides {[f'{s:g}' for s in strides]} and the student's stages "
            f"{[stage.stride for stage in stages]}; {'each layer needs' if every else 'one at least needs'} a stage "
            "of its stride. Name other layers, or a student with another patch_size or more stages."
        )
    twice = sorted({stride for stride in strides if strides.count(stride) > 1 and stride in by_stride})
    if twice:
        raise ValueError(f"Two of the teacher's layers have the stride {twice[0]:g}; name one a stride.")
    return sorted(found, key=lambda pair: pair[0].stride)


__all__ = ["DreamTeacherConfig", "DreamTeacherObjective", "matched_levels"]
