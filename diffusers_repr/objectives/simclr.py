"""`SimCLRObjective`: a vision transformer trained without labels, as a teacher for alignment and an encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.encoders.preprocessing import preprocess
from diffusers_repr.hub.files import write_json
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective
from diffusers_repr.objectives.gathered import gathered


def nt_xent(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (eq. 1): of all other views, those of all processes included, which is of the same image?

    Args:
        one: `(B, D)`.
        two: `(B, D)`; row b of both is a view of the same image.
        temperature: Of the softmax over similarities.
    """
    own = F.normalize(torch.cat([one, two]).float(), dim=-1)
    everyone, first = own, 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = gathered(own)
        first = dist.get_rank() * len(own)
    rows = torch.arange(len(own), device=own.device)
    with torch.autocast(own.device.type, enabled=False):
        logits = own @ everyone.T / temperature
    logits = logits.index_put((rows, first + rows), logits.new_tensor(-torch.inf))
    return F.cross_entropy(logits, first + (rows + len(one)) % len(own))


@dataclasses.dataclass(frozen=True)
class SimCLRConfig:
    """The network and its loss; the fields are keys of a recipe.

    Raises:
        ValueError: If an argument of the network is missing or unknown, or a value is out of range.
    """

    model: dict | str | None = setting(None, "arguments of ViTConfig, a mapping (JSON in a flag)")
    projection_dim: int = setting(128, "width of the vectors that the loss compares")
    temperature: float = setting(0.2, "of the softmax over similarities")
    eval_split: str | None = setting(None, "split whose labels measure the result; none: no measurement")

    def __post_init__(self) -> None:
        arguments = json_mapping("model", self.model)
        check_keys("`model`", arguments, ViTConfig().to_dict())
        missing = [key for key in ("image_size", "patch_size", "num_channels") if key not in arguments]
        if missing:
            raise ValueError(f"`model` needs {', '.join(missing)}, as whole numbers.")
        if arguments["image_size"] % arguments["patch_size"]:
            raise ValueError(f"`model` has image_size={arguments['image_size']}, no multiple of its patch_size.")
        if self.temperature <= 0 or self.projection_dim < 1:
            raise ValueError("`temperature` and `projection_dim` must be positive.")
        object.__setattr__(self, "model", arguments)


class SimCLRObjective(Objective):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709) of a vision transformer, on class tokens and mean patch tokens.

    Logs `class_loss` and `patch_loss`, whose mean is the loss. A batch has `views` (2, B, C, H, W) in [-1, 1].

    Args:
        model: Arguments of transformers' `ViTConfig`.
        mean: Of the data in [0, 1], one a channel: the encoder's own preprocessing.
        std: As `mean`.
        projection_dim: Width of the vectors that are compared.
        temperature: Of the softmax over similarities.
    """

    card = {"kind": "`ViTModel`", "library_name": "transformers", "pipeline_tag": "image-feature-extraction",
            "tags": ["vision", "simclr"]}  # fmt: skip

    discarded = ("projector",)  # the paper throws it away

    def __init__(
        self,
        model: Mapping[str, Any],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        projection_dim: int = 128,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        self.mean, self.std, self.temperature = list(mean), list(std), temperature
        self.encoder = ViTModel(ViTConfig(**model), add_pooling_layer=False)
        width = self.encoder.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, projection_dim))

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of a batch of views."""
        tokens = self.tokens(self.encoder, batch["views"].flatten(0, 1))
        pairs = (self.projector(part).chunk(2) for part in (tokens[:, 0], tokens[:, 1:].mean(1)))
        of_class, of_patches = (nt_xent(one, two, self.temperature) for one, two in pairs)
        loss = (of_class + of_patches) / 2
        return {"loss": loss, "class_loss": of_class.detach(), "patch_loss": of_patches.detach()}

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


class Preprocessor:
    """The file in which transformers keeps an encoder's preprocessing."""

    def __init__(self, **own: Any) -> None:
        self.own = own

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `preprocessor_config.json`."""
        fixed = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 3, "do_rescale": True,
                 "rescale_factor": 1 / 255, "do_normalize": True}  # fmt: skip
        write_json(Path(folder) / "preprocessor_config.json", {**fixed, **self.own})


__all__ = ["Preprocessor", "SimCLRConfig", "SimCLRObjective", "nt_xent"]
