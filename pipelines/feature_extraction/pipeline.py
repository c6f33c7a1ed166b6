"""Features of images from the layers of any diffusion pipeline, as a pipeline. Needs `pip install diffusers-repr`.

`DiffusionPipeline.from_pretrained(X, custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is
an ordinary pipeline folder or Hub id of one of the families that diffusers_repr knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_repr.denoiser.any_pipeline import AnyPipelineMixin
from diffusers_repr.features import FeatureExtractor, FeatureOutput
from diffusers_repr.noise import NoiseLevel


class FeatureExtractionPipeline(AnyPipelineMixin, DiffusionPipeline):
    """Reads what named layers of a diffusion model compute for images at chosen noise levels.

    It holds the components and settings of the pipeline it is loaded from (see `AnyPipelineMixin`); prompts and class
    labels are turned into network inputs by that pipeline's own code.
    """

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        layers: str | Sequence[str],
        timestep: int | float | NoiseLevel | Sequence[int | float | NoiseLevel],
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | torch.Tensor | None = None,
        embeddings: Mapping[str, Any] | None = None,
        ids: Sequence[Any] | None = None,
        ensemble_size: int = 1,
        pooling: str | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> FeatureOutput:
        """Features of images.

        Args:
            images: PIL images, numpy arrays or tensors; brought to the model's own size unless `image_size` says else.
            layers: Full module paths, such as `"up_blocks.1"`; `diffusers-repr layers MODEL` prints them.
            timestep: Training timestep or `NoiseLevel` (larger is noisier), or a list of them.
            prompt: One for all images or one per image; the empty prompt if None.
            class_labels: One id for all images or one per image; the null class if None.
            embeddings: Ready inputs instead, by the names of the original pipeline's call or of the network's.
            ids: A stable name per image, the key of its noise; its pixels if None.
            ensemble_size: Noise draws an image, averaged.
            pooling: None, `mean`, `max` or `adaptive:P`.
            seed: Of the noise.
            **settings: Further arguments of `FeatureExtractor`: `noise`, `batch_size`, `output_device`, `where`,
                `image_size`, `sample_posterior`.

        Returns:
            `.features[layer]` is a tensor, map `(B, C, H, W)` or tokens `(B, N, C)`; `.as_map(layer)` is always a map.
        """
        extractor = FeatureExtractor(
            self.denoiser,
            layers,
            timestep,
            ensemble_size=ensemble_size,
            pooling=pooling,
            seed=seed,
            **{"progress_bar": self.progress_bar, **settings},
        )
        features = extractor(images, prompt=prompt, class_labels=class_labels, embeddings=embeddings, ids=ids)
        self.maybe_free_model_hooks()
        return features
