"""Saving, loading, pushing and publishing; knows no method and does not import torch."""

from diffusers_repr.hub.cards import Metric, dataset_card, model_card
from diffusers_repr.hub.errors import HubError, is_repo_id
from diffusers_repr.hub.files import atomic_file, atomic_folder, atomic_write, read_json, write_json
from diffusers_repr.hub.load import load_json_config, resolve_folder
from diffusers_repr.hub.push import check_pipeline_file, publish_pipeline, push_folder

__all__ = [
    "HubError",
    "Metric",
    "atomic_file",
    "atomic_folder",
    "atomic_write",
    "check_pipeline_file",
    "dataset_card",
    "is_repo_id",
    "load_json_config",
    "model_card",
    "publish_pipeline",
    "push_folder",
    "read_json",
    "resolve_folder",
    "write_json",
]
