"""One network for both tasks, or one for each? JDM and HybViT of the digits beside networks that learn one task.

    python examples/studies/joint_digits.py --output_dir outputs/joint --results docs/results/joint

Every run is `train_joint.py` with the recipe of its method; a task is left out by the weight 0, all else being equal:
network, steps, seed, noise. Measured on the averaged weights: accuracy on the 500 test digits, the denoising error on
them, the Fréchet distance of samples, and what guidance by the network's own classifier does to samples. Finished runs
are kept. `--results` gets README.md, rows.jsonl and pictures.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline
from digits_metrics import DigitsJudge, real_digits
from PIL import Image
from torch import Tensor

from diffusers_repr.cli.guard import run_script
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.noise import training_target
from diffusers_repr.pictures.grid import image_grid

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_joint

CONFIGS = Path(__file__).parents[1] / "configs"
CLASSES = 10
# Name -> recipe, changes of it, scales of guidance.
RUNS: dict[str, tuple[str, dict, tuple[float, ...]]] = {
    "JDM": ("jdm_digits", {}, (0, -30, 30, 100, 300, 1000)),
    "JDM, clean images only": ("jdm_digits", {"classify": "clean"}, (0, -30, 30, 100, 300)),
    "U-Net, denoising alone": ("jdm_digits", {"classification_weight": 0, "classify": "noised"}, ()),
    "U-Net, classification alone": ("jdm_digits", {"generation_weight": 0, "classify": "clean"}, ()),
    "HybViT": ("hybvit_digits", {}, (0, -1, 1, 3, 10)),
    "HybViT, generation weight 10": ("hybvit_digits", {"generation_weight": 10}, (0, 1, 3, 10)),
    "ViT, denoising alone": ("hybvit_digits", {"classification_weight": 0, "classify": "clean"}, ()),
    "ViT, classification alone": ("hybvit_digits", {"generation_weight": 0, "classify": "clean"}, ()),
}

TURNED = {"JDM": 30.0, "HybViT": 10.0}  # scales at which images are turned into other classes


def folder_of(root: Path, name: str) -> Path:
    return root / "".join(c if c.isalnum() else "_" for c in name)


def trained(root: Path, name: str, steps: int) -> JointDiffusionPipeline:
    """The run's pipeline with DDIM as its sampler; trained where it is not there yet."""
    recipe, changes, _ = RUNS[name]
    folder = folder_of(root, name)
    flags = {"config": CONFIGS / f"{recipe}.yaml", "output_dir": folder, "max_train_steps": steps,
             "checkpointing_steps": steps, "eval_batch_size": 0, **changes}  # fmt: skip
    if not (folder / "model_index.json").is_file():
        train_joint.main([part for key, value in flags.items() for part in (f"--{key}", str(value))])
    pipe = JointDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def denoising_error(pipe: JointDiffusionPipeline, images: Tensor) -> float:
    """Mean squared error of eps on images in [0, 1], at levels spread evenly over the schedule."""
    denoiser = Denoiser.from_pipe(pipe)
    generator, total = torch.Generator().manual_seed(0), 0.0
    levels = torch.linspace(0, 999, 20).round().long().tolist()
    for timestep in levels:
        x0, level = 2 * images - 1, denoiser.level(timestep)
        noise = torch.randn(x0.shape, generator=generator)
        read = pipe.unet(denoiser.add_noise(x0, level, noise), torch.full((len(x0),), timestep)).sample
        total += (read - training_target(x0, noise, level, denoiser.schedule)).square().mean().item()
    return total / len(levels)


def samples(pipe: JointDiffusionPipeline, count: int, steps: int, scale: float | None, seed: int = 0) -> Tensor:
    """Images (N, 1, 8, 8) in [0, 1] by stochastic DDIM, of each digit in turn where a scale is given."""
    labels, found = torch.arange(count) % CLASSES, []
    generator = torch.Generator().manual_seed(seed)
    for part in labels.split(250):
        call = {"batch_size": len(part)} if scale is None else {"class_labels": part, "guidance_scale": scale}
        call |= {"num_inference_steps": steps, "eta": 1.0, "use_clipped_model_output": True, "output_type": "pt"}
        found.append(pipe(**call, generator=generator).images)
    return torch.cat(found).float()


def measure(pipe: JointDiffusionPipeline, judge: DigitsJudge, name: str, args: argparse.Namespace) -> list[dict]:
    """Rows of one run: one for the run itself, one for each scale of guidance."""
    _, changes, scales = RUNS[name]
    images, labels = real_digits("test")
    row: dict = {"run": name, "steps": args.max_train_steps, "parameters": pipe.unet.num_parameters()}
    if changes.get("classification_weight") != 0:
        row["accuracy"] = (pipe.classify(images).class_labels == labels).double().mean().item()
    if changes.get("generation_weight") != 0:
        found = samples(pipe, args.num_samples, args.num_inference_steps, None)
        row |= {
            "eps_mse": denoising_error(pipe, images),
            "frechet_distance": judge.frechet_distance(found, "augmented"),
        }
    rows = [row]
    for scale in scales:
        found = samples(pipe, args.num_guided, args.num_inference_steps, float(scale))
        asked = torch.arange(len(found)) % CLASSES
        rows.append({"run": name, "scale": scale, "asked": judge.accuracy(found, asked),
                     "frechet_distance": judge.frechet_distance(found, "augmented"),
                     "std": found.std().item()})  # fmt: skip
    return rows


