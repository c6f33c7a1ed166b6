"""From a data set to a feature store: bounded memory, several processes, and a resume by the same call."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.image_data import ImageData
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.noise_policy import Policy, pixel_keys
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.recipe import recipe_differences, recipe_hash, recipe_of
from diffusers_repr.hub import atomic_write, write_json
from diffusers_repr.hub.files import only_writer
from diffusers_repr.store.card import store_card
from diffusers_repr.store.feature_store import FeatureStore
from diffusers_repr.store.manifest import MANIFEST, read_manifest
from diffusers_repr.store.shards import Column, Layout, row_bytes, shard_problem, shard_stamp, write_shard

DTYPES = ("float32", "float16")
_SHARD_BYTES = 256 * 2**20  # a shard's rows without shard_size: at most these bytes of features,
_SHARD_ROWS = 1000  # and at most these rows
_IMAGES_AT_ONCE = 32  # without a batch_size
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Plan:
    """One extraction, the same on every process."""

    extractor: FeatureExtractor
    data: ImageData
    out: Path
    layout: Layout
    recipe: dict[str, Any]
    prompt: str | None
    class_label: int | None

    @property
    def at_once(self) -> int:
        """Images of one call of the extractor."""
        return self.extractor.batch_size or _IMAGES_AT_ONCE

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) that every image must have."""
        height, width = self.recipe["features"]["image_size"]
        return height, width

    def manifest(self, complete: bool) -> dict[str, Any]:
        """What `manifest.json` holds."""
        label = self.layout.label
        packages = ("diffusers-repr", "torch", "diffusers", "transformers", "datasets")
        return {
            "format": 1,
            "complete": complete,
            "recipe_hash": self.layout.recipe,
            "rows": self.layout.rows,
            "shard_size": self.layout.shard_size,
            "shards": self.layout.shards,
            "label": None if label is None else {"names": getattr(label, "names", None)},
            "columns": [column.to_dict() for column in self.layout.columns],
            "recipe": self.recipe,
            "versions": {name: version(name) for name in packages},
        }


