"""From images to features: noise policies, pooling, extraction, selection, storage."""

from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.pooling import pool, tokens_to_map

__all__ = ["FeatureExtractor", "FeatureOutput", "pool", "tokens_to_map"]
