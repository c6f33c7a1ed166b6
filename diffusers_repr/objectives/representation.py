"""`RepresentationObjective`: the denoising loss on vectors, of any network of vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.assign import Assigner
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact, PipelineArtifact
from diffusers_repr.objectives.base import Batch
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.times import TimeSampler

COLUMN = "condition"


class RepresentationObjective(DiffusionObjective):
    """Diffusion of vectors `(B, D)`: representations (RCG, Li et al. 2023, arXiv 2312.03701), latents of one vector.

    `mean |f(alpha z + sigma eps, t) - target|^2`; the target is z itself in RCG, and whatever the scheduler's
    `prediction_type` says. Classes are dropped to the null class as in every diffusion. Saved as an `RCGPipeline` of
    the vectors alone, the assigner beside it in `assigner/`.

    Args:
        denoiser: `Denoiser(RepresentationMLPModel(...), scheduler)`, or another network of a family without axes.
        column: Of the batch that holds the vectors, raw or ready.
        encoder: Take the global features of this encoder (`features_global` of a batch) in place of the column.
        assigner: Fitted, of vectors: standardises what the batch holds; None for vectors that are ready.
        time_sampling: How noise levels are drawn.
        label_dropout: Probability that a class becomes null, of a network with classes.
        id2label: Names of the classes, for the pipeline.

    Raises:
        TypeError: For what is no assigner.
        ValueError: For a network of images, an assigner that gives no vectors, is not fitted or has another width, and
            labels to be dropped without a null class.
    """

    card = {
        "kind": "diffusion model of representations",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "diffusers-repr", "representations"],
    }

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        column: str = COLUMN,
        encoder: str | None = None,
        assigner: Assigner | None = None,
        time_sampling: TimeSampler | None = None,
        label_dropout: float = 0.1,
        id2label: Mapping[Any, str] | None = None,
    ) -> None:
        conditional = denoiser.conditioner.conditional
        super().__init__(denoiser, time_sampling=time_sampling, label_dropout=label_dropout if conditional else 0.0)
        self.column, self.encoder, self.id2label = column, encoder, id2label
        if assigner is not None:
            self.freeze("assigner", self._checked(assigner))

    @property
    def assigner(self) -> Assigner | None:
        """What standardises the vectors."""
        return self.frozen.get("assigner")

    def _checked(self, assigner: Assigner) -> Assigner:
        if not isinstance(assigner, Assigner):
            raise TypeError(f"assigner is an Assigner of vectors, or None; got {type(assigner).__name__}.")
        width = self.denoiser.family.channels()
        if assigner.gives != "vector" or not bool(assigner.fitted) or assigner.null.shape != (width,):
            raise ValueError(
                f"The assigner is a fitted one that gives vectors of {width} channels; got one "
                f"({type(assigner).__name__}) that gives {assigner.gives} (fitted: {bool(assigner.fitted)})."
            )
        return assigner

    def check_denoiser(self, denoiser: Denoiser) -> None:
        """Refuse networks of images.

        Raises:
            ValueError: With the network.
        """
        if denoiser.family.axes:
            raise ValueError(
                f"RepresentationObjective trains networks of vectors; {type(denoiser.model).__name__} makes images: "
                "DiffusionObjective."
            )

    def vectors(self, batch: Mapping[str, Any]) -> Tensor:
        """The vectors of a batch, as it holds them.

        Raises:
            ValueError: If there are none.
        """
        held = batch if self.encoder is None else batch.get("features_global", {})
        name = self.encoder or self.column
        if not isinstance(held.get(name), Tensor):
            place = "column" if self.encoder is None else "global features of an encoder"
            raise ValueError(f"The batch has no {place} {name!r}; it has {', '.join(map(str, held)) or 'none'}.")
        return held[name]

    def clean(self, batch: Batch) -> Tensor:
        """The vectors, standardised, float32."""
        vectors = self.vectors(batch).float()
        return vectors if self.assigner is None else self.assigner.assign(vectors)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """The vectors must be there, finite and of the network's width, and the classes in range.

        Raises:
            ValueError: Naming what is wrong.
        """
        super().check_batch(batch)
        vectors, width = self.vectors(batch), self.denoiser.family.channels()
        if self.assigner is not None:
            width = self.assigner.in_features
        if vectors.ndim != 2 or vectors.shape[1] != width or not vectors.is_floating_point():
            raise ValueError(f"The vectors are floats (B, {width}); got {tuple(vectors.shape)}, {vectors.dtype}.")
        if not bool(torch.isfinite(vectors).all()):
            raise ValueError("The vectors have NaN or infinite values.")

    def identity(self) -> dict[str, Any]:
        """With the assigner's fingerprint."""
        own = {"vectors": self.encoder or self.column}
        return {
            **super().identity(),
            **own,
            "assigner": None if self.assigner is None else self.assigner.fingerprint(),
        }

    def artifacts(self) -> list[Artifact]:
        """The pipeline of the vectors, and the assigner."""
        parts: dict[str, Any] = {
            "prior": ModelArtifact(self.network, "network"),
            "prior_scheduler": self.denoiser.scheduler,
        }
        parts |= {} if self.id2label is None else {"id2label": dict(self.id2label)}
        beside = [] if self.assigner is None else [FixedArtifact(self.assigner, folder="assigner")]
        return [PipelineArtifact("RCGPipeline", parts), *beside]


__all__ = ["RepresentationObjective"]
