"""`ImageStore`: generated images, each with the key that tells what it was made of; no key is there twice."""

from __future__ import annotations

import io
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffusers_repr.hub.components import MAX_SIDE
from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.places import is_place, last_name
from diffusers_repr.hub.schema import Check, anything, digest, integer, mapping, one_of, optional, record, text
from diffusers_repr.store.image_card import image_card
from diffusers_repr.store.manifest import MANIFEST, layout_schema, manifest_schema, recipe_hash
from diffusers_repr.store.parquet import ParquetLayout
from diffusers_repr.store.parquet_store import ParquetStore
from diffusers_repr.store.write import Plan, Spans, check_folder, choose_shard_size, write_store

Make = Callable[[Sequence["ImageKey"]], Sequence[Image.Image]]
_KIND = "images"
_SHARD_ROWS = 1000
_PATH = "holds a path in place of a picture, which no generation writes"
_PNG = b"\x89PNG\r\n\x1a\n"
_KEY = record(
    {
        "model": text(1000),
        "revision": optional(text(1000)),
        "prompt": optional(text()),
        "condition": optional(text()),
        "guidance": text(1000),
        "steps": integer(1, 1_000_000),
        "seed": integer(0, 2**63 - 1),
        "source": optional(text(1000)),
        "variant": integer(0, 2**31 - 1),
        "height": integer(1, MAX_SIDE),
        "width": integer(1, MAX_SIDE),
    }
)


@dataclass(frozen=True)
class ImageKey:
    """All that decides a generated image.

    Attributes:
        model: Hub id or name; published, as `source` is.
        revision: Commit of the model.
        prompt: Text it was conditioned on.
        condition: What else it was conditioned on, as text: a class id, the name of a control image.
        guidance: How it was guided, as text: `7.5`, `pag=3`; empty for none.
        steps: Steps of the sampler.
        seed: Of the noise, 0 to 2^63 - 1.
        source: The image it was made from, by id or hash; it is published with the store, so no place of this machine.
        variant: Which of several images of one source.
        height: Pixels.
        width: Pixels.

    Raises:
        ValueError: For a value out of range; names the field.
    """

    model: str
    height: int
    width: int
    steps: int
    seed: int
    revision: str | None = None
    prompt: str | None = None
    condition: str | None = None
    guidance: str = ""
    source: str | None = None
    variant: int = 0

    def __post_init__(self) -> None:
        _KEY(asdict(self), "the key of an image")

    @property
    def name(self) -> str:
        """A short name: equal for equal keys, and for no others.

        Example:
            >>> one = ImageKey("m", 8, 8, steps=4, seed=0)
            >>> one.name == ImageKey("m", 8, 8, steps=4, seed=0).name, one.name == ImageKey("m", 8, 8, 4, seed=1).name
            (True, False)
        """
        return recipe_hash(asdict(self))


_FIELDS = tuple(field.name for field in fields(ImageKey))
_TYPES = {"seed": "int64", **dict.fromkeys(("height", "width", "steps", "variant"), "int32")}


@dataclass(frozen=True)
class ImageLayout(ParquetLayout):
    """Rows of `row`, `key`, `image` (PNG) and the fields of `ImageKey`."""

    nullable: ClassVar[tuple[str, ...]] = ("revision", "prompt", "condition", "source")
    stem: ClassVar[str] = "train"  # as `datasets` names the split of data without others

    kind: str = _KIND

    def features(self) -> datasets.Features:
        """See `ParquetLayout`."""
        described = {name: datasets.Value(_TYPES.get(name, "string")) for name in _FIELDS}
        head = {"row": datasets.Value("int64"), "key": datasets.Value("string"), "image": datasets.Image()}
        return datasets.Features({**head, **described})

    def table_problem(self, table: pa.Table) -> str | None:
        """See `ParquetLayout`: keys that are not those of their rows, and what is no PNG of the key's size."""
        for row in table.to_pylist():
            key = ImageKey(**{name: row[name] for name in _FIELDS})
            if key.name != row["key"]:
                return f"holds another key in row {row['row']} than its columns tell"
            if row["image"]["path"] is not None:
                return _PATH
            if _png_size(row["image"]["bytes"] or b"") != (key.height, key.width):
                return f"holds no PNG of {key.height} x {key.width} (H x W) in row {row['row']}"
        return None


