"""Write composed scenes of digits and shapes, with exact captions and masks, as a folder of Parquet files.

    python examples/make_scenes.py --out data/scenes

Splits: train, validation, test, and held_out, whose scenes each have a pair of colour and kind that no training scene
has. Columns: image, caption, mask (class ids of pixels), panoptic (ids of things), things. With `--scribbles` instead:
image, caption (without colours), mask, scribble (class ids where a line is, 255 elsewhere). The same files everywhere.
"""

import argparse
from pathlib import Path

from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.scenes import SPLITS, load_scenes
from diffusers_repr.data.scribbles import load_scribbled_scenes

COUNTS = {"train": 20_000, "validation": 1_000, "test": 1_000, "held_out": 1_000}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="data/scenes", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="another gives other scenes")
    parser.add_argument("--overlap", action="store_true", help="let things cover one another in part")
    parser.add_argument("--scribbles", action="store_true", help="scenes with lines to learn from")
    for split in SPLITS:
        parser.add_argument(f"--{split}", type=int, default=COUNTS[split], help=f"scenes of {split}; 0: none")
    args = parser.parse_args(argv)
    if args.scribbles and args.overlap:
        parser.error("--scribbles are of things apart from one another; drop --overlap.")
    folder = Path(args.out) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        count = getattr(args, split)
        if count:
            path = folder / f"{split}-00000-of-00001.parquet"  # the form in which `datasets` finds splits of any name
            # Captions that are measured with name colours always.
            how = {"overlap": args.overlap} | ({} if split == "train" else {"colourless": 0.0})
            made = load_scribbled_scenes(split, count, args.seed) if args.scribbles else None
            (made or load_scenes(split, count, args.seed, **how)).to_parquet(path)
            print(f"{count:,} scenes in {path}")


if __name__ == "__main__":
    run_script(main)
