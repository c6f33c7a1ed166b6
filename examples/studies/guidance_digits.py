"""What guidance does to samples of a class-conditional digit model: Fréchet distance and class accuracy by scale.

    python examples/studies/guidance_digits.py --output_dir outputs/guidance
    python examples/studies/guidance_digits.py --output_dir outputs/guidance --seeds 0 --num_samples 500 \
        --rows none "PAG(1.0)"

Each row samples the same number of images of each digit from the same noise as every other row of its seed. A row that
is done is not done again: several processes may share a folder, each with its own seeds. Writes `rows.jsonl`,
`report.md`, `scales.png` and `digits.png`, samples of all methods.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from digits_metrics import DigitsJudge, real_digits
from PIL import Image
from torch import Tensor

from diffusers_repr import CFG, PAG, SAG, AutoGuidance, ClassifierGuidance, EnergyGuidance, NoisyClassifier, guide
from diffusers_repr.pictures.figure import png_of, require_matplotlib
from diffusers_repr.pictures.grid import image_grid

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_png import write_small_png

MODELS = Path(__file__).parents[1] / "models"
CLASSES = 10
ATTENTION = "up_blocks.0.*"  # the two blocks at 4x4; the default, the middle one alone, changes little here


def pag(scale: float) -> PAG:
    return PAG(scale, layers=ATTENTION)


# Name of a row -> its guidance. CFG takes the place of the pipeline's own, which is on where CFG is given.
BY_CLASS: dict[str, tuple] = {
    "none": (),
    **{f"CFG({s})": (CFG(s),) for s in (1.5, 2.0, 3.0)},
    **{f"PAG({s})": (pag(s),) for s in (0.5, 1.0, 2.0)},
    **{f"SAG({s})": (SAG(s),) for s in (0.1, 0.5)},
    "CFG(1.5) + PAG(0.5)": (CFG(1.5), pag(0.5)),
    "CFG(1.5) + SAG(0.1)": (CFG(1.5), SAG(0.1)),
    "PAG(0.5) + SAG(0.1)": (pag(0.5), SAG(0.1)),
    "CFG(1.5) + PAG(0.5) + SAG(0.1)": (CFG(1.5), pag(0.5), SAG(0.1)),
}
WITHOUT_CLASS: dict[str, tuple] = {
    "no class: none": (),
    "no class: PAG(0.5)": (pag(0.5),),
    "no class: SAG(0.1)": (SAG(0.1),),
    "no class: PAG(0.5) + SAG(0.1)": (pag(0.5), SAG(0.1)),
}
ROWS = BY_CLASS | WITHOUT_CLASS


def load(folder: Path) -> GuidedUnconditionalPipeline:
    pipe = GuidedUnconditionalPipeline.from_pretrained(str(folder))
    # The models' own DDPM schedulers take a thousand steps.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(
    pipe: GuidedUnconditionalPipeline, guidance: Sequence, labels: Tensor | None, noise: Tensor, steps: int
) -> Tensor:
    """Images (N, 1, 8, 8) in [0, 1]: DDIM whose noise estimate follows the clipped clean one.

    Without that (`use_clipped_model_output=False`, the default) what guidance adds beyond [-1, 1] stays in the noise
    estimate, and the samples overshoot, the more the more steps there are.
    """
    own = 2.0 if any(isinstance(config, CFG) for config in guidance) else 1.0
    call = {} if labels is None else {"class_labels": labels, "guidance_scale": own}
    with guide(pipe, list(guidance)) if guidance else nullcontext():
        call |= {"num_inference_steps": steps, "use_clipped_model_output": True, "output_type": "pt"}
        return pipe(latents=noise, **call).images


def run_row(pipe, judge: DigitsJudge, folder: Path, name: str, seed: int, count: int, steps: int, batch: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images, start = [], time.perf_counter()
    for chunk in labels.split(batch):
        noise = torch.randn(len(chunk), 1, 8, 8, generator=generator)
        images.append(sample(pipe, ROWS[name], chunk if name in BY_CLASS else None, noise, steps))
    found = torch.cat(images).float()
    path = samples_file(folder, name, seed, count, steps)
    path.parent.mkdir(exist_ok=True)
    np.save(path, (found * 255).round().to(torch.uint8).numpy())
    return {
        "row": name,
        "seed": seed,
        "num_samples": count,
        "num_inference_steps": steps,
        "frechet_distance": judge.frechet_distance(found, "augmented"),
        "frechet_distance_unaugmented": judge.frechet_distance(found, "train"),
        "accuracy": judge.accuracy(found, labels) if name in BY_CLASS else None,
        "seconds": round(time.perf_counter() - start, 1),
    }


def samples_file(folder: Path, name: str, seed: int, count: int, steps: int) -> Path:
    words = "".join(c if c.isalnum() or c == "." else "_" for c in name)
    return folder / "samples" / f"{words}-seed{seed}-{count}-{steps}.npy"


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(rows: list[dict], pooled: Mapping[str, dict[str, float]], floor: Mapping[str, float]) -> str:
    """All samples of a row together, and the seeds' own range, in the order of `ROWS`."""
    head = "| guidance | Fréchet distance | to the digits as they are | class accuracy |"
    lines = [head, "|---|---|---|---|"]
    for name, together in pooled.items():
        own = [row for row in rows if row["row"] == name]
        cells = []
        for key, form in (("frechet_distance", ".3f"), ("frechet_distance_unaugmented", ".3f"), ("accuracy", ".4f")):
            values = [row[key] for row in own if row[key] is not None]
            ends = f" ({min(values):{form}} to {max(values):{form}})" if values else ""
            cells.append(f"{together[key]:{form}}{ends}" if key in together else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    real = f"*{floor['augmented']:.3f}* | *{floor['train']:.3f}* | *{floor['accuracy']:.4f}*"
    return "\n".join([*lines, f"| *800 real digits not trained on* | {real} |"])


def pool(rows: list[dict], folder: Path, judge: DigitsJudge, count: int, steps: int) -> dict[str, dict[str, float]]:
    """Each row's samples of all seeds, judged together."""
    pooled: dict[str, dict[str, float]] = {}
    for name in ROWS:
        seeds = [row["seed"] for row in rows if row["row"] == name]
        if not seeds:
            continue
        every = [np.load(samples_file(folder, name, seed, count, steps)) for seed in seeds]
        images = torch.from_numpy(np.concatenate(every)).float() / 255
        pooled[name] = {
            "frechet_distance": judge.frechet_distance(images, "augmented"),
            "frechet_distance_unaugmented": judge.frechet_distance(images, "train"),
        }
        if name in BY_CLASS:
            pooled[name]["accuracy"] = judge.accuracy(images, (torch.arange(count) % CLASSES).repeat(len(seeds)))
    return pooled


def plot(rows: list[dict], path: Path) -> None:
    """Both distances and the accuracy by the weight of each term: means of the seeds, bars from lowest to highest."""
    keys = {
        "frechet_distance": "Fréchet distance to the augmented digits\n(lower is better)",
        "frechet_distance_unaugmented": "Fréchet distance to the digits as they are\n(lower is better)",
        "accuracy": "samples of the class asked for\n(share; higher is better)",
    }
    figure = require_matplotlib().Figure(figsize=(4.2 * len(keys), 4.1), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(keys))
    for axis, (key, title) in zip(axes, keys.items(), strict=True):
        for method, off in (("CFG", 1.0), ("PAG", 0.0), ("SAG", 0.0)):
            points = {off: [row[key] for row in rows if row["row"] == "none"]}
            for name in ROWS:
                if name.startswith(method + "(") and "+" not in name:
                    points[float(name[4:-1])] = [row[key] for row in rows if row["row"] == name]
            points = {scale - off: values for scale, values in points.items() if values}
            means = [statistics.mean(values) for values in points.values()]
            below = [mean - min(values) for mean, values in zip(means, points.values(), strict=True)]
            above = [max(values) - mean for mean, values in zip(means, points.values(), strict=True)]
            label = f"{method}(1 + x)" if off else f"{method}(x)"
            axis.errorbar(list(points), means, [below, above], marker="o", ms=5, capsize=3, label=label)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="weight of the term, x", xticks=[0, 0.5, 1, 1.5, 2])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    seeds = len({row["seed"] for row in rows})
    count, steps = rows[0]["num_samples"], rows[0]["num_inference_steps"]
    figure.suptitle(f"One term of guidance: {count:,} samples of {steps} DDIM steps, for each of {seeds} seeds "
                    "(bars: lowest and highest)", fontsize=11)  # fmt: skip
    write_small_png(png_of(figure), path)


