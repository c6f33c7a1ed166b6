"""Which head to take: all heads on one base under one protocol, with 1 %, 10 % and all labels.

    python examples/studies/classification.py
    python examples/studies/classification.py --model examples/models/cifar10-ddpm --dataset cifar10 --limit 10000 \
        --timesteps 0 10 20 50 --epochs 10 --output_dir outputs/classification-cifar10

Layer and level are chosen by a closed-form linear head on a validation split, once for all heads. Then every head is
fitted with each share of the labels and each of three seeds, and measured on the test split: linear, MLP, nearest
neighbours, convolution, attention, DifFormer and DifFeed, against a linear head on raw pixels and on the same layer of
the untrained network. Last, one classifier that is told the level is measured level by level. Writes comparison.json,
comparison.md, noise_curve.json and pictures.
"""

import argparse
import dataclasses
import time
from pathlib import Path

from diffusers.utils.logging import disable_progress_bar

from diffusers_repr import Denoiser, select_features
from diffusers_repr.data.image_data import load_images
from diffusers_repr.data.splits import has_split
from diffusers_repr.heads import PROTOCOLS
from diffusers_repr.sweep.splits import draw_rows, hold_out
from diffusers_repr.tasks import HEADS, HeadPlaces, compare_heads, noise_curve

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "classification"
CURVE = [0, 50, 100, 200, 300, 500, 700, 900]


def open_data(dataset: str, limit: int | None, test_limit: int | None, validate: float):
    """Train, validation and test; a part of train validates where there is no such split."""
    train = load_images(dataset, "train")
    if has_split(dataset, "validation"):
        validation = load_images(dataset, "validation")
    else:
        train, validation = hold_out(train, validate)
    test = load_images(dataset, "test")
    train = train if limit is None else draw_rows(train, limit)
    validation = validation if limit is None else draw_rows(validation, max(limit // 4, 2))
    return train, validation, test if test_limit is None else draw_rows(test, test_limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="examples/models/digits-ddpm")
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[0, 10, 30, 100])
    parser.add_argument("--heads", nargs="+", default=list(HEADS))
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--map_size", type=int, default=4)
    parser.add_argument("--limit", type=int, help="training images, a fixed draw")
    parser.add_argument("--test_limit", type=int, help="test images, a fixed draw")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output_dir", type=Path, default=RESULTS)
    args = parser.parse_args()
    disable_progress_bar()
    start = time.perf_counter()
    denoiser = Denoiser.from_pretrained(args.model)
    denoiser.pipe.to(args.device)
    train, validation, test = open_data(args.dataset, args.limit, args.test_limit, 0.2)
    selection = select_features(
        denoiser, train, validation, args.timesteps, metric="neg_brier", max_layers=1, max_levels=1, seeds=args.seeds
    )
    places = HeadPlaces.of(selection)
    print(places, flush=True)
    comparison = compare_heads(
        denoiser,
        train,
        test,
        places,
        heads=args.heads,
        shares=args.shares,
        seeds=args.seeds,
        epochs=args.epochs,
        protocol=PROTOCOLS["adam-maps"].replace(learning_rate=args.learning_rate),
        map_size=args.map_size,
        progress=lambda line: print(line, flush=True),
    )
    seconds = round(time.perf_counter() - start)
    comparison = dataclasses.replace(comparison, recipe={**comparison.recipe, "seconds": seconds})
    comparison.save(args.output_dir)
    (args.output_dir / "heatmap.png").write_bytes(selection.heatmap())
    curve = noise_curve(
        denoiser, places.layer, train, test, timesteps=CURVE, draws=4, protocol=PROTOCOLS["ddae"].replace(epochs=60)
    )
    curve.save(args.output_dir)
    print("accuracy by timestep:", dict(zip(curve.timesteps, curve.accuracies, strict=True)))
    print(comparison.table(), comparison.words(), sep="\n\n")


if __name__ == "__main__":
    main()
