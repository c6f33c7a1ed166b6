"""`diffusers-repr segment predict SEGMENTER IMAGES...`: write masks of images, and what is uncertain in them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers_repr.cli import options
from diffusers_repr.cli.saved_task import SavedTaskSettings, find_images, image_batches, load_task
from diffusers_repr.config.recipe import REQUIRED, setting

LINES = "masks.jsonl"
OUT = options.Out("folder of masks", (LINES,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(SavedTaskSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("segmenter", "images")

    segmenter: str = setting(REQUIRED, "folder or Hub id of a segmenter")
    out: str = setting(REQUIRED, "folder for masks/ (class ids), pictures/ and masks.jsonl")
    prompt: str | None = setting(None, "of all images; default: the recorded one")
    batch_size: int = setting(8, "images a forward")
    overwrite: bool = setting(False, "write into a folder of masks that is there")


def run(args: Settings) -> int:
    """Load, predict, write and print, one line an image."""
    files = find_images(args.images)[: args.limit]

    from diffusers_repr.tasks import Segmenter

    segmenter = load_task(Segmenter, args.segmenter, args)
    out, names = Path(args.out), mask_names(files)
    for folder in ("masks", "pictures"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    written: list[dict[str, Any]] = []
    for rows, images in image_batches(files, args.batch_size):
        output = segmenter(images, prompt=args.prompt)
        written += _write(out, files[rows], names[rows], images, output, args)
    (out / LINES).write_text("".join(json.dumps(row) + "\n" for row in written))
    options.say(f"Wrote {len(written)} masks to {args.out}", aside=args.json)
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
