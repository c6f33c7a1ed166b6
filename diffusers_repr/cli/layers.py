"""`diffusers-repr layers MODEL`: the layer table, from configs alone."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar, Literal

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("model",)

    model: str = setting(REQUIRED, "pipeline folder or Hub id; no weights are loaded")
    image_size: list[int] | None = setting(None, "pixels: one side, or height and width")
    detail: Literal["blocks", "all"] = setting("blocks", "blocks alone, or every module that gives an image")
    revision: str | None = setting(None, "branch, tag or commit on the Hub")
    json: bool = setting(False, "print JSON lines instead of a table")


def run(args: Settings) -> int:
    """Print the table."""
    from diffusers_repr.denoiser.layers import list_layers_from_config

    size = options.two_sides(args.image_size)
    layers = list_layers_from_config(args.model, size, args.detail, revision=args.revision)
    if args.json:
        for layer in layers:
            print(json.dumps(layer.to_dict()))
        return 0
    width = max(len(layer.path) for layer in layers)
    print(f"{'layer':<{width}}  {'kind':<6} {'channels':>8} {'grid':>9} {'stride':>6} {'cum. FLOPs':>10}  module")
    for layer in layers:
        grid = f"{layer.grid[0]}x{layer.grid[1]}"
        print(
            f"{layer.path:<{width}}  {layer.kind:<6} {layer.channels:>8} {grid:>9} {layer.stride:>6g} "
            f"{layer.flops_share:>10.1%}  {layer.module}"
        )
    return 0
