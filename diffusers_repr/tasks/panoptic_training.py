"""`train_segmenter`: a run of the training loop whose folder is an open-vocabulary segmenter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusers_repr.data.panoptic_data import PanopticTrainData
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.objectives.odise import OdiseConfig
from diffusers_repr.tasks.held_out_panoptic import PanopticAccuracy
from diffusers_repr.tasks.panoptic_fit import make_objective

if TYPE_CHECKING:
    from diffusers_repr.training import TrainingConfig


def train_segmenter(
    denoiser: Denoiser,
    towers: ImageTextEncoder,
    data: PanopticTrainData,
    odise: OdiseConfig,
    training: TrainingConfig,
    held: Mapping[str, PanopticTrainData] | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> None:
    """Train a head; `OpenVocabularySegmenter.from_pretrained` loads the folder of the run.

    Args:
        denoiser: The frozen base.
        towers: The frozen CLIP.
        data: Images with panoptic masks.
        odise: The head.
        training: The run; a head has no samples, `eval_batch_size` is 0.
        held: Name -> images whose panoptic quality is measured at the end.
        recipe: All settings of the run, for its card.

    Raises:
        TypeError, ValueError: As `OdiseObjective`, and as `train`.
    """
    from diffusers_repr.training import train

    objective, file = make_objective(denoiser, towers, data, odise, training)
    accuracy = PanopticAccuracy(objective, held, odise.eval_images, file) if held else None
    train(objective, data, training, recipe=recipe, evaluate=accuracy)


__all__ = ["train_segmenter"]
