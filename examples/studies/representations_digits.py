"""Which representation does training with diffusion give? Every system's recipe on the digits, measured alike.

    python examples/studies/representations_digits.py --results docs/results/representations
    python examples/studies/representations_digits.py --dataset_name data/cifar10 \\
        --model examples/models/cifar10-ddpm \\
        --steps 2000 --results outputs/representations-cifar10    # RepFusion, DreamTeacher and PDAE on that base

Every row is its recipe of `examples/configs`, unchanged but for folder, seed and steps: all see the training images
`--passes` times (a stage that stands on another one's result, each). Measured on the test split, always beside raw
pixels, the untrained network and the layer that is selected of a plain diffusion model: linear probe, five labels a
class, k-NN, fine-tuning, DCI and TAD; of what decodes, reconstructions; of what samples, the Fréchet distance. What is
trained and measured is kept: the same command goes on where it was. `--results` gets rows.jsonl, table.md, curves.png
and pictures.
"""

import argparse
import contextlib
import importlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from representation_pictures import curves, pictures, reconstruction_scores, sample_scores
from torch import Tensor

from diffusers_repr import Denoiser, Encoder
from diffusers_repr.cli.guard import run_script
from diffusers_repr.config.recipe import read_recipe, to_yaml
from diffusers_repr.data.image_data import ImageData, load_images
from diffusers_repr.data.splits import has_split
from diffusers_repr.encoders import load_encoder
from diffusers_repr.encoders.loading import layer_encoder
from diffusers_repr.hub.files import write_json
from diffusers_repr.sweep import FinetuneProtocol, ProbeSettings, hold_out, measure_representation, select_features
from diffusers_repr.sweep.representation import RANDOM, attribute_scores, pixel_vectors
from diffusers_repr.sweep.splits import draw_rows

EXAMPLES = Path(__file__).parents[1]
sys.path.insert(0, str(EXAMPLES))  # where the scripts of the recipes are
CONFIGS, MODEL = EXAMPLES / "configs", EXAMPLES / "models" / "digits-ddpm"
LEVELS = [30, 100, 200, 300]  # among which a layer of a denoiser is selected, on the validation split


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        recipe: Name of its file in `examples/configs`; None: nothing is trained.
        layer: Whether the product is a denoiser, of which a layer is selected.
        note: What the numbers stand on.
    """

    recipe: str | None = None
    layer: bool = False
    note: str = ""


ROWS: dict[str, Row] = {
    "raw pixels": Row(),
    "plain diffusion": Row(layer=True, note="the model that comes along"),
    "plain diffusion, equal passes": Row("ddpm_digits", layer=True),
    "SimCLR": Row("encoder_digits", note="no diffusion"),
    "RepFusion": Row("repfusion_digits", note="labels choose its levels"),
    "DreamTeacher": Row("dreamteacher_digits"),
    "DiffAE": Row("diffae_digits"),
    "InfoDiffusion": Row("infodiffusion_digits"),
    "PDAE": Row("pdae_digits"),
    "l-DAE": Row("ldae_digits"),
    "MDM": Row("mdm_digits", layer=True),
    "MAGE": Row("mage_digits"),
    "ADDP": Row("addp_digits"),
}
OF_A_BASE = ("raw pixels", "plain diffusion", "RepFusion", "DreamTeacher", "PDAE")  # those that take any data and base
COLUMNS = {
    "linear": "linear", "few_shot": "5-shot", "knn": "k-NN", "finetune": "fine-tuned", "dim": "numbers",
    "disentanglement": "D", "completeness": "C", "informativeness": "I", "tad": "TAD",
    "ssim_inferred": "SSIM, inferred", "mse_inferred": "MSE, inferred", "ssim_random": "SSIM, random",
    "mse_random": "MSE, random", "feature_distance_inferred": "features, inferred",
    "feature_distance_random": "features, random", "frechet_distance": "Fréchet", "cpu_seconds": "CPU seconds",
}  # fmt: skip
PROBES = ("linear", "few_shot", "knn", "finetune")


class MissingRecipe(FileNotFoundError):
    """A row's recipe is not in `examples/configs`."""


def recipe_file(name: str, row: str) -> Path:
    """The recipe of a row, or of a stage before it."""
    file = CONFIGS / f"{name}.yaml"
    if not file.is_file():
        raise MissingRecipe(f"{row}: there is no recipe {file.name} in examples/configs, so it cannot be trained.")
    return file


