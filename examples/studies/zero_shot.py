"""How many network evaluations does the Diffusion Classifier need, by the paper's schedule, by racing, by averaging?

    python examples/studies/zero_shot.py --output_dir outputs/zero_shot --results outputs/zero_shot-results
    python examples/studies/zero_shot.py --ask kind --model examples/models/digits-text --output_dir outputs/zero_text

The class-conditional digits model tells digits apart that it was not trained on; the text-to-image model of composed
scenes tells, by prompts, what the one thing of a scene is (`--ask kind`) or which colour it has (`--ask colour`), in
scenes of digits that it was not trained on; `--several` gives each kind a prompt for every colour.

Every error of an image, a class and a level is evaluated once and kept, so a run that was stopped goes on where it
was, and all rules are replayed on the same table: they see the same noise, image by image. The first seed has the
whole table, the others what the schedule and the races ask for. With `--published` the first seed also runs the
paper's schedule of 50 and 500 levels, about half an hour of a core for the digits.
"""

import argparse
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from zero_shot_questions import Question, question

from diffusers_repr.cli.guard import run_script
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.noise_policy import pixel_keys
from diffusers_repr.pictures.figure import png_of, require_matplotlib
from diffusers_repr.pictures.match_lines import stack_pictures
from diffusers_repr.tasks import AdaptiveSchedule, Averaging, CalibratedRacing
from diffusers_repr.tasks.denoising_errors.calibration import class_errors, rank_levels, running_scales
from diffusers_repr.tasks.denoising_errors.levels import even_timesteps
from diffusers_repr.tasks.denoising_errors.network import NetworkErrors
from diffusers_repr.tasks.denoising_errors.pairs import Asked, PairTable
from diffusers_repr.tasks.denoising_errors.picture import plot_curves
from diffusers_repr.tasks.denoising_errors.rules import Decisions, Rule

CHUNK, STATED = 100, (0.2, 0.1, 0.05, 0.02, 0.01)


class Kept:
    """The errors of some images under one seed, kept in a file.

    Args:
        denoiser: The model.
        asked: Gives conditions and units.
        pixels: Of the images.
        seed: Of the noise.
        path: Of the file.
    """

    def __init__(self, denoiser: Denoiser, asked: Question, pixels: Tensor, seed: int, path: Path) -> None:
        self.path, self.units, conditions = path, asked.units, asked.conditions
        x0 = torch.cat([denoiser.encode_pixels(part) for part in pixels.split(CHUNK)])
        network = NetworkErrors(denoiser, x0, pixel_keys(pixels), conditions, seed=seed, batch_size=256)
        self.table = PairTable(network, len(pixels), len(conditions))
        if path.is_file():
            with np.load(path) as file:
                found = {tuple(json.loads(name)): torch.from_numpy(file[name]) for name in file.files}
            self.table.held = {(float(time), int(draw)): values for (time, draw), values in found.items()}

    def decide(self, rule: Rule, levels: list[float]) -> Iterator[Decisions]:
        """What a rule finds, some images at a time; what is evaluated is kept."""
        for start in range(0, self.table.images, CHUNK):
            count, before = min(CHUNK, self.table.images - start), self.table.evaluations
            yield rule(lambda asked, start=start: self.table(shifted(asked, start)), self.units, count, levels)
            if self.table.evaluations > before:
                self.save()
                print(f"{self.path.name}: {type(rule).__name__}, images to {start + count}", flush=True)

    def labels(self, rule: Rule, levels: list[float]) -> tuple[Tensor, Tensor]:
        """Class and evaluations of each image by a rule."""
        found = list(self.decide(rule, levels))
        return torch.cat([one.labels for one in found]), torch.cat([one.evaluations for one in found]).double()

    def errors(self, levels: list[float]) -> Tensor:
        """Error of every class at every level, `(L, N, K)`, of its best prompt, where prompts compete."""
        return class_errors(self.table, self.units, self.table.images, levels, 1)[:, 0]

    def save(self) -> None:
        """Write what is held, whole or not at all."""
        fresh = self.path.with_suffix(".tmp.npz")
        np.savez_compressed(fresh, **{json.dumps(key): values.numpy() for key, values in self.table.held.items()})
        fresh.replace(self.path)


