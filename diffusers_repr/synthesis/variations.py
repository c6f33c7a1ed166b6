"""Variants by what a network sees of an image: a vector of an encoder (RCG), an embedding of CLIP (unCLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusers_repr.assign import Assigner
from diffusers_repr.data.image_data import ImageData
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders import Encoder
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.identity import plain_hash, weights_hash
from diffusers_repr.store.image_store import ImageKey
from diffusers_repr.synthesis.makers import GenerativeAugmenter


class RepresentationAugmenter(GenerativeAugmenter):
    """Images of the vector that an encoder gives of an image (RCG, arXiv 2312.03701): all else is drawn anew.

    Args:
        denoiser: Of a pipeline that takes vectors by `condition`, such as `RCGPipeline` or `SiTPipeline`.
        data: The images.
        encoder: What the vectors of its training were of.
        assigner: That was fitted on them, and standardises them.
        **settings: As `ImageMaker`.

    Raises:
        ValueError: For a pipeline without vectors, and an assigner of something else.
    """

    methods = ("representation",)

    def __init__(
        self, denoiser: Denoiser, data: ImageData, encoder: Encoder, assigner: Assigner, **settings: Any
    ) -> None:
        self.encoder, self.assigner = encoder, assigner
        if assigner.gives != "vector" or assigner.in_features != encoder.dim:
            raise ValueError(
                f"The assigner gives {assigner.gives} of {assigner.in_features} numbers; of this encoder vectors of "
                f"{encoder.dim} are needed."
            )
        seen = {name: value for name, value in encoder.fingerprint().items() if name != "name"}  # a place, perhaps
        self._sees = plain_hash([seen, assigner.fingerprint()])
        super().__init__(denoiser, data, "representation", **settings)

    def check_pipe(self) -> None:
        """See `GenerativeAugmenter`."""
        if "condition" not in self.known():
            raise ValueError(f"{type(self.pipe).__name__} takes no vectors (`condition`); take one that does.")

    def how(self) -> dict[str, Any]:
        """With what the vectors are of."""
        return {**super().how(), "vectors": self._sees}

    def make(self, keys: Sequence[ImageKey]) -> np.ndarray:
        """See `ImageMaker`."""
        vectors = self.assigner.assign(self.encoder(self.read(keys)).global_features)
        return self.call(keys, condition=vectors)


class UnCLIPAugmenter(GenerativeAugmenter):
    """Images of the embedding that CLIP gives of an image, as GenSSL makes its views (arXiv 2403.05966).

    Every image has noise of its own, also on its embedding; in the code of the paper all images share a seed.

    Args:
        denoiser: Of a `StableUnCLIPImg2ImgPipeline`.
        data: The images.
        noise_level: Timestep to which the embedding is noised: 0 is least, more gives images less alike.
        **settings: As `GenerativeAugmenter`, without method and strength.

    Raises:
        ValueError: For another pipeline, a level that its schedule does not have, and further guidance beside scales
            other than 1.
    """

    methods = ("image_variation",)

    def __init__(self, denoiser: Denoiser, data: ImageData, noise_level: int = 0, **settings: Any) -> None:
        self.noise_level = check_whole("noise_level", noise_level, 0)
        super().__init__(denoiser, data, "image_variation", **settings)
        steps = self.pipe.image_noising_scheduler.config.num_train_timesteps
        if self.guidance and (self.scales is None or self.scales.high > 1):
            raise ValueError(
                f"{type(self.pipe).__name__} does not tell which rows of its batch are null, so that it is guided "
                "further only without its own guidance; set guidance_scale to 1."
            )
        if noise_level >= steps:
            raise ValueError(f"noise_level is a timestep from 0 to {steps - 1}; got {noise_level}.")
        parts = (self.pipe.image_encoder, self.pipe.image_normalizer)
        self._sees = plain_hash([weights_hash(part) for part in parts])

    def how(self) -> dict[str, Any]:
        """With the noise of the embedding, and what embeds."""
        return {**super().how(), "noise_level": self.noise_level, "vectors": self._sees}

    def make(self, keys: Sequence[ImageKey]) -> np.ndarray:
        """See `ImageMaker`."""
        images = [image.convert("RGB") for image in self.read(keys)]
        texts = [key.prompt or "" for key in keys]
        height, width = keys[0].height, keys[0].width
        size = {"height": height, "width": width, "noise_level": self.noise_level}
        return self.call(keys, image=images, prompt=texts, **size)


__all__ = ["RepresentationAugmenter", "UnCLIPAugmenter"]
