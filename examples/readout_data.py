"""What a readout head is trained on: images with their labels, triplets, or pairs with corresponding points."""

import datasets
import torch
import torch.nn.functional as F
from image_batches import ImagePixels
from readout_args import ReadoutArgs
from torch import Tensor
from torch.utils.data import Dataset

from diffusers_repr import Denoiser
from diffusers_repr.heads import read_features, sobel_edges
from diffusers_repr.noise import NoiseLevel

Batch = dict[str, Tensor]

# Name of an image in a row -> field of `ReadoutArgs` with its column, for each kind of head.
IMAGES = {
    "spatial": {"image": "image_column"},
    "depth": {"image": "image_column"},
    "appearance": {"image": "image_column", "positive": "positive_column", "negative": "negative_column"},
    "correspondence": {"image": "image_column", "second": "second_column"},
}


class ReadoutRows(Dataset):
    """Rows of a data set as dicts of tensors: images uint8 CHW of one size, labels as such, points as numbers."""

    def __init__(self, data: datasets.Dataset, args: ReadoutArgs, channels: int, size: tuple[int, int]) -> None:
        self.data, self.args, self.size = data, args, size
        self.images = {
            name: ImagePixels(data, getattr(args, column), channels, size, args.cache_images)
            for name, column in IMAGES[args.kind].items()
        }
        if args.kind in ("spatial", "depth") and args.target != "edges":
            shown = args.head.get("out_channels", 1)
            self.images["label"] = ImagePixels(data, args.label_column, shown, size, args.cache_images)
        self.points = {}
        if args.kind == "correspondence":
            self.points = {"image": args.points_column, "second": args.second_points_column}
            for column in self.points.values():
                if column not in data.features:
                    raise ValueError(
                        f"No column {column!r} of points among {list(data.features)}; see --points_column."
                    )

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: images[index] for name, images in self.images.items()}
        if self.points:
            valid = torch.ones(self.args.max_points, dtype=torch.bool)
            for name, column in self.points.items():
                side = self.data[index][getattr(self.args, IMAGES["correspondence"][name])].size
                points = torch.as_tensor(self.data[index][column], dtype=torch.float32).reshape(-1, 2)
                row[f"{name}_points"], inside = fit_points(points, side[::-1], self.size, self.args.max_points)
                valid &= inside
            row["valid"] = valid
        return row


def fit_points(points: Tensor, size: tuple[int, int], fitted: tuple[int, int], count: int) -> tuple[Tensor, Tensor]:
    """Points (P, 2) as (y, x) of an image after its largest centred crop was scaled from `size` to `fitted`.

    Returns the first `count` of them, padded with zeros, and which of these are points inside the crop.
    """
    old, new = torch.tensor(size, dtype=torch.float32), torch.tensor(fitted, dtype=torch.float32)
    scale = (new / old).max()
    moved = (points[:count] + 0.5 - old / 2) * scale + new / 2 - 0.5
    inside = ((moved >= -0.5) & (moved <= new - 0.5)).all(1)
    room = count - len(moved)
    return F.pad(moved, (0, 0, 0, room)), F.pad(inside, (0, room))


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def labels_of(batch: Batch, args: ReadoutArgs, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) at the head's `size`, averaged over areas: computed edges, or the label column in `label_range`."""
    if "label" in batch:
        low, high = args.label_range
        label = low + (high - low) * batch["label"].float() / 255
    else:
        label = sobel_edges(to_unit(batch["image"]))
    return F.interpolate(label, size, mode="area")


@torch.no_grad()
def noisy_features(
    denoiser: Denoiser, args: ReadoutArgs, batch: Batch, level: NoiseLevel, layers: list[str]
) -> tuple[Batch, Tensor]:
    """Features and timesteps of every image of a batch, the images of one row at the same level."""
    pixels = to_unit(torch.cat([batch[name] for name in IMAGES[args.kind]]))
    repeats = len(pixels) // len(batch["image"])
    level = denoiser.level(torch.as_tensor(level.timestep).expand(len(batch["image"])).repeat(repeats))
    x0 = denoiser.encode_pixels(pixels)
    x_t = denoiser.add_noise(x0, level, torch.randn_like(x0))
    size = (pixels.shape[2], pixels.shape[3])
    condition = denoiser.condition(class_labels=args.class_label, batch=len(pixels), size=size)
    return read_features(denoiser, x_t, level, condition, layers), level.timestep
