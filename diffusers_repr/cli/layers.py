"""`diffusers-repr layers MODEL`: the layer table, from configs alone."""

from __future__ import annotations

import argparse
import json

from diffusers_repr.cli import options


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", help="pipeline folder or Hub id; no weights are loaded")
    options.add_image_size(parser)
    parser.add_argument("--detail", choices=("blocks", "all"), default="blocks")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    from diffusers_repr.denoiser.layers import list_layers_from_config

    layers = list_layers_from_config(args.model, options.image_size(args), args.detail, revision=args.revision)
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
