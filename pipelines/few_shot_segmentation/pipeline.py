"""Masks of images from a few annotated ones, by any diffusion pipeline. Needs `pip install diffusers-repr`.

`DiffusionPipeline.from_pretrained(X, custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is
an ordinary pipeline folder or Hub id of one of the families that diffusers_repr knows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_repr.denoiser.any_pipeline import AnyPipelineMixin
from diffusers_repr.tasks import SegmentationOutput, Segmenter


class FewShotSegmentationPipeline(AnyPipelineMixin, DiffusionPipeline):
    """Gives every pixel of images a class, learned from a few images with masks (DDPM-Seg, arXiv 2112.03126).

    It holds the components and settings of the pipeline it is loaded from (see `AnyPipelineMixin`).
    """

    def fit(self, images: Any, masks: Any, **settings: Any) -> Segmenter:
        """Learn from annotated images.

        Args:
            images: PIL images, numpy arrays or tensors.
            masks: One per image, of its size: class ids of its pixels, as PIL images or arrays `(H, W)`; 255 where
                there is no class.
            **settings: Arguments of `Segmenter.fit`: `label_names`, `layers`, `timestep`, `preset`, `members`, ...

        Returns:
            A `Segmenter`, which can be saved, measured, and passed to a call.

        Raises:
            ValueError, TypeError: As `Segmenter.fit`.
        """
        found = Segmenter.fit(self.denoiser, (images, masks), **{"progress_bar": self.progress_bar, **settings})
        self.maybe_free_model_hooks()
        return found

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        examples: tuple[Any, Any] | None = None,
        segmenter: Segmenter | str | os.PathLike[str] | None = None,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | None = None,
        **settings: Any,
    ) -> SegmentationOutput:
        """Segment images.

        Args:
            images: PIL images, numpy arrays or tensors of any size.
            examples: `(images, masks)` to learn from, as `fit` takes them; what is learned is not kept.
            segmenter: From `fit`, or a folder or Hub id of one, in place of examples.
            prompt: One for all images or one per image; with `examples` one, which they are read with as well.
            class_labels: Condition of a class-conditional model, one for all images.
            **settings: With `examples`: arguments of `fit`.

        Returns:
            `.masks`, class ids at the images' sizes; `.uncertainty` of every pixel; `.scores` of every image;
            `.pictures(images)`.

        Raises:
            ValueError: Unless one of examples and segmenter is given; for a segmenter of another base, and for several
                prompts with examples.
        """
        if (examples is None) == (segmenter is None):
            raise ValueError("Pass examples=(images, masks) to learn from, or segmenter=..., one of the two.")
        if examples is not None:
            if prompt is not None and not isinstance(prompt, str):
                raise ValueError(
                    "With examples pass one prompt: they are read with it too. Or fit first: pipe.fit(...)."
                )
            segmenter = self.fit(*examples, prompt=prompt, class_labels=class_labels, **settings)
        elif settings:
            raise ValueError(f"{', '.join(settings)}: settings of `fit`, which a fitted segmenter has already.")
        elif isinstance(segmenter, Segmenter):
            segmenter = segmenter.on(self.denoiser)
        else:
            assert segmenter is not None
            segmenter = Segmenter.from_pretrained(segmenter, base=self.denoiser)
        found = segmenter(images, prompt, class_labels)
        self.maybe_free_model_hooks()
        return found
