"""`diffusers-repr extract MODEL DATASET --out DIR`: a feature store of a data set, also under `accelerate launch`."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.data.image_data import ImageData
    from diffusers_repr.features import FeatureExtractor
    from diffusers_repr.store.feature_store import FeatureStore

OUT = options.Out("store of features", ("manifest.json", "data"), again="resumed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ModelSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model", "dataset")
    EARLIER_KEYS: ClassVar = {"timestep": "timesteps", "model_dtype": "dtype", "dtype": "store_dtype"}

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    dataset: str = setting(REQUIRED, "folder of images or Parquet files, a .parquet file, a Hub id, or digits")
    out: str = setting(REQUIRED, "folder of the store; the same command resumes it")
    layers: list[str] = setting(REQUIRED, "full module paths (`diffusers-repr layers MODEL`)")
    timesteps: list[float] = setting(REQUIRED, "levels, each a column of the store; larger is noisier, e.g. 261")
    split: str = setting("train", "of the data set")
    image_column: str | None = setting(None, "of the images; default: found by type")
    label_column: str | None = setting(None, "of the class ids; default: found by type")
    pooling: str = setting("mean", "mean, max, adaptive:P or none")
    noise: Literal["per_image", "shared", "clean"] = setting("per_image", "whose noise is whose")
    where: Literal["output", "input", "residual"] = setting("output", "what is read of a layer")
    ensemble_size: int = setting(1, "noise draws an image, averaged")
    batch_size: int = setting(32, "rows of one forward, levels and draws counted")
    shard_size: int | None = setting(None, "rows of a file; default: at most 1000 and 256 MiB")
    store_dtype: Literal["float32", "float16"] = setting("float32", "of the stored features")
    image_size: list[str] | None = setting(None, options.IMAGE_SIZE)
    prompt: str | None = setting(None, "of text models; {label} stands for the class name; default: the empty one")
    class_label: int | None = setting(None, "of class-conditional models; default: the null class, if it has one")
    seed: int = setting(0, "of the noise")
    dataset_revision: str | None = setting(None, "branch, tag or commit of the data set on the Hub")
    limit: int | None = setting(None, "the first images only, for a quick try; default: all")
    overwrite: bool = setting(False, "delete a store of another recipe in --out first")


def run(args: Settings) -> int:
    """Extract, and say where it is."""
    import torch

    from diffusers_repr.data.image_data import load_images
    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.features.extractor import FeatureExtractor
    from diffusers_repr.store.processes import process_state

    state = process_state()
    with state.main_process_first():  # the others find it in the cache
        data = load_images(args.dataset, args.split, args.image_column, args.label_column, args.dataset_revision)
        if data.label_column is not None:  # a row without a label is told before the model is loaded
            (data if args.limit is None else data.select(range(min(args.limit, len(data))))).labels()
        denoiser = Denoiser.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    if denoiser.pipe is not None:
        denoiser.pipe.to(args.device or state.device)
    image_size = options.sides(args.image_size)
    extractor = FeatureExtractor(
        denoiser,
        args.layers,
        options.numbers(args.timesteps),
        noise=args.noise,
        ensemble_size=args.ensemble_size,
        pooling=None if args.pooling == "none" else args.pooling,
        batch_size=args.batch_size,
        seed=args.seed,
        where=args.where,
        image_size=image_size,
    )
    if args.overwrite:
        with state.main_process_first():
            _clear(Path(args.out), state.is_main_process)
    try:
        store = _extract(extractor, data, args)
    except FileExistsError as error:
        raise FileExistsError(f"{error} --overwrite deletes what is there first.") from error
    if state.is_main_process:
        options.tell_size(denoiser, image_size)
        _report(store, args.out, state.num_processes)
    return 0


def _extract(extractor: FeatureExtractor, data: ImageData, args: Settings) -> FeatureStore:
    from diffusers_repr.features.extraction import extract_to_store

    return extract_to_store(
        extractor,
        data,
        args.out,
        prompt=args.prompt,
        class_label=args.class_label,
        dtype=args.store_dtype,
        shard_size=args.shard_size,
        limit=args.limit,
        progress=not args.quiet,
    )


def _report(store: FeatureStore, out: str, processes: int) -> None:
    by = "" if processes == 1 else f", written by {processes} processes"
    shards = f"{store.layout.shards} shard{'s' if store.layout.shards > 1 else ''}"
    print(f"{len(store)} rows in {shards}{by}: {out}")
    for column in store.columns:
        print(f"  {column.name}  {' x '.join(map(str, column.shape))}")


def _clear(out: Path, is_main: bool) -> None:
    """Delete what a store of another recipe has in its folder; the rest of the folder stays."""
    if is_main and out.is_dir():
        for name in ("manifest.json", "README.md"):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / "data", ignore_errors=True)
