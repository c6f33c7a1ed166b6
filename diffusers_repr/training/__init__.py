"""The one training loop: settings, data, moving average, checkpoints, results. It knows no method."""

from diffusers_repr.training.checkpoints import CheckpointError
from diffusers_repr.training.config import TrainingConfig, recipe_of
from diffusers_repr.training.data import TrainData, load_train_data
from diffusers_repr.training.data_config import DataConfig
from diffusers_repr.training.ema import EMA
from diffusers_repr.training.loop import TrainResult, make_accelerator, train
from diffusers_repr.training.recipe import parse_recipe

__all__ = [
    "EMA",
    "CheckpointError",
    "DataConfig",
    "TrainData",
    "TrainResult",
    "TrainingConfig",
    "load_train_data",
    "make_accelerator",
    "parse_recipe",
    "recipe_of",
    "train",
]
