"""What is on an image, without training, by a conditional diffusion pipeline. Needs `pip install diffusers-repr`.

`DiffusionPipeline.from_pretrained(X, custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is
an ordinary text-to-image or class-conditional folder or Hub id of one of the families that diffusers_repr knows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_repr.denoiser.any_pipeline import AnyPipelineMixin
from diffusers_repr.tasks import ZeroShotClassifier, ZeroShotOutput


class DiffusionClassifierPipeline(AnyPipelineMixin, DiffusionPipeline):
    """Classifies images by the errors of the denoiser under each class's condition (arXiv 2303.16203).

    It holds the components and settings of the pipeline it is loaded from (see `AnyPipelineMixin`).
    """

    def load_classifier(self, id_or_folder: str | os.PathLike[str], **options: Any) -> ZeroShotClassifier:
        """A saved classifier on this pipeline's model.

        Args:
            id_or_folder: What `ZeroShotClassifier.save_pretrained` wrote, or a Hub id.
            **options: Arguments of `ZeroShotClassifier.from_pretrained`.

        Raises:
            ValueError: If it was made for another model.
        """
        return ZeroShotClassifier.from_pretrained(id_or_folder, self.denoiser, **options)

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        classes: Any = None,
        template: str | Sequence[str] = "a photo of a {}.",
        rule: Any = "racing",
        loss: str | None = None,
        ensemble: str = "mean",
        classifier: ZeroShotClassifier | str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> ZeroShotOutput:
        """Classes of images.

        Args:
            images: PIL images, numpy arrays or tensors of any size.
            classes: Names, a mapping of names to prompts, or class ids; None: all of a class-conditional model.
            template: Puts names into words; several give several prompts a class.
            rule: `racing`, `averaging`, a data set of the paper's schedules (`cifar10`, `pets`, ...), or a `Rule`.
            loss: `l2`, `l1`, `huber` or `vlb`; the preset's, else `l2`, if None.
            ensemble: `mean` over the prompts of a class, or its `best`.
            classifier: From `load_classifier`, or a folder or Hub id; then all else is its own.
            **settings: Further arguments of `ZeroShotClassifier.of`: `image_size`, `resize`, `seed`, `batch_size`.

        Returns:
            `.labels`, `.errors`, `.confidence`, `.evaluations`, `.plot(at)`; see `ZeroShotOutput`.

        Raises:
            ValueError: For a model without condition, classes that are none, and a classifier with settings beside it.
        """
        if classifier is None:
            made = ZeroShotClassifier.of(
                self.denoiser, classes, template=template, rule=rule, loss=loss, ensemble=ensemble, **settings
            )
        elif classes is not None or settings:
            raise ValueError("classifier= has classes and settings of its own; leave out those of the call.")
        else:
            made = classifier if isinstance(classifier, ZeroShotClassifier) else self.load_classifier(classifier)
            if made.denoiser.model is not self.denoiser.model:
                raise ValueError("This classifier is of another pipeline; take load_classifier(...) of this one.")
        found = made(images)
        self.maybe_free_model_hooks()
        return found