def less_ink(features, x0: Tensor, condition) -> Tensor:
    return x0.clamp(-1, 1).mean(dim=(1, 2, 3))


def pictures(folder: Path, pipe, weaker: UNet2DModel | None, steps: int) -> None:
    """Two samples of each digit, a column each, all methods from the same noise: digits.png."""
    labels = torch.arange(2 * CLASSES) % CLASSES
    noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shown: dict[str, tuple] = {
        "no guidance": (),
        "CFG(3.0)": (CFG(3.0),),
        "PAG(2.0)": (pag(2.0),),
        "SAG(1.0)": (SAG(1.0),),
        "EnergyGuidance: less ink": (EnergyGuidance(less_ink, scale=20.0),),
    }
    if weaker is not None:
        shown["AutoGuidance(1.0)"] = (AutoGuidance(weaker, scale=1.0),)
    images = {name: sample(pipe, guidance, labels, noise, steps) for name, guidance in shown.items()}
    plain = load(MODELS / "digits-ddpm")
    classifier = NoisyClassifier.from_pretrained(MODELS / "digits-classifier")
    guidance = (ClassifierGuidance(classifier, labels.tolist(), scale=1.0),)
    images["ClassifierGuidance(1.0),\nmodel without classes"] = sample(plain, guidance, None, noise, steps)
    draw(images).save(folder / "digits.png")


