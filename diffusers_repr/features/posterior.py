"""x_0 of images, each encoded once: the pixels, or a VAE's mean, or one draw an image, or one draw a member."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.vae import draw_latents, encode_moments, has_posterior
from diffusers_repr.features.noise_policy import keyed_generator

# False: the mean; True: one draw an image; "per_member": one for each member of the ensemble, as DIFT's code draws.
SamplePosterior: TypeAlias = bool | Literal["per_member"]


def check_sample_posterior(value: Any, denoiser: Denoiser, noise: str) -> SamplePosterior:
    """How latents are drawn, if it is a way.

    Raises:
        ValueError: For another value; for `per_member` where there is no posterior, no image, or no ensemble.
    """
    if value not in (True, False, "per_member") or not isinstance(value, (bool, str)):
        raise ValueError(f"sample_posterior is True, False or 'per_member'; got {value!r}.")
    if value == "per_member":
        asked = "sample_posterior='per_member' draws latents for each member of an ensemble, "
        if denoiser.vae is None or not has_posterior(denoiser.vae):
            what = "none" if denoiser.vae is None else f"a {type(denoiser.vae).__name__}, whose code is one"
            raise ValueError(f"{asked}from a VAE's posterior; this model has {what}. Pass False.")
        if denoiser.family.axes == 3:
            raise ValueError(f"{asked}which is done for images alone, and this is a network of videos. Pass True.")
        if noise == "clean":
            raise ValueError(f"{asked}and noise='clean' has no ensemble. Pass True for one draw.")
    return value


class EncodedImages:
    """What the VAE made of some images, each encoded once, however many members are read of it.

    Args:
        denoiser: Its VAE encodes, if it has one.
        pixels: `(B, C, H, W)` or `(B, C, frames, H, W)` in [-1, 1].
        keys: Of the images, for what is drawn.
        sample: See `SamplePosterior`.
        seed: Of what is drawn.
        batch_size: Images encoded at a time.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pixels: Tensor,
        keys: Sequence[str],
        sample: SamplePosterior,
        seed: int,
        batch_size: int,
    ) -> None:
        self.denoiser, self.keys, self.sample, self.seed = denoiser, keys, sample, seed
        starts = range(0, len(pixels), batch_size)
        # x_0, or the posterior's moments where members differ
        self.values = torch.cat(
            [self._encode(pixels[at : at + batch_size], keys[at : at + batch_size]) for at in starts]
        )

    def take(self, rows: Sequence[int], members: Sequence[int]) -> Tensor:
        """x_0 `(n, C, h, w)`, or of videos `(n, C, f, h, w)`.

        Args:
            rows: Which images.
            members: Of the ensemble, one for each row.
        """
        values = self.values[torch.tensor(rows, device=self.values.device)]
        if self.sample != "per_member":
            return values
        pairs = zip(rows, members, strict=True)
        generators = [keyed_generator(self.seed, self.keys[row], "posterior", member) for row, member in pairs]
        return draw_latents(values, self.denoiser.vae, generators).to(self.denoiser.dtype)

    def _encode(self, pixels: Tensor, keys: Sequence[str]) -> Tensor:
        if self.sample == "per_member":
            self.denoiser.check_size(tuple(pixels.shape[2:]))
            return encode_moments(self.denoiser.vae, pixels.to(self.denoiser.device)).to(self.denoiser.device)
        generators = [keyed_generator(self.seed, key, "posterior") for key in keys] if self.sample else None
        return self.denoiser.encode_pixels(pixels, sample=bool(self.sample), generator=generators)


__all__ = ["EncodedImages", "SamplePosterior", "check_sample_posterior"]
