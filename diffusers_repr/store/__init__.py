"""Recorded, resumable sets on disk: one way to write them, two formats of shards, and the kinds that are stored so."""

from diffusers_repr.store.assignment_store import AssignmentStore, write_assignments
from diffusers_repr.store.feature_store import FeatureStore
from diffusers_repr.store.image_store import ImageKey, ImageStore, not_yet_made, write_images
from diffusers_repr.store.parquet_store import ParquetStore
from diffusers_repr.store.tensor_cache import TensorCache

# What is pushed to the Hub and loaded by `datasets`, by the name of its kind.
STORES: dict[str, type[ParquetStore]] = {store.noun: store for store in (AssignmentStore, FeatureStore, ImageStore)}

__all__ = [
    "STORES",
    "AssignmentStore",
    "FeatureStore",
    "ImageKey",
    "ImageStore",
    "TensorCache",
    "not_yet_made",
    "write_assignments",
    "write_images",
]