Row = dict[str, Any]
Rules = dict[str, tuple[Rule, list[float]]]


def shifted(asked: Asked, start: int) -> Asked:
    """The same pairs of images that stand further behind."""
    return Asked(asked.images + start, asked.prompts, asked.timesteps, asked.draws)


def make_rules(
    denoiser: Denoiser, asked: Question, out: Path, levels: list[float], published: bool
) -> tuple[Rules, Rules]:
    """Rules for every seed, and those for the seed with the whole table; levels are learned from training images."""
    pixels, labels = asked.train
    size, kept = len(levels), Kept(denoiser, asked, pixels, 1000, out / "calibration.npz")
    errors = class_errors(kept.table, asked.units, len(pixels), levels, 2)
    kept.save()
    learned = rank_levels(errors, labels, levels)
    order = list(learned.timesteps)
    scales = running_scales(errors[[levels.index(level) for level in order]], labels)
    print("levels, the most telling first:", [int(level) for level in order], flush=True)
    every: Rules = {"schedule": (AdaptiveSchedule((2, size), (min(5, len(asked.units) // 2), 1)), levels)}
    every |= {f"race {error:g}": (CalibratedRacing(tuple(order), scales, error), order) for error in STATED[::-1]}
    whole: Rules = {f"average {size}": (Averaging(size), levels)}
    for few in [few for few in (1, 2, 4, 8) if few < size]:
        places = range(size // few // 2, size, size // few)
        whole[f"average {few}"] = Averaging(few), [levels[place] for place in places][:few]
        whole[f"best {few}"] = Averaging(few), order[:few]
    if published:
        rule = AdaptiveSchedule()
        whole["published schedule"] = rule, rule.levels(denoiser.schedule)
    return every, whole


def rows_of(results: dict[str, list[tuple[Tensor, Tensor]]], asked: Question) -> list[Row]:
    """Of each rule: accuracy over seeds, evaluations, and against the schedule on the same images and noise."""
    rows: list[Row] = []
    labels, real = asked.test[1], asked.real
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


def table_of(rows: list[Row], asked: Question) -> str:
    moved = asked.real < len(asked.test[1])
    names = ["rule", "seeds", "accuracy", "lowest seed", *([f"{asked.real} as written"] if moved else [])]
    names += ["evaluations", "fewer than the schedule", "accuracy less the schedule's"]
    form = "| {rule} | {seeds} | {accuracy:.4f} | {lowest:.4f} |" + " {as_written:.4f} |" * moved
    form += " {evaluations:.1f} | {fewer:.2f}x | {difference:+.4f} +- {standard_error:.4f} |"
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names), *(form.format(**row) for row in rows)]
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], asked: Question) -> bytes:
    figure = require_matplotlib().Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    kinds = {
        "average": "averaging, levels evenly spread",
        "best": "averaging, the most telling levels",
        "race": "calibrated racing, by its stated error",
        "schedule": "the paper's schedule, 2 then all levels",
        "published": "the paper's schedule as published, 50 then 500 levels",
    }
    for kind, text in kinds.items():
        own = sorted((row for row in rows if str(row["rule"]).startswith(kind)), key=lambda row: row["evaluations"])
        if not own:
            continue
        style = {"marker": "*", "markersize": 13, "linestyle": ""} if not own[1:] else {"marker": "o"}
        axes.plot([row["evaluations"] for row in own], [row["accuracy"] for row in own], label=text, **style)
        for row in own if kind == "race" else []:
            stated = f"{float(str(row['rule']).split()[1]):.0%}"
            place = (row["evaluations"], row["accuracy"])
            axes.annotate(stated, place, xytext=(-4, 7), textcoords="offset points", fontsize="small", ha="right")
    axes.set_xscale("log")
    told = "classes" if asked.name == "digit" else "prompts"
    most = max(row["evaluations"] for row in rows) / len(asked.units.of_prompt)
    ticks = [len(asked.units.of_prompt) * times for times in (1, 2, 5, 10, 20, 50, 100, 200) if times < 1.3 * most]
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(f"network evaluations an image ({len(asked.units.of_prompt)} {told})")
    axes.set_ylabel(f"accuracy on images not seen, {len(asked.classes)} classes")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return png_of(figure)


def picture_of_levels(errors: Tensor, levels: list[float], labels: Tensor) -> bytes:
    """How often one evaluation a class is right, at each level alone."""
    figure = require_matplotlib().Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    right = (errors.argmin(2) == labels).double()
    deviation = (right.var(1) / right.shape[1]).sqrt()
    axes.errorbar(levels, right.mean(1), 2 * deviation, marker="o", markersize=4, capsize=3)
    axes.axhline(1 / errors.shape[2], color="grey", linestyle=":", label="chance")
    axes.set_xlabel("timestep (larger is noisier)")
    axes.set_ylabel("accuracy at this level alone")
    axes.grid(alpha=0.3)
    axes.legend()
    return png_of(figure)


def picture_of_images(
    errors: Tensor, levels: list[float], asked: Question, decided: Decisions, limit: int = 6
) -> Image.Image:
    """Error of each class by level: of the image the model is surest of, the one it is least sure of, a wrong one."""
    labels, sheets = asked.test[1], []
    right = (decided.labels == labels).double()
    chosen = [int((decided.confidence + 2 * right).argmax()), int((decided.confidence - 2 * right).argmin())]
    chosen += (right == 0).nonzero()[:1, 0].tolist()
    for at in chosen:
        order = errors[:, at].mean(0).argsort()[:limit]
        names = [asked.classes[place] for place in order]
        title = f"{names[0]}, confidence {float(decided.confidence[at]):.3f}; it is {asked.classes[int(labels[at])]}"
        shown = ((asked.test[0][at] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        image = Image.fromarray(shown[..., 0] if shown.shape[2] == 1 else shown)
        drawn = plot_curves(torch.tensor(levels), errors[:, at, order], names, title, image)
        sheets.append(Image.open(io.BytesIO(png_of(drawn))).convert("RGB"))
    return stack_pictures(sheets)


def joined(parts: list[Decisions]) -> Decisions:
    """Of all images, without the pairs."""
    return dataclasses.replace(
        parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in ("labels", "confidence")}
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ask", choices=("digit", "kind", "colour"), default="digit")
    parser.add_argument("--several", action="store_true", help="a prompt for every colour of a kind")
    parser.add_argument("--model", help="examples/models/digits-class-ddim, or digits-text for kinds and colours")
    parser.add_argument("--output_dir", default="outputs/zero_shot", help="where errors are kept")
    parser.add_argument("--results", default="outputs/zero_shot-results", help="table and pictures")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--calibration_images", type=int, default=60)
    parser.add_argument("--levels", type=int, default=16)
    parser.add_argument("--published", action="store_true", help="the published schedule too: 2,750 evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    out, results = Path(args.output_dir), Path(args.results)
    out.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    default = "examples/models/" + ("digits-class-ddim" if args.ask == "digit" else "digits-text")
    denoiser = Denoiser.from_pretrained(args.model or default)
    asked = question(denoiser, args.ask, args.several, args.calibration_images, args.images)
    levels = even_timesteps(denoiser.schedule, args.levels)
    every, whole = make_rules(denoiser, asked, out, levels, args.published)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in (*every, *whole)}
    for at, seed in enumerate(args.seeds):
        kept = Kept(denoiser, asked, asked.test[0], seed, out / f"seed{seed}.npz")
        for name, (rule, own) in {**every, **(whole if at == 0 else {})}.items():
            found[name].append(kept.labels(rule, own))
        if at == 0:
            errors, sure = kept.errors(levels), joined(list(kept.decide(Averaging(len(levels)), levels)))
    rows = rows_of(found, asked)
    (results / "rows.json").write_text(json.dumps(rows, indent=2) + "\n")
    (results / "table.md").write_text(table_of(rows, asked))
    (results / "accuracy.png").write_bytes(picture(rows, asked))
    (results / "levels.png").write_bytes(picture_of_levels(errors, levels, asked.test[1]))
    picture_of_images(errors, levels, asked, sure).save(results / "images.png")
    print(table_of(rows, asked))


if __name__ == "__main__":
    run_script(main)