def extract_to_store(
    extractor: FeatureExtractor,
    data: ImageData,
    out: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    class_label: int | None = None,
    dtype: str = "float32",
    shard_size: int | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> FeatureStore:
    """Write features of a data set to a folder; the same call goes on where an earlier one was stopped.

    Under `accelerate launch` the processes share the shards. A shard holds fixed rows and depends on nothing but the
    recipe, so neither a kill nor the number of processes changes what is in it. Memory holds one batch.

    Args:
        extractor: Layers, levels, noise, pooling, seed; its `batch_size` bounds the memory.
        data: Images, from `load_images`.
        out: Folder of the store; new, empty, or of an earlier call with the same recipe.
        prompt: Of text models; `{label}` stands for the image's class name.
        class_label: Of class-conditional models: one id for all images.
        dtype: Of the stored features: `float32` or `float16`.
        shard_size: Rows of a shard; what an earlier call chose, else at most 1000 rows and 256 MiB, if None.
        limit: The first rows only.
        progress: Show a bar on the main process.

    Raises:
        FileExistsError: If the folder holds another recipe (tells what differs), or is no feature store.
        ValueError: If images differ in size, features overflow `dtype`, or settings do not fit.
        OSError: If the disk is full; what is written stays valid.
    """
    from accelerate.utils import gather_object

    state = process_state()
    plan = _plan(extractor, data, Path(out), prompt, class_label, dtype, shard_size, limit)
    lock = only_writer(plan.out, "diffusers-repr extract") if state.is_main_process else nullcontext()
    with lock:
        error: Exception | None = None
        if state.is_main_process:
            try:
                _prepare(plan)
            except (OSError, ValueError) as caught:
                error = caught
        told = [text for text in gather_object([str(error) if error else None]) if text]
        if error is not None:
            raise error
        if told:
            raise RuntimeError(f"Process 0 stopped: {told[0]}")
        mine = range(state.process_index, plan.layout.shards, state.num_processes)
        todo = sorted(gather_object([shard for shard in mine if _is_to_do(plan, shard)]))
        todo = todo[state.process_index :: state.num_processes]
        _write_all(plan, todo, progress and state.is_main_process, state.num_processes)
        state.wait_for_everyone()
        if state.is_main_process:
            atomic_write(plan.out / "README.md", store_card(plan.manifest(True)))
            write_json(plan.out / MANIFEST, plan.manifest(True))
        state.wait_for_everyone()
    return FeatureStore.open(plan.out)


def process_state() -> Any:
    """This process among those of `accelerate launch`, on the CPU where there is no accelerator.

    Raises:
        RuntimeError: If several processes were launched but do not know each other.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without cpu=True, processes launched on a machine without accelerator would each do all the work.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise RuntimeError(f"{launched} processes were launched, but accelerate sees {state.num_processes}.")
    return state


# Planning


def _plan(
    extractor: FeatureExtractor,
    data: ImageData,
    out: Path,
    prompt: str | None,
    class_label: int | None,
    dtype: str,
    shard_size: int | None,
    limit: int | None,
) -> _Plan:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; features are stored as {' or '.join(DTYPES)} (Arrow has no bfloat16).")
    if extractor.noise.policy == "fresh":
        allowed = ", ".join(p for p in get_args(Policy) if p != "fresh")
        raise ValueError(
            f"noise='fresh' goes on from call to call, so a store could not be resumed; use {allowed}. "
            "Another --seed gives per_image another draw."
        )
    for name, value in (("shard_size", shard_size), ("limit", limit)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number from 1; got {value!r}.")
    if prompt is not None and "{label}" in prompt and data.label_names is None:
        raise ValueError(f"The prompt {prompt!r} asks for the class name, but {data.name} has no label names.")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r} is a file; give a folder for the features.")
    extractor = extractor.replace(output_device="cpu", progress_bar=None)
    rows = len(data) if limit is None else min(limit, len(data))
    size, shapes = _probe(extractor, data, prompt, class_label)
    recipe = recipe_of(
        extractor, data, rows=rows, image_size=size, dtype=dtype, prompt=prompt, class_label=class_label
    )
    columns = _columns(extractor, shapes)
    if shard_size is None:
        shard_size = _earlier_shard_size(out) or max(1, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes(columns, dtype)))
    label = None
    if data.label_column is not None:
        label = datasets.ClassLabel(names=data.label_names) if data.label_names else datasets.Value("int64")
    layout = Layout(data.split, rows, shard_size, columns, dtype, recipe_hash(recipe), label)
    return _Plan(extractor, data, out, layout, recipe, prompt, class_label)


def _probe(
    extractor: FeatureExtractor, data: ImageData, prompt: str | None, class_label: int | None
) -> tuple[tuple[int, int], FeatureOutput]:
    """The size of the first image and the shapes of its features, from one cheap call."""
    images, labels = next(data.batches(1))
    pixels = to_pixels(images, extractor.denoiser.image_channels, extractor.image_size)
    one = extractor.replace(timestep=extractor.levels[0], ensemble_size=1)
    output = one.from_pixels(pixels, prompt=_prompts(prompt, data, labels), class_labels=class_label)
    return (pixels.shape[2], pixels.shape[3]), output


def _columns(extractor: FeatureExtractor, found: FeatureOutput) -> tuple[Column, ...]:
    times = [float(level.timestep) for level in extractor.levels]
    names = [f"{time:.6g}" for time in times]
    if len(set(names)) < len(names):
        names = [repr(time) for time in times]
    if len(set(names)) < len(names):
        raise ValueError(f"Timesteps {times} are not distinct; each can be stored once.")
    columns = []
    for layer in extractor.layers:
        grid, text = found.places.get(layer, (None, 0)) if extractor.pooling is None else (None, 0)
        for level, (time, name) in enumerate(zip(times, names, strict=True)):
            shape = tuple(found[layer].shape[1:])
            columns.append(Column(f"{layer}@t{name}", layer, level, time, shape, grid, text))
    return tuple(columns)


def _earlier_shard_size(out: Path) -> int | None:
    return read_manifest(out)["shard_size"] if (out / MANIFEST).is_file() else None


# The folder


def _prepare(plan: _Plan) -> None:
    """Refuse what is another's, clear what a kill left, say what will be here."""
    manifest = read_manifest(plan.out) if (plan.out / MANIFEST).is_file() else None
    blank = manifest is None or _has_no_shard(plan.out, manifest)
    if manifest is None and plan.out.is_dir():
        _check_ours(plan)
    elif manifest is not None and not blank:
        _check_same(plan, manifest)
    for leftover in (plan.out / "data").glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if blank:
        write_json(plan.out / MANIFEST, plan.manifest(False))


def _has_no_shard(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether a run ended before its first shard: its recipe binds nobody."""
    return not manifest["complete"] and not any((out / "data").glob("*.parquet"))


def _check_same(plan: _Plan, manifest: dict[str, Any]) -> None:
    old = {**manifest["recipe"], "shard_size": manifest["shard_size"]}
    differences = recipe_differences(old, {**plan.recipe, "shard_size": plan.layout.shard_size})
    if differences:
        raise FileExistsError(
            f"{str(plan.out)!r} holds features of another recipe; nothing was changed. "
            f"What differs (there -> now): {'; '.join(differences)}. Run the old command to finish it, or give "
            "another --out."
        )


def _check_ours(plan: _Plan) -> None:
    """A folder without a manifest: empty, or with shards of this very recipe."""
    shards = sorted((plan.out / "data").glob("*.parquet"))
    others = [p.name for p in shards if (shard_stamp(p) or {}).get("recipe") != plan.layout.recipe]
    allowed = {"data", "README.md"} if shards and not others else set()
    strangers = [p.name for p in plan.out.iterdir() if p.name not in allowed and not p.name.startswith(".")]
    if strangers:
        raise FileExistsError(
            f"{str(plan.out)!r} is not empty and is no feature store with this recipe (it holds "
            f"{', '.join(sorted(strangers)[:8])}); nothing was changed. Give another --out."
        )


def _is_to_do(plan: _Plan, shard: int) -> bool:
    """Whether a shard is to be written; says so of one that is there but not whole."""
    path = plan.layout.path(shard)
    if not (plan.out / path).exists():
        return True
    problem = shard_problem(plan.out, plan.layout, shard)
    if problem is not None:
        _logger.warning("%s %s; it is written anew.", path, problem)
        return True
    _check_data_unchanged(plan, shard)
    return False


def _check_data_unchanged(plan: _Plan, shard: int) -> None:
    """The first image of a finished shard must be that of the data set."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(plan.out / plan.layout.path(shard)) as file:
        stored = file.read_row_group(0, columns=["image_hash"])["image_hash"][0].as_py()
    start = plan.layout.span(shard)[0]
    images, _ = next(plan.data.batches(1, start))
    if pixel_keys(_pixels(plan, images, start))[0] != stored:
        raise FileExistsError(
            f"Row {start} of {plan.data.name} is another image than the one in {str(plan.out)!r}: the data set has "
            "changed since. Nothing was changed; give another --out."
        )


# The work


def _write_all(plan: _Plan, todo: Sequence[int], progress: bool, processes: int) -> None:
    from tqdm.auto import tqdm

    spans = [plan.layout.span(shard) for shard in todo]
    what = "extract" if processes == 1 else f"extract (1 of {processes} processes)"
    total = sum(stop - start for start, stop in spans)
    with tqdm(total=total, unit=" images", desc=what, disable=not (progress and todo)) as bar:
        for shard in todo:
            try:
                _write_one(plan, shard, bar)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                done = sum((plan.out / plan.layout.path(n)).is_file() for n in range(plan.layout.shards))
                raise OSError(
                    error.errno,
                    f"The disk is full while {plan.layout.path(shard)} is written. {done} of {plan.layout.shards} "
                    f"shards in {str(plan.out)!r} are whole and stay. Free space, then run the same command again",
                ) from error


def _write_one(plan: _Plan, shard: int, bar: Any) -> None:
    start, stop = plan.layout.span(shard)
    with write_shard(plan.out, plan.layout, shard) as writer:
        for images, labels in plan.data.batches(plan.at_once, start, stop):
            pixels = _pixels(plan, images, start)
            hashes = pixel_keys(pixels)
            prompts = _prompts(plan.prompt, plan.data, labels)
            output = plan.extractor.from_pixels(pixels, prompt=prompts, class_labels=plan.class_label, ids=hashes)
            writer.write(start, hashes, labels, _stored(plan, output))
            start += len(images)
            bar.update(len(images))


def _pixels(plan: _Plan, images: list[Any], start: int) -> Tensor:
    extractor = plan.extractor
    sizes = {(image.height, image.width) for image in images}
    if extractor.image_size is None and sizes != {plan.image_size}:
        row, image = next((i, m) for i, m in enumerate(images) if (m.height, m.width) != plan.image_size)
        raise ValueError(
            f"Row {start + row} of {plan.data.name} is {image.height} x {image.width} (H x W), the first image is "
            f"{plan.image_size[0]} x {plan.image_size[1]}: pass image_size (--image_size) to resize all to one size."
        )
    return to_pixels(images, extractor.denoiser.image_channels, extractor.image_size)


def _prompts(prompt: str | None, data: ImageData, labels: list[int] | None) -> str | list[str] | None:
    if prompt is None or "{label}" not in prompt or data.label_names is None or labels is None:
        return prompt
    return [prompt.replace("{label}", data.label_names[label]) for label in labels]


def _stored(plan: _Plan, output: FeatureOutput) -> dict[str, np.ndarray]:
    features = {}
    for column in plan.layout.columns:
        feature = output[column.layer][column.level] if plan.extractor.many else output[column.layer]
        with np.errstate(over="ignore"):
            values = feature.numpy().astype(plan.layout.dtype)
        if not np.isfinite(values).all():
            raise ValueError(
                f"Features of {column.layer!r} reach {float(feature.abs().max()):.4g}, more than {plan.layout.dtype} "
                "holds (65504); use dtype float32."
            )
        features[column.name] = values
    return features