class ImageStore(ParquetStore):
    """Generated images; made by `write_images`. `load()` gives them as a `datasets.Dataset` with a column `image`."""

    noun: ClassVar[str] = "store of images"
    command: ClassVar[str] = "write_images(...)"
    schema: ClassVar[Check] = staticmethod(
        manifest_schema(
            {
                "layout": layout_schema(one_of(_KIND)),
                "recipe": record({"keys": digest(), "models": mapping(integer(1))}),
                "about": mapping(anything()),
            }
        )
    )

    layout_type: ClassVar[type[ImageLayout]] = ImageLayout

    layout: ImageLayout

    @classmethod
    def card(cls, manifest: dict[str, Any]) -> str:
        """See `Store`."""
        return image_card(manifest)

    def load(self) -> datasets.Dataset:
        """See `ParquetStore`; a file of others may not name files or addresses, which `datasets` would open.

        Every file is read once before, by its checksums: `datasets` takes damaged pages as they are.

        Raises:
            ValueError: If a shard is corrupted.
        """
        for shard in range(self.layout.shards):
            self._check_shard(shard)
            if any(row["image"]["path"] is not None for row in self._rows(shard, None)):
                raise self._broken(shard, _PATH)
        return super().load()

    def labelled(self) -> datasets.Dataset:
        """As `load`, with a column `label` of class ids where every image has a condition.

        Conditions that are whole numbers are the ids themselves; other texts are named classes, numbered as they come.

        Raises:
            ValueError: If a shard is corrupted.
        """
        data = self.load()
        given = data["condition"][:]
        if any(text is None for text in given):
            return data
        if all(text.isascii() and text.isdigit() for text in given):
            names = [str(number) for number in range(max(map(int, given)) + 1)]
        else:
            names = list(dict.fromkeys(given))
        ids = {name: number for number, name in enumerate(names)}
        labels = [ids[str(int(text)) if text not in ids else text] for text in given]
        return data.add_column("label", labels, feature=datasets.ClassLabel(names=names))

    def image_keys(self) -> list[ImageKey]:
        """The key of every row.

        Raises:
            ValueError: If a shard is corrupted.
        """
        found: list[ImageKey] = []
        for shard in range(self.layout.shards):
            self._check_shard(shard)
            rows = list(self._rows(shard, list(_FIELDS)))
            try:
                found += [ImageKey(**row) for row in rows]
            except ValueError as error:
                raise self._broken(shard, f"holds what is no key ({error})") from error
        return found

    def pictures(self) -> Iterator[Image.Image]:
        """The images in order, a shard in memory at a time.

        Raises:
            ValueError: If a shard is corrupted.
        """
        for shard in range(self.layout.shards):
            self._check_shard(shard)
            for row in self._rows(shard, ["image"]):
                if row["image"]["path"] is not None:
                    raise self._broken(shard, _PATH)
                with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
                    yield picture.copy()

    def _rows(self, shard: int, columns: list[str] | None) -> Iterator[dict[str, Any]]:
        """Rows of a shard, some in memory at a time, all columns if None."""
        try:
            with pq.ParquetFile(self.folder / self.layout.path(shard), page_checksum_verification=True) as file:
                for rows in file.iter_batches(256, columns=columns):
                    yield from rows.to_pylist()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._broken(shard, f"cannot be read ({error})") from error


def write_images(
    out: str | os.PathLike[str],
    keys: Sequence[ImageKey],
    make: Make,
    *,
    batch_size: int = 8,
    shard_size: int | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ImageStore:
    """Make the images of some keys and write them; the same call goes on where an earlier one was stopped.

    Under `accelerate launch` the processes share the shards.

    Args:
        out: Folder of the store; new, empty, or of an earlier call with the same keys.
        keys: Of the images, in their order.
        make: Gives the image of each of some keys, and nothing else decides it.
        batch_size: Keys of one call of `make`.
        shard_size: Rows of a file; what an earlier call chose, else at most 1000 and 256 MiB of pixels, if None.
        about: What the manifest tells beside the keys, as JSON.
        progress: Show a bar on the main process.

    Raises:
        FileExistsError: If the folder holds images of other keys, or is no store of images.
        ValueError: If there is no key, a key stands twice or names a place of this machine, or an image has another
            size than its key tells.
        OSError: If the disk is full; what is written stays valid.
    """
    folder = Path(out)
    check_folder(folder)
    names = [key.name for key in keys]
    if not keys:
        raise ValueError("No keys of images; give one for each image that is to be made.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{keys[names.index(name)]} stands {times} times; each image is made once.")
    for key in keys:
        _refuse_places(key)
    models = Counter(f"{key.model}@{key.revision or ''}" for key in keys)
    recipe = {"keys": recipe_hash({"keys": names}), "models": dict(sorted(models.items()))}
    pixels = max(3 * key.height * key.width for key in keys)
    size = choose_shard_size(ImageStore, folder, _SHARD_ROWS, pixels, shard_size)

    def rows(spans: Spans) -> Iterator[dict[str, Any]]:
        for start, stop in spans:
            for at in range(start, stop, batch_size):
                asked = keys[at : min(at + batch_size, stop)]
                images = [_encoded(image, key) for image, key in zip(make(asked), asked, strict=True)]
                described = {name: [getattr(key, name) for key in asked] for name in _FIELDS}
                numbers = list(range(at, at + len(asked)))
                yield {"row": numbers, "key": [key.name for key in asked], "image": images, **described}

    layout = ImageLayout(len(keys), size, recipe_hash(recipe))
    write_store(Plan(ImageStore, folder, layout, recipe, rows, about or {}, progress=progress, what="generate"))
    return ImageStore.open(folder)


def not_yet_made(keys: Iterable[ImageKey], stores: Iterable[ImageStore]) -> list[ImageKey]:
    """The keys that no store holds, each once, in their order."""
    known = {key.name for store in stores for key in store.image_keys()}
    return list({key.name: key for key in keys if key.name not in known}.values())


def is_image_store(folder: Path) -> bool:
    """Whether a folder has the manifest of an `ImageStore`."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    held = read_json(manifest)
    layout = held.get("layout") if isinstance(held, Mapping) else None
    return isinstance(layout, Mapping) and layout.get("kind") == _KIND


def _refuse_places(key: ImageKey) -> None:
    """Refuse folders of this machine: a store may be published, and elsewhere they name nothing."""
    for name in ("model", "source", "condition"):
        value = getattr(key, name)
        if is_place(value):
            raise ValueError(
                f"The {name} of a key is a place of this machine: {value!r}. Give an id or a name, such as "
                f"{last_name(value)!r}."
            )


def _encoded(image: Image.Image, key: ImageKey) -> dict[str, Any]:
    if (image.height, image.width) != (key.height, key.width):
        raise ValueError(f"{key} came as {image.height} x {image.width} (H x W).")
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def _png_size(data: bytes) -> tuple[int, int] | None:
    """(H, W) of a PNG file, from its head; None for anything else."""
    if len(data) < 24 or not data.startswith(_PNG) or data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack(">II", data[16:24])
    return height, width
