"""From images to features: noise policies, pooling, extraction, selection, storage."""

from diffusers_repr.features.cleandift import cleandift_extractor, cleandift_layers
from diffusers_repr.features.ddae import ddae_layers, ddae_levels
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.pooling import pool, tokens_to_map
from diffusers_repr.features.source import FeatureSource

__all__ = [
    "FeatureExtractor",
    "FeatureOutput",
    "FeatureSource",
    "cleandift_extractor",
    "cleandift_layers",
    "ddae_layers",
    "ddae_levels",
    "pool",
    "tokens_to_map",
]
