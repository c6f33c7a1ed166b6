"""Edges of real cars as targets of guidance: how near do samples come, by the head's own reading and in truth?

    python examples/studies/readout_control.py --output_dir outputs/readout --dataset_name data/cifar10-cars

The data set is a folder of parquet files or a Hub id with a column `image`; ddpm_cars.yaml says how to make the cars.
Every row of a seed starts from the same noises, so guided and unguided samples are pairs. `DepthGuidance` has no
depth here: its heads read the same edges, a stand-in. Rows that are done are not done again. Writes `rows.jsonl`,
`report.md`, `control.png` and `depth.png`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from PIL import Image
from torch import Tensor

from diffusers_repr import Denoiser, DepthGuidance, ReadoutGuidance, guide
from diffusers_repr.cli.guard import run_script
from diffusers_repr.config.made import check_made
from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.splits import open_split
from diffusers_repr.heads import DepthHead, MapHead, ReadoutHead, read_features, sobel_edges
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.pictures.grid import image_grid

MODELS = Path(__file__).parents[1] / "models"
SIGN = {f"latent_sign {scale}": {"scale": scale} for scale in (0.01, 0.02, 0.04)}
READOUT = SIGN | {"eps 20": {"scale": 20.0, "update": "eps"}}
DEPTH = {"depth, eps 100": {"scale": 100.0}, "depth, latent_sign 0.02": {"scale": 0.02, "update": "latent_sign"}}
ROWS = ["none", *READOUT, *DEPTH]
SHOWN, SHOWN_STRONGER, SHOWN_DEPTH = "latent_sign 0.02", "latent_sign 0.04", "depth, latent_sign 0.02"
SHOWN_COUNT = 8  # columns of the pictures
CONTROL = (
    "Edges of real cars as targets; a column of samples starts from the same noise",
    ("target edges", "no guidance", "scale 0.02", "its edges", "scale 0.04", "its edges"),
)
DEPTHS = (
    "Two heads that read edges, a stand-in for depth; a column starts from the same noise",
    ("no guidance", "strong head", "weak head", "scale 0.02", "strong head", "weak head"),
)
LOW, MIDDLE = 50, 300  # timesteps: finished images are read at the first, and judged as images at the second

COLUMNS = {  # key of a row -> title and format
    "readout_error": ("error of the readout", ".4f"),
    "edge_error": ("error of the edges", ".4f"),
    "correlation": ("correlation of the edges", ".3f"),
    "disagreement": ("weak against strong", ".4f"),
    "denoising_error": ("denoising error", ".4f"),
    "contrast": ("contrast", ".3f"),
    "saturation": ("saturation", ".3f"),
    "clipped": ("clipped", ".3f"),
    "lanes": ("lanes a step", ".2f"),
    "seconds": ("seconds a sample", ".2f"),
}


class Study:
    """The models, the cars, and what is measured on images in [-1, 1]."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.pipe = GuidedUnconditionalPipeline.from_pretrained(args.model)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config, timestep_spacing="trailing")
        self.denoiser, self.steps = Denoiser.from_pipe(self.pipe), args.num_inference_steps
        self.head: MapHead = ReadoutHead.from_pretrained(args.edge_head).eval()
        self.strong: MapHead = DepthHead.from_pretrained(args.depth_head).eval()
        self.weak: MapHead = DepthHead.from_pretrained(args.depth_head / "weak").eval()
        data, count = open_split(args.dataset_name, args.dataset_split), args.num_samples
        if len(data) < count:
            raise ValueError(f"--num_samples {count}, but {args.dataset_name!r} has {len(data)} images.")
        pixels = ImagePixels(data, "image", 3, self.denoiser.image_size, cache=False)
        self.real = torch.stack([pixels[index] for index in range(count)]) / 127.5 - 1
        self.target = sobel_edges(self.real)

    def guidance(self, row: str, count: int):
        if row in READOUT:
            return ReadoutGuidance(self.head, self.target[:count], **READOUT[row])
        return DepthGuidance(self.strong, self.weak, **DEPTH[row]) if row in DEPTH else None

    def sample(self, row: str, seed: int, count: int) -> tuple[Tensor, float]:
        """Images `(count, 3, H, W)`, and lanes a step."""
        noise = torch.randn(self.real.shape, generator=torch.Generator().manual_seed(seed))[:count]
        config = self.guidance(row, count)
        with nullcontext() if config is None else guide(self.pipe, config) as handle:
            images = self.pipe(latents=noise, num_inference_steps=self.steps, output_type="pt").images
            lanes = 1.0 if handle is None else handle.stats.lanes / self.steps
        return 2 * images - 1, lanes

    @torch.no_grad()
    def read(self, head: MapHead, images: Tensor) -> Tensor:
        noisy, level = self.noised(images, LOW)[:2]
        condition = self.denoiser.condition(batch=len(images))
        features = read_features(self.denoiser, noisy, level, condition, head.config["layers"])
        return head(features, LOW, tuple(images.shape[2:]))

    def noised(self, images: Tensor, timestep: int) -> tuple[Tensor, NoiseLevel, Tensor]:
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(timestep))
        level = self.denoiser.level(timestep)
        return self.denoiser.add_noise(images, level, noise), level, noise

    def measure(self, images: Tensor) -> dict[str, float]:
        """How near images are to the targets, and how much they are images."""
        edges, target = sobel_edges(images), self.target
        strong, weak = self.read(self.strong, images), self.read(self.weak, images)
        noisy, level, noise = self.noised(images, MIDDLE)
        with torch.no_grad():
            found = self.denoiser.predict(noisy, level).eps
        return {
            "readout_error": (self.read(self.head, images) - target).square().mean().item(),
            "edge_error": (edges - target).square().mean().item(),
            "correlation": correlation(edges, target).mean().item(),
            "disagreement": (weak - strong).abs().mean().item(),
            "denoising_error": (found - noise).square().mean().item(),
            "contrast": images.std(dim=(1, 2, 3)).mean().item() / 2,
            "saturation": (images.amax(1) - images.amin(1)).mean().item() / 2,
            "clipped": (images.abs() >= 1 - 1 / 255).float().mean().item(),
        }

    def run(self, row: str, seed: int) -> dict:
        start = time.perf_counter()
        images, lanes = self.sample(row, seed, len(self.real))
        seconds = (time.perf_counter() - start) / len(images)
        setting = {"row": row, "seed": seed, "num_samples": len(images), "num_inference_steps": self.steps}
        return setting | self.measure(images) | {"lanes": lanes, "seconds": seconds}

    def references(self) -> dict[str, dict[str, float]]:
        """The cars whose edges are the targets, and the same cars against the targets of others."""
        own = self.measure(self.real)
        other = self.measure(self.real.roll(1, 0))
        keys = ("readout_error", "edge_error", "correlation")
        return {"*the car itself*": own, "*another car*": {key: other[key] for key in keys}}


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's, of each sample, `(B,)`; 0 where a map is flat."""
    a, b = (x.flatten(1) - x.flatten(1).mean(1, keepdim=True) for x in (first, second))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-8)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(rows: list[dict], references: dict[str, dict[str, float]]) -> str:
    """Means over the seeds, with the range of the two measures of the edges."""
    lines = ["| guidance | " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|---" * 11 + "|"]
    for name in ROWS:
        own, cells = [row for row in rows if row["row"] == name], []
        if not own:
            continue
        for key, (_, form) in COLUMNS.items():
            values = [row[key] for row in own]
            spread = f" ({min(values):{form}} to {max(values):{form}})"
            cells.append(f"{statistics.mean(values):{form}}" + spread * (key in ("edge_error", "correlation")))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name, values in references.items():
        cells = [f"{values[key]:{form}}" if key in values else "" for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(words: tuple[str, Sequence[str]], rows: Sequence[Tensor]) -> Image.Image:
    """Title and names of rows; each tensor `(N, 1 or 3, H, W)` in [-1, 1] is one of them."""
    title, names = words
    images = torch.cat([row[:SHOWN_COUNT].expand(-1, 3, -1, -1) for row in rows]) / 2 + 0.5
    return image_grid(images, len(images) // len(rows), title=title, row_titles=names, side=96)


def pictures(folder: Path, study: Study, seed: int) -> None:
    count = min(SHOWN_COUNT, len(study.real))
    shown = ("none", SHOWN, SHOWN_STRONGER, SHOWN_DEPTH)
    plain, guided, stronger, deep = (study.sample(row, seed, count)[0] for row in shown)
    maps = [study.read(head, images) for images in (plain, deep) for head in (study.strong, study.weak)]
    control = [study.target[:count], plain, guided, sobel_edges(guided), stronger, sobel_edges(stronger)]
    draw(CONTROL, control).save(folder / "control.png")
    draw(DEPTHS, [plain, *maps[:2], deep, *maps[2:]]).save(folder / "depth.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/readout"))
    parser.add_argument("--dataset_name", default="data/cifar10-cars", help="folder of parquet files, or Hub id")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--model", type=Path, default=MODELS / "cars-ddpm", help="pipeline folder")
    parser.add_argument("--edge_head", type=Path, default=MODELS / "cars-edges", help="folder of a ReadoutHead")
    parser.add_argument("--depth_head", type=Path, default=MODELS / "cars-depth-standin", help="of two DepthHeads")
    parser.add_argument("--rows", nargs="*", default=ROWS, choices=ROWS, metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=24, help="cars, and samples of each row and seed")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    args = parser.parse_args(argv)
    check_made(Path(__file__).parents[1] / "configs", dataset_name=args.dataset_name)
    count, steps, path = args.num_samples, args.num_inference_steps, args.output_dir / "rows.jsonl"
    study = Study(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    same = {"num_samples": count, "num_inference_steps": steps}
    for seed in args.seeds:
        for name in args.rows:
            if any((same | {"row": name, "seed": seed}).items() <= row.items() for row in read_rows(path)):
                continue
            row = study.run(name, seed)
            with path.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    rows = [row for row in read_rows(path) if same.items() <= row.items()]
    text = (
        f"{count} samples a row and seed, DDIM, {steps} steps; means over seeds {sorted({r['seed'] for r in rows})}."
    )
    found = table(rows, study.references())
    (args.output_dir / "report.md").write_text(f"{text}\n\n{found}\n")
    print(found)
    pictures(args.output_dir, study, args.seeds[0])


if __name__ == "__main__":
    run_script(main)