def draw(images: Mapping[str, Tensor]) -> Image.Image:
    """Two rows of each method, a column of each digit."""
    return image_grid(
        torch.cat(list(images.values())),
        CLASSES,
        title="Digits asked for, two samples each; all methods from the same noises",
        row_titles=[title for name in images for title in (name, "")],
        column_titles=[str(digit) for digit in range(CLASSES)],
        side=48,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/guidance"))
    parser.add_argument("--model", type=Path, default=MODELS / "digits-class-ddim", help="pipeline folder")
    parser.add_argument("--weaker", type=Path, help="folder of a weaker network (UNet2DModel), for AutoGuidance")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num_samples", type=int, default=2000, help="of each row and seed")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=125)
    args = parser.parse_args()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe, judge, path = load(args.model), DigitsJudge.train(seed=0), args.output_dir / "rows.jsonl"
    for seed in args.seeds:
        for name in args.rows:
            setting = {"row": name, "seed": seed, "num_samples": args.num_samples,
                       "num_inference_steps": args.num_inference_steps}  # fmt: skip
            if any(setting.items() <= row.items() for row in read_rows(path)):
                continue
            row = run_row(
                pipe, judge, args.output_dir, name, seed, args.num_samples, args.num_inference_steps, args.batch_size
            )
            with path.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    weaker = UNet2DModel.from_pretrained(args.weaker).eval() if args.weaker else None
    report(args.output_dir, judge, args.num_samples, args.num_inference_steps)
    pictures(args.output_dir, pipe, weaker, args.num_inference_steps)


def report(folder: Path, judge: DigitsJudge, count: int, steps: int) -> None:
    same = {"num_samples": count, "num_inference_steps": steps}
    rows = [row for row in read_rows(folder / "rows.jsonl") if same.items() <= row.items()]
    images, labels = real_digits("validation", "test")
    floor: dict[str, float] = {name: judge.frechet_distance(images, name) for name in ("augmented", "train")}
    floor["accuracy"] = judge.accuracy(images, labels)
    seeds = sorted({row["seed"] for row in rows})
    text = (
        f"DDIM, {steps} steps, {count} samples for each of the seeds {seeds}: all of them judged together (lowest to "
        "highest of the seeds alone, whose distances are larger because they have fewer samples). The distance is "
        "between Gaussians fitted to the 64 features of a classifier of the training digits: to these digits under "
        "the augmentation that the model was trained with, and to the digits as they are.\n\n"
    )
    text += table(rows, pool(rows, folder, judge, count, steps), floor)
    (folder / "report.md").write_text(text + "\n")
    plot(rows, folder / "scales.png")
    print(text)


if __name__ == "__main__":
    main()
