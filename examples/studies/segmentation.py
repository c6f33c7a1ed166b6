"""Masks from a few annotated crops: features of a diffusion model against its pixels and against a random network.

    python examples/studies/segmentation.py --output_dir outputs/segmentation --cifar10 data/cifar10

Two sets. `coins`: disjoint crops of scikit-image's photograph of 24 coins; masks by a watershed on the edges, grown
from what is darker than 30 (ground) and brighter than 150 (coin), holes filled, as scikit-image's guide segments them.
`cars`: 38 automobiles of CIFAR-10's test split, outlined by eye in `car_outlines.json`; left out without `--cifar10`,
a folder with `test.parquet`. A seed draws the crops to learn from, the noise and the networks' weights; the crops that
are measured on are never learned from. Rows that are done are not done again. Writes `rows.jsonl`, `report.md` and a
picture a set.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_repr import Denoiser, Segmenter
from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.coins import coin_crops
from diffusers_repr.data.image_data import load_images
from diffusers_repr.denoiser.untrained import untrained
from diffusers_repr.features.pixel_source import PixelSource
from diffusers_repr.heads import DDPM_SEG
from diffusers_repr.pictures.grid import image_grid
from diffusers_repr.pictures.masks import heat, mask_over

STUDIES = Path(__file__).parent
MODEL = STUDIES.parent / "models" / "cifar10-ddpm"
HELD = {"coins": 28, "cars": 20}  # crops that are measured on
SIZES = {"coins": (5, 10, 20), "cars": (5, 10, 18)}
NAMES = {"coins": ["ground", "coin"], "cars": ["ground", "car"]}
SHOWN = 6  # crops in a picture
SOURCES = {
    "diffusion": "features of the diffusion model",
    "random": "the same network, random weights",
    "patches": "7 x 7 pixels",
    "places": "a pixel and its place",
    "pixels": "a pixel",
}
DRAWN = ("diffusion", "random", "patches")
TITLES = {
    "diffusion": "diffusion model",
    "random": "random network",
    "patches": "7 x 7 pixels",
    "places": "pixel and place",
    "pixels": "pixel",
}


def cars(folder: str) -> tuple[list[Image.Image], list[np.ndarray]]:
    """The outlined cars: a pixel is one of the car's whose centre lies inside."""
    from skimage import draw

    outlines = json.loads((STUDIES / "car_outlines.json").read_text())
    images = load_images(folder, "test").read([int(row) for row in outlines])
    corners = [np.array(points, float)[:, ::-1] - 0.5 for points in outlines.values()]  # (y, x), centres whole
    return [image.convert("RGB") for image in images], [
        draw.polygon2mask((32, 32), points).astype(np.int64) for points in corners
    ]


