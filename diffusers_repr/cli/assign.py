"""`diffusers-repr assign ENCODER DATASET --method kmeans --k 100 --out DIR`: conditions of all images of a data set.

    diffusers-repr assign facebook/dinov2-base photos --method kmeans --k 100 --out clusters
    accelerate launch -m diffusers_repr assign openai/clip-vit-base-patch32 photos --text_space \
        --method neighbours --k 20 --out neighbours
    diffusers-repr assign MODEL:mid_block@100 digits --method classifier --labels_per_class 2 --out few

The processes share the work, and the same command run again goes on where it stopped. Training reads DIR by
`assignments_dir` and refuses it for other images.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.cli.encoders import open_encoder
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.assign import Assigner
    from diffusers_repr.data.config import DataConfig
    from diffusers_repr.data.train_data import ImageTrainData
    from diffusers_repr.store import AssignmentStore

_FOLDERS = ("assignments", "assigner", "vectors", "index")
OUT = options.Out("assignments", _FOLDERS, again="resumed")
_OF_METHOD = {
    "kmeans": ("k", "metric", "iterations", "backend", "init"),
    "neighbours": ("k", "index", "include_self", "index_kind", "cells", "probes"),
    "identity": ("over",),
    "classifier": ("labels_per_class",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(options.ModelSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("encoder", "dataset")

    encoder: str = setting(
        REQUIRED, "folder or Hub id of a vision transformer, or MODEL:layer@timestep for a layer of a denoiser"
    )
    dataset: str = setting(REQUIRED, "folder of images or Parquet files, a .parquet file, a Hub id, or digits")
    out: str = setting(REQUIRED, "folder of the result; the same command resumes it")
    method: Literal["kmeans", "neighbours", "identity", "classifier"] = setting("kmeans", "what assigns")
    k: int | None = setting(None, "clusters (default 100), or neighbours (default 20)")
    metric: Literal["cosine", "euclidean"] = setting("cosine", "of kmeans")
    iterations: int = setting(30, "of kmeans, at most")
    init: str = setting("k-means++", "first centres of kmeans: k-means++ or random")
    backend: str | None = setting(None, "of kmeans: faiss or sklearn; default: faiss where it is installed")
    index: str | None = setting(None, "folder of another index to find neighbours in; default: the images themselves")
    include_self: bool = setting(False, "let an image be its own nearest neighbour")
    index_kind: Literal["exact", "ivf"] = setting("exact", "of the index that is made; ivf needs faiss")
    cells: int | None = setting(None, "lists of an index of kind ivf; default: the root of the number of images")
    probes: int | None = setting(None, "lists that a search looks into; default: a sixteenth of them")
    over: Literal["column", "vector"] = setting(
        "column", "of identity: mean and deviation over the images, or of each vector by itself as RCG has it"
    )
    labels_per_class: int | None = setting(None, "labels the classifier sees, drawn by --seed; default: all")
    text_space: bool = setting(False, "ENCODER is a CLIP: vectors of the space of images and texts, for text queries")
    split: str = setting("train", "of the data set")
    image_column: str | None = setting(None, "of the images; default: found by type")
    label_column: str | None = setting(None, "of the class ids; default: found by type")
    dataset_revision: str | None = setting(None, "branch, tag or commit of the data set on the Hub")
    resolution: int | None = setting(None, "side of the square cut from an image; default: the first one's short side")
    center_crop: Literal["adm", "fit"] = setting("fit", "the largest crop by Lanczos, or ADM's")
    bad_images: Literal["error", "skip"] = setting("error", "images that cannot be read: stop, or take the next one")
    encoder_positions: str = setting("transformers", "how position embeddings are resampled: transformers or repa")
    store_dtype: Literal["float32", "float16"] = setting("float32", "of the stored vectors")
    batch_size: int = setting(64, "images of one forward")
    shard_size: int | None = setting(None, "vectors of a file; default: what makes 256 MiB")
    num_threads: int = setting(0, "that decode images beside the work")
    seed: int = setting(0, "of the fit, of the labels that are drawn, and of a denoiser's noise")
    overwrite: bool = setting(False, "delete the assignments in --out first")

    def __post_init__(self) -> None:
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        for method, names in _OF_METHOD.items():
            for name in names:
                if getattr(self, name) != fields[name] and name not in _OF_METHOD[self.method]:
                    raise ValueError(f"--{name} would not act: it is of --method {method}; drop it.")
        for name in ("k", "labels_per_class", "batch_size", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        if self.index is not None and not (self.cells is self.probes is None and self.index_kind == "exact"):
            raise ValueError("--index_kind, --cells and --probes are of an index that is made, and --index names one.")


def write_from_recipe(data_config: DataConfig, recipe: Any, out: str, seed: int) -> None:
    """What the command does, for the recipe of a training whose conditions are not there yet.

    Args:
        data_config: The data; images are encoded at their own size.
        recipe: With `assigner`, `encoder`, `text_space`, and `k`, `labels_per_class` or `over`.
        out: Folder of the assignments; those of the same recipe are taken as they are.
        seed: Of the fit.

    Raises:
        FileExistsError, ValueError: As the command.
    """
    if data_config.dataset_name is None:
        raise ValueError("No data set; pass --dataset_name, a folder, a .parquet file, a Hub id or digits.")
    names = ("image_column", "label_column", "dataset_revision", "bad_images")
    same = {name: getattr(data_config, name) for name in names}
    same["label_column"] = None if same["label_column"] == "none" else same["label_column"]
    split, method = data_config.dataset_split, recipe.assigner
    own = [
        name for name in ("k", "labels_per_class", "over") if name in _OF_METHOD[method] and hasattr(recipe, name)
    ]  # a recipe may have the others
    same |= {name: getattr(recipe, name) for name in ("text_space", *own)}
    args = {"encoder": recipe.encoder, "dataset": data_config.dataset_name, "out": out, "method": method}
    run(Settings(**args, split=split, seed=seed, quiet=True, **same))


def run(args: Settings) -> int:
    """Encode, fit, assign, and say what was written."""
    from diffusers_repr.store.processes import process_state

    state = process_state()
    with state.main_process_first():  # the others find it in the cache
        encoder = open_encoder(
            args.encoder,
            revision=args.revision,
            dtype=args.dtype,
            positions=args.encoder_positions,
            text_space=args.text_space,
            seed=args.seed,
        )
        data = _data(args, encoder.channels)
    if args.overwrite:
        with state.main_process_first():
            for name in _FOLDERS if state.is_main_process else ():
                shutil.rmtree(Path(args.out) / name, ignore_errors=True)
    try:
        store = _assign(args, encoder, data)
    except FileExistsError as error:
        raise FileExistsError(f"{error} --overwrite deletes what is there first.") from error
    if state.is_main_process:
        _report(args, store, data)
    return 0


def _data(args: Settings, channels: int) -> ImageTrainData:
    from diffusers_repr.data import DataConfig
    from diffusers_repr.data.splits import open_split
    from diffusers_repr.data.train_data import ImageTrainData

    dataset: Any = open_split(args.dataset, args.split, args.dataset_revision, False)
    config = DataConfig(
        args.dataset,
        image_column=args.image_column,
        label_column=args.label_column,
        center_crop=args.center_crop,
        bad_images=args.bad_images,
        missing_labels="keep",
    )
    side = args.resolution
    if side is None:
        column = config.columns(dataset.features, args.dataset).image
        side = min(dataset[0][column].size)
    return ImageTrainData(dataset, config, channels, (side, side), args.dataset)


def _assign(args: Settings, encoder: Any, data: ImageTrainData) -> AssignmentStore:
    from diffusers_repr.assign import RetrievalIndex
    from diffusers_repr.assign.few_labels import few_labels
    from diffusers_repr.assign.images import AssignSettings, assign_images, assign_neighbours

    settings = AssignSettings(
        args.batch_size, args.shard_size, args.store_dtype, args.num_threads, args.device, not args.quiet
    )
    if args.method == "neighbours":
        return assign_neighbours(
            encoder,
            data,
            args.out,
            args.k or 20,
            index=None if args.index is None else RetrievalIndex.open(args.index),
            exclude_self=not args.include_self,
            kind=args.index_kind,
            cells=args.cells,
            probes=args.probes,
            split=args.split,
            settings=settings,
        )
    labels = few_labels(data, args.labels_per_class, args.seed) if args.method == "classifier" else None
    assigner = _assigner(args, encoder, data)
    return assign_images(
        encoder, data, assigner, args.out, labels=labels, seed=args.seed, split=args.split, settings=settings
    )


def _assigner(args: Settings, encoder: Any, data: ImageTrainData) -> Assigner:
    from diffusers_repr.assign import ClassifierAssigner, IdentityAssigner, KMeansAssigner

    if args.method == "kmeans":
        clusters = args.k or 100
        if clusters > len(data):
            raise ValueError(f"--k {clusters} clusters of {len(data)} images; ask for at most as many clusters.")
        cosine = args.metric == "cosine"
        return KMeansAssigner(encoder.dim, clusters, cosine, args.iterations, args.init, backend=args.backend)
    if args.method == "identity":
        return IdentityAssigner(encoder.dim, over=args.over)
    return ClassifierAssigner(encoder.dim, data.num_classes)


def _report(args: Settings, store: AssignmentStore, data: ImageTrainData) -> None:
    """How many rows there are of what, and where labels are at hand what the classes have to do with them."""
    import torch

    from diffusers_repr.metrics import normalized_mutual_information, purity

    columns = ", ".join(f"{name} {list(shape)}" if shape else name for name, shape in store.layout.columns.items())
    print(f"{len(store)} images: {columns} in {args.out}")
    if "class_id" not in store.layout.columns:
        return
    ids = torch.from_numpy(store.array("class_id"))
    held = torch.bincount(ids, minlength=store.layout.num_classes or 0)
    print(f"{len(held)} classes of {int(held.min())} to {int(held.max())} images")
    if data.labels is not None:
        known = torch.from_numpy(data.labels)
        ids, known = ids[known >= 0], known[known >= 0]
        told = f"purity {purity(ids, known):.3f}, mutual information {normalized_mutual_information(ids, known):.3f}"
        print(f"against the labels: {told}")
