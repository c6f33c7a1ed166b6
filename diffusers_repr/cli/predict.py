"""`diffusers-repr predict PROBE IMAGES...`: label images with a saved probe."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from diffusers_repr.cli import options

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("probe", help="folder or Hub id of a probe")
    parser.add_argument("images", nargs="+", help="image files, or folders that are searched for them")
    parser.add_argument("--top", type=int, default=5, help="classes shown an image")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--base", help="folder or Hub id of the base model, if not the recorded one")
    parser.add_argument("--base_revision", help="branch, tag or commit of --base")
    parser.add_argument("--revision", help="branch, tag or commit of the probe")
    parser.add_argument("--prompt", help="instead of the probe's own")
    parser.add_argument("--batch_size", type=int, default=64, help="images a forward")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    options.add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Load, predict and print, one line an image."""
    for name in ("top", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1; got {getattr(args, name)}.")
    files = find_images(args.images)

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
    probe.to(options.device(args))
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