def script_of(file: Path) -> str:
    """The script that a recipe is for, which its first lines name."""
    found = re.search(rf"examples/(\w+)\.py --config examples/configs/{re.escape(file.name)}", file.read_text())
    if found is None:
        raise ValueError(f"{file.name} does not tell in a comment which script of examples/ it is for.")
    return found[1]


def stages_before(file: Path) -> dict[str, str]:
    """Keys of a recipe that name what another recipe writes -> that recipe."""
    makers = {str(read_recipe(one).get("output_dir")): one.stem for one in sorted(CONFIGS.glob("*.yaml"))}
    values = {key: value for key, value in read_recipe(file).items() if key != "output_dir"}
    return {key: makers[value] for key, value in values.items() if isinstance(value, str) and value in makers}


class Study:
    """Trains what is not there, and measures it.

    Args:
        args: Of the command.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.digits = args.dataset_name == "digits"
        self.model = str(args.model)
        self.train, self.validation, self.test = self._splits()
        self.attributes = None
        if self.digits:
            self.attributes = digit_attributes(self.train), digit_attributes(self.test)

    def _splits(self) -> tuple[ImageData, ImageData, ImageData]:
        name, args = self.args.dataset_name, self.args
        train, test = load_images(name, "train"), load_images(name, args.test_split)
        if has_split(name, "validation"):
            validation = load_images(name, "validation")
        else:
            train, validation = hold_out(train, 0.2, seed=0)
        limits = (args.train_images, args.train_images, args.test_images)
        parts = (train, validation, test)
        return tuple(one if most is None else draw_rows(one, most) for one, most in zip(parts, limits, strict=True))

    def steps(self, file: Path) -> int:
        """As many as `--passes` over the training images take, or `--steps`."""
        if self.args.steps is not None:
            return self.args.steps
        images = len(load_images(self.args.dataset_name, "train"))
        return max(1, round(self.args.passes * images / self.batch(file)))

    def batch(self, file: Path) -> int:
        """Images a step: `--train_batch_size`, or the recipe's."""
        return self.args.train_batch_size or int(read_recipe(file)["train_batch_size"])

    def trained(self, recipe: str, seed: int, row: str) -> Path:
        """The folder of a recipe's run with a seed, trained if it is not, what it stands on before it."""
        file = recipe_file(recipe, row)
        folder = self.args.work / recipe / f"seed-{seed}"
        before = {key: self.trained(one, seed, row) for key, one in stages_before(file).items()}
        done = folder / "study.json"
        if done.is_file():
            return folder
        keys = {key: value for key, value in read_recipe(file).items() if key != "eval_split"}  # measured here, alike
        given = {"output_dir": str(folder), "seed": seed, "max_train_steps": self.steps(file)}
        given["train_batch_size"] = self.batch(file)
        given |= {key: str(place) for key, place in before.items()}
        given |= {"pretrained_model_name_or_path": self.model} if "pretrained_model_name_or_path" in keys else {}
        given |= {} if self.digits else {"dataset_name": self.args.dataset_name}
        changed = folder.parent / f"seed-{seed}.yaml"
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.write_text(to_yaml({**keys, **given}))
        print(f"{recipe}, seed {seed}: {given['max_train_steps']} steps", flush=True)
        since = time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            script = importlib.import_module(script_of(file))
            script.main(["--config", str(changed), *self.args.flags])
        seconds = time.process_time() - since
        write_json(done, {"recipe": recipe, "seed": seed, "steps": given["max_train_steps"],
                          "batch": given["train_batch_size"], "cpu_seconds": round(seconds, 1),
                          "before": sorted(map(str, before.values()))})  # fmt: skip
        return folder

    def cost(self, folder: Path | None) -> dict:
        """Steps, and the CPU seconds of all stages."""
        if folder is None:
            return {}
        stages: dict[str, dict] = {}
        waiting = [str(folder)]
        while waiting:
            place = waiting.pop()
            stages[place] = json.loads(Path(place, "study.json").read_text())
            waiting += [one for one in stages[place]["before"] if one not in stages]
        told = stages[str(folder)]
        seconds = round(sum(stage["cpu_seconds"] for stage in stages.values()), 1)
        return {"steps": told["steps"], "batch": told["batch"], "stages": len(stages), "cpu_seconds": seconds}

    def encoder(self, row: Row, folder: Path | None, seed: int) -> Encoder:
        """What is measured: the folder's encoder, or the layer of its denoiser that is best on validation."""
        if not row.layer:
            return load_encoder(str(folder))
        place = self.model if folder is None else str(folder)
        denoiser = Denoiser.from_pretrained(place)
        found = select_features(denoiser, self.train, self.validation, LEVELS, seeds=[seed], progress=False)
        best = found.best
        return layer_encoder(f"{place}:{best.layer}@{float(best.timestep):g}", denoiser, seed)

    def measured(self, name: str, seed: int) -> dict:
        """A line of rows.jsonl."""
        row, args = ROWS[name], self.args
        folder = None if row.recipe is None else self.trained(row.recipe, seed, name)
        head = {"row": name, "seed": seed, "data": args.dataset_name, "passes": length(args), **self.cost(folder)}
        settings = ProbeSettings(PROBES, finetune=FinetuneProtocol(epochs=args.finetune_epochs), seed=seed)
        if name == "raw pixels":
            return {**head, **self.of_pixels(settings)}
        encoder = self.encoder(row, folder, seed)
        found = measure_representation(
            encoder, self.train, self.test, self.validation, beside=["random"], settings=settings,
            attributes=self.attributes,
        )  # fmt: skip
        own, random = found.rows[encoder.name], found.rows[RANDOM]
        place = Path(self.model) if folder is None else folder
        judge = load_encoder(f"{self.model}:mid_block@100")
        judge.name = Path(judge.name).name
        images = pixel_images(self.test, args.samples)
        own = {**own, **reconstruction_scores(place, images, judge, args.inference_steps, seed)}
        own |= sample_scores(place, pixel_images(self.train, None), judge, args.samples, args.inference_steps, seed)
        read = encoder.name if row.layer else type(encoder.module).__name__
        return {**head, "dim": found.dims[encoder.name], "reads": Path(read).name, "scores": own, "random": random}

    def of_pixels(self, settings: ProbeSettings) -> dict:
        """The images themselves."""
        from diffusers_repr.sweep import few_shot_probe, knn_probe, linear_probe

        sets = [pixel_vectors(open_rows(one)) for one in (self.train, self.test, self.validation)]
        labels = [torch.tensor(one.labels()) for one in (self.train, self.test, self.validation)]
        pair = (sets[0], labels[0], sets[1], labels[1])
        few = few_shot_probe(*pair, settings.shots, draws=settings.draws, seed=settings.seed)
        scores = {
            "linear": linear_probe(*pair, validation=(sets[2], labels[2]), seed=settings.seed).accuracy,
            "few_shot": few.mean, "few_shot_std": few.std, "knn": knn_probe(*pair, k=settings.k).accuracy,
        }  # fmt: skip
        if self.attributes is not None:
            scores |= attribute_scores(sets[0], sets[1], *self.attributes, settings.predictor, settings.seed)
        return {"dim": sets[0].shape[1], "reads": "", "scores": scores, "random": {}}