class Study:
    """The model, the sets, and one fit after another."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.denoiser, self.members = Denoiser.from_pretrained(args.model), args.members
        self.max_epochs = args.max_epochs
        makers: dict[str, Callable[[], Any]] = {"coins": coin_crops}
        if args.cifar10 is not None:
            makers["cars"] = lambda: cars(args.cifar10)
        self.sets = {name: make() for name, make in makers.items() if name in args.sets}

    def source(self, kind: str, seed: int) -> Any:
        if kind in ("pixels", "patches", "places"):
            around = {"patch": 7 if kind == "patches" else 1, "places": kind == "places"}
            return PixelSource(self.denoiser, **around, image_size="keep")
        return self.denoiser if kind == "diffusion" else untrained(self.denoiser, seed)

    def split(self, name: str, size: int, seed: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        images, masks = self.sets[name]
        order = np.random.default_rng(seed).permutation(len(images))
        parts = order[: len(order) - HELD[name]][:size], order[-HELD[name] :]
        train, held = (([images[i] for i in part], [masks[i] for i in part]) for part in parts)
        return train, held

    def fit(self, name: str, kind: str, size: int, seed: int) -> tuple[Segmenter, tuple[Any, Any]]:
        train, held = self.split(name, size, seed)
        source = self.source(kind, seed)
        settings: dict[str, Any] = {"image_size": "keep", "seed": seed} if isinstance(source, Denoiser) else {}
        protocol = DDPM_SEG.replace(max_epochs=self.max_epochs)
        settings |= {"members": self.members, "protocol": protocol, "label_names": NAMES[name]}
        return Segmenter.fit(source, train, **settings), held

    def run(self, name: str, kind: str, size: int, seed: int) -> dict[str, Any]:
        segmenter, held = self.fit(name, kind, size, seed)
        found = segmenter.evaluate(held, record=False)
        row = {"set": name, "source": kind, "size": size, "seed": seed, "members": self.members}
        measured = {key.replace("iou: ", "iou_"): value for key, value in found.items()}
        return row | measured | {"uncertain_errors": uncertain_errors(segmenter, held)}


def uncertain_errors(segmenter: Segmenter, held: tuple[Any, Any]) -> float:
    """The chance that a wrong pixel is more uncertain than a right one: 0.5 says nothing, 1 tells all."""
    output = segmenter(held[0])
    wrong = torch.cat([(m != torch.from_numpy(t)).flatten() for m, t in zip(output.masks, held[1], strict=True)])
    doubt = torch.cat([one.flatten() for one in output.uncertainty])
    ranks = doubt.double().argsort().argsort().double() + 1
    bad, good = int(wrong.sum()), int((~wrong).sum())
    return float((ranks[wrong].sum() - bad * (bad + 1) / 2) / (bad * good)) if bad and good else float("nan")


def picture(study: Study, name: str, size: int, seed: int, kinds: list[str]) -> Image.Image:
    """Crops that were held out: truth, what each kind of features gives, and the uncertainty of the first."""
    masks: dict[str, list[np.ndarray]] = {}
    doubts: list[np.ndarray] = []
    for kind in kinds:
        segmenter, held = study.fit(name, kind, size, seed)
        output = segmenter(held[0][:SHOWN])
        masks[kind] = [mask.numpy() for mask in output.masks]
        doubts = doubts or [one.numpy() for one in output.uncertainty]
    images, truth = held[0][:SHOWN], held[1][:SHOWN]
    highest = max(float(one.max()) for one in doubts)
    rows: list[Image.Image] = list(images)
    for drawn in (truth, *masks.values()):
        rows += [mask_over(image, mask, 2) for image, mask in zip(images, drawn, strict=True)]
    rows += [heat(one, highest) for one in doubts]
    names = ["held-out crop", "its mask", *(TITLES[kind] for kind in kinds), f"uncertainty,\n{TITLES[kinds[0]]}"]
    return image_grid(rows, SHOWN, title=f"Learned from {size} crops", row_titles=names, side=112)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(rows: list[dict[str, Any]], name: str) -> str:
    """Mean IoU over the seeds, lowest to highest in brackets; and what the uncertainty tells of errors."""
    sizes = [size for size in SIZES[name] if any(r["set"] == name and r["size"] == size for r in rows)]
    heads = [f"{size} crops" for size in sizes]
    lines = ["| features | " + " | ".join(heads) + " | uncertain errors |", "|---" * (len(sizes) + 2) + "|"]
    for kind, title in SOURCES.items():
        own = [row for row in rows if row["set"] == name and row["source"] == kind]
        if not own:
            continue
        cells = []
        for size in sizes:
            values = [row["mean_iou"] for row in own if row["size"] == size]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "")
        errors = statistics.mean(row["uncertain_errors"] for row in own if row["size"] == sizes[-1])
        lines.append(f"| {title} | {' | '.join(cells)} | {errors:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/segmentation"))
    parser.add_argument("--model", default=str(MODEL), help="pipeline folder or Hub id")
    parser.add_argument("--cifar10", help="folder with CIFAR-10's test.parquet, for the cars")
    parser.add_argument("--sets", nargs="+", default=["coins", "cars"], choices=["coins", "cars"])
    parser.add_argument("--sources", nargs="+", default=list(SOURCES)[:4], choices=list(SOURCES))
    parser.add_argument("--sizes", nargs="*", type=int, help="crops to learn from; those of the set if not given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--max_epochs", type=int, default=100)
    parser.add_argument("--no_pictures", action="store_true")
    args = parser.parse_args(argv)
    study, path = Study(args), args.output_dir / "rows.jsonl"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in study.sets:
            for size in args.sizes or SIZES[name]:
                for kind in args.sources:
                    wanted = {"set": name, "source": kind, "size": size, "seed": seed, "members": args.members}
                    if any(wanted.items() <= row.items() for row in read_rows(path)):
                        continue
                    row = study.run(name, kind, size, seed)
                    with path.open("a") as lines:
                        lines.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)
    rows = [row for row in read_rows(path) if row["members"] == args.members]
    texts = [f"{name}\n\n{table(rows, name)}" for name in study.sets]
    (args.output_dir / "report.md").write_text("\n\n".join(texts) + "\n")
    print("\n\n".join(texts))
    for name in () if args.no_pictures else study.sets:
        size = (args.sizes or SIZES[name])[0]
        kinds = [kind for kind in DRAWN if kind in args.sources] or args.sources
        picture(study, name, size, args.seeds[0], kinds).save(args.output_dir / f"{name}.png")


if __name__ == "__main__":
    run_script(main)
