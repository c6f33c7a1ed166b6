"""How many network evaluations does the Diffusion Classifier need, by the paper's schedule, by racing, by averaging?

    python examples/studies/zero_shot.py --output_dir outputs/zero_shot --results outputs/zero_shot-results

The class-conditional digits model tells digits apart that it was not trained on. Every error of an image, a class and
a level is evaluated once and kept, so a run that was stopped goes on where it was, and all rules are replayed on the
same table: they see the same noise, image by image. The first seed has the whole table, the others what the schedule
and the races ask for.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.transforms import augment
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.noise_policy import pixel_keys
from diffusers_repr.pictures.figure import png_of, require_matplotlib
from diffusers_repr.tasks import AdaptiveSchedule, Averaging, CalibratedRacing
from diffusers_repr.tasks.denoising_errors.calibration import class_errors, rank_levels, running_scales
from diffusers_repr.tasks.denoising_errors.conditions import ConditionRows, encode_conditions
from diffusers_repr.tasks.denoising_errors.levels import even_timesteps
from diffusers_repr.tasks.denoising_errors.network import NetworkErrors
from diffusers_repr.tasks.denoising_errors.pairs import Asked, PairTable
from diffusers_repr.tasks.denoising_errors.rules import Rule, Units

CLASSES, CHUNK, STATED = 10, 100, (0.2, 0.1, 0.05, 0.02, 0.01)


def held_out(count: int) -> tuple[Tensor, Tensor, int]:
    """Pixels and labels of digits that the model was not trained on, and how many of them are as they were written.

    These are validation and test together, 800; beyond them come copies, turned, moved and scaled as in training.
    """
    splits = load_digits_splits()
    images = [image for split in ("test", "validation") for image in splits[split]["image"]]
    labels = torch.tensor([label for split in ("test", "validation") for label in splits[split]["label"]])
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None].float() / 127.5 - 1
    real = min(count, len(pixels))
    more = torch.arange(count - real) % len(pixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moved = augment(pixels[more], False, 10.0, 0.0875, 0.1)
    return torch.cat([pixels[:real], moved]), torch.cat([labels[:real], labels[more]]), real


class Kept:
    """The errors of some images under one seed, kept in a file.

    Args:
        denoiser: The model.
        pixels: Of the images.
        seed: Of the noise.
        path: Of the file.
        conditions: Of the classes.
    """

    def __init__(self, denoiser: Denoiser, pixels: Tensor, seed: int, path: Path, conditions: ConditionRows) -> None:
        self.path = path
        x0, keys = denoiser.encode_pixels(pixels), pixel_keys(pixels)
        network = NetworkErrors(denoiser, x0, keys, conditions, seed=seed, batch_size=256)
        self.table = PairTable(network, len(pixels), len(conditions))
        if path.is_file():
            with np.load(path) as file:
                found = {tuple(json.loads(name)): torch.from_numpy(file[name]) for name in file.files}
            self.table.held = {(float(time), int(draw)): values for (time, draw), values in found.items()}

    def labels(self, rule: Rule, levels: list[float]) -> tuple[Tensor, Tensor]:
        """Class and evaluations of each image by a rule, some images at a time, what is evaluated being kept."""
        labels, evaluations = [], []
        for start in range(0, self.table.images, CHUNK):
            count, before = min(CHUNK, self.table.images - start), self.table.evaluations
            found = rule(lambda asked, start=start: self.table(shifted(asked, start)), UNITS, count, levels)
            labels.append(found.labels)
            evaluations.append(found.evaluations)
            if self.table.evaluations > before:
                self.save()
                print(f"{self.path.name}: {type(rule).__name__}, images to {start + count}", flush=True)
        return torch.cat(labels), torch.cat(evaluations).double()

    def save(self) -> None:
        """Write what is held, whole or not at all."""
        fresh = self.path.with_suffix(".tmp.npz")
        np.savez_compressed(fresh, **{json.dumps(key): values.numpy() for key, values in self.table.held.items()})
        fresh.replace(self.path)


UNITS = Units.of(range(CLASSES))


Row = dict[str, Any]


def shifted(asked: Asked, start: int) -> Asked:
    """The same pairs of images that stand further behind."""
    return Asked(asked.images + start, asked.prompts, asked.timesteps, asked.draws)


def make_rules(
    denoiser: Denoiser, conditions: ConditionRows, out: Path, count: int, levels: list[float]
) -> tuple[dict[str, tuple[Rule, list[float]]], dict[str, tuple[Rule, list[float]]]]:
    """Rules for every seed, and those for the seed with the whole table; levels are learned from training images."""
    train, size = load_digits_splits()["train"].select(range(count)), len(levels)
    kept = Kept(denoiser, denoiser.pixels(train["image"]), 1000, out / "calibration.npz", conditions)
    errors = class_errors(kept.table, UNITS, count, levels, 2)
    kept.save()
    labels = torch.tensor(train["label"])
    learned = rank_levels(errors, labels, levels)
    order = list(learned.timesteps)
    scales = running_scales(errors[[levels.index(level) for level in order]], labels)
    print("levels, the most telling first:", [int(level) for level in order], flush=True)
    every: dict[str, tuple[Rule, list[float]]] = {"schedule": (AdaptiveSchedule((2, size), (5, 1)), levels)}
    every |= {f"race {error:g}": (CalibratedRacing(tuple(order), scales, error), order) for error in STATED[::-1]}
    whole: dict[str, tuple[Rule, list[float]]] = {f"average {size}": (Averaging(size), levels)}
    for few in (1, 2, 4, 8):
        places = range(size // few // 2, size, size // few)
        whole[f"average {few}"] = Averaging(few), [levels[place] for place in places][:few]
        whole[f"best {few}"] = Averaging(few), order[:few]
    return every, whole


def rows_of(results: dict[str, list[tuple[Tensor, Tensor]]], labels: Tensor, real: int) -> list[Row]:
    """Of each rule: accuracy over seeds, evaluations, and against the schedule on the same images and noise."""
    rows: list[Row] = []
    base = results["schedule"]
    for name, runs in results.items():
        right = torch.stack([(found == labels).double() for found, _ in runs])
        took = torch.stack([evaluations for _, evaluations in runs])
        against = torch.stack([(found == labels).double() for found, _ in base[: len(runs)]])
        difference = right - against
        rows.append(
            {
                "rule": name,
                "seeds": len(runs),
                "accuracy": float(right.mean()),
                "lowest": float(right.mean(1).amin()),
                "as_written": float(right[:, :real].mean()),
                "evaluations": float(took.mean()),
                "fewer": float(base[0][1].mean() / took.mean()),
                "difference": float(difference.mean()),
                # Of the mean over images, each with its seeds: what is paired is paired.
                "standard_error": float(difference.mean(0).std() / difference.shape[1] ** 0.5),
            }
        )
    return rows


def table_of(rows: list[Row]) -> str:
    head = "| rule | seeds | accuracy | lowest seed | 800 as written | evaluations | fewer than the schedule | "
    lines = [head + "accuracy less the schedule's |", "|---|---|---|---|---|---|---|---|"]
    form = (
        "| {rule} | {seeds} | {accuracy:.4f} | {lowest:.4f} | {as_written:.4f} | {evaluations:.1f} | {fewer:.2f}x | "
        "{difference:+.4f} +- {standard_error:.4f} |"
    )
    return "\n".join([*lines, *(form.format(**row) for row in rows)]) + "\n"


def picture(rows: list[Row]) -> bytes:
    figure = require_matplotlib().Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    kinds = {
        "average": "averaging, levels evenly spread",
        "best": "averaging, the most telling levels",
        "race": "calibrated racing, by its stated error",
        "schedule": "the paper's schedule, 2 then all levels",
    }
    for kind, text in kinds.items():
        own = sorted((row for row in rows if str(row["rule"]).startswith(kind)), key=lambda row: row["evaluations"])
        style = {"marker": "*", "markersize": 13, "linestyle": ""} if kind == "schedule" else {"marker": "o"}
        axes.plot([row["evaluations"] for row in own], [row["accuracy"] for row in own], label=text, **style)
        for row in own if kind == "race" else []:
            stated = f"{float(str(row['rule']).split()[1]):.0%}"
            place = (row["evaluations"], row["accuracy"])
            axes.annotate(stated, place, xytext=(-4, 7), textcoords="offset points", fontsize="small", ha="right")
    axes.set_xscale("log")
    axes.set_xticks([10, 20, 50, 100, 200], labels=["10", "20", "50", "100", "200"])
    axes.set_xlabel("network evaluations an image (10 classes)")
    axes.set_ylabel("accuracy on held-out digits")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return png_of(figure)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="examples/models/digits-class-ddim")
    parser.add_argument(
        "--text_model", default="outputs/digits-text", help="of composed scenes; left out if not there"
    )
    parser.add_argument("--output_dir", default="outputs/zero_shot", help="where errors are kept")
    parser.add_argument("--results", default="outputs/zero_shot-results", help="table and picture")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calibration_images", type=int, default=60)
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out, results = Path(args.output_dir), Path(args.results)
    out.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    denoiser = Denoiser.from_pretrained(args.model)
    conditions = encode_conditions(denoiser, class_labels=list(range(CLASSES)), size=denoiser.image_size)
    levels = even_timesteps(denoiser.schedule, args.levels)
    every, whole = make_rules(denoiser, conditions, out, args.calibration_images, levels)
    pixels, labels, real = held_out(args.images)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in (*every, *whole)}
    for at, seed in enumerate(args.seeds):
        kept = Kept(denoiser, pixels, seed, out / f"seed{seed}.npz", conditions)
        for name, (rule, own) in {**every, **(whole if at == 0 else {})}.items():
            found[name].append(kept.labels(rule, own))
    rows = rows_of(found, labels, real)
    (results / "rows.json").write_text(json.dumps(rows, indent=2) + "\n")
    (results / "table.md").write_text(table_of(rows))
    (results / "accuracy.png").write_bytes(picture(rows))
    print(table_of(rows))


if __name__ == "__main__":
    run_script(main)
