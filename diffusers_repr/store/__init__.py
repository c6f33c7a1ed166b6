"""Recorded, resumable sets on disk: one way to write them, two formats of shards, and the kinds that are stored so."""

from diffusers_repr.store.feature_store import FeatureStore
from diffusers_repr.store.tensor_cache import TensorCache

__all__ = ["FeatureStore", "TensorCache"]
