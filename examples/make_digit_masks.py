"""Write the 8x8 digits with masks, of the digit's class where there is ink, as a folder of Parquet files.

    python examples/make_digit_masks.py --out data/digit-masks

Columns: image, label, mask (0: paper; 1 + digit: its ink). A hundred of the training digits, for masks are few, all of
validation and test. The same files everywhere.
"""

import argparse
from pathlib import Path

from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.digits import SPLIT_SIZES, load_digit_masks

COUNTS = {**SPLIT_SIZES, "train": 100}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="data/digit-masks", help="folder to write")
    for split, count in COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"digits of {split}, the first ones")
    args = parser.parse_args(argv)
    folder = Path(args.out) / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for split in COUNTS:
        path = folder / f"{split}-00000-of-00001.parquet"  # the form in which `datasets` finds splits of any name
        count = getattr(args, split)
        load_digit_masks(split, count).to_parquet(path)
        print(f"{count} digits in {path}")


if __name__ == "__main__":
    run_script(main)
