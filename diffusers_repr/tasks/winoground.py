"""Winoground's scores: two captions and two images of the same words, matched by denoising errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.noise_policy import image_keys
from diffusers_repr.tasks.denoising_errors.conditions import encode_conditions
from diffusers_repr.tasks.denoising_errors.crops import sized_pixels
from diffusers_repr.tasks.denoising_errors.levels import even_timesteps
from diffusers_repr.tasks.denoising_errors.network import NetworkErrors
from diffusers_repr.tasks.denoising_errors.pairs import ask


@dataclass(frozen=True, eq=False)
class WinogroundOutput:
    """Scores of pairs of captions and images.

    Attributes:
        scores: `(M, 2, 2)` float64: minus the mean error of caption c under image i, `[m, c, i]`.
    """

    scores: Tensor

    @property
    def text(self) -> Tensor:
        """Whether each image scores higher under its own caption, `(M,)` bool."""
        s = self.scores
        return (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])

    @property
    def image(self) -> Tensor:
        """Whether each caption scores higher on its own image; how likely an image is by itself distorts this."""
        s = self.scores
        return (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])

    @property
    def group(self) -> Tensor:
        """Both."""
        return self.text & self.image

    def summary(self) -> dict[str, float]:
        """The shares of `text`, `image` and `group`; chance is 1/4, 1/4 and 1/6."""
        return {name: float(getattr(self, name).double().mean()) for name in ("text", "image", "group")}


def winoground(
    denoiser: Denoiser,
    examples: Iterable[tuple[Sequence[str], Sequence[Any]]],
    *,
    n_levels: int = 1000,
    loss: str = "l2",
    seed: int = 0,
    batch_size: int = 64,
    shared_noise: bool = True,
    image_size: Any = None,
) -> WinogroundOutput:
    """Score examples of Winoground (two captions, two images, caption k belonging to image k).

    Args:
        denoiser: A text-to-image model.
        examples: `((caption 0, caption 1), (image 0, image 1))` each.
        n_levels: Evenly spread; the paper's 1,000 is every timestep of Stable Diffusion.
        loss: See `Loss`.
        seed: Of the noise.
        batch_size: Rows of one forward.
        shared_noise: Whether both images of an example see the same noise, as in the paper; captions always do.
        image_size: As for `ZeroShotClassifier.of`.

    Raises:
        ValueError: For a model without text, examples of other numbers, equal captions, and without examples.
    """
    if denoiser.conditioner.argument != "prompt":
        raise ValueError(f"Winoground needs a text-to-image model; {type(denoiser.model).__name__} takes no prompts.")
    size, found = denoiser.resize_to(image_size), []
    assert size is not None
    levels = even_timesteps(denoiser.schedule, n_levels)
    for at, (captions, images) in enumerate(examples):
        if len(captions) != 2 or len(images) != 2 or captions[0] == captions[1]:
            raise ValueError(f"Example {at} must be two captions, which differ, and two images.")
        pixels = sized_pixels(list(images), denoiser, size, "crop")
        conditions = encode_conditions(denoiser, prompts=list(captions), size=size, batch_size=batch_size)
        keys = [f"example {at}"] * 2 if shared_noise else image_keys(None, pixels)
        x0 = denoiser.encode_pixels(pixels).cpu()
        network = NetworkErrors(denoiser, x0, keys, conditions, loss, seed, batch_size)
        asked = ask(torch.ones(2, 2, dtype=torch.bool), levels)
        errors = torch.zeros(4, dtype=torch.float64)
        errors.index_add_(0, asked.prompts * 2 + asked.images, network(asked))
        found.append(-errors.view(2, 2) / len(levels))
        batch_size = network.batch_size
    if not found:
        raise ValueError("No examples: pass ((caption, caption), (image, image)) at least once.")
    return WinogroundOutput(torch.stack(found))


__all__ = ["WinogroundOutput", "winoground"]
