"""From images to features: noise policies, pooling, extraction, selection, storage."""

from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.pooling import pool, tokens_to_map
from diffusers_repr.features.source import FeatureSource

__all__ = ["FeatureExtractor", "FeatureOutput", "FeatureSource", "pool", "tokens_to_map"]
