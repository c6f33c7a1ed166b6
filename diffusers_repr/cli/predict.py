"""`diffusers-repr predict PROBE IMAGES...`: label images with a saved probe."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

from diffusers_repr.cli.saved_task import SavedTaskSettings, find_images, image_batches, load_task
from diffusers_repr.config.recipe import REQUIRED, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(SavedTaskSettings):
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("probe", "images")

    probe: str = setting(REQUIRED, "folder or Hub id of a probe")
    top: int = setting(5, "classes shown an image")
    prompt: str | None = setting(None, "of all images; default: the recorded one")
    batch_size: int = setting(64, "images a forward")


def run(args: Settings) -> int:
    """Load, predict and print, one line an image."""
    files = find_images(args.images)[: args.limit]

    from diffusers_repr.hub.schema import printable
    from diffusers_repr.tasks import Probe

    probe = load_task(Probe, args.probe, args)
    width = max(len(str(file)) for file in files)
    for rows, images in image_batches(files, args.batch_size):
        output = probe(images, prompt=args.prompt)
        for file, top in zip(files[rows], output.top(args.top), strict=True):
            if args.json:
                ranked = [{"label": name, "probability": value} for name, value in top]
                print(json.dumps({"image": str(file), "label": top[0][0], "top": ranked}))
            else:
                print(
                    f"{printable(str(file)):<{width}}  "
                    + "  ".join(f"{printable(name)} {value:.3f}" for name, value in top)
                )
    return 0
