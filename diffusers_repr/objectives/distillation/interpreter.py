"""`InterpreterObjective`: what a class each pixel is of, told from a frozen denoiser's features; for DreamTeacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.config.recipe import setting
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.layers import Layer
from diffusers_repr.models.feature_interpreter import FeatureInterpreter
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.distillation.distances import normalized
from diffusers_repr.objectives.distillation.teacher import DenoiserTeacher, decoder_layers
from diffusers_repr.objectives.frozen_base import FrozenBaseConfig


@dataclasses.dataclass(frozen=True)
class InterpreterConfig(FrozenBaseConfig):
    """The teacher and the interpreter of its features; the fields are keys of a recipe.

    Raises:
        ValueError: If a number is out of range.
    """

    layers: list[str] | None = setting(None, "full module paths, one a stride; default: of a U-Net its way up")
    timestep: float = setting(150.0, "level of the noise that the teacher sees")
    noise: Literal["match_t", "none"] = setting("match_t", "match_t: fresh noise of that level; none: the clean image")
    target_norm: Literal["image", "channels"] = setting(
        "image", "layer norm of the features, as DreamTeacher's target"
    )
    width: int = setting(256, "channels of the interpreter")
    groups: int = setting(32, "of its group norms")
    dropout: float = setting(0.1, "before its logits")
    dice_weight: float = setting(3.0, "of the Dice loss, beside the cross-entropy")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dice_weight < 0:
            raise ValueError(f"`dice_weight` is 0 or more; got {self.dice_weight}.")


class InterpreterObjective(Objective):
    """The first half of DreamTeacher's label distillation: `CE + 3 Dice` on a few images with masks.

    The interpreter reads normalised features, as DreamTeacher's regressor makes them. The result, the interpreter's
    folder, is `interpreter` of `DreamTeacherConfig`.

    Logs `cross_entropy` and `dice`.

    Args:
        denoiser: The teacher, frozen.
        config: Settings.
        num_classes: Of pixels.
        ignore_index: Id of pixels of no class.

    Raises:
        ValueError: For layers and a timestep that do not exist, two layers of one stride, fewer than two classes.
    """

    def __init__(
        self, denoiser: Denoiser, config: InterpreterConfig, num_classes: int, ignore_index: int = 255
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"Pixels need two or more classes; got {num_classes}. Name masks by --mask_column.")
        self.config, self.num_classes, self.ignore_index = config, num_classes, ignore_index
        self.freeze_base(denoiser)
        layers = DenoiserTeacher(denoiser, config.layers or decoder_layers(denoiser), config.noise).layers
        layers = sorted(layers, key=lambda layer: layer.stride)
        strides = [layer.stride for layer in layers]
        if len(set(strides)) < len(strides):
            raise ValueError(f"The layers have strides {strides}; name one a stride.")
        self.teacher = DenoiserTeacher(denoiser, [layer.path for layer in layers], config.noise)
        self.level = denoiser.level(config.timestep)
        self.interpreter = FeatureInterpreter(
            [layer.path for layer in layers], [layer.channels for layer in layers], num_classes, config.width,
            config.dropout, config.groups, config.timestep, config.noise, config.target_norm,
        )  # fmt: skip
        base = config.public_base
        self.card = {
            "kind": "interpreter of a denoiser's features", "library_name": "diffusers",
            "pipeline_tag": "image-segmentation", "tags": ["dreamteacher"],
            "text": "For the labels of DreamTeacher (arXiv 2307.07487): `interpreter: {folder}` of its recipe.",
            **({"base_model": base} if base else {}),
        }  # fmt: skip

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of images with `masks` (B, H, W); `noise` of a batch is taken, not drawn."""
        pixels, masks = batch["pixel_values"].float(), batch["masks"].long()
        logits = self.logits(pixels, batch.get("generator"), batch.get("noise"))
        logits = _enlarged(logits, masks.shape[1:])
        terms = {
            "cross_entropy": F.cross_entropy(logits, masks, ignore_index=self.ignore_index),
            "dice": dice_loss(logits, masks, self.ignore_index),
        }
        return weighted_sum(terms, {"dice": self.config.dice_weight})

    def logits(
        self,
        pixels: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        interpreter: nn.Module | None = None,
    ) -> Tensor:
        """Of images `(B, C, H, W)` in [-1, 1], at the finest layer's size; `interpreter`: another of the same kind."""
        read = self.teacher.read(pixels, self.level, generator, noise)
        channels_only = self.config.target_norm == "channels"
        return (interpreter or self.interpreter)([normalized(value, channels_only) for value in read])

    @torch.no_grad()
    def predict(self, pixels: Tensor, interpreter: nn.Module | None = None) -> Tensor:
        """Class ids `(B, H, W)`, of features under noise that is the same for the same images."""
        generator = torch.Generator(pixels.device).manual_seed(0)
        return _enlarged(self.logits(pixels, generator, interpreter=interpreter), pixels.shape[2:]).argmax(1)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """There must be masks, of the classes there are.

        Raises:
            ValueError: If not.
        """
        masks = batch.get("masks")
        if masks is None:
            raise ValueError("The data have no masks; name a column of them by --mask_column.")
        known = masks[masks != self.ignore_index]
        if known.numel() and (int(known.min()) < 0 or int(known.max()) >= self.num_classes):
            raise ValueError(
                f"Masks hold classes {int(known.min())} to {int(known.max())}; there are 0 to {self.num_classes - 1}, "
                f"and {self.ignore_index} for pixels of none (`ignore_index`)."
            )

    def identity(self) -> dict[str, Any]:
        """With the layers."""
        return {"layers": [layer.path for layer in self.teacher.layers], "classes": self.num_classes}

    def artifacts(self) -> list[Artifact]:
        """The interpreter."""
        return [ModelArtifact(self.interpreter, "interpreter")]


