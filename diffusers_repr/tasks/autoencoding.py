"""What an encoder and a decoder of codes and noise are good for: reconstructions, what lies between images, edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.sampling import check_number
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.heads.fitting.direction import code_direction
from diffusers_repr.noise.slerp import slerp


class AutoencodingMixin:
    """Of a pipeline whose `encode(images, num_inference_steps, image_size)` gives `.code` and `.x_T`, and `decode`."""

    def reconstruct(
        self: Any,
        images: Any,
        num_inference_steps: int = 100,
        random: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        image_size: ImageSize = None,
    ) -> Any:
        """Images encoded and decoded again.

        Args:
            images: As in `encode`.
            num_inference_steps: Of both ways.
            random: Draw the noise: what the code alone tells of the image.
            generator: Of drawn noise.
            output_type: As in `decode`.
            image_size: As in `encode`.
        """
        found = self.encode(images, None if random else num_inference_steps, image_size)
        return self.decode(found.code, found.x_T, num_inference_steps, generator, output_type)

    def interpolate(
        self: Any,
        first: Any,
        second: Any,
        weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        num_inference_steps: int = 100,
        output_type: str = "pil",
        image_size: ImageSize = None,
    ) -> list[Any]:
        """From images to others: the code goes straight, the noise on the sphere.

        Args:
            first: Images, as in `encode`.
            second: As many.
            weights: Of the second ones, 0 to 1; an output each.
            num_inference_steps: Of both ways.
            output_type: As in `decode`.
            image_size: As in `encode`.

        Raises:
            ValueError: For another number of images.
        """
        one, two = (self.encode(images, num_inference_steps, image_size) for images in (first, second))
        if len(one.code) != len(two.code):
            raise ValueError(f"{len(one.code)} images to interpolate to {len(two.code)}; give as many.")
        found = []
        for weight in weights:
            code = (1 - weight) * one.code + weight * two.code
            noise = slerp(one.x_T, two.x_T, weight)
            found.append(self.decode(code, noise, num_inference_steps, output_type=output_type))
        return found

    def fit_direction(self: Any, code: Tensor, labels: Tensor, l2: float = 1e-2) -> Tensor:
        """The direction `(D,)` to an attribute, for `edit`; see `code_direction`.

        Args:
            code: `(N, D)`, of images with and without it: `pipe.encode(images, None).code`.
            labels: `(N,)`, boolean or 0 and 1.
            l2: Penalty of the probe's weights.
        """
        return code_direction(self.check_code(code), labels, l2)

    def edit(
        self: Any,
        images: Any,
        direction: Tensor,
        strength: float = 0.3,
        num_inference_steps: int = 100,
        output_type: str = "pil",
        image_size: ImageSize = None,
    ) -> Any:
        """Images with their codes moved, and their own noise.

        Args:
            images: As in `encode`.
            direction: `(D,)`, of `fit_direction`.
            strength: How far, in `sqrt(D)` standard deviations; below 0 the other way.
            num_inference_steps: Of both ways.
            output_type: As in `decode`.
            image_size: As in `encode`.

        Raises:
            ValueError: For a direction of another width, and as `encode`.
        """
        found = self.encode(images, num_inference_steps, image_size)
        if direction.shape != found.code.shape[1:]:
            raise ValueError(f"direction is ({found.code.shape[1]},); got {tuple(direction.shape)}.")
        moved = found.code + check_number("strength", strength) * direction.to(found.code)
        return self.decode(moved, found.x_T, num_inference_steps, output_type=output_type)


__all__ = ["AutoencodingMixin"]
