"""Images with what is known of them (labels, captions, masks, points), their transforms, streams, and cached data."""

from diffusers_repr.data.base import TrainData
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.image_data import ImageData, from_dataset, load_images
from diffusers_repr.data.loading import load_train_data

__all__ = ["DataConfig", "ImageData", "TrainData", "from_dataset", "load_images", "load_train_data"]
