"""Do generated variants help to segment from scribbles? By encode ratio and mixing scheme, on held-out real scenes.

    python examples/studies/scribbles.py --results docs/results/scribbles

Scenes of digits and shapes with a line through each thing (`examples/make_scenes.py --scribbles`): a ControlNet is
trained on them (`controlnet_scenes.yaml`), makes a variant of each at every encode ratio, and a segmenter is trained
(`scribble_scenes.yaml`) for equal steps in every row, also in those without variants. Measured is the mean IoU
of 16 classes on test scenes, whose digits are in no training scene and whose every pixel has a class. What is made is
kept: the same command goes on where it was. `--results` gets rows.jsonl, table.md and variants.png.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusers_repr.cli import main as command
from diffusers_repr.cli.guard import run_script
from diffusers_repr.config.recipe import read_recipe, to_yaml
from diffusers_repr.data.masks import IGNORE_INDEX
from diffusers_repr.data.splits import open_split
from diffusers_repr.hub.files import write_json
from diffusers_repr.pictures.grid import image_grid
from diffusers_repr.store.image_store import ImageStore

sys.path.insert(0, str(Path(__file__).parents[1]))

from make_scenes import main as make_scenes

EXAMPLES = Path(__file__).parents[1]
CONFIGS, MODEL = EXAMPLES / "configs", EXAMPLES / "models" / "digits-text"
RATIOS = (0.25, 0.5, 0.75, 1.0)
SHOWN = 10  # scenes in the picture


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        mixing: As `MixingConfig`.
        ratios: Encode ratios of the variants that are shown.
        changes: Settings of `scribble_scenes.yaml` that differ.
    """

    mixing: str
    ratios: tuple[float, ...] = ()
    changes: tuple[tuple[str, Any], ...] = ()


ROWS = {
    "real": Row("real"),
    "real, no pairwise": Row("real", changes=(("pairwise_weight", 0.0),)),
    "real, every pixel labelled": Row("real", changes=(("mask_column", "mask"), ("pairwise_weight", 0.0))),
    **{f"{mixing} {ratio:g}": Row(mixing, (ratio,)) for mixing in ("synthetic", "append", "replace")
       for ratio in RATIOS},
    "curriculum": Row("curriculum", RATIOS),
    "replace, all ratios": Row("replace", RATIOS),  # the control of the curriculum: the same variants in any order
}  # fmt: skip


