"""The library's main job on real input, end to end: `make demo`.

A small diffusion model of handwritten digits is asked which of its noise levels and layers carry the meaning; a probe
is fitted there, compared with raw pixels and with the same network untrained, saved, loaded again and used.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from demo_report import draw_pca, draw_samples, write_report
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.utils.logging import disable_progress_bar
from small_png import write_small_png

from diffusers_repr import Denoiser, Probe, select_features
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.heads import fit_head
from diffusers_repr.store.progress import progress_bar

MODEL = Path(os.path.relpath(Path(__file__).parent / "models" / "digits-ddpm"))
RECIPE = Path(__file__).parent / "configs" / "ddpm_digits.yaml"
TIMESTEPS = (10, 30, 60, 100, 200, 400)
NOISE = ("per_image", "clean")
POOLING = "adaptive:2"  # the means of the four quarters of a map
PER_CLASS, DRAWS, RANDOM_INITS = 10, 5, 3


def train_short(output_dir: Path, steps: int) -> Path:
    """Train the model anew, for fewer steps than the committed one."""
    folder = output_dir / "digits-ddpm"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", "examples/train_unconditional.py"]
    command += ["--config", str(RECIPE), "--output_dir", str(folder), "--max_train_steps", str(steps)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    return folder


def untrained(denoiser: Denoiser, seed: int) -> Denoiser:
    """The same network with random weights."""
    torch.manual_seed(seed)
    return Denoiser(UNet2DModel.from_config(denoiser.config).eval(), denoiser.scheduler, name="random initialisation")


def select(networks: list[Denoiser], digits):
    """For each network the best of level, layer and noise policy on the validation split; one bar for all."""
    selections = []
    with progress_bar(100, "selection", "%") as bar:
        for number, network in enumerate(networks):

            def tell(share: float, number: int = number) -> None:
                bar.update(int(100 * (number + share) / len(networks)) - bar.n)

            selections.append(select_one(network, digits, tell))
    return selections


def select_one(denoiser: Denoiser, digits, progress):
    return select_features(
        denoiser,
        digits["train"],
        digits["validation"],
        timesteps=TIMESTEPS,
        noise=NOISE,
        metric="neg_brier",  # the accuracy of many cells is the same here, their loss is not
        pooling=POOLING,
        batch_size=256,
        max_layers=1,
        max_levels=1,
        progress=progress,
    )


def features(selection, denoiser: Denoiser, digits) -> dict[str, torch.Tensor]:
    """Features of every split at the selected place."""
    extractor = selection.extractor(denoiser, batch_size=256)
    return {split: extractor(digits[split]["image"])[selection.best.layer] for split in digits}


def pixels(digits) -> dict[str, torch.Tensor]:
    """Raw pixels of every split."""
    return {split: to_pixels(digits[split]["image"], channels=1).flatten(1) for split in digits}


def accuracy(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor], rows: torch.Tensor | None = None) -> float:
    """Test accuracy of a logistic regression fitted on rows of train, its penalty tuned on validation."""
    train = (x["train"], y["train"]) if rows is None else (x["train"][rows], y["train"][rows])
    head = fit_head(*train, 10, protocol="lbfgs", validation=(x["validation"], y["validation"])).head
    return float((head(x["test"]).argmax(1) == y["test"]).float().mean())


def few_label_accuracies(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> list[float]:
    """As `accuracy`, with `PER_CLASS` labels a class, once for each of `DRAWS` draws."""
    scores = []
    for draw in range(DRAWS):
        order = torch.randperm(len(y["train"]), generator=torch.Generator().manual_seed(draw))
        rows = torch.cat([order[y["train"][order] == label][:PER_CLASS] for label in range(10)])
        scores.append(accuracy(x, y, rows))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--train", action="store_true", help="train a short version of the model first")
    parser.add_argument("--train_steps", type=int, default=1500, help="steps of --train")
    args = parser.parse_args()
    disable_progress_bar()  # of diffusers, when it loads a folder; the one bar is that of step 2
    start = time.perf_counter()
    args.output_dir.mkdir(parents=True, exist_ok=True)

    folder = train_short(args.output_dir, args.train_steps) if args.train else MODEL
    digits = load_digits_splits()
    labels = {split: torch.tensor(digits[split]["label"]) for split in digits}
    denoiser = Denoiser.from_pretrained(folder)

    print("1/5 samples from the model")
    sampler = DDIMPipeline(denoiser.model, DDIMScheduler.from_config(denoiser.scheduler.config))
    sampler.set_progress_bar_config(disable=True)
    images = sampler(64, generator=torch.Generator().manual_seed(0), num_inference_steps=50).images
    draw_samples(images, args.output_dir / "samples.png")

    print(f"2/5 which level, which layer? (all layers; the trained network, then {RANDOM_INITS} untrained ones)")
    untrained_networks = [untrained(denoiser, seed) for seed in range(RANDOM_INITS)]
    selection, *untrained_selections = select([denoiser, *untrained_networks], digits)
    selection.save(args.output_dir / "selection")
    write_small_png(selection.heatmap(), args.output_dir / "heatmap.png")

    print("3/5 probe, against raw pixels and the untrained network")
    inputs = {
        "probe": [features(selection, denoiser, digits)],
        "pixels": [pixels(digits)],
        "random_init": [
            features(*pair, digits) for pair in zip(untrained_selections, untrained_networks, strict=True)
        ],
    }
    report = {}
    for name, networks in inputs.items():
        every = [accuracy(x, labels) for x in networks]
        few = [score for x in networks for score in few_label_accuracies(x, labels)]
        report[f"{name}_accuracy"] = sum(every) / len(every)
        report[f"{name}_accuracy_10_per_class"] = sum(few) / len(few)
        report[f"{name}_every_run"] = {"all_labels": every, "10_per_class": few}
    pictured = [inputs[name][0]["test"] for name in ("probe", "pixels")]
    draw_pca(*pictured, labels["test"], args.output_dir / "features_pca.png")

    print("4/5 save the probe, load it, predict")
    data = {split: from_dataset(digits[split], name="digits", split=split) for split in digits}
    probe = Probe.fit(denoiser, data["train"], data["validation"], selection=selection, protocol="lbfgs")
    probe.evaluate(data["test"])
    probe.save_pretrained(args.output_dir / "probe")
    loaded = Probe.from_pretrained(args.output_dir / "probe", base=folder)
    predicted = loaded(digits["test"]["image"]).labels
    names = digits["test"].features["label"].names
    saved_accuracy = sum(p == names[y] for p, y in zip(predicted, digits["test"]["label"], strict=True)) / len(
        predicted
    )

    print("5/5 report")
    report |= {
        "saved_probe_accuracy": saved_accuracy,
        "best": best_of(selection),
        "random_init_best": [best_of(found) for found in untrained_selections],
        "timesteps": list(TIMESTEPS),
        "splits": {split: len(digits[split]) for split in digits},
        "model": "retrained, short" if args.train else "examples/models/digits-ddpm",
        "seconds": round(time.perf_counter() - start, 1),
    }
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    write_report(report, args.output_dir / "report.md")
    for name in ("probe", "pixels", "random_init"):
        all_labels, few = report[f"{name}_accuracy"], report[f"{name}_accuracy_10_per_class"]
        print(f"{name:>12}: test accuracy {all_labels:.3f} with all labels, {few:.3f} with {PER_CLASS} a class")
    best = {name: round(value, 4) if isinstance(value, float) else value for name, value in report["best"].items()}
    print(f"best: {best}")
    print(f"{args.output_dir / 'report.md'} ({report['seconds']} s)")


def best_of(selection) -> dict[str, object]:
    best = selection.best
    return {
        "timestep": best.timestep,
        "layer": best.layer,
        "noise": best.noise,
        "pooling": selection.recipe["pooling"],
        "validation_neg_brier": best.mean,
        "std_over_noise_seeds": best.std,
    }


if __name__ == "__main__":
    main()