def tables(rows: list[dict]) -> tuple[str, str, str]:
    """The runs, what guidance does, and images turned into another class."""
    runs = ["| run | test accuracy | eps error on test digits | Fréchet distance |", "|---|---|---|---|"]
    guided = [
        "| guided by | scale | samples of the asked class | Fréchet distance | spread |",
        "|---|---|---|---|---|",
    ]
    edits = [
        "| digits turned by | of the asked class | by its own classifier | still as before |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if "counterfactual_scale" in row:
            keys = ("asked", "asked_by_its_own_classifier", "as_before")
            edits.append(
                line(f"{row['run']}, scale {row['counterfactual_scale']:g}", *(f"{row[k]:.3f}" for k in keys))
            )
        elif "scale" in row:
            found = (f"{row['asked']:.3f}", f"{row['frechet_distance']:.2f}", f"{row['std']:.3f}")
            guided.append(line(row["run"], f"{row['scale']:g}", *found))
        else:
            forms = {"accuracy": ".3f", "eps_mse": ".4f", "frechet_distance": ".2f"}
            runs.append(line(row["run"], *(f"{row[key]:{form}}" if key in row else "" for key, form in forms.items())))
    return "\n".join(runs), "\n".join(guided), "\n".join(edits)


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def turned(pipe: JointDiffusionPipeline, images: Tensor, classes: Tensor, scale: float, steps: int) -> Tensor:
    """Counterfactuals (N, 1, 8, 8) of images, by stochastic DDIM from 70 % of the steps on."""
    return pipe.counterfactual(
        images, classes, 0.7, scale, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, eta=1.0,
        use_clipped_model_output=True, output_type="pt",
    ).images.float()  # fmt: skip


def measure_turned(pipe: JointDiffusionPipeline, judge: DigitsJudge, name: str, steps: int) -> dict:
    """Test digits, each asked to be another digit; the first 100, which settings were chosen on, are left out."""
    images, labels = (part[100:] for part in real_digits("test"))
    asked = (labels + 1 + torch.arange(len(labels)) % (CLASSES - 1)) % CLASSES
    found = turned(pipe, images, asked, TURNED[name], steps)
    own = (pipe.classify(found).class_labels == asked).double().mean().item()
    return {"run": name, "counterfactual_scale": TURNED[name], "asked": judge.accuracy(found, asked),
            "asked_by_its_own_classifier": own, "as_before": judge.accuracy(found, labels)}  # fmt: skip


def pictures(folder: Path, pipes: dict[str, JointDiffusionPipeline], steps: int) -> None:
    """Samples without and with guidance, and one image of each digit turned into every other."""
    images, labels = real_digits("test")
    for name, scale in TURNED.items():
        if name in pipes:
            free, guided = (samples(pipes[name], 20, steps, by) for by in (0.0, scale))
            draw_samples(name, scale, free, guided).save(folder / f"{name.lower()}_samples.png")
            first = torch.stack([images[labels == digit][0] for digit in range(CLASSES)])
            rows = [
                turned(pipes[name], first, torch.full((CLASSES,), digit), scale, steps) for digit in range(CLASSES)
            ]
            draw_turned(name, scale, torch.cat([first, *rows])).save(folder / f"{name.lower()}_counterfactual.png")


def draw_samples(name: str, scale: float, free: Tensor, guided: Tensor) -> Image.Image:
    """Two rows without guidance, where a column means nothing, and two rows with."""
    rows = ["no guidance"] * 2 + [f"guided,\nscale {scale:g}"] * 2
    title = f"{name}: samples, and below samples guided by its own classifier to the digit of the column"
    return draw(torch.cat([free, guided]), title, rows)


def draw_turned(name: str, scale: float, images: Tensor) -> Image.Image:
    """A row of test digits, and below it all of them guided to one digit."""
    rows = ["a test image", *(f"turned into {digit}" for digit in range(CLASSES))]
    return draw(images, f"{name}: a test image a column, turned into each digit, scale {scale:g}", rows)


def draw(images: Tensor, title: str, rows: list[str]) -> Image.Image:
    digits = [str(digit) for digit in range(CLASSES)]
    return image_grid(images, CLASSES, title=title, row_titles=rows, column_titles=digits, side=40)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/joint"))
    parser.add_argument("--results", type=Path, help="folder for rows.jsonl, tables.md and pictures")
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS), metavar="RUN")
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument("--num_samples", type=int, default=1000, help="without guidance")
    parser.add_argument("--num_guided", type=int, default=500, help="for each scale")
    parser.add_argument("--num_inference_steps", type=int, default=25)
    args = parser.parse_args(argv)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    if not (saved := args.output_dir / "judge.safetensors").is_file():
        DigitsJudge.train(seed=0).save(saved)
    judge, rows, pipes = DigitsJudge.load(saved), [], {}
    for name in args.runs:
        since = time.perf_counter()
        pipes[name] = trained(args.output_dir, name, args.max_train_steps)
        file = folder_of(args.output_dir, name) / "rows.json"
        if not file.is_file():
            found = measure(pipes[name], judge, name, args)
            if name in TURNED:
                found.append(measure_turned(pipes[name], judge, name, args.num_inference_steps))
            file.write_text(json.dumps(found))
        rows += json.loads(file.read_text())
        print(f"{name}: {time.perf_counter() - since:.0f} s", flush=True)
    found = "\n\n".join(tables(rows))
    print(found)
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (args.results / "tables.md").write_text(found + "\n")
        pictures(args.results, pipes, args.num_inference_steps)


if __name__ == "__main__":
    run_script(main)
