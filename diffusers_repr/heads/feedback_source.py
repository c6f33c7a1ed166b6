"""`FeedbackExtractor`: images to the maps that a network gives when its first forward is fed back into a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffusers_repr.capture.feedback import FeedbackPasses
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.extractor import ImageBatch
from diffusers_repr.heads.feedback import FeedbackHead


class FeedbackExtractor(FeatureExtractor):
    """A `FeatureExtractor` whose layers are read in the second of two forwards, as a `FeedbackHead` feeds it.

    Args:
        head: Makes what is fed back.
        denoiser: Any `Denoiser` of a U-Net.
        layers: As in `FeatureExtractor`, as all else.
        timestep: As in `FeatureExtractor`.
        **settings: As in `FeatureExtractor`.
    """

    def __init__(self, head: FeedbackHead, denoiser: Any, layers: Any, timestep: Any, **settings: Any) -> None:
        super().__init__(denoiser, layers, timestep, **settings)
        if self.where != "output":
            raise ValueError(f"where={self.where!r}; what is fed back is read at the output of layers.")
        self.head = head
        self.passes = FeedbackPasses(denoiser.model, head.config["sources"], head.config["targets"], self.layers)

    @classmethod
    def of(cls, head: FeedbackHead, extractor: FeatureExtractor) -> FeedbackExtractor:
        """With the settings of another extractor."""
        names = ("denoiser", "layers", "ensemble_size", "pooling", "batch_size", "output_device", "seed", "where",
                 "image_size", "sample_posterior", "progress_bar")  # fmt: skip
        settings = {name: getattr(extractor, name) for name in names}
        levels = extractor.levels if extractor.many else extractor.levels[0]
        return cls(head, timestep=levels, noise=extractor.noise.policy, **settings)

    def _like(self, settings: dict[str, Any]) -> FeedbackExtractor:
        return FeedbackExtractor(self.head, **settings)

    def read(self, batch: ImageBatch, keep: Callable[[Tensor, str], None]) -> None:
        """See `FeatureExtractor.read`; two forwards, of which the second is read."""

        def run() -> Any:
            return self.denoiser.predict(batch.x_t, batch.level, batch.condition)

        first = self.passes.first(run)
        device = next(self.head.parameters()).device
        maps = {path: value.to(device) for path, value in first.features.items()}
        feedback = {path: value.to(batch.x_t.device) for path, value in self.head.feedback(maps).items()}
        self.passes.second(run, first, feedback, keep)


__all__ = ["FeedbackExtractor"]