def open_rows(data: ImageData):
    from diffusers_repr.data.labelled import open_images

    return open_images(data, "images")


def pixel_images(data: ImageData, count: int | None) -> Tensor:
    """The first images `(N, C, H, W)` in [0, 1]."""
    rows = open_rows(data)
    channels = 1 if data.read([0])[0].mode == "L" else 3
    parts = rows.pixels(256, channels, None, range(len(data) if count is None else min(count, len(data))))
    return torch.cat([pixels for _, pixels in parts]) / 2 + 0.5


def digit_attributes(data: ImageData) -> dict[str, Tensor]:
    """What is seen of each digit: its class, how much ink, where, how wide and high, how far it leans."""
    images = pixel_images(data, None)[:, 0].double()
    ink = images.sum((1, 2))
    y, x = torch.meshgrid(torch.arange(8.0).double(), torch.arange(8.0).double(), indexing="ij")
    mean_y, mean_x = ((images * axis).sum((1, 2)) / ink for axis in (y, x))
    dy, dx = (axis[None] - mean[:, None, None] for axis, mean in ((y, mean_y), (x, mean_x)))
    yy, xx, xy = ((images * one * two).sum((1, 2)) / ink for one, two in ((dy, dy), (dx, dx), (dx, dy)))
    numbers = {"ink": ink, "column": mean_x, "row": mean_y, "width": xx.sqrt(), "height": yy.sqrt(), "slant": xy / yy}
    labels = torch.tensor(data.labels())
    return {"class": labels, **{name: values.float() for name, values in numbers.items()}}


