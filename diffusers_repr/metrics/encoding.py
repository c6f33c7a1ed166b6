"""Images to one feature vector each, by an `Encoder`, the work shared between processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffusers_repr.data.labelled import ImageRows, open_images
from diffusers_repr.encoders import Encoder, EncoderOutput
from diffusers_repr.features.noise_policy import pixel_keys
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.gather import failing_together, gather_rows, own_rows

Which = Literal["global", "tokens"]


def check_which(which: str) -> str:
    """The name of features, if an encoder gives them.

    Raises:
        ValueError: If not.
    """
    if which not in get_args(Which):
        raise ValueError(f"An encoder gives 'global' features, or 'tokens' (their mean is taken); got {which!r}.")
    return which


@dataclass(frozen=True)
class SharedRead:
    """What was made of a set of images, the same on every process.

    Attributes:
        made: Name -> `(N, ...)` on the CPU, in the order of the rows.
        image_size: (H, W) of the images.
        images_hash: Of the pixels of all images, whatever their order.
        keys: Of the pixels of each image, in the order of the rows.
    """

    made: dict[str, Tensor]
    image_size: tuple[int, int]
    images_hash: str
    keys: tuple[bytes, ...]


def read_shared(
    images: ImageRows,
    rows: Sequence[int],
    make: Callable[[Tensor], Mapping[str, Tensor]],
    names: Sequence[str],
    *,
    channels: int,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    step: Callable[[], object] | None = None,
    like: tuple[str, tuple[int, int]] | None = None,
) -> SharedRead:
    """Run a function over images in batches, each process over a share of them, and put the results together.

    Args:
        images: The data set.
        rows: Which of them.
        make: From pixels `(n, C, H, W)` in [-1, 1] to tensors of n rows, by name.
        names: The names that `make` gives.
        channels: Of the pixels.
        image_size: Resize to (H, W) or a square.
        batch_size: Images a call.
        step: Called after every batch.
        like: Name and (H, W) of other images, which these must have.

    Raises:
        ValueError: For images that differ in size, or from `like`; as any other error, it is raised on every
            process.
    """
    check_whole("batch_size", batch_size, 1)
    mine = own_rows(len(rows))
    kept: dict[str, list[Tensor]] = {name: [] for name in names}
    digests: list[list[int]] = []
    sizes: list[tuple[int, int]] = []
    with failing_together():
        places = [rows[at] for at in mine]
        for _, pixels in images.pixels(batch_size, channels, image_size, places):
            sizes += [(pixels.shape[2], pixels.shape[3])] * len(pixels)
            if like is not None and like[1] != sizes[-1]:
                raise ValueError(
                    f"{images.name} are {sizes[-1][0]} x {sizes[-1][1]} (H x W), {like[0]} are {like[1][0]} x "
                    f"{like[1][1]}: what differs would be the sizes. Pass image_size=(H, W) to resize both."
                )
            made = make(pixels)
            for name in names:
                kept[name].append(made[name].cpu())
            digests += [list(bytes.fromhex(key)) for key in pixel_keys(pixels)]
            if step is not None:
                step()
    index = torch.tensor(mine, dtype=torch.int64)

    def whole(values: Tensor) -> Tensor:
        return gather_rows(values, index, len(rows))

    made = {name: whole(torch.cat(parts) if parts else torch.zeros(0)) for name, parts in kept.items()}
    every = {(h, w) for h, w in whole(torch.tensor(sizes, dtype=torch.int64).view(-1, 2)).tolist()}
    if len(every) > 1:  # those of one process were equal
        raise ValueError(
            f"{images.name}: images of mixed sizes (H, W) {sorted(every)}; pass image_size=(H, W) to resize them."
        )
    keys = tuple(map(bytes, whole(torch.tensor(digests, dtype=torch.uint8).view(-1, 16)).tolist()))
    total = hashlib.blake2b(b"".join(sorted(keys)), digest_size=16).hexdigest()
    return SharedRead(made, every.pop(), total, keys)


@dataclass(frozen=True)
class Encoded:
    """Features of a set of images.

    Attributes:
        features: `(N, D)` float32 on the CPU, in the order of the images.
        image_size: (H, W) of the images as the encoder got them.
        images_hash: Of the pixels of all images, whatever their order.
    """

    features: Tensor
    image_size: tuple[int, int]
    images_hash: str


def encode_images(
    encoder: Encoder,
    data: Any,
    which: Which = "global",
    *,
    batch_size: int = 64,
    image_size: int | tuple[int, int] | None = None,
    role: str = "images",
    like: Encoded | None = None,
) -> Encoded:
    """Features of every image; under `accelerate launch` each process encodes a share, and all get all of them.

    Args:
        encoder: What makes them.
        data: See `open_images`.
        which: `global` features, or the mean of the `tokens`.
        batch_size: Images a forward.
        image_size: Resize images before, to (H, W) or a square; needed where they differ in size.
        role: What the images are called in errors.
        like: What was made of other images, whose size these must have.

    Raises:
        ValueError: For images that differ in size, among themselves or from `like`, or are none, on every process.
    """
    check_which(which)
    images = open_images(data, role)
    read = read_shared(
        images,
        range(len(images)),
        lambda pixels: {"features": pick(encoder.encode_pixels(pixels), which)},
        ("features",),
        channels=encoder.channels,
        image_size=image_size,
        batch_size=batch_size,
        like=None if like is None else ("those to compare with", like.image_size),
    )
    return Encoded(read.made["features"], read.image_size, read.images_hash)


def pick(output: EncoderOutput, which: str) -> Tensor:
    """One vector an image `(B, D)` of an encoder's output: `global`, or the mean of the `tokens`."""
    return output.global_features if which == "global" else output.tokens.mean(1)
