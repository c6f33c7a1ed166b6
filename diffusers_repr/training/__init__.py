"""The one training loop: settings, moving average, checkpoints, results. It knows no method."""

from diffusers_repr.training.checkpoints import CheckpointError
from diffusers_repr.training.config import TrainingConfig, recipe_of
from diffusers_repr.training.ema import EMA
from diffusers_repr.training.loop import TrainResult, make_accelerator, train

__all__ = [
    "EMA",
    "CheckpointError",
    "TrainResult",
    "TrainingConfig",
    "make_accelerator",
    "recipe_of",
    "train",
]
