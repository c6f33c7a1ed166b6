"""`ProbeObjective`: cross-entropy of a head on the features of a frozen denoiser, in one forward or in two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.capture import FeedbackPasses, capture
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.pooling import leaves_maps
from diffusers_repr.heads import FeedbackHead
from diffusers_repr.heads.feedback_logits import feedback_logits, pooled_levels
from diffusers_repr.heads.fitting.protocols import Classifier
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective


class ProbeObjective(Objective):
    """Cross-entropy of a classifier's head; the denoiser is frozen and gets no gradient.

    Every image gets new noise at each level, and the levels go through the network as one batch. A `FeedbackHead` has
    its two forwards, the first without gradients; in the second they pass through the network to what is fed back.

    A batch has `class_labels` and `pixel_values`, or `layer_features`, layer path -> `(B, levels, ...)`, read before.

    Args:
        extractor: Its denoiser, layers, levels and pooling are the head's.
        head: New, in float32.
        condition: Prompt and class label of every image.
        extra: What is saved beside the head.
        mark: What else tells this run from another.

    Raises:
        ValueError: For a base in float16 under a head that is trained through it: gradients would vanish.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        head: Classifier,
        condition: tuple[str | None, int | None] = (None, None),
        *,
        extra: Sequence[Artifact] = (),
        mark: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        denoiser = extractor.denoiser
        self.extractor, self.denoiser, self.condition = extractor, denoiser, condition
        self.freeze_base(denoiser)
        self.head, self.extra, self.mark = head, list(extra), dict(mark or {})
        self.times = torch.tensor([float(level.timestep) for level in extractor.levels])
        self.passes: FeedbackPasses | None = None
        if isinstance(head, FeedbackHead):
            if denoiser.dtype == torch.float16:
                raise ValueError(
                    "The gradient of a feedback head passes through the base, where float16 loses small values; load "
                    "it in float32 or bfloat16 (base_dtype)."
                )
            pairs = (head.config["sources"], head.config["targets"])
            self.passes = FeedbackPasses(denoiser.model, *pairs, extractor.layers)

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """Loss and accuracy of a batch; its `noise` `(levels * B, ...)`, level by level, is taken instead of drawn."""
        logits, labels = self.logits(batch), batch["class_labels"]
        right = (logits.argmax(1) == labels).float().mean()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": right.detach()}

    def logits(self, batch: Batch) -> Tensor:
        """Of a batch, `(B, K)`."""
        if "layer_features" in batch:
            return self.head(self._inputs({k: v.transpose(0, 1) for k, v in batch["layer_features"].items()}))
        x_t, level, condition = self._noisy(batch)

        def run() -> Any:
            return self.denoiser.predict(x_t, level, condition)

        size = tuple(x_t.shape[2:])
        if self.passes is not None:
            assert isinstance(self.head, FeedbackHead)
            return feedback_logits(self.head, self.passes, run, self.denoiser, size, str(self.extractor.pooling))
        with torch.no_grad(), capture(self.denoiser.model, self.extractor.layers) as tape:
            run()
        pooled = pooled_levels(tape.features, self.denoiser, size, self.extractor.pooling, len(self.times))
        return self.head(self._inputs(pooled))

    def _noisy(self, batch: Batch) -> tuple[Tensor, Any, Any]:
        """What the network is called with: all images at the first level, then at the second."""
        pixels, levels = batch["pixel_values"], len(self.times)
        with torch.no_grad():
            clean = self.denoiser.encode_pixels(pixels).repeat(levels, *[1] * 3)
            noise = batch["noise"] if "noise" in batch else torch.randn_like(clean)
            level = self.denoiser.level(self.times.repeat_interleave(len(pixels)))
            size, (prompt, label) = (pixels.shape[2], pixels.shape[3]), self.condition
            condition = self.denoiser.condition(prompt, class_labels=label, batch=len(clean), size=size)
            return self.denoiser.add_noise(clean, level, noise), level, condition

    def _inputs(self, features: Mapping[str, Tensor]) -> Any:
        """What the head takes of features `(levels, B, ...)`."""
        if leaves_maps(self.extractor.pooling):
            return dict(features)
        parts = [features[path][at] for at in range(len(self.times)) for path in self.extractor.layers]
        return torch.cat(parts, dim=1)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """See `Objective`; labels must be ids of the head's classes.

        Raises:
            ValueError: If one is not.
        """
        labels = batch["class_labels"]
        if int(labels.min()) < 0 or int(labels.max()) >= self.head.config["num_classes"]:
            raise ValueError(
                f"Labels of a batch run from {int(labels.min())} to {int(labels.max())}; class ids run from 0 to "
                f"{self.head.config['num_classes'] - 1}."
            )

    def check_data(self, data: Any) -> None:
        """See `Objective`.

        Raises:
            ValueError: Without classes; for one class, labels outside of the classes, and classes without an image.
        """
        labels = getattr(data, "labels", None)
        if not data.class_names:
            raise ValueError("The data have no classes; name a column of them by --label_column.")
        if labels is None:
            return
        found = np.unique(labels)
        if len(found) < 2:
            raise ValueError(f"All {len(labels)} training labels are {int(found[0])}; a classifier needs two classes.")
        if int(found[0]) < 0 or int(found[-1]) >= self.head.config["num_classes"]:
            raise ValueError(
                f"The training labels run from {int(found[0])} to {int(found[-1])}; class ids run from 0 to "
                f"{self.head.config['num_classes'] - 1}."
            )
        names = list(data.class_names)
        absent = [names[at] for at in sorted(set(range(len(names))) - set(found.tolist()))]
        if absent:
            raise ValueError(f"Classes {absent[:10]} have no image in the training data; leave them out.")

    def identity(self) -> dict[str, Any]:
        """What `mark` says."""
        return dict(self.mark)

    def artifacts(self) -> Sequence[Artifact]:
        """The head as the folder itself, and what goes with it."""
        return [ModelArtifact(self.head, "head"), *self.extra]


__all__ = ["ProbeObjective"]
