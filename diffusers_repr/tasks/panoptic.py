"""`OpenVocabularySegmenter`: segments of images under any names, by a trained head of ODISE on its base."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
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
from diffusers_repr.pictures.masks import mask_over

# Weight of CLIP for classes of the training and for others, of the label and of the caption model (ODISE's configs).
LABEL_WEIGHTS, CAPTION_WEIGHTS = (0.30, 0.70), (0.35, 0.65)


@dataclass(frozen=True)
class PanopticOutput:
    """What is where in a batch of images.

    Attributes:
        maps: Of each image its segments, at the image's own size.
        scores: Of each image, id of a segment -> probability of its class.
        class_maps: Of each image the class of every pixel, `(H, W)` int64: the sum over all queries decides, so that
            no pixel is void.
        names: Of the classes.
    """

    maps: list[PanopticMap]
    scores: list[dict[int, float]]
    class_maps: list[Tensor]
    names: tuple[str, ...]

    def segments(self, at: int = 0) -> list[tuple[str, float, int]]:
        """(name, score, pixels) of each segment of an image, the largest first."""
        found = self.maps[at]
        rows = [
            (self.names[label], self.scores[at][number], int((found.ids == number).sum()))
            for number, label in found.classes.items()
        ]
        return sorted(rows, key=lambda row: -row[2])

    def pictures(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Each image with its segments over it, every segment in a colour of its own; void is left as it is.

        Args:
            images: Those that were segmented, as PIL images.
        """
        return [
            mask_over(image, one.ids.numpy().astype(np.int64), max(one.classes, default=0) + 1)
            for image, one in zip(images, self.maps, strict=True)
        ]


