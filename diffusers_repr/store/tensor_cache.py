"""`TensorCache`: a row of tensors for every image of a data set, VAE moments or a teacher's features."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffusers_repr.hub.schema import Check, anything, integer, listing, mapping, one_of, optional, record, text
from diffusers_repr.store.manifest import SIDE, layout_schema, manifest_schema, recipe_differences
from diffusers_repr.store.store import Store
from diffusers_repr.store.tensors import INDEX, TensorLayout

LATENTS, FEATURES = "latents", "features"
_COLUMNS = {LATENTS: {"moments"}, FEATURES: {"tokens", "global"}}
_WORD = text(200, pattern=r"\w[\w.-]*", what="a name of letters, digits, '_', '.', '-'")
_DTYPE = one_of("float32", "float16")
_ABOUT = record(
    {},
    {
        "name": text(1000),
        "fingerprint": mapping(anything()),
        "grid": listing(SIDE, 2, 2),
        "vae": optional(text()),
        "revision": optional(text(1000)),
    },
    others=True,
)
_SCHEMA = manifest_schema(
    {
        "layout": layout_schema(
            one_of(*_COLUMNS), tensors=mapping(listing(SIDE, 1, 6), 1, 100, keys=_WORD), dtype=_DTYPE
        ),
        "recipe": record({"mirrors": integer(1, 2), "dtype": _DTYPE}, others=True),
        "about": _ABOUT,
    }
)


class TensorCache(Store):
    """A finished cache, opened for reading; `len(cache)` rows, `cache[i]` a row of each tensor.

    Attributes:
        folder: Where it lies.
        manifest: As written.
        layout: Rows, shards and tensors; its `kind` is `latents` or `features`.

    It may be sent to other processes: each opens the shards it reads for itself.
    """

    noun: ClassVar[str] = "cache"
    command: ClassVar[str] = "diffusers-repr cache"
    schema: ClassVar[Check] = staticmethod(_SCHEMA)
    layout_type: ClassVar[type[TensorLayout]] = TensorLayout

    layout: TensorLayout

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(folder, manifest)
        self._open: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], kind: str) -> Self:
        """Open a finished cache.

        Args:
            folder: Where it lies.
            kind: `latents` or `features`.

        Raises:
            FileNotFoundError: If there is no such folder, or it is no cache.
            ValueError: If it is not finished, of another kind, or its manifest is damaged.
        """
        cache = cls.open_folder(Path(folder), f"cache of {kind}")
        if cache.layout.kind != kind:
            raise ValueError(f"{str(folder)!r} holds {cache.layout.kind}, not {kind}.")
        return cache

    @classmethod
    def agrees(cls, manifest: dict[str, Any], at: str) -> None:
        """See `Store`."""
        layout, about = manifest["layout"], manifest["about"]
        super().agrees(manifest, at)
        if layout["dtype"] != manifest["recipe"]["dtype"]:
            raise ValueError(f"{at}: layout.dtype and recipe.dtype do not tell the same.")
        kind, tensors = layout["kind"], layout["tensors"]
        if not set(tensors) <= _COLUMNS[kind]:
            raise ValueError(f"{at}: layout.tensors has {', '.join(tensors)}, which a cache of {kind} has not.")
        for name, shape in tensors.items():
            if shape[0] != manifest["recipe"]["mirrors"]:
                raise ValueError(f"{at}: layout.tensors.{name} has not the mirrors that recipe.mirrors says.")
        if kind == FEATURES and not {"name", "fingerprint", "grid"} <= set(about):
            raise ValueError(f"{at}: about lacks the name, fingerprint or grid of the encoder.")

    def __repr__(self) -> str:
        tensors = ", ".join(f"{name} {shape}" for name, shape in self.layout.tensors.items())
        return f"TensorCache({str(self.folder)!r}, {len(self)} rows of {tensors}, {self.layout.dtype})"

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """Each tensor of a row, and `index`, the row of the data set that it stands for.

        Raises:
            IndexError: For a row that is not there.
            ValueError: If the shard cannot be read, or holds what no cache is written with (NaN, infinity, another
                dtype, a row beyond the data set); names the file and the remedy.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"Row {row} of {len(self)} in {str(self.folder)!r}.")
        shard, at = divmod(row, self.layout.shard_size)
        slices = self._open.get(shard)
        if slices is None:
            slices = self._open[shard] = self._slices(shard)
        found = {name: part[at] for name, part in slices.items()}
        if not 0 <= int(found[INDEX]) < len(self):
            raise self._broken(shard, f"says that row {row} stands for image {int(found[INDEX])}")
        for name in self.layout.tensors:
            low, high = torch.aminmax(found[name])  # NaN where one value is; a tenth of `isfinite`'s time
            if not (math.isfinite(low) and math.isfinite(high)):
                raise self._broken(shard, f"holds NaN or infinity in {name!r} of row {row}")
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}

    @property
    def mirrors(self) -> int:
        """2: an image and its mirror, 1: the image alone."""
        return self.recipe["mirrors"]

    def check(self, wanted: Mapping[str, Any], mirrors: int) -> None:
        """Refuse a cache that was made otherwise.

        Args:
            wanted: Parts of the recipe that must be equal, such as `data` and `vae`.
            mirrors: 2 where images are flipped.

        Raises:
            ValueError: Telling what differs (cache -> run).
        """
        stored = {name: self.recipe.get(name) for name in wanted}
        differs = recipe_differences(stored, dict(wanted))
        if differs:
            raise ValueError(
                f"The cache {str(self.folder)!r} was made otherwise than this run needs (cache -> run): "
                f"{'; '.join(differs)}. Run with the settings of the cache, or make another one."
            )
        if mirrors > self.mirrors:
            flag = "--both_mirrors true" if self.layout.kind == LATENTS else "--random_flip true"
            raise ValueError(
                f"The cache {str(self.folder)!r} holds no mirrored images, which random_flip needs "
                f"({self.layout.kind} cannot be flipped). Make one with {flag} in another folder, or train without "
                "random_flip."
            )

    def _slices(self, shard: int) -> dict[str, Any]:
        """The tensors of a shard, of which nothing is read yet; a mapped file holds no file descriptor."""
        self._check_shard(shard)
        try:
            file = safe_open(self.folder / self.layout.path(shard), "pt")
            return {name: file.get_slice(name) for name in (*self.layout.tensors, INDEX)}
        except (SafetensorError, OSError) as error:
            raise self._broken(shard, f"cannot be read ({error})") from error
