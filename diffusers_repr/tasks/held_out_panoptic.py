"""`PanopticAccuracy`: panoptic quality of a head in training, on held-out images."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from diffusers_repr.data.panoptic_data import PanopticTrainData, to_maps
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.heads import OdiseHead
from diffusers_repr.objectives.odise import OdiseObjective
from diffusers_repr.tasks.panoptic import OpenVocabularySegmenter


class PanopticAccuracy:
    """Panoptic quality and mean IoU of splits, with CLIP's say and without it.

    Args:
        objective: That trains the head.
        splits: Name -> images with panoptic masks, of the same classes.
        images: How many of each, the first.
    """

    def __init__(self, objective: OdiseObjective, splits: Mapping[str, PanopticTrainData], images: int) -> None:
        self.objective, self.splits, self.images = objective, dict(splits), images

    def __call__(self, head: OdiseHead, step: int) -> dict[str, float]:
        """Of each split what `OpenVocabularySegmenter.evaluate` gives, and `pq_alone`, without CLIP."""
        found: dict[str, float] = {}
        made, words = self.objective, self.objective.vocabulary
        for name, data in self.splits.items():
            rows = [data[at] for at in range(min(self.images, len(data)))]
            images = list(to_unit(torch.stack([row["pixel_values"] for row in rows])) / 2 + 0.5)
            truth = to_maps(*(torch.stack([row[key] for row in rows]) for key in ("panoptic", "segment_classes")))
            for suffix, weights in (("", (0.3, 0.7)), ("_alone", (0.0, 0.0))):
                segmenter = OpenVocabularySegmenter(
                    head.to(made.denoiser.device), made.denoiser, made.towers, words, weights, made.config.template
                )
                scores = segmenter.evaluate(images, truth)
                wanted = ("pq", "sq", "rq", "mean_iou") if not suffix else ("pq",)
                found |= {f"{name}_{key}{suffix}": scores[key] for key in wanted}
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found


__all__ = ["PanopticAccuracy"]