class OpenVocabularySegmenter:
    """Panoptic segmentation by names in words (ODISE, arXiv 2303.04803): a trained head, its base, and CLIP.

    Each mask is classified twice, by the head and by CLIP's own vector of it (MaskCLIP); a class whose names were
    learned trusts the head more, another CLIP.

    Args:
        head: The trained head.
        denoiser: The frozen text-to-image model it was trained on.
        towers: The CLIP it was trained with.
        trained_on: Vocabulary of the training; classes that share no name with it count as new.
        weights: CLIP's share for classes of the training and for new ones; 0 leaves it out.
        template: Of the prompts, with `{}` for the name.
        batch_size: Windows read at a time; all of an image if None.

    Raises:
        TypeError, ValueError: For a base or a CLIP that is not the head's, and weights outside of [0, 1].
    """

    def __init__(
        self,
        head: OdiseHead,
        denoiser: Denoiser,
        towers: ImageTextEncoder,
        trained_on: Vocabulary,
        weights: tuple[float, float] = LABEL_WEIGHTS,
        template: str = TEMPLATE,
        batch_size: int | None = None,
    ) -> None:
        head.check_base(denoiser)
        if head.config["text_dim"] != towers.dim:
            raise ValueError(
                f"The head was trained with vectors of {head.config['text_dim']} values; this CLIP gives {towers.dim}."
            )
        if len(weights) != 2 or not all(0 <= weight <= 1 for weight in weights):
            raise ValueError(f"weights are two numbers in [0, 1], for known and for new classes; got {weights!r}.")
        self.head, self.denoiser, self.towers, self.trained_on = head.eval(), denoiser, towers, trained_on
        self.weights, self.template = weights, template
        self.batch_size = None if batch_size is None else check_whole("batch_size", batch_size)

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike[str],
        base: Denoiser | str | os.PathLike[str] | None = None,
        clip: ImageTextEncoder | str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        **options: Any,
    ) -> OpenVocabularySegmenter:
        """What `examples/train_odise.py` wrote, with its base and its CLIP.

        Args:
            id_or_folder: Folder or Hub id of the head.
            base: A `Denoiser`, folder or Hub id in place of the recorded base.
            clip: An `ImageTextEncoder`, folder or Hub id in place of the recorded CLIP.
            revision: Of the head.
            token: Hub token.
            **options: Further arguments of the class; `trained_on` is in the head's record.

        Raises:
            FileNotFoundError, OSError: If something is not there.
            ValueError: For a head without a record of what it needs, and as the class.
        """
        head = OdiseHead.from_pretrained(id_or_folder, revision=revision, token=token)
        names, config = head.config["vocabulary"], head.config
        base, clip = base or config["base_model"], clip or config["clip_model"]
        missing = [what for what, value in (("base", base), ("clip", clip), ("vocabulary", names)) if not value]
        if missing:
            raise ValueError(f"{str(id_or_folder)!r} does not record its {missing[0]}; pass it.")
        trained_on = Vocabulary(tuple(tuple(one) for one in names), frozenset(config["stuff"]))
        denoiser = base if isinstance(base, Denoiser) else Denoiser.from_pretrained(os.fspath(base), token=token)
        towers = clip if isinstance(clip, ImageTextEncoder) else ImageTextEncoder.from_pretrained(clip, token=token)
        return cls(head, denoiser, towers, **{"trained_on": trained_on, **options})

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        vocabulary: Vocabulary | Sequence[str | Sequence[str]] | None = None,
        *,
        short_side: int | None = None,
        overlap: float = 0.8,
        threshold: float = 0.0,
    ) -> PanopticOutput:
        """Segment images.

        Args:
            images: PIL images, numpy arrays or tensors of any size.
            vocabulary: What may be on them: a `Vocabulary`, or names with synonyms parted by commas; that of the
                training if None.
            short_side: Length to which the shorter side is brought, the aspect kept (1024 in the paper, with a base of
                512); None: as it is.
            overlap: As in `panoptic_inference`.
            threshold: As in `panoptic_inference`.

        Raises:
            ValueError: Without images; for names that are none, that stand twice, or of which the tokenizer makes
                nothing.
        """
        items = image_items(images)
        if not items:
            raise ValueError("No images: the list is empty. Pass at least one PIL image, array or tensor.")
        words = self._words(vocabulary)
        texts = self.towers.embed_texts(words.prompts(self.template))
        maps, scores, class_maps = [], [], []
        for item in items:
            probabilities, masks = self._queries(item, words, texts, short_side)
            found, values = panoptic_inference(probabilities, masks, words.stuff, overlap=overlap, threshold=threshold)
            maps.append(found)
            scores.append(values)
            class_maps.append(semantic_inference(probabilities, masks).argmax(0).cpu())
        return PanopticOutput(maps, scores, class_maps, words.names)

    def evaluate(
        self,
        images: Iterable[Any],
        truth: Iterable[PanopticMap],
        vocabulary: Vocabulary | Sequence[str | Sequence[str]] | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """Panoptic quality and mean IoU on annotated images.

        Args:
            images: As in a call.
            truth: One an image, of its size; classes are numbered as in the vocabulary.
            vocabulary: As in a call.
            **options: As in a call.

        Returns:
            `pq`, `sq`, `rq` and `mean_iou`, means over the classes that occur; `pq_known` and `pq_new`, of those whose
            names the training had and had not, where such occur; `rows`.

        Raises:
            ImportError: Without torchmetrics.
            ValueError: As a call; for sizes and classes that do not fit.
        """
        words, true = self._words(vocabulary), list(truth)
        output = self(list(images), words, **options)
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

    def _words(self, vocabulary: Any) -> Vocabulary:
        if vocabulary is None:
            return self.trained_on
        return vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.of(vocabulary)

    def _queries(self, image: Any, words: Vocabulary, texts: Tensor, short_side: int | None) -> tuple[Tensor, Tensor]:
        """Class probabilities `(Q, K + 1)` and mask probabilities `(Q, H, W)` of an image."""
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
        found = self.head(levels, texts, words.counts)
        masks = functional.interpolate(found.masks[-1], tuple(padded.shape[2:]), mode="bilinear", align_corners=False)
        masks = masks[:, :, :height, :width]
        probabilities = self._classes(pixels, masks.sigmoid(), found.logits[-1], words, texts)
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


__all__ = ["CAPTION_WEIGHTS", "LABEL_WEIGHTS", "OpenVocabularySegmenter", "PanopticOutput"]
