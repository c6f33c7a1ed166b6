"""`load_train_data`: the training data of a run, whatever its configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from diffusers_repr.data.base import TrainData
from diffusers_repr.data.cached import CachedData
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.splits import open_split
from diffusers_repr.data.stream import StreamData
from diffusers_repr.data.train_data import ImageTrainData, InMemoryTrainData
from diffusers_repr.store.processes import process_state


def load_train_data(
    config: DataConfig,
    channels: int,
    size: int | tuple[int, int] | None = None,
    dataset: datasets.Dataset | datasets.IterableDataset | None = None,
    *,
    seed: int = 0,
    rank: int | None = None,
    world_size: int | None = None,
    num_workers: int = 0,
    vae: Any = None,
    encoders: Sequence[Any] = (),
    needs_pixels: bool = False,
) -> TrainData | StreamData:
    """The training data of a run: images, a stream of them, or a cache over them.

    Args:
        config: See `DataConfig`.
        channels: Of the images: 1 (grey) or 3 (RGB).
        size: (H, W) that the model, its VAE included, takes; `config.resolution` if None.
        dataset: The split itself, in place of `config.dataset_name`.
        seed: Of a stream's order; map-style data are ordered by the loop.
        rank: This process, for a stream; as `accelerate launch` started it if None.
        world_size: Number of processes, as `rank`.
        num_workers: Threads that decode the images of a stream; other data leave it to the loader.
        vae: The run's VAE; a latent cache must have been made with it.
        encoders: The run's teachers; a feature cache must have been made with them.
        needs_pixels: Load images even where latents are cached, for a teacher that is not.

    Raises:
        FileNotFoundError: If the data set or a cache is not there.
        ValueError: If columns or settings do not fit, or a cache was made otherwise or is not finished.
    """
    height_width = config.size(size)
    for setting in ("index_dir", "num_neighbours", "include_query"):
        if getattr(config, setting) and not config.assignments_dir:
            raise ValueError(f"`{setting}` is of neighbours, and no `assignments_dir` is set; name the folder.")
    name = config.dataset_name or "the data set"
    if dataset is None:
        if config.dataset_name is None:
            raise ValueError("No data set; pass --dataset_name, a folder, a .parquet file, a Hub id or digits.")
        dataset = open_split(config.dataset_name, config.dataset_split, config.dataset_revision, config.streaming)
    if isinstance(dataset, datasets.IterableDataset):
        if config.latents_dir or config.features_dir:
            raise ValueError("A stream has no places in the data set to keep latents or features by.")
        if rank is None or world_size is None:
            state = process_state()
            rank, world_size = state.process_index, state.num_processes
        return StreamData(dataset, config, channels, height_width, seed, rank, world_size, num_workers, name)
    if config.streaming:
        raise ValueError(f"`streaming` is set, but {name} was given as a map-style data set; leave it out.")
    kind = InMemoryTrainData if config.cache_images else ImageTrainData
    images = kind(dataset, config, channels, height_width, config.dataset_name)
    if not (config.latents_dir or config.features_dir):
        return images
    return CachedData.open(images, vae=vae, encoders=encoders, needs_pixels=needs_pixels)
