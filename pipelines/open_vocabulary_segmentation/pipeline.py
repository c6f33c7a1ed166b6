"""Segments of images under any names, by a text-to-image pipeline (ODISE). Needs `pip install diffusers-repr`.

`DiffusionPipeline.from_pretrained(X, custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is
an ordinary folder or Hub id of Stable Diffusion 1 or 2, or another pipeline of a U-Net with text.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_repr.denoiser.any_pipeline import AnyPipelineMixin
from diffusers_repr.tasks import OpenVocabularySegmenter, PanopticOutput


class OpenVocabularySegmentationPipeline(AnyPipelineMixin, DiffusionPipeline):
    """Gives segments of images names in words (ODISE, arXiv 2303.04803), by a head that was trained on this model.

    It holds the components and settings of the pipeline it is loaded from (see `AnyPipelineMixin`).
    """

    def load_head(
        self, head: str | os.PathLike[str], clip: str | os.PathLike[str] | None = None, **options: Any
    ) -> OpenVocabularySegmenter:
        """A trained head on this pipeline's model.

        Args:
            head: Folder or Hub id, what `examples/train_odise.py` wrote.
            clip: Folder or Hub id of the CLIP it was trained with; the recorded one if None.
            **options: Arguments of `OpenVocabularySegmenter`: `weights`, `template`, `batch_size`, ...

        Raises:
            ValueError, TypeError: For a head of another model, or a pipeline without text.
        """
        return OpenVocabularySegmenter.from_pretrained(head, self.denoiser, clip, **options)

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        vocabulary: Sequence[str | Sequence[str]] | None = None,
        head: OpenVocabularySegmenter | str | os.PathLike[str] | None = None,
        clip: str | os.PathLike[str] | None = None,
        short_side: int | None = None,
    ) -> PanopticOutput:
        """Segment images.

        Args:
            images: PIL images, numpy arrays or tensors of any size.
            vocabulary: Names of what may be on them, synonyms parted by commas; those of the training if None.
            head: From `load_head`, or a folder or Hub id.
            clip: As in `load_head`.
            short_side: Length to which the shorter side is brought; as it is if None.

        Returns:
            `.maps`, the segments of each image; `.segments(at)`, their names and sizes; `.class_maps`;
            `.pictures(images)`.

        Raises:
            ValueError: Without a head; as `OpenVocabularySegmenter`.
        """
        if head is None:
            raise ValueError("Pass head=..., what examples/train_odise.py wrote: nothing is segmented without one.")
        segmenter = head if isinstance(head, OpenVocabularySegmenter) else self.load_head(head, clip)
        if segmenter.denoiser.model is not self.denoiser.model:
            raise ValueError("This head was loaded on another pipeline; take load_head(...) of this one.")
        found = segmenter(images, vocabulary, short_side=short_side)
        self.maybe_free_model_hooks()
        return found