def _enlarged(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False)


def dice_loss(logits: Tensor, masks: Tensor, ignore_index: int = 255) -> Tensor:
    """One minus the Dice coefficient, `2 sum p q / (sum p + sum q)`, mean over the classes; pixels of none left out.

    Args:
        logits: `(B, K, H, W)`.
        masks: Class ids `(B, H, W)`.
        ignore_index: Id of pixels of no class.

    Returns:
        In [0, 1]; a class that is neither there nor told counts as found.
    """
    valid = (masks != ignore_index)[:, None]
    truth = F.one_hot(masks.clamp(0, logits.shape[1] - 1).long(), logits.shape[1]).movedim(-1, 1) * valid
    p = logits.float().softmax(1) * valid
    both, sums = (p * truth).sum((0, 2, 3)), (p + truth).sum((0, 2, 3))
    return 1 - ((2 * both + 1) / (sums + 1)).mean()


def check_interpreter(
    interpreter: FeatureInterpreter, layers: Sequence[Layer], read: Mapping[str, Any], place: str
) -> None:
    """An interpreter reads exactly what is distilled.

    Args:
        interpreter: Trained.
        layers: That are distilled, finest first.
        read: `timestep`, `noise` and `target_norm` of the distillation.
        place: Where the interpreter came from, for messages.

    Raises:
        ValueError: If its layers or their channels are others, or it was trained on features read otherwise.
    """
    config = interpreter.config
    ours = [(layer.path, layer.channels) for layer in layers]
    theirs = list(zip(config["layers"], config["channels"], strict=True))
    if ours != theirs:
        raise ValueError(
            f"The interpreter {place!r} reads {dict(theirs)}, and distilled are {dict(ours)}. Name its layers by "
            "`layers`, train one for these, or take a student that has a stage for each of its layers."
        )
    other = {name: config[name] for name, value in read.items() if config[name] not in (None, value)}
    if other:
        raise ValueError(
            f"The interpreter {place!r} was trained on features read with {other}; distilled are features with "
            f"{ {name: read[name] for name in other} }. Take the same."
        )


__all__ = ["InterpreterConfig", "InterpreterObjective", "check_interpreter", "dice_loss"]
