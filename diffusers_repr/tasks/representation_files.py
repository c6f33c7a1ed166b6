"""A `RepresentationProbe` as files: the head, what encoder it stands on, the card; one folder, one Hub repository."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from diffusers_repr.encoders import Encoder
from diffusers_repr.encoders.loading import split_layer
from diffusers_repr.heads import LinearHead
from diffusers_repr.hub import is_repo_id, push_folder, resolve_folder, schema
from diffusers_repr.hub.files import atomic_write, read_json, write_json
from diffusers_repr.hub.places import last_name

FILE, FORMAT, NOUN = "representation.json", "diffusers_repr.representation/1", "representation probe"
_HEAD = "head"
_PATTERNS = [FILE, "README.md", f"{_HEAD}/config.json", f"{_HEAD}/*.safetensors"]
_SIDE = schema.integer(1, 1 << 16)
_SCHEMA = schema.record({
    "format": schema.one_of(FORMAT),
    "encoder": schema.record({
        "name": schema.optional(schema.text(1000)), "layer": schema.optional(schema.text(1000)),
        "revision": schema.optional(schema.text(200)), "model_class": schema.text(200), "weights": schema.text(200),
    }),
    "features": schema.one_of("global", "tokens"),
    "image_size": schema.optional(schema.listing(_SIDE, 2, 2)),
    "label_names": schema.optional(schema.listing(schema.text(1000), 1, 1 << 20)),
    "beside": schema.listing(schema.text(1000), 0, 100),
    "scores": schema.mapping(schema.number(), 0, 10_000),
})  # fmt: skip


@dataclass(frozen=True)
class EncoderPlace:
    """Where the encoder of a head is found again, and by what it is known.

    Attributes:
        name: Hub id, or the way from the probe's folder to the encoder's; None of one that was made of parts.
        layer: `layer@timestep` of a denoiser that is read as an encoder.
        revision: Of the Hub id.
        model_class: Class of the network.
        weights: Hash of its weights.
    """

    name: str | None
    layer: str | None
    revision: str | None
    model_class: str | None
    weights: str | None

    @classmethod
    def of(cls, encoder: Encoder, folder: Path | None) -> Self:
        """Of an encoder as a file in `folder` holds it: of a folder the way there, from a dot on.

        None, for a card: its last name alone.
        """
        record, place = encoder.record(), encoder.place
        layer = None if place is None else split_layer(place)
        name = layer[0] if layer is not None else place
        if name is not None and Path(name).expanduser().is_dir():
            there = Path(name).expanduser().absolute()
            way = None if folder is None else Path(os.path.relpath(there, folder.absolute())).as_posix()
            name = last_name(name) if way is None else way if way.startswith(".") else f"./{way}"
        read = None if layer is None else f"{layer[1]}@{layer[2]:g}"
        return cls(name, read, encoder.revision, record.model_class, record.weights)

    def found(self, folder: Path) -> str:
        """What `load_encoder` takes.

        Args:
            folder: Of the probe.

        Raises:
            FileNotFoundError: If it was a folder that is gone.
            ValueError: If it has no name.
        """
        if self.name is None:
            raise ValueError(
                f"The head in {str(folder)!r} was fitted on an encoder that has no name (random weights, or made of "
                "parts). Pass base=<the encoder>."
            )
        beside = folder / self.name
        if self.name.startswith(".") and not beside.is_dir():
            raise FileNotFoundError(f"The encoder of {str(folder)!r} was the folder {self.name!r} from there, which "
                                    "is gone. Pass base=<the encoder, its folder or Hub id>.")  # fmt: skip
        found = os.path.normpath(beside) if beside.is_dir() else self.name
        return found if self.layer is None else f"{found}:{self.layer}"


def write(folder: Path, head: LinearHead, told: dict[str, Any], encoder: EncoderPlace, title: str) -> None:
    """Write all files of a probe into an empty folder.

    Args:
        folder: Exists.
        head: Of the probe.
        told: Keys of the file besides the format and the encoder.
        encoder: What the head stands on.
        title: Heading of the card.
    """
    whole = {"format": FORMAT, "encoder": vars(encoder), **told}
    _SCHEMA(whole, FILE)
    head.save_pretrained(folder / _HEAD)
    write_json(folder / FILE, whole)
    atomic_write(folder / "README.md", card(told, encoder, title))


def read(id_or_folder: Any, revision: str | None, token: str | None) -> tuple[Path, EncoderPlace, dict[str, Any]]:
    """The folder of a probe, its encoder's place and all else that its file tells.

    Raises:
        FileNotFoundError: If it holds no probe of this kind.
        HubError: If the Hub has none, or is not reached.
        ValueError: If the file is damaged.
    """
    folder = resolve_folder(id_or_folder, revision, token, _PATTERNS)
    if not (folder / FILE).is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no {NOUN}: it has no {FILE}.")
    told = _SCHEMA(read_json(folder / FILE), FILE)
    del told["format"]
    return folder, EncoderPlace(**told.pop("encoder")), told


def read_head(folder: Path) -> LinearHead:
    """The head in the folder of a probe."""
    return LinearHead.from_pretrained(folder / _HEAD, local_files_only=True)


def push(folder: Path, repo_id: str, base: str | None = None, base_revision: str | None = None, **options: Any) -> str:
    """Upload a saved probe, whose folder is not changed.

    Args:
        folder: What `RepresentationProbe.save_pretrained` wrote.
        repo_id: `"user/name"`.
        base: Hub id to write as the encoder's, where that was a folder.
        base_revision: Goes with `base`.
        **options: Of `push_folder`.

    Returns:
        Address of the commit.

    Raises:
        ValueError: If `base` is no Hub id.
    """
    if base is not None and not is_repo_id(base):
        raise ValueError(f"base={base!r}: what others load the encoder by is a Hub id, 'user/name'.")
    _, place, told = read(folder, None, None)
    head = read_head(folder)
    if base is not None:
        place = replace(place, name=base, revision=base_revision)
    elif place.name is None or place.name.startswith("."):  # the way to a folder
        place = replace(place, name=place.name and last_name(place.name))
        warnings.warn(
            f"The {NOUN}'s encoder is {place.name!r}, which is not on the Hub: others must pass base=... when they "
            "load it. Push the encoder too and give its id: base='user/model'.",
            stacklevel=3,
        )
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary), head, told, place, repo_id)
        return push_folder(temporary, repo_id, kind=NOUN, **options)


def card(told: dict[str, Any], encoder: EncoderPlace, title: str) -> str:
    """What a probe is, and a table of what was measured."""
    name = str(encoder.model_class) if encoder.name is None else last_name(encoder.name)
    layer = "" if encoder.layer is None else f", `{schema.printable(encoder.layer)}`"
    head = "---\nlibrary_name: diffusers-repr\ntags: [image-feature-extraction, representation]\n---\n"
    text = f"A linear head on the {told['features']} features of `{schema.printable(name)}`{layer}."
    load = f'probe = RepresentationProbe.from_pretrained("{schema.printable(title)}")'
    use = f"```py\nfrom diffusers_repr.tasks import RepresentationProbe\n\n{load}\nprint(probe(images))  # (N, K)\n```"
    rows = [f"| {schema.printable(name)} | {value:.4f} |" for name, value in told["scores"].items()]
    scores = "\n".join(["| measure | value |", "|---|---|", *rows]) if rows else "Not measured."
    return f"{head}\n# {schema.printable(title)}\n\n{text}\n\n{use}\n\n{scores}\n"


__all__ = ["FILE", "NOUN", "EncoderPlace", "card", "push", "read", "read_head", "write"]
