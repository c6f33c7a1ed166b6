"""`JointObjective`: denoising and classification by one network; what JDM and HybViT share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.data.transforms import augment
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.objectives.base import Batch
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.noisy import NoisyBatch

# Labels (B,), each with its share in the target of a row.
Targets = list[tuple[Tensor, float]]
LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
CLASSIFIED = ("clean", "noised", "both")
UNLABELLED = -1


class JointObjective(DiffusionObjective):
    """`generation_weight` x denoising loss + `classification_weight` x cross-entropy.

    Rows with the label -1 are unlabelled: they denoise and have no part in the cross-entropy, which is the mean over
    the labelled rows of the micro-batch, and 0 where there are none. Every parameter is in the graph of every step,
    so the objective may be distributed as it is.

    Args:
        denoiser: Of a network that takes no class.
        classification_weight: Of the cross-entropy.
        generation_weight: Of the denoising loss.
        loss: `l2` or `l1`, of what the network predicts.
        classify: `clean`: x_0, in one more pass; `noised`: x_t at its time, in the pass that denoises; `both`.
        label_smoothing: Share of the target that is spread over all classes.
        mixup: a of Beta(a, a), by which clean images and their targets are mixed in pairs (Zhang et al. 2017, arXiv
            1710.09412); 0: none.
        flip, rotation, shift, scale: Augmentation of the classified clean images on top of the data's own, as
            `training.transforms.augment` takes it.
        **options: `time_sampling`, `losses` and `encoders` of `DiffusionObjective`.

    Logs: `<output>_mse` or `<output>_l1` (`eps_mse` for a network that predicts epsilon), `ce`, `accuracy` of the
    labelled rows as they were trained on, `labelled`, their share; with `both`, `ce_noised`.

    Raises:
        ValueError: For weights below 0, settings that exclude one another, a network that takes classes.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        classification_weight: float,
        generation_weight: float = 1.0,
        loss: Literal["l1", "l2"] = "l2",
        classify: Literal["clean", "noised", "both"] = "clean",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        flip: bool = False,
        rotation: float = 0.0,
        shift: float = 0.0,
        scale: float = 0.0,
        **options: Any,
    ) -> None:
        output = denoiser.schedule.output
        self.loss_name = f"{'eps' if output == 'epsilon' else output}_{'l1' if loss == 'l1' else 'mse'}"
        self.own_losses = ("loss", self.loss_name, "ce", "ce_noised", "accuracy", "labelled")
        super().__init__(denoiser, label_dropout=0.0, **options)
        if self.conditioner.conditional:
            raise ValueError(
                f"This {type(self.network).__name__} is told the class (or a text); a joint model finds it. Build it "
                "without classes."
            )
        self.weights = {"generation": generation_weight, "classification": classification_weight}
        if min(self.weights.values()) < 0 or not 0 <= label_smoothing < 1 or mixup < 0:
            raise ValueError(
                "Weights and mixup are at least 0 and label_smoothing from 0 to below 1; got "
                f"{self.weights}, mixup={mixup}, label_smoothing={label_smoothing}."
            )
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}; it is one of {', '.join(LOSSES)}.")
        if classify not in CLASSIFIED:
            raise ValueError(f"classify={classify!r}; it is one of {', '.join(CLASSIFIED)}.")
        self.flip, self.geometry = flip, (rotation, shift, scale)
        if classify == "noised" and (mixup or flip or any(self.geometry)):
            raise ValueError(
                "classify='noised' classifies the images that are denoised, so mixup, flip, rotation, shift and scale "
                "would not act on it. Augment the data instead."
            )
        self.loss, self.classify = loss, classify
        self.label_smoothing, self.mixup = label_smoothing, mixup

    # What a network defines

    @property
    def classes(self) -> int:
        """Number of classes of the classifier."""
        raise NotImplementedError

    def denoise_and_classify(self, noisy: NoisyBatch) -> tuple[Tensor, Tensor]:
        """Prediction and logits of x_t, in one pass."""
        raise NotImplementedError

    def classify_clean(self, x0: Tensor) -> Tensor:
        """Logits `(B, K)` of clean data."""
        raise NotImplementedError

    # Loss

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """See the class."""
        noisy, labels = self.noised(batch), batch["class_labels"]
        found: dict[str, tuple[Tensor, Targets]] = {}
        if self.classify != "noised":
            images, targets = self.clean_view(noisy.x0, labels)
            found["ce"] = self.classify_clean(images), targets
        with self.losses.recording() as recorded:
            if self.classify == "clean":
                prediction = self.predict(noisy)
            else:
                prediction, logits = self.denoise_and_classify(noisy)
        if self.classify != "clean":
            found["ce_noised" if found else "ce"] = logits, [(labels, 1.0)]
        terms = {self.loss_name: LOSSES[self.loss](prediction, noisy.target)}
        terms |= {name: masked_cross_entropy(*pair, self.label_smoothing) for name, pair in found.items()}
        labelled = (labels != UNLABELLED).float()
        hits = (found["ce"][0].argmax(1) == labels).float().sum()
        return {
            **self.combine(terms, self.observation(noisy, prediction, recorded)),
            "accuracy": hits / labelled.sum().clamp(min=1),
            "labelled": labelled.mean(),
        }

    def loss_weights(self) -> dict[str, float]:
        """With those of both losses."""
        classification = self.weights["classification"]
        own = {self.loss_name: self.weights["generation"], "ce": classification, "ce_noised": classification}
        return {**super().loss_weights(), **own}

    def clean_view(self, x0: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
        """The images to be classified, augmented and mixed, and their targets: labels, each with its share.

        The draws come from torch's global generators, as those of the data's augmentation.
        """
        images = augment(x0, self.flip, *self.geometry)
        if not self.mixup:
            return images, [(labels, 1.0)]
        share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        share = max(share, 1 - share)  # so that accuracy is that of a row's main label
        order = torch.randperm(len(images)).to(images.device)
        return share * images + (1 - share) * images[order], [(labels, share), (labels[order], 1 - share)]

    # Checks

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Labels must be there, each of a class or -1; and what the encoders need.

        Raises:
            ValueError: Naming the label and the allowed range, or what is missing.
        """
        self.check_encoders(batch)
        labels = batch.get("class_labels")
        if labels is None:
            raise ValueError(
                f"{type(self).__name__} classifies, and the data have no class_labels; name a column by label_column "
                f"({UNLABELLED} is for rows without a class)."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < UNLABELLED or high >= self.classes:
            raise ValueError(
                f"A batch has class_labels from {low} to {high}; the classifier's are 0 to {self.classes - 1}, and "
                f"{UNLABELLED} for rows without one. Check label_column, or build it with as many classes as the data "
                "have."
            )

    def check_data(self, data: Any) -> None:
        """The classes of the data must be those of the classifier.

        Raises:
            ValueError: Naming both numbers.
        """
        classes = getattr(data, "num_classes", None)
        if classes is not None and classes != self.classes:
            raise ValueError(
                f"The data have {classes} classes, the classifier has {self.classes}; build it with as many."
                + ("" if classes else " Name the column of classes by label_column.")
            )

    def preview(self, pipe: Any, count: int, generator: torch.Generator, steps: int) -> list[Any]:
        """Samples without guidance."""
        return pipe(batch_size=count, generator=generator, num_inference_steps=steps).images


def masked_cross_entropy(logits: Tensor, targets: Targets, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over labelled rows; 0, and not NaN, where there are none.

    Args:
        logits: `(B, K)`.
        targets: Labels `(B,)`, -1 for none, each with its share in the target of a row.
        label_smoothing: Share of the target that is spread over all classes.

    Example:
        >>> masked_cross_entropy(torch.zeros(2, 4), [(torch.tensor([1, -1]), 1.0)])
        tensor(1.3863)
        >>> masked_cross_entropy(torch.zeros(1, 4), [(torch.tensor([-1]), 1.0)])
        tensor(0.)
    """
    total = weight = torch.zeros((), device=logits.device)
    for labels, share in targets:
        known = (labels != UNLABELLED).float()
        losses = F.cross_entropy(
            logits.float(), labels.clamp(min=0), reduction="none", label_smoothing=label_smoothing
        )
        total, weight = total + share * (known * losses).sum(), weight + share * known.sum()
    return total / torch.where(weight > 0, weight, 1.0)


__all__ = ["UNLABELLED", "JointObjective", "masked_cross_entropy"]
