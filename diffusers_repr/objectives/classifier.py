"""`ClassifierObjective`: p(class | x_t, t) on the noise process of a pipeline, for classifier guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.vae import encode_latents, scale_latents
from diffusers_repr.hub.places import public_name
from diffusers_repr.models import NoisyClassifier, describe_process
from diffusers_repr.noise import NoiseSchedule, add_noise
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective


@dataclasses.dataclass(frozen=True)
class ClassifierBase:
    """What a noisy classifier takes over from a pipeline at one size of images: all but its network.

    Attributes:
        name: Of the pipeline.
        hub_id: Its Hub id, or None.
        schedule: Its noise process.
        channels: Of x_0.
        image_channels: Of an image.
        image_size: (H, W).
        stride: Pixels of an image per pixel of x_0.
        vae: Of a latent pipeline.
    """

    name: str
    hub_id: str | None
    schedule: NoiseSchedule
    channels: int
    image_channels: int
    image_size: tuple[int, int]
    stride: int
    vae: Any

    @classmethod
    def load(cls, path: str, revision: str | None = None, resolution: int | None = None) -> ClassifierBase:
        """From a folder or a Hub id; images of the pipeline's own size, or of the side `resolution`."""
        denoiser = Denoiser.from_pretrained(path, revision=revision)
        require_images(denoiser, "Classifiers")
        size = (resolution, resolution) if resolution else denoiser.image_size
        denoiser.check_size(size)
        local, channels = Path(path).is_dir(), denoiser.family.channels()
        name, hub_id = (Path(path).resolve().name, None) if local else (path, path)
        return cls(name, hub_id, denoiser.schedule, channels, denoiser.image_channels, size, denoiser.stride,
                   denoiser.vae)  # fmt: skip

    def config(self) -> dict[str, Any]:
        """What a classifier's config keeps of it."""
        height, width = (side // self.stride for side in self.image_size)
        return describe_process(self.schedule) | {
            "in_channels": self.channels,
            "sample_size": height if height == width else [height, width],
            "base_model": self.name,
            "latent_scale": None if self.vae is None else self.vae.config.get("scaling_factor") or 1.0,
        }


class ClassifierObjective(Objective):
    """Cross-entropy at noise levels drawn uniformly, one a sample (Dhariwal and Nichol 2021, section 4.1).

    Logs `accuracy`, and `loss_<part>` and `accuracy_<part>` in equal parts of the noise levels, the least noisy first.

    Args:
        base: The pipeline whose noise it reads, and its VAE.
        class_names: Of the data.
        model: Arguments of `NoisyClassifier` that neither base nor data decide.
        noise_bins: Number of the parts.
    """

    def __init__(
        self,
        base: ClassifierBase,
        class_names: Sequence[str],
        model: Mapping[str, Any] | None = None,
        *,
        noise_bins: int = 5,
    ) -> None:
        super().__init__()
        self.base, self.bins = base, noise_bins
        classes: dict[str, Any] = {"num_classes": len(class_names), "id2label": list(class_names)}
        self.classifier = NoisyClassifier(**classes, **base.config(), **(model or {}))
        if base.vae is not None:
            self.freeze("vae", base.vae)

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of a batch of images, or of the moments of their latents, with labels."""
        labels = batch["class_labels"]
        places = torch.rand(len(labels), device=labels.device)
        losses, correct = self.classify(self.classifier, batch, places)
        parts = (places * self.bins).long().clamp(max=self.bins - 1)
        logged = {"accuracy": correct.mean()}
        for name, values in (("loss", losses.detach()), ("accuracy", correct)):
            both = torch.stack([values, torch.ones_like(values)])
            sums, counts = values.new_zeros(2, self.bins).index_add_(1, parts, both)
            logged |= {f"{name}_{part}": mean for part, mean in enumerate(sums / counts)}  # NaN, not counted, if empty
        return {"loss": losses.mean(), **logged}

    def classify(self, model: nn.Module, batch: Batch, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and correctness (0 or 1), both (B,) float32, of x_t with noise at `places` of the process."""
        x0, labels = self.clean(batch), batch["class_labels"]
        timesteps = timesteps_at(self.base.schedule, places)
        x_t = add_noise(x0, self.base.schedule.resolve(timesteps), torch.randn_like(x0))
        logits = model(x_t, timesteps)
        return F.cross_entropy(logits, labels, reduction="none"), (logits.argmax(1) == labels).float()

    def clean(self, batch: Batch) -> Tensor:
        """x_0, float32: pixels, or the means of the VAE's posterior."""
        if self.base.vae is None:
            return batch["pixel_values"].float()
        if "moments" in batch:
            return scale_latents(self.base.vae, batch["moments"].float().chunk(2, dim=1)[0])
        with torch.autocast(batch["pixel_values"].device.type, enabled=False):  # a VAE may overflow in fp16
            return encode_latents(self.base.vae, batch["pixel_values"]).float()

    def about(self, dataset: str, split: str | None) -> dict[str, Any]:
        """What the card tells besides what every card tells.

        Args:
            dataset: Name of the data set.
            split: That it was measured on; None: on none.
        """
        base, edges = self.base, self.edges()
        parts = "\n".join(f"| `_{i}` | {low:.4g} to {high:.4g} |" for i, (low, high) in enumerate(pairwise(edges)))
        measured = (
            f"The `eval_` numbers are of split `{split}`, each image once in every part. "
            if split
            else "It was not measured. "
        )
        text = f"""It is p(class | x_t, t) on the {base.schedule.kind} noise process of `{base.name}`, for classifier
guidance (Dhariwal and Nichol 2021).

```python
from diffusers_repr.models import NoisyClassifier

classifier = NoisyClassifier.from_pretrained("{{folder}}")
log_p = classifier(x_t, timestep).log_softmax(1)  # x_t: (B, {base.channels}, H, W) as the network takes it
```

{measured}Loss (nats) and accuracy
are those over all noise levels, and of parts of them:

| part | timesteps |
|---|---|
{parts}"""
        accuracy = {"type": "accuracy", "name": "accuracy over all noise levels", "dataset": public_name(dataset),
                    "split": split}  # fmt: skip
        return {
            "kind": "`NoisyClassifier`", "pipeline_tag": "image-classification",
            "tags": ["diffusers", "classifier-guidance", "image-classification"],
            "base_model": base.hub_id, "text": text, "metrics": {"eval_accuracy": accuracy},
        }  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """The noise process."""
        return {"base": self.base.config()}

    def artifacts(self) -> list[Artifact]:
        """The classifier by itself."""
        return [ModelArtifact(self.classifier, "classifier")]

    def edges(self) -> list[float]:
        """The timesteps at which the parts of the noise begin, and that at which the last one ends."""
        return timesteps_at(self.base.schedule, torch.arange(self.bins + 1) / self.bins).tolist()


def timesteps_at(schedule: NoiseSchedule, places: Tensor) -> Tensor:
    """Places in [0, 1], least noise first, to timesteps: whole ones of a table, VE's by their logarithm."""
    low, high = schedule.timestep_range
    if schedule.kind == "vp":
        return (places * schedule.num_train_timesteps).floor().clamp(low, high)
    if schedule.kind == "ve":
        return (low * (high / low) ** places).clamp(low, high)
    return (low + (high - low) * places).clamp(low, high)


__all__ = ["ClassifierBase", "ClassifierObjective", "timesteps_at"]
