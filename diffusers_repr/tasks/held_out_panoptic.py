"""`PanopticAccuracy`: panoptic quality of a head in training, on held-out images."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers_repr.data.panoptic_data import PanopticTrainData
from diffusers_repr.heads import OdiseHead
from diffusers_repr.objectives.odise import OdiseObjective
from diffusers_repr.tasks.panoptic_fit import RecipeFile, opened, scores_of, words_of
from diffusers_repr.tasks.panoptic_predictor import LABEL_WEIGHTS, PanopticPredictor


class PanopticAccuracy:
    """Panoptic quality and mean IoU of splits, with CLIP's say and without it.

    Args:
        objective: That trains the head.
        splits: Name -> images with panoptic masks. Their classes are named by the data; those that the training had
            not count as new.
        images: How many of each, the first; all if None.
        file: The recipe that keeps the scores; none if None.
    """

    def __init__(
        self,
        objective: OdiseObjective,
        splits: Mapping[str, PanopticTrainData],
        images: int | None = None,
        file: RecipeFile | None = None,
    ) -> None:
        self.objective, self.splits, self.images, self.file = objective, dict(splits), images, file

    def __call__(self, head: OdiseHead, step: int) -> dict[str, float]:
        """Of each split what `OpenVocabularySegmenter.evaluate` gives, and `pq_alone`, without CLIP."""
        found: dict[str, float] = {}
        made = self.objective
        head = head.to(made.denoiser.device)
        for name, data in self.splits.items():
            images, truth, place = opened(data)
            images, truth = images[: self.images], truth[: self.images]
            words = words_of(data, made.vocabulary)
            for suffix, weights in (("", LABEL_WEIGHTS), ("_alone", (0.0, 0.0))):
                reader = PanopticPredictor(
                    head, made.denoiser, made.towers, made.vocabulary, weights, made.config.template
                )
                scores = reader.measure(images, truth, words)
                kept = [key for key in scores if key != "rows" and (not suffix or key.startswith("pq"))]
                found |= {f"{name}_{key}{suffix}": scores[key] for key in kept}
                if self.file is not None and not suffix:
                    self.file.record(scores_of(scores, *place))
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found


__all__ = ["PanopticAccuracy"]
