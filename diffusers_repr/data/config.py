"""`DataConfig`: which images a run sees and how; the fields are keys of a recipe and flags of a script."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from diffusers_repr.config.recipe import setting
from diffusers_repr.data.columns import LABEL, Columns, choose_columns
from diffusers_repr.data.masks import IGNORE_INDEX, MaskColumn
from diffusers_repr.data.palette import Palette
from diffusers_repr.data.placement import CROPS


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Settings of the training data, read by transformers' `HfArgumentParser`.

    Raises:
        ValueError: If a value is out of range or two settings exclude one another.
    """

    dataset_name: str | None = setting(None, "a folder, a .parquet file, a Hub id, or digits")
    dataset_revision: str | None = setting(None, "branch, tag or commit of a Hub id")
    dataset_split: str = setting("train", "split to train on")
    image_column: str | None = setting(None, "column that holds the images; default: the one there is")
    label_column: str | None = setting(None, "column of class ids; default: a ClassLabel; none: no labels")
    caption_column: str | None = setting(None, "column of texts; default: no texts")
    mask_column: str | None = setting(None, "column of class ids of the pixels; default: no masks")
    mask_names: list[str] | None = setting(None, "names of these classes; default: what the column knows")
    mask_colours: list[str] | None = setting(
        None, "masks that are images of colours: #rrggbb of each class, and a last one of no class"
    )
    ignore_index: int = setting(IGNORE_INDEX, "id of pixels of no class")
    points_column: str | None = setting(None, "column of points: [x, y] or [x, y, visible] in pixels; default: none")
    max_points: int | None = setting(None, "points of an image, the first; default: as many as the row with most")
    missing_labels: Literal["error", "keep"] = setting("error", "rows without a class; keep: their id is -1")
    resolution: int | None = setting(None, "side of the images, pixels; default: what the model takes")
    center_crop: Literal["adm", "fit"] = setting("adm", "ADM's crop, or the largest crop by Lanczos")
    random_flip: bool = setting(False, "mirror half of the images")
    random_rotation: float = setting(0.0, "turn images by up to so many degrees")
    random_shift: float = setting(0.0, "move them by up to this share of their side")
    random_scale: float = setting(0.0, "shrink or enlarge them by up to this share")
    cache_images: bool = setting(False, "decode every image once and keep it in memory")
    streaming: bool = setting(False, "read the data as it is used, without downloading it first")
    shuffle_buffer: int = setting(1000, "rows of a stream that are shuffled together")
    bad_images: Literal["error", "skip"] = setting("error", "images that cannot be read: stop, or leave out")
    latents_dir: str | None = setting(None, "latents to train on: of `diffusers-repr cache`, or REPA's folder vae-sd")
    features_dir: str | None = setting(None, "teacher features, written by `diffusers-repr cache`")
    assignments_dir: str | None = setting(None, "what images are conditioned on, written by `diffusers-repr assign`")
    index_dir: str | None = setting(None, "index that neighbours are of; default: the one in assignments_dir")
    num_neighbours: int | None = setting(None, "of those that are stored, the nearest; default: all")
    include_query: bool = setting(False, "before its neighbours the image's own vector")

    def __post_init__(self) -> None:
        if self.center_crop not in CROPS:
            raise ValueError(f"`center_crop` is one of {', '.join(CROPS)}, got {self.center_crop!r}.")
        for name in ("missing_labels", "bad_images"):
            allowed = ("error", "keep" if name == "missing_labels" else "skip")
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("random_rotation", "random_shift", "random_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.random_scale >= 1:
            raise ValueError(f"`random_scale` is a share below 1, got {self.random_scale}.")
        for name in ("resolution", "max_points", "num_neighbours"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        for name, column in (
            ("mask_names", "mask_column"),
            ("mask_colours", "mask_column"),
            ("max_points", "points_column"),
        ):
            if getattr(self, name) is not None and getattr(self, column) is None:
                raise ValueError(f"`{name}` is set, but no `{column}`; name the column.")
        if self.streaming and self.points_column is not None and self.max_points is None:
            raise ValueError("How many points the rows of a stream have is not known before; pass --max_points.")
        if self.shuffle_buffer < 1:
            raise ValueError(f"`shuffle_buffer` must be at least 1 (1: no shuffling), got {self.shuffle_buffer}.")
        cached = [
            name for name in ("cache_images", "latents_dir", "features_dir", "assignments_dir") if getattr(self, name)
        ]
        if self.streaming and cached:
            raise ValueError(f"`streaming` has no places in the data set to keep {', '.join(cached)} by; drop one.")
        moved = [name for name in ("random_rotation", "random_shift", "random_scale") if getattr(self, name)]
        if (self.latents_dir or self.features_dir) and moved:
            raise ValueError(
                f"Cached latents and features know an image and its mirror only; {', '.join(moved)} cannot act. "
                "Set them to 0, or train without the cache."
            )

    def held_out(self, split: str) -> DataConfig:
        """The same for another split whose images are read as they are, to measure on."""
        still: dict[str, Any] = dict.fromkeys(("random_rotation", "random_shift", "random_scale"), 0.0)
        still |= dict.fromkeys(("latents_dir", "assignments_dir", "index_dir", "num_neighbours"))
        return dataclasses.replace(
            self, dataset_split=split, random_flip=False, streaming=False, include_query=False, **still
        )

    def columns(self, features: Mapping[str, Any], name: str) -> Columns:
        """The columns that are chosen, among those of a data set; see `choose_columns`.

        Raises:
            ValueError: As `choose_columns`, and if the column named `label` holds no class ids: training would go on
                without labels in silence.
        """
        labelled = self.label_column != "none"
        label = self.label_column if labelled else None
        chosen = (self.image_column, label, self.caption_column, self.mask_column, self.points_column)
        found = choose_columns(features, *chosen, labelled=labelled, name=name)
        if labelled and found.label is None and LABEL in features and LABEL not in found.used():
            raise ValueError(f"{found.unlabelled} To train without labels: --label_column none.")
        return found

    def masks(self, features: Mapping[str, Any]) -> MaskColumn | None:
        """What the column of masks holds; None without."""
        if self.mask_column is None:
            return None
        palette = None if self.mask_colours is None else Palette.of(self.mask_colours, self.ignore_index)
        return MaskColumn(features[self.mask_column], self.mask_names, self.ignore_index, palette)

    def size(self, wanted: int | tuple[int, int] | None = None) -> tuple[int, int]:
        """(H, W) of the images: what the model takes, or `resolution`.

        Args:
            wanted: What the model takes; one number: square.

        Raises:
            ValueError: If there is neither, or both and they differ.
        """
        sides = (wanted, wanted) if isinstance(wanted, int) else wanted
        own = None if self.resolution is None else (self.resolution, self.resolution)
        if own is None and sides is None:
            raise ValueError("The size of the images is not known; pass --resolution.")
        if own is not None and sides is not None and own != tuple(sides):
            raise ValueError(f"`resolution` is {self.resolution}, but the model takes {tuple(sides)} (H, W).")
        height, width = own or sides  # type: ignore[misc]
        return int(height), int(width)
