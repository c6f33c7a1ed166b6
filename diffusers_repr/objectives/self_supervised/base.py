"""`SelfSupervisedObjective`: a vision transformer trained without labels, by two views of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from diffusers_repr.encoders.preprocessing import preprocess
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective
from diffusers_repr.objectives.preprocessor import Preprocessor


class SelfSupervisedObjective(Objective):
    """Base: subclass, build the heads, write `compare`.

    Class tokens and mean patch tokens go through the same heads. Logs `class_loss` and `patch_loss`, whose mean is the
    loss. A batch has `views` (2, B, C, H, W) in [-1, 1]. The encoder is saved; the heads are thrown away.

    Args:
        model: Arguments of transformers' `ViTConfig`.
        mean: Of the data in [0, 1], one a channel: the encoder's own preprocessing.
        std: As `mean`.
    """

    projector: nn.Module

    def __init__(self, model: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = list(mean), list(std)
        self.encoder = ViTModel(ViTConfig(**model), add_pooling_layer=False)

    @property
    def width(self) -> int:
        """Of the tokens."""
        return int(self.encoder.config.hidden_size)

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of a batch of views."""
        images = batch["views"].flatten(0, 1)
        parts = self.parts(self.encoder, images)
        of_class, of_patches = (
            self.compare(self.project(part), target) for part, target in zip(parts, self.targets(images), strict=True)
        )
        loss = (of_class + of_patches) / 2
        return {"loss": loss, "class_loss": of_class.detach(), "patch_loss": of_patches.detach()}

    def parts(self, encoder: ViTModel, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class tokens and mean patch tokens of both views, `(2 B, D)` each."""
        tokens = self.tokens(encoder, images)
        return tokens[:, 0], tokens[:, 1:].mean(1)

    def project(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """The projections of both views; each view is normalised by its own batch."""
        one, two = (self.projector(view) for view in part.chunk(2))
        return one, two

    def targets(self, images: Tensor) -> Sequence[tuple[Tensor, Tensor] | None]:
        """What the parts are compared with beside each other, by a network that is not trained."""
        return None, None

    def compare(self, pair: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor] | None) -> Tensor:
        """The loss of the projections of two views, a scalar."""
        raise NotImplementedError

    def artifacts(self) -> list[Artifact]:
        """The encoder as a folder of transformers, with its preprocessing."""
        config = self.encoder.config
        make = partial(ViTModel, ViTConfig.from_dict(config.to_dict()), add_pooling_layer=False)
        side = dict.fromkeys(("height", "width"), config.image_size)
        return [
            ModelArtifact(self.encoder, "encoder", make=make),
            FixedArtifact(Preprocessor(size=side, image_mean=self.mean, image_std=self.std)),
        ]

    def tokens(self, encoder: ViTModel, images: Tensor) -> Tensor:
        """(B, 1 + N, D) of images (B, C, H, W) in [-1, 1]."""
        pixels = preprocess(images, (images.shape[2], images.shape[3]), self.mean, self.std)
        return encoder(pixel_values=pixels).last_hidden_state


class PredictingObjective(SelfSupervisedObjective):
    """Base of methods without negatives: a predictor is all that keeps them from collapse.

    It must stay ahead of the network: BYOL (arXiv 2006.07733, section 5) learns even without its moving average when
    the predictor's learning rate is higher than the network's, and Tian et al. (arXiv 2102.06810) show why.

    Args:
        model: As `SelfSupervisedObjective`, and so are mean and std.
        mean: See there.
        std: See there.
        predictor_lr_scale: Learning rate of the predictor, times that of the rest.

    Raises:
        ValueError: If `predictor_lr_scale` is not positive.
    """

    predictor: nn.Module
    discarded = ("projector", "predictor")

    def __init__(
        self, model: Mapping[str, Any], mean: Sequence[float], std: Sequence[float], *, predictor_lr_scale: float
    ) -> None:
        super().__init__(model, mean, std)
        if not predictor_lr_scale > 0:
            raise ValueError(f"`predictor_lr_scale` must be positive, got {predictor_lr_scale}.")
        self.predictor_lr_scale = predictor_lr_scale

    def param_groups(self, phase: str = "main") -> list[dict[str, Any]]:
        """What is trained but the predictor, and the predictor at a rate of its own."""
        own = list(self.predictor.parameters())
        inner = {id(p) for p in own}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in inner]
        return [{"params": rest}, {"params": own, "lr_scale": self.predictor_lr_scale}]


def card_of(method: str) -> dict[str, Any]:
    """What the card of an encoder tells, by the tag of its method."""
    return {"kind": "`ViTModel`", "library_name": "transformers", "pipeline_tag": "image-feature-extraction",
            "tags": ["vision", method]}  # fmt: skip


def mlp(*widths: int, last_norm: bool = False) -> nn.Sequential:
    """Linear layers with batch norm and ReLU between them.

    The norms go by the batch in hand always, for the heads are never used outside of training.

    Args:
        *widths: Of the input, the hidden layers and the output.
        last_norm: Whether the output is normalised too, without scale and shift.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for place, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        normed = place < last or last_norm
        layers.append(nn.Linear(before, after, bias=not normed))
        if normed:
            layers.append(nn.BatchNorm1d(after, affine=place < last, track_running_stats=False))
        if place < last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1, float32 or wider."""
    return torch.nn.functional.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


def crossed_cosine(pair: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """Mean of `cos(pair_1, target_2) + cos(pair_2, target_1)`, `(B, D)` each; no gradient goes into the target."""
    (one, two), (first, second) = pair, target
    return ((unit(one) * unit(second.detach())).sum(-1) + (unit(two) * unit(first.detach())).sum(-1)).mean()


__all__ = ["PredictingObjective", "SelfSupervisedObjective", "card_of", "crossed_cosine", "mlp", "unit"]
