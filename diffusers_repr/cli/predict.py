"""`diffusers-repr predict PROBE IMAGES...`: label images with a saved probe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("probe", "images")

    probe: str = setting(REQUIRED, "folder or Hub id of a probe")
    images: list[str] = setting(REQUIRED, "image files, or folders that are searched for them")
    top: int = setting(5, "classes shown an image")
    json: bool = setting(False, "print JSON lines instead of a table")
    base: str | None = setting(None, "folder or Hub id of the base model; default: the recorded one")
    base_revision: str | None = setting(None, "branch, tag or commit of --base")
    revision: str | None = setting(None, "branch, tag or commit of the probe")
    prompt: str | None = setting(None, "of all images; default: that of the probe")
    batch_size: int = setting(64, "images a forward")
    limit: int | None = setting(None, "the first images only, for a quick try; default: all")
    dtype: options.DType = setting("float32", "of the base model, what it computes in")
    device: str | None = setting(None, "cuda, cpu, ...; default: the accelerator, if there is one")
    quiet: bool = setting(False, "no progress bar")

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1; got {getattr(self, name)}.")


def run(args: Settings) -> int:
    """Load, predict and print, one line an image."""
    files = find_images(args.images)[: args.limit]

    import torch

    from diffusers_repr.data.image_files import read_image
    from diffusers_repr.hub.schema import printable
    from diffusers_repr.tasks import Probe

    probe = Probe.from_pretrained(
        args.probe,
        args.base,
        args.revision,
        base_revision=args.base_revision,
        batch_size=args.batch_size,
        dtype=getattr(torch, args.dtype),
    )
    probe.to(options.device(args.device))
    width = max(len(str(file)) for file in files)
    for start in range(0, len(files), args.batch_size):
        part = files[start : start + args.batch_size]
        output = probe([read_image(file, "The image") for file in part], prompt=args.prompt)
        for file, top in zip(part, output.top(args.top), strict=True):
            if args.json:
                ranked = [{"label": name, "probability": value} for name, value in top]
                print(json.dumps({"image": str(file), "label": top[0][0], "top": ranked}))
            else:
                print(
                    f"{printable(str(file)):<{width}}  "
                    + "  ".join(f"{printable(name)} {value:.3f}" for name, value in top)
                )
    return 0


def find_images(paths: Sequence[str]) -> list[Path]:
    """Files, and the image files in folders (in all depths, sorted by path).

    Raises:
        FileNotFoundError: If a path does not exist, or a folder has no image.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise FileNotFoundError(f"No image in the folder {name!r}; looked for {', '.join(SUFFIXES)}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"No file or folder {name!r}.")
    return found
