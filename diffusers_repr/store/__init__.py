"""Recorded, resumable sets of tensors on disk: manifest, shards, checks."""

from diffusers_repr.store.feature_store import FeatureStore
from diffusers_repr.store.tensor_cache import TensorCache

__all__ = ["FeatureStore", "TensorCache"]
