"""What the training of a noisy classifier takes from a diffusion pipeline and from a data set."""

import dataclasses
from pathlib import Path

import torch
from classifier_args import ClassifierArgs
from image_batches import ImagePixels, LabelledImages, load_split

from diffusers_repr import Denoiser, NoiseSchedule
from diffusers_repr.models import describe_process


@dataclasses.dataclass
class Base:
    """What the classifier takes over from a pipeline."""

    name: str
    hub_id: str | None
    schedule: NoiseSchedule
    channels: int  # of x_0
    image_channels: int
    image_size: tuple[int, int]  # H, W
    stride: int  # pixels per x_0 pixel
    vae: torch.nn.Module | None

    @classmethod
    def load(cls, args: ClassifierArgs) -> "Base":
        path = args.pretrained_model_name_or_path
        denoiser = Denoiser.from_pretrained(path, revision=args.revision)
        size = (args.resolution, args.resolution) if args.resolution else denoiser.image_size
        denoiser.check_size(size)
        local, channels = Path(path).is_dir(), denoiser.family.channels(denoiser.config)
        name, hub_id = (Path(path).resolve().name, None) if local else (path, path)
        return cls(name, hub_id, denoiser.schedule, channels, denoiser.image_channels, size, denoiser.stride,
                   denoiser.vae)  # fmt: skip

    def config(self) -> dict:
        """What a classifier's config keeps of it."""
        height, width = (side // self.stride for side in self.image_size)
        return describe_process(self.schedule) | {
            "in_channels": self.channels,
            "sample_size": height if height == width else [height, width],
            "base_model": self.name,
            "latent_scale": None if self.vae is None else self.vae.config.get("scaling_factor") or 1.0,
        }

    def timesteps(self, places: torch.Tensor) -> torch.Tensor:
        """Places in [0, 1], least noise first, to timesteps: whole ones of a table, VE's by their logarithm."""
        low, high = self.schedule.timestep_range
        if self.schedule.kind == "vp":
            return (places * self.schedule.num_train_timesteps).floor().clamp(low, high)
        if self.schedule.kind == "ve":
            return (low * (high / low) ** places).clamp(low, high)
        return (low + (high - low) * places).clamp(low, high)


def class_names(data: LabelledImages, args: ClassifierArgs) -> list[str]:
    return data.images.data.features[args.label_column].names


def load_images(args: ClassifierArgs, split: str, base: Base) -> LabelledImages:
    data = load_split(args.dataset_name, split)
    images = ImagePixels(data, args.image_column, base.image_channels, base.image_size, args.cache_images)
    classes = getattr(data.features.get(args.label_column), "num_classes", 0)
    return LabelledImages(images, args.label_column, classes + 1)


def add_up(parts: torch.Tensor, losses: torch.Tensor, correct: torch.Tensor, bins: int) -> torch.Tensor:
    """(bins, 3): number, summed loss and number correct of the samples of each part of the noise levels."""
    rows = torch.stack([torch.ones_like(losses), losses.detach(), correct.float()], dim=1)
    return torch.zeros(bins, 3, device=rows.device).index_add_(0, parts, rows)


def averages(sums: torch.Tensor) -> dict:
    """Of sums (bins, 3): loss and accuracy, over all and of each part, least noise first."""
    total = sums.sum(0)
    by_bin = [(sums[:, i] / sums[:, 0]).tolist() for i in (1, 2)]
    by_bin = [[value if value == value else None for value in values] for values in by_bin]
    whole = (total[1:] / total[0]).tolist()
    return dict(zip(("loss", "accuracy", "loss_by_bin", "accuracy_by_bin"), [*whole, *by_bin], strict=True))
