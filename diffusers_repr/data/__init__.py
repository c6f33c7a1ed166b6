"""Images with what is known of them: labels and captions, their transforms, streams, and readers of cached data."""

from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.train_data import TrainData, load_train_data

__all__ = ["DataConfig", "TrainData", "load_train_data"]
