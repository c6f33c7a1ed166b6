"""`PanopticPredictor`: from images and names to segments, by a head of ODISE, its base and CLIP; and how good."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.data.masked import image_size
from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.images import image_items
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads import OdiseHead
from diffusers_repr.heads.odise.classification import (
    cosine_logits,
    geometric_ensemble,
    merge_synonyms,
    with_background,
)
from diffusers_repr.heads.odise.vocabulary import TEMPLATE, Vocabulary
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics import ConfusionMatrix, panoptic_inference, panoptic_quality, semantic_inference
from diffusers_repr.tasks.panoptic_output import PanopticOutput

# Weight of CLIP for classes of the training and for others, of the label and of the caption model (ODISE's configs).
LABEL_WEIGHTS, CAPTION_WEIGHTS = (0.30, 0.70), (0.35, 0.65)


@dataclass(frozen=True)
class PanopticPredictor:
    """Segments of images, and what they are worth. Each mask is classified twice, by the head and by CLIP (MaskCLIP).

    Attributes:
        head: Trained, or in training.
        denoiser: Its base.
        towers: CLIP.
        trained_on: Vocabulary of the training; classes that share no name with it count as new.
        weights: CLIP's share for classes of the training and for new ones; 0 leaves it out.
        template: Of the prompts, with `{}` for the name.
        batch_size: Windows read at a time; all of an image if None.

    Raises:
        ValueError: For a CLIP of other vectors, and weights outside of [0, 1].
    """

    head: OdiseHead
    denoiser: Denoiser
    towers: ImageTextEncoder
    trained_on: Vocabulary
    weights: Sequence[float] = LABEL_WEIGHTS
    template: str = TEMPLATE
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.head.config["text_dim"] != self.towers.dim:
            raise ValueError(
                f"The head was trained with vectors of {self.head.config['text_dim']} values; this CLIP gives "
                f"{self.towers.dim}. Pass the CLIP it was trained with: clip=<folder or Hub id>."
            )
        if len(self.weights) != 2 or not all(0 <= weight <= 1 for weight in self.weights):
            raise ValueError(
                f"weights are two numbers in [0, 1], for known and for new classes; got {self.weights!r}."
            )
        if self.batch_size is not None:
            check_whole("batch_size", self.batch_size)

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        words: Vocabulary,
        *,
        short_side: int | None = None,
        overlap: float = 0.8,
        threshold: float = 0.0,
    ) -> PanopticOutput:
        """As `OpenVocabularySegmenter`."""
        items = image_items(images)
        if not items:
            raise ValueError("No images: the list is empty. Pass at least one PIL image, array or tensor.")
        self.towers.check_words([name for names in words.classes for name in names])
        texts = self.towers.embed_texts(words.prompts(self.template))
        maps, scores, class_maps = [], [], []
        for item in items:
            probabilities, masks = self.queries(item, words, texts, short_side)
            found, values = panoptic_inference(probabilities, masks, words.stuff, overlap=overlap, threshold=threshold)
            maps.append(found)
            scores.append(values)
            class_maps.append(semantic_inference(probabilities, masks).argmax(0).cpu())
        return PanopticOutput(maps, scores, class_maps, words.names)

    def measure(
        self, images: Iterable[Any], truth: Iterable[PanopticMap], words: Vocabulary, **options: Any
    ) -> dict[str, float]:
        """Panoptic quality and mean IoU on annotated images.

        Args:
            images: As in a call.
            truth: One an image, of its size; classes are numbered as in the vocabulary.
            words: The vocabulary.
            **options: As in a call.

        Returns:
            `pq`, `sq`, `rq` and `mean_iou`, means over the classes that occur; `pq_known` and `pq_new`, of those whose
            names the training had and had not, where such occur; `rows`.

        Raises:
            ImportError: Without torchmetrics.
            ValueError: As a call; for sizes and classes that do not fit.
        """
        true, output = list(truth), self(list(images), words, **options)
        scores = panoptic_quality(output.maps, true, len(words.classes))
        matrix = ConfusionMatrix(len(words.classes), ignore_index=-1)
        for found, one in zip(output.class_maps, true, strict=True):
            matrix.update(found, one.class_map(void=-1))
        result = {
            "pq": scores.mean(),
            "sq": float(scores.segmentation_quality().nanmean()),
            "rq": float(scores.recognition_quality().nanmean()),
            "mean_iou": matrix.mean_iou(),
        }
        known = words.known(self.trained_on)
        for name, wanted in (("pq_known", True), ("pq_new", False)):
            rows = [at for at, own in enumerate(known) if own is wanted]
            if rows and bool(scores.panoptic_quality()[rows].isfinite().any()):
                result[name] = scores.mean(rows)
        return {**result, "rows": float(len(true))}

    def queries(self, image: Any, words: Vocabulary, texts: Tensor, short_side: int | None) -> tuple[Tensor, Tensor]:
        """Class probabilities `(Q, K + 1)` and mask probabilities `(Q, H, W)` of an image.

        Args:
            image: The image.
            words: The vocabulary.
            texts: CLIP's vectors of its prompts.
            short_side: As in a call.
        """
        size = image_size(image)
        pixels = self.denoiser.pixels(image, "keep")
        if short_side is not None:
            factor = check_whole("short_side", short_side) / min(size)
            sized = (max(round(size[0] * factor), 1), max(round(size[1] * factor), 1))
            pixels = functional.interpolate(pixels, sized, mode="bilinear", align_corners=False, antialias=True)
        height, width = pixels.shape[2:]
        coarsest = self.head.pyramid.strides[-1]
        padded = functional.pad(pixels, (0, -width % coarsest, 0, -height % coarsest))
        levels = self.head.levels(self.denoiser, self.towers, padded, self.batch_size)
        found, logits = self.head(levels, texts, words.counts, return_dict=False)
        masks = functional.interpolate(found[-1], tuple(padded.shape[2:]), mode="bilinear", align_corners=False)
        masks = masks[:, :, :height, :width]
        probabilities = self._classes(pixels, masks.sigmoid(), logits[-1], words, texts)
        if (height, width) != size:
            masks = functional.interpolate(masks, size, mode="bilinear", align_corners=False)
        return probabilities[0], masks[0].sigmoid()

    def _classes(self, pixels: Tensor, masks: Tensor, logits: Tensor, words: Vocabulary, texts: Tensor) -> Tensor:
        """`(B, Q, K + 1)`: the head's probabilities, joined with CLIP's, and those of the background."""
        own, background = logits[..., :-1].softmax(-1), logits.softmax(-1)[..., -1]
        if any(self.weights):
            vectors = self.towers.embed_masks(pixels, masks)
            clip = merge_synonyms(cosine_logits(vectors, texts, self.towers.scale), words.counts).softmax(-1)
            shares = [self.weights[0] if known else self.weights[1] for known in words.known(self.trained_on)]
            own = geometric_ensemble(own, clip, torch.tensor(shares, device=own.device))
        return with_background(own, background)


__all__ = ["CAPTION_WEIGHTS", "LABEL_WEIGHTS", "PanopticPredictor"]
