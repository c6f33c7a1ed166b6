"""Encode a data set once: VAE moments of every image and its mirror, and teacher features, for `train_repa.py`.

    accelerate launch examples/cache_latents.py --dataset_name DIR --resolution 256 --latents_dir latents \
        --vae stabilityai/sd-vae-ft-mse
    accelerate launch examples/cache_latents.py --config recipe.yaml --latents_dir latents \
        --cache_features --features_dir features

The settings of the data, `--vae` and `--encoder` are those of `train_repa.py`; `--config` may be its recipe, whose
other keys are passed over. The processes share the work, and the same command run again continues where it stopped.
Training reads the caches by the same `--latents_dir` and `--features_dir`, and refuses those of another VAE, encoder,
crop, size or data set.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Literal

import torch
from recipe_data import load_split
from transformers.hf_argparser import HfArg

from diffusers_repr.config.recipe import parse_recipe, read_recipe, setting
from diffusers_repr.data.cache_writer import CacheSettings
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.latents import cache_latents
from diffusers_repr.data.loading import load_train_data
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.denoiser.loading import load_autoencoder
from diffusers_repr.encoders import Encoder
from diffusers_repr.encoders.feature_cache import cache_features


@dataclasses.dataclass(frozen=True)
class CacheArgs:
    """What is encoded by what, beside the settings of the data."""

    vae: str | None = setting(None, "folder or Hub id of a VAE, or of a pipeline with one")
    vae_subfolder: str | None = setting(None, "where the VAE lies in it; default: vae, if a local folder has one")
    vae_revision: str | None = setting(None, "branch, tag or commit of a Hub id")
    vae_dtype: Literal["float32", "float16", "bfloat16"] = setting("float32", "what the VAE computes in")
    encoder: list[str] = HfArg(default_factory=list, help="folders or Hub ids of the teachers")
    cache_features: bool = setting(False, "write the teachers' features to --features_dir")
    image_channels: Literal[1, 3] = setting(3, "1: features for a model of grey pixels")
    dtype: Literal["float32", "float16"] = setting("float32", "of the stored moments")
    features_dtype: Literal["float32", "float16"] = setting("float16", "of the stored features")
    both_mirrors: bool = setting(True, "moments of the mirrored images too; features follow --random_flip")
    batch_size: int = setting(16, "images of one process and forward")
    shard_size: int | None = setting(None, "images of a shard; default: what makes 256 MiB")
    dataloader_num_workers: int = setting(0, "processes that decode images")
    verify: bool = setting(False, "read shards that are there and compare their checksums")


def load_vae(args: CacheArgs) -> torch.nn.Module:
    """The autoencoder of a folder or Hub id: its own, or that of a pipeline."""
    name, subfolder = args.vae, args.vae_subfolder
    if subfolder is None:
        places = [Path(name) / "vae"] if Path(name).is_dir() else []
        subfolder = "vae" if any(place.is_dir() for place in places) else None
    return load_autoencoder(name, subfolder, args.vae_revision, getattr(torch, args.vae_dtype))


def load_data(config: DataConfig, channels: int) -> ImageTrainData:
    """The images as training crops them, without the caches that are to be made."""
    config = dataclasses.replace(config, latents_dir=None, features_dir=None, caption_column=None, cache_images=False)
    given = load_split("digits", config.dataset_split) if config.dataset_name == "digits" else None
    return load_train_data(config, channels, None, given)


def parse_args(argv: list[str]) -> tuple[DataConfig, CacheArgs]:
    """Flags over the recipe of `--config`, of which only the keys of data and cache are read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, flags = parser.parse_known_args(argv)
    names = {field.name for kind in (DataConfig, CacheArgs) for field in dataclasses.fields(kind)}
    given: list[str] = []
    for key, value in (read_recipe(known.config) if known.config else {}).items():
        if key in names and value is not None:
            given += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    data, args = parse_recipe((DataConfig, CacheArgs), [*given, *flags], __doc__)
    if data.streaming:
        raise ValueError("A stream has no places to keep latents or features by; leave out --streaming.")
    if not (data.latents_dir or args.cache_features):
        raise ValueError("Nothing to write: name --latents_dir, or --cache_features with --features_dir.")
    if data.latents_dir and not args.vae:
        raise ValueError("--latents_dir needs --vae, the VAE to encode with.")
    if args.cache_features and not (data.features_dir and set(args.encoder) - {"none"}):
        raise ValueError("--cache_features needs --encoder, one or more teachers, and --features_dir to write to.")
    return data, args


def main(argv: list[str]) -> None:
    config, args = parse_args(argv)
    data = load_data(config, args.image_channels)
    settings = CacheSettings(
        args.both_mirrors,
        args.dtype,
        args.batch_size,
        args.shard_size,
        args.dataloader_num_workers,
        verify=args.verify,
    )
    if config.latents_dir:
        print(cache_latents(load_vae(args), data, config.latents_dir, settings, args.vae_revision))
    for name in args.encoder if args.cache_features else []:
        if name == "none":
            continue
        of_features = dataclasses.replace(settings, both_mirrors=config.random_flip, dtype=args.features_dtype)
        print(cache_features(Encoder.from_pretrained(name), data, config.features_dir, of_features))


if __name__ == "__main__":
    main(sys.argv[1:])
