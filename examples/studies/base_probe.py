"""Is a model good enough to stand on? Its best layer by a linear probe, against raw pixels and itself untrained.

    python examples/studies/base_probe.py --model examples/models/cifar10-ddpm --dataset_name data/cifar10 \
        --output_dir outputs/base-probe

Level and layer of each network are selected on rows of the training split, never on the test split; the untrained
network gets the same choice. All three are read by a logistic regression whose penalty is tuned on the same rows.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDPMPipeline

from diffusers_repr import Denoiser, select_features
from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.splits import open_split
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.denoiser.untrained import untrained
from diffusers_repr.heads import fit_head
from diffusers_repr.hub import write_json

PARTS = ("train", "validation", "test")


def load(args: argparse.Namespace) -> dict:
    """Rows of the splits, the same for every network; validation is a part of train that nothing is fitted on."""
    rows = open_split(args.dataset_name, "train", None).shuffle(seed=args.seed)
    test = open_split(args.dataset_name, "test", None).shuffle(seed=args.seed)
    stop = args.train + args.validation
    parts = (rows.select(range(args.train)), rows.select(range(args.train, stop)), test.select(range(args.test)))
    return dict(zip(PARTS, parts, strict=True))


def accuracy(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
    head = fit_head(x["train"], y["train"], protocol="lbfgs", validation=(x["validation"], y["validation"])).head
    return float((head(x["test"]).argmax(1) == y["test"]).float().mean())


def best_layer(denoiser: Denoiser, data: dict, labels: dict, args: argparse.Namespace) -> dict:
    selection = select_features(
        denoiser, data["train"], data["validation"], timesteps=args.timesteps, layers=args.layers, max_layers=1,
        max_levels=1, pooling=args.pooling, batch_size=args.batch_size, seeds=(0,), finalists=3,
    )  # fmt: skip
    extractor, best = selection.extractor(denoiser, batch_size=args.batch_size), selection.best
    x = {part: extractor(rows["image"][:])[best.layer] for part, rows in data.items()}
    return {"layer": best.layer, "timestep": best.timestep, "accuracy": accuracy(x, labels)}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="examples/models/cifar10-ddpm", help="an unconditional pipeline folder")
    parser.add_argument("--dataset_name", default="data/cifar10", help="with splits train and test, and labels")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/base-probe"))
    parser.add_argument("--timesteps", type=int, nargs="+", default=[10, 50, 100, 200])
    parser.add_argument("--layers", nargs="+", help="default: all")
    parser.add_argument("--pooling", default="adaptive:2")
    parser.add_argument("--inits", type=int, default=2, help="untrained networks")
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--validation", type=int, default=2000)
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    data = load(args)
    labels = {part: torch.tensor(rows["label"][:]) for part, rows in data.items()}
    denoiser = Denoiser.from_pipe(DDPMPipeline.from_pretrained(args.model))
    channels, size = denoiser.image_channels, denoiser.image_size
    flat = {part: to_pixels(rows["image"][:], channels, size).flatten(1) for part, rows in data.items()}
    report = {
        "trained": best_layer(denoiser, data, labels, args),
        "untrained": [best_layer(untrained(denoiser, seed), data, labels, args) for seed in range(args.inits)],
        "pixels": accuracy(flat, labels),
        "settings": {k: v for k, v in vars(args).items() if k != "output_dir"},
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "report.json", report)
    print(json.dumps({k: v for k, v in report.items() if k != "settings"}, indent=2))


if __name__ == "__main__":
    run_script(main)
