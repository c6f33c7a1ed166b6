"""Which point of one image is which of another, by any diffusion pipeline. Needs `pip install diffusers-repr`.

`DiffusionPipeline.from_pretrained(X, custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is
an ordinary pipeline folder or Hub id of one of the families that diffusers_repr knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_repr.denoiser.any_pipeline import AnyPipelineMixin
from diffusers_repr.features import FeatureSource
from diffusers_repr.features.presets import Preset
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.tasks.correspondence import Correspondence
from diffusers_repr.tasks.correspondence_source import correspondence_source
from diffusers_repr.tasks.image_features import fill_prompt
from diffusers_repr.tasks.matches import Matches


class CorrespondencePipeline(AnyPipelineMixin, DiffusionPipeline):
    """Finds points of one image in another by the features of a diffusion model (DIFT, arXiv 2306.03881).

    It holds the components and settings of the pipeline it is loaded from (see `AnyPipelineMixin`).
    """

    @torch.no_grad()
    def __call__(
        self,
        source: Any,
        target: Any,
        points: Any = None,
        target_points: Any = None,
        layer: str | None = None,
        timestep: int | float | NoiseLevel | None = None,
        preset: str | Preset | None = None,
        prompt: str | Sequence[str] | None = None,
        category: str | None = None,
        class_labels: int | Sequence[int] | None = None,
        embeddings: Mapping[str, Any] | None = None,
        features: FeatureSource | None = None,
        likeness: str = "cosine",
        cycle: bool = False,
        similarity: bool = False,
        **settings: Any,
    ) -> Matches:
        """Matches of points, or of what chooses each other.

        Args:
            source: PIL image, numpy array or tensor, of any size.
            target: The same, of any size.
            points: N times (x, y) in pixels of the source, the centre of the first pixel at (0, 0). None: cells of
                both images that choose each other.
            target_points: Candidates in the target; then mutual nearest neighbours are matched.
            layer: Full module path; the preset's, or a default of ours, if None.
            timestep: Training timestep or `NoiseLevel` (larger is noisier); likewise.
            preset: `dift`, `dift-hpatches`, ... or a `Preset`; DIFT's for SPair-71k if None and nothing is chosen.
            prompt: One for both images or one each; the preset's if None.
            category: Of the object, put where the prompt, yours or the preset's, has `{category}`.
            class_labels: One id for both images or one each; the null class if None.
            embeddings: Ready network inputs, for both images.
            features: Another source of features of this model, such as a tuned or learned one; then layer, timestep,
                preset and settings are its own.
            likeness: Of mutual neighbours: `cosine` or `l2`.
            cycle: Match back, and tell by how many pixels the way back misses.
            similarity: Keep the similarity map of every point.
            **settings: Further arguments of `FeatureExtractor`: `ensemble_size`, `image_size`, `noise`, `seed`,
                `batch_size`, `sample_posterior`, ...

        Returns:
            `.matches`, `.scores`, `.plot()`, `.homography()`, `.to_dict()`; see `Matches`.

        Raises:
            ValueError: For points outside of their image, and options that do not go together.
        """
        if features is None:
            given = {"progress_bar": self.progress_bar, **settings}
            features, own = correspondence_source(self.denoiser, layer, timestep, preset, **given)
            if prompt is None:
                prompt = own if category is not None else fill_prompt(own, None)
        elif settings or layer is not None or timestep is not None or preset is not None:
            raise ValueError(
                "features= has a layer, a timestep and settings of its own; those of the call would change nothing. "
                "Leave them out."
            )
        prompt = prompt if category is None else _with_category(prompt, category)
        found = Correspondence(features)(
            source,
            target,
            points,
            target_points,
            prompt=prompt,
            class_labels=class_labels,
            embeddings=embeddings,
            likeness=likeness,  # type: ignore[arg-type]
            cycle=cycle,
            similarity=similarity,
        )
        self.maybe_free_model_hooks()
        return found


def _with_category(prompt: str | Sequence[str] | None, category: str) -> Any:
    """One prompt or two with the name of the object in its place; ValueError if none has a place for it."""
    texts = [prompt] if prompt is None or isinstance(prompt, str) else list(prompt)
    if not any("{category}" in (text or "") for text in texts):
        raise ValueError(
            f"category={category!r} has no place in the prompt ({prompt!r}) and would change nothing. Pass "
            'prompt="a photo of a {category}" to a text model, or leave category out.'
        )
    filled = [fill_prompt(text, category) for text in texts]
    return filled[0] if isinstance(prompt, str) else filled
