"""`diffusers-repr cache`: VAE moments of every image and its mirror, and teacher features, encoded once for training.

    diffusers-repr cache --dataset_name DIR --resolution 256 --latents_dir latents --vae stabilityai/sd-vae-ft-mse
    accelerate launch -m diffusers_repr cache --config recipe.yaml --latents_dir latents \
        --cache_features --features_dir features

The settings of the data, `--vae` and `--encoder` are those of `examples/train_repa.py`; `--config` may be its recipe,
whose other keys are passed over. The processes share the work, and the same command run again continues where it
stopped. Training reads the caches by the same `--latents_dir` and `--features_dir`, and refuses those of another VAE,
encoder, crop, size or data set.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import setting
from diffusers_repr.data.config import DataConfig

if TYPE_CHECKING:
    from diffusers_repr.data.train_data import ImageTrainData


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(DataConfig):
    """The data, and what is encoded by what."""

    OTHER_KEYS: ClassVar = True  # a recipe of the training has more than the data
    EARLIER_KEYS: ClassVar = {"dtype": "store_dtype"}

    vae: str | None = setting(None, "folder or Hub id of a VAE, or of a pipeline with one")
    vae_subfolder: str | None = setting(None, "where the VAE lies in it; default: vae, if a local folder has one")
    vae_revision: str | None = setting(None, "branch, tag or commit of a Hub id")
    vae_dtype: options.DType = setting("float32", "what the VAE computes in")
    encoder: list[str] = setting([], "folders or Hub ids of the teachers")
    encoder_positions: list[str] = setting(
        [], "how they resample position embeddings: transformers (default) or repa; one for all or one each"
    )
    cache_features: bool = setting(False, "write the teachers' features to --features_dir")
    image_channels: Literal[1, 3] = setting(3, "1: features for a model of grey pixels")
    store_dtype: Literal["float32", "float16"] = setting("float32", "of the stored moments")
    features_dtype: Literal["float32", "float16"] = setting("float16", "of the stored features")
    both_mirrors: bool = setting(True, "moments of the mirrored images too; features follow --random_flip")
    batch_size: int = setting(16, "images of one process and forward")
    shard_size: int | None = setting(None, "images of a shard; default: what makes 256 MiB")
    dataloader_num_workers: int = setting(0, "processes that decode images")
    device: str | None = setting(None, "cuda, cpu, ...; default: the accelerator, if there is one")
    quiet: bool = setting(False, "no progress bar")
    verify: bool = setting(False, "read shards that are there and compare their checksums")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming:
            raise ValueError("A stream has no places to keep latents or features by; leave out --streaming.")
        if not (self.latents_dir or self.cache_features):
            raise ValueError("Nothing to write: name --latents_dir, or --cache_features with --features_dir.")
        if self.latents_dir and not self.vae:
            raise ValueError("--latents_dir needs --vae, the VAE to encode with.")
        if self.cache_features and not (self.features_dir and self.teachers):
            raise ValueError("--cache_features needs --encoder, one or more teachers, and --features_dir to write to.")

    @property
    def teachers(self) -> list[str]:
        """The encoders, without the word of a recipe for none."""
        return [name for name in self.encoder if name != "none"]


def load_data(settings: DataConfig, channels: int) -> ImageTrainData:
    """The images as training crops them, without the caches that are to be made."""
    from diffusers_repr.data.loading import load_train_data

    of_data = {field.name: getattr(settings, field.name) for field in dataclasses.fields(DataConfig)}
    of_data |= {"latents_dir": None, "features_dir": None, "caption_column": None, "cache_images": False}
    of_data |= {"assignments_dir": None, "index_dir": None, "num_neighbours": None, "include_query": False}
    return cast("ImageTrainData", load_train_data(DataConfig(**of_data), channels))


def load_vae(settings: Settings) -> Any:
    """The autoencoder of a folder or Hub id: its own, or that of a pipeline."""
    import torch

    from diffusers_repr.denoiser.loading import load_autoencoder

    name, subfolder = cast(str, settings.vae), settings.vae_subfolder
    if subfolder is None and (Path(name) / "vae").is_dir():
        subfolder = "vae"
    return load_autoencoder(name, subfolder, settings.vae_revision, getattr(torch, settings.vae_dtype))


def run(args: Settings) -> int:
    """Encode, and say what was written."""
    from diffusers_repr.data.cache_writer import CacheSettings
    from diffusers_repr.data.latents import cache_latents
    from diffusers_repr.encoders.feature_cache import cache_features
    from diffusers_repr.encoders.loading import iter_encoders

    data = load_data(args, args.image_channels)
    settings = CacheSettings(
        args.both_mirrors,
        args.store_dtype,
        args.batch_size,
        args.shard_size,
        args.dataloader_num_workers,
        args.device,
        progress=not args.quiet,
        verify=args.verify,
    )
    if args.latents_dir:
        print(cache_latents(load_vae(args), data, args.latents_dir, settings, args.vae_revision))
    for encoder in iter_encoders(args.teachers, args.encoder_positions) if args.cache_features else []:
        of_features = dataclasses.replace(settings, both_mirrors=args.random_flip, dtype=args.features_dtype)
        print(cache_features(encoder, data, cast(str, args.features_dir), of_features))
    return 0