class Study:
    """Makes what is not there, and measures it.

    Args:
        args: Of the command.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work

    def scenes(self) -> Path:
        """The scenes with their scribbles."""
        folder = self.work / "scenes"
        if not (folder / "done.json").is_file():
            counts = {"train": self.args.images, "validation": 0, "test": self.args.test_images, "held_out": 0}
            flags = [part for name, count in counts.items() for part in (f"--{name}", str(count))]
            make_scenes(["--scribbles", "--out", str(folder), *flags])
            write_json(folder / "done.json", counts)
        return folder

    def controlnet(self) -> Path:
        """The ControlNet, one for all seeds."""
        given = {"pretrained_model_name_or_path": str(MODEL), "max_train_steps": self.args.controlnet_steps}
        return self._run("train_controlnet", "controlnet_scenes", self.work / "controlnet", given)

    def hint_errors(self) -> dict[str, float]:
        """What tells whether the ControlNet uses its hints; nothing where there is none yet."""
        file = self.work / "controlnet" / "evaluation.jsonl"
        told = json.loads(file.read_text().splitlines()[-1]) if file.is_file() else {}
        return {name.removeprefix("eval_"): value for name, value in told.items() if name.startswith("eval_")}

    def variants(self, ratio: float, seed: int) -> Path:
        """A variant of each training scene, by the noise of a seed."""
        folder = self.work / "variants" / f"{ratio:g}-seed-{seed}"
        recipe = {
            "model": str(MODEL), "method": "hint", "count": 1, "dataset_name": str(self.scenes()),
            "image_column": "image", "mask_column": "scribble", "caption_column": "caption", "strength": ratio,
            "controlnet": str(self.controlnet()), "guidance_scale": [self.args.guidance_scale], "seed": seed,
            "num_inference_steps": self.args.inference_steps,
        }  # fmt: skip
        file = folder.parent / f"{folder.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(recipe))
        with contextlib.redirect_stdout(sys.stderr):
            if command(["generate", str(file), "--out", str(folder), "--quiet"]):
                raise RuntimeError(f"The variants of {file} were not made; what was wrong is told above.")
        return folder

    def picture(self, seed: int) -> Image.Image:
        """Scenes, their scribbles, and their variants by each ratio."""
        rows = open_split(str(self.scenes()), "train").select(range(min(SHOWN, self.args.images)))
        lines = [mask.point(lambda value: 255 if value == IGNORE_INDEX else 14 * value) for mask in rows["scribble"]]
        shown = [*rows["image"], *lines]
        for ratio in RATIOS:
            shown += itertools.islice(ImageStore.open(self.variants(ratio, seed)).pictures(), len(rows))
        titles = ["scene", "scribbles", *(f"encode ratio {ratio:g}" for ratio in RATIOS)]
        return image_grid(shown, columns=len(rows), row_titles=titles).quantize(256)

    def measured(self, name: str, seed: int) -> dict[str, Any]:
        """A row: how well the segmenter does on real test scenes."""
        row, folder = ROWS[name], self.work / "segmenters" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        given: dict[str, Any] = {"mixing": row.mixing, "max_train_steps": self.args.steps, "seed": seed}
        if row.ratios:
            given["synthetic_dirs"] = [str(self.variants(ratio, seed)) for ratio in row.ratios]
        if row.mixing == "curriculum":  # the highest ratio for the last quarter
            batch = int(read_recipe(CONFIGS / "scribble_scenes.yaml")["train_batch_size"])
            given["curriculum_epochs"] = max(1, self.args.steps * batch // self.args.images)
        since = time.process_time()
        self._run("train_scribble", "scribble_scenes", folder, given | dict(row.changes))
        told = json.loads((folder / "evaluation.jsonl").read_text().splitlines()[-1])
        return {
            "row": name, "seed": seed, "mean_iou": told["eval_mean_iou"],
            "pixel_accuracy": told["eval_pixel_accuracy"], "images": self.args.images, "steps": self.args.steps,
            "controlnet_steps": self.args.controlnet_steps, "guidance_scale": self.args.guidance_scale,
            "test_images": self.args.test_images, "cpu_seconds": round(time.process_time() - since, 1),
        }  # fmt: skip

    def _run(self, script: str, recipe: str, folder: Path, given: dict[str, Any]) -> Path:
        """The folder of a run of a script by its recipe with changes; trained if it is not."""
        if (folder / "study.json").is_file():
            return folder
        settings = read_recipe(CONFIGS / f"{recipe}.yaml")
        settings |= {"dataset_name": str(self.scenes()), "output_dir": str(folder), **given}
        file = folder.parent / f"{folder.name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(settings))
        print(f"{folder.name}: {settings['max_train_steps']} steps", flush=True)
        with contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(script).main(["--config", str(file), *self.args.flags])
        write_json(folder / "study.json", {"recipe": recipe, **given})
        return folder


def table(lines: Sequence[dict[str, Any]], errors: dict[str, float]) -> str:
    """Markdown: mean and spread over seeds of each row, and what it differs from `real` by, seed by seed.

    Below it the denoising errors of the ControlNet: with equal ones it does not use its hints.
    """
    real = {line["seed"]: line["mean_iou"] for line in lines if line["row"] == "real"}
    found = ["| training set | mean IoU | pixels right | less `real`, of the same seeds | seeds |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name in ROWS:
        own = [line for line in lines if line["row"] == name]
        if not own:
            continue
        gains = [line["mean_iou"] - real[line["seed"]] for line in own if line["seed"] in real]
        cells = [spread([line[key] for line in own]) for key in ("mean_iou", "pixel_accuracy")]
        cells.append("" if name == "real" or not gains else spread(gains, signed=True))
        found.append(f"| {name} | {' | '.join(cells)} | {len(own)} |")
    if errors:
        told = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in errors.items())
        found += ["", f"Denoising errors of the ControlNet on test scenes: {told}."]
    return "\n".join(found) + "\n"


def spread(values: Sequence[float], signed: bool = False) -> str:
    """The mean, and the standard deviation of two or more."""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.3f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}"


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/scribbles"), help="where what is made is kept")
    parser.add_argument("--results", type=Path, default=Path("outputs/scribbles-results"), help="rows.jsonl, table.md")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="some of them; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of noise, first weights and order")
    parser.add_argument("--images", type=int, default=400, help="training scenes")
    parser.add_argument("--test_images", type=int, default=500, help="test scenes")
    parser.add_argument("--steps", type=int, default=1500, help="of every segmenter")
    parser.add_argument("--controlnet_steps", type=int, default=3000, help="of the ControlNet")
    parser.add_argument("--inference_steps", type=int, default=20, help="of the sampler, for ratio 1")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="over the hint; 1: none")
    args, args.flags = parser.parse_known_args(argv)
    for name in ("images", "test_images", "steps", "controlnet_steps", "inference_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str]) -> None:
    args = parsed(argv)
    study, file = Study(args), args.results / "rows.jsonl"
    args.results.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    same = ("images", "test_images", "steps", "controlnet_steps", "guidance_scale")
    old = next((line for line in lines if any(line[name] != getattr(args, name) for name in same)), None)
    if old is not None:
        raise ValueError(f"{file} holds rows of { {name: old[name] for name in same} }; name another --results.")
    known = {(line["row"], line["seed"]): line for line in lines}
    for seed in args.seeds:
        for name in args.rows or ROWS:
            if (name, seed) in known:
                continue
            known[name, seed] = study.measured(name, seed)
            print(json.dumps(known[name, seed]), flush=True)
            ordered = sorted(known.values(), key=lambda line: (list(ROWS).index(line["row"]), line["seed"]))
            file.write_text("".join(json.dumps(line) + "\n" for line in ordered))
            (args.results / "table.md").write_text(table(ordered, study.hint_errors()))
    if args.rows is None:
        study.picture(args.seeds[0]).save(args.results / "variants.png", optimize=True)


if __name__ == "__main__":
    run_script(main)