def table(lines: Sequence[dict]) -> str:
    """Mean and standard deviation over the seeds; of probes, in brackets, that of the untrained network."""
    keys = [key for key in COLUMNS if any(key in {**line, **line["scores"]} for line in lines)]
    rows = [f"| | {' | '.join(COLUMNS[key] for key in keys)} | passes | seeds |", f"|---|{'---|' * (len(keys) + 2)}"]
    for name in dict.fromkeys(line["row"] for line in lines):
        own = [line for line in lines if line["row"] == name]
        cells = [cell(key, own) for key in keys]
        passes = "-" if "steps" not in own[0] else f"{own[0]['passes']} x {own[0]['stages']}"
        rows.append(f"| {name} | {' | '.join(cells)} | {passes} | {len(own)} |")
    return "\n".join(rows) + "\n"


def length(args: argparse.Namespace) -> int | str:
    """How long every stage is trained, as the rows say it."""
    return f"{args.steps} steps" if args.steps is not None else args.passes


def cell(key: str, own: Sequence[dict]) -> str:
    values = [{**line, **line["scores"]}.get(key) for line in own]
    numbers = torch.tensor([float(value) for value in values if value is not None]).double()
    if not len(numbers):
        return ""
    if key in ("dim", "cpu_seconds"):
        return f"{float(numbers.mean()):.0f}"
    shown = f"{float(numbers.mean()):.3f}" + (f" ± {float(numbers.std()):.3f}" if len(numbers) > 1 else "")
    random = [line["random"][key] for line in own if key in line["random"] and key in PROBES]
    return shown + (f" ({sum(random) / len(random):.3f})" if random else "")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/representations"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("outputs/representations-results"))
    parser.add_argument("--rows", nargs="+", default=None, choices=list(ROWS), help="default: all that have a recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--passes", type=int, default=80, help="over the training images, of every stage")
    parser.add_argument("--steps", type=int, help="optimizer steps of every stage, in place of --passes")
    parser.add_argument("--train_batch_size", type=int, help="images a step; default: the recipe's")
    parser.add_argument("--dataset_name", default="digits", help="another data set: rows that take any base alone")
    parser.add_argument("--test_split", default="test")
    parser.add_argument("--train_images", type=int, help="that probes learn from, drawn; default: all")
    parser.add_argument("--test_images", type=int, help="that probes are measured on, drawn; default: all")
    parser.add_argument("--model", default=MODEL, help="teacher and base: folder or Hub id of an unconditional model")
    parser.add_argument("--finetune_epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, default=500, help="images reconstructed, and generated")
    parser.add_argument("--inference_steps", type=int, default=50, help="of DDIM, both ways")
    args, args.flags = parser.parse_known_args(argv)
    return args


def main(argv: list[str]) -> None:
    args = parsed(argv)
    disable_progress_bar()
    study = Study(args)
    asked = args.rows or (list(ROWS) if study.digits else list(OF_A_BASE))
    other = [name for name in asked if not study.digits and name not in OF_A_BASE]
    if other:
        raise ValueError(f"{', '.join(other)}: of the digits alone; on {args.dataset_name} there are {OF_A_BASE}.")
    file = args.results / "rows.jsonl"
    args.results.mkdir(parents=True, exist_ok=True)
    lines = read_lines(file)
    known = {(line["row"], line["seed"]): line for line in lines}
    old = next((line for line in lines if (line["data"], line["passes"]) != (args.dataset_name, length(args))), None)
    if old is not None:
        raise ValueError(f"{file} holds rows of {old['data']}, trained for {old['passes']}; name another --results.")
    for seed in args.seeds:
        for name in asked:
            if (name, seed) in known:
                continue
            try:
                known[name, seed] = study.measured(name, seed)
            except MissingRecipe as error:
                if args.rows is not None:
                    raise
                print(f"left out: {error}", flush=True)
                continue
            print(json.dumps(known[name, seed]), flush=True)
            ordered = sorted(known.values(), key=lambda line: (list(ROWS).index(line["row"]), line["seed"]))
            file.write_text("".join(json.dumps(line) + "\n" for line in ordered))
            (args.results / "table.md").write_text(table(ordered))
    folders = {name: args.work / str(ROWS[name].recipe) / f"seed-{args.seeds[0]}" for name in asked}
    there = {name: folder for name, folder in folders.items() if (folder / "study.json").is_file()}
    curves(there, args.results / "curves.png")
    known = None
    if study.attributes is not None:
        slant = study.attributes[0]["slant"]
        known = (pixel_images(study.train, None), slant < slant.median(), "a lean to the right")
    pictures(there, pixel_images(study.test, 8), args.results, args.inference_steps, known)


if __name__ == "__main__":
    run_script(main)
