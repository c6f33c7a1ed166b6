"""`diffusers-repr segment predict SEGMENTER IMAGES...`: write masks of images, and what is uncertain in them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers_repr.cli import options
from diffusers_repr.cli.predict import find_images
from diffusers_repr.config.recipe import REQUIRED, setting

LINES = "masks.jsonl"
OUT = options.Out("folder of masks", (LINES,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("segmenter", "images")

    segmenter: str = setting(REQUIRED, "folder or Hub id of a segmenter")
    images: list[str] = setting(REQUIRED, "image files, or folders that are searched for them")
    out: str = setting(REQUIRED, "folder for masks/ (class ids), pictures/ and masks.jsonl")
    base: str | None = setting(None, "folder or Hub id of the base model; default: the recorded one")
    base_revision: str | None = setting(None, "branch, tag or commit of --base")
    revision: str | None = setting(None, "branch, tag or commit of the segmenter")
    prompt: str | None = setting(None, "of all images; default: that of the segmenter")
    batch_size: int = setting(8, "images a forward")
    limit: int | None = setting(None, "the first images only, for a quick try; default: all")
    json: bool = setting(False, "print JSON lines instead of a table")
    overwrite: bool = setting(False, "write into a folder of masks that is there")
    dtype: options.DType = setting("float32", "of the base model, what it computes in")
    device: str | None = setting(None, "cuda, cpu, ...; default: the accelerator, if there is one")
    quiet: bool = setting(False, "no progress bar")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1; got {self.batch_size}.")


def run(args: Settings) -> int:
    """Load, predict, write and print, one line an image."""
    files = find_images(args.images)[: args.limit]

    import torch

    from diffusers_repr.data.image_files import read_image
    from diffusers_repr.tasks import Segmenter

    segmenter = Segmenter.from_pretrained(
        args.segmenter,
        args.base,
        args.revision,
        base_revision=args.base_revision,
        batch_size=args.batch_size,
        dtype=getattr(torch, args.dtype),
    )
    segmenter.to(options.device(args.device))
    out, names = Path(args.out), mask_names(files)
    for folder in ("masks", "pictures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(files), args.batch_size):
        part = files[start : start + args.batch_size]
        images = [read_image(file, "The image") for file in part]
        output = segmenter(images, prompt=args.prompt)
        rows += _write(out, part, names[start : start + len(part)], images, output, args)
    (out / LINES).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options.say(f"Wrote {len(rows)} masks to {args.out}", aside=args.json)
    return 0


def _write(
    out: Path, files: Sequence[Path], names: Sequence[str], images: list[Any], output: Any, args: Settings
) -> list[dict[str, Any]]:
    """Masks and pictures of some images; their lines, which are printed too."""
    from diffusers_repr.hub.schema import printable
    from diffusers_repr.pictures.masks import mask_image

    rows = []
    pictures = output.pictures(images)
    for place, (file, name, picture) in enumerate(zip(files, names, pictures, strict=True)):
        mask = output.masks[place]
        mask_image(mask.numpy(), len(output.label_names)).save(out / "masks" / f"{name}.png")
        picture.save(out / "pictures" / f"{name}.png")
        counts = mask.flatten().bincount(minlength=len(output.label_names)) / mask.numel()
        shares = {label: round(float(share), 4) for label, share in zip(output.label_names, counts, strict=True)}
        row = {"image": str(file), "mask": f"masks/{name}.png", "picture": f"pictures/{name}.png"}
        rows.append({**row, "uncertainty": round(float(output.scores[place]), 4), "classes": shares})
        shown = "  ".join(f"{printable(label)} {share:.3f}" for label, share in shares.items() if share)
        line = f"{printable(str(file))}  uncertainty {rows[-1]['uncertainty']:.3f}  {shown}"
        print(json.dumps(rows[-1]) if args.json else line)
    return rows


def mask_names(files: Sequence[Path]) -> list[str]:
    """A name for each file's mask; files of one name are counted."""
    seen: dict[str, int] = {}
    names = []
    for file in files:
        seen[file.stem] = seen.get(file.stem, 0) + 1
        names.append(file.stem if seen[file.stem] == 1 else f"{file.stem}-{seen[file.stem]}")
    return names
