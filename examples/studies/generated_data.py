"""Do generated images help? Classifiers without a real image, few labels with variants, encoders on generated views.

    python examples/studies/generated_data.py --results docs/results/generated
    python examples/studies/generated_data.py --parts zero few views --dataset_name data/cifar10 --train_images 2000 \\
        --model examples/models/cifar10-ddpm --class_model FOLDER --results docs/results/generated/cifar10

- `zero`: a classifier of generated images alone, at guidance scales that are fixed and drawn, beside one of the real
  ones. The generator (`--class_model`) saw labelled images of the training split; the classifier sees none.
- `tricks` (scenes): the same by prompts: the class, with a colour as domain, with drawn guidance (MA-ZSC's tricks).
- `few`: some labelled images of each class, alone and with variants of them by a generator that knows no labels.
- `views`: linear and k-NN probes of encoders by every method, on plain views and with variants of each image as second
  views; and plain ones that are trained longer, by what making the variants took.

Everything is measured on the test split of real images, which chooses nothing. What is made and trained is kept, and
the same command goes on where it was. `--results` gets rows.jsonl and table.md.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, Features, Image

from diffusers_repr.cli import main as command
from diffusers_repr.cli.guard import run_script
from diffusers_repr.config.recipe import to_yaml
from diffusers_repr.data.image_data import ImageData, load_images
from diffusers_repr.data.scenes import COLOURS, DIGIT_NAMES, load_scenes
from diffusers_repr.hub.files import write_json
from diffusers_repr.store.image_store import ImageStore
from diffusers_repr.sweep.splits import draw_rows

EXAMPLES = Path(__file__).parents[1]
CONFIGS, MODELS = EXAMPLES / "configs", EXAMPLES / "models"
sys.path.insert(0, str(EXAMPLES))

SCALES = {"w = 1": [1.0], "w = 3": [3.0], "w = 5": [5.0], "w from 1 to 5": [1.0, 5.0]}
PLAIN, COLOURED = ["a {class}"], ["a {domain} {class}"]
TRICKS = {  # name -> templates, domains, guidance scales
    "class alone": (PLAIN, [], [3.0]),
    "with colours": (COLOURED, list(COLOURS), [3.0]),
    "with drawn guidance": (PLAIN, [], [1.0, 5.0]),
    "both": (COLOURED, list(COLOURS), [1.0, 5.0]),
}
METHODS = ("simclr", "simsiam", "byol", "barlow_twins")
CODES = ("code", "representation")  # sources of views that are trained first, on the digits
REAL, SELECTED = "real images", 10


@dataclasses.dataclass(frozen=True)
class Kind:
    """What depends on the data set.

    Attributes:
        side: Of its images.
        channels: Of them.
        classifier: Arguments of the network.
        moves: How images are moved in training.
        encoder: Flags of `train_encoder.py`.
    """

    side: int
    channels: int
    classifier: dict
    moves: dict
    encoder: dict


_TURNS = {"random_rotation": 15.0, "random_shift": 0.1, "random_scale": 0.2}  # no flips: a mirrored digit is another
_VIT = {"image_size": 32, "patch_size": 4, "num_channels": 3, "hidden_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 256}  # fmt: skip
_COLOURED = {"random_flip": True, "random_rotation": 0.0, "random_shift": 0.0, "random_scale": 0.0, "crop_scale": 0.3,
             "grey_probability": 0.2, "model": json.dumps(_VIT)}  # fmt: skip
_CONVNEXT = {"model_type": "convnext", "patch_size": 2, "hidden_sizes": [64, 128], "depths": [2, 2],
             "layer_scale_init_value": 1.0}  # fmt: skip
# Of 32 x 32 pixels: a ConvNeXt of this size learns nothing of small things in any place in so few steps.
_RESNET = {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1],
           "layer_type": "basic"}  # fmt: skip
DIGITS = Kind(8, 1, _CONVNEXT, _TURNS, {})
SCENES = Kind(32, 3, _RESNET, {"random_rotation": 10.0, "random_shift": 0.2, "random_scale": 0.2}, {})
PHOTOGRAPHS = Kind(32, 3, _RESNET, {"random_flip": True, "random_shift": 0.1}, _COLOURED)


class Study:
    """Makes, trains and measures what is not there.

    Args:
        args: Of the command.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work
        self.digits = args.dataset_name == "digits"
        self.kind = DIGITS if self.digits else PHOTOGRAPHS

    # Data

    def folder(self, name: str, make: Callable[[], dict[str, Dataset]]) -> Path:
        """A data set of this name, by splits; made once."""
        place = self.work / "data" / name.replace(" ", "-")
        if not (place / "made.json").is_file():
            (place / "data").mkdir(parents=True, exist_ok=True)
            for split, rows in make().items():
                rows.to_parquet(place / "data" / f"{split}-00000-of-00001.parquet")
            write_json(place / "made.json", {"name": name})
        return place

    def part(self, split: str, count: int | None) -> ImageData:
        data = load_images(self.args.dataset_name, split)
        return data if count is None else draw_rows(data, count)

    def real(self) -> Path:
        """The real images of the study."""
        args = self.args
        counts = {"train": args.train_images, "test": args.test_images}
        return self.folder(REAL, lambda: {split: rows_of(self.part(split, n)) for split, n in counts.items()})

    def scenes(self) -> Path:
        """Real scenes of one digit, by its class: as many to train on as are generated."""
        counts = {"train": self.args.per_class * len(DIGIT_NAMES), "test": self.args.test_images or 500}
        return self.folder(
            "scenes of a digit", lambda: {split: single_digits(split, n) for split, n in counts.items()}
        )

    # Generation

    def generated(self, name: str, seed: int, **recipe: object) -> tuple[Path, float]:
        """A generated set and the CPU seconds that it took."""
        place = self.work / "generated" / f"{name}-seed{seed}".replace(" ", "-")
        told = place.parent / f"{place.name}.json"
        if not told.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            file = place.parent / f"{place.name}.yaml"
            file.write_text(to_yaml({"num_inference_steps": self.args.inference_steps, "seed": seed, **recipe}))
            since = time.process_time()
            if command(["generate", str(file), "--out", str(place), "--quiet", "--batch_size", "64"]):
                raise RuntimeError(f"{file} could not be generated; see above.")
            write_json(told, {"cpu_seconds": time.process_time() - since})
        return place, json.loads(told.read_text())["cpu_seconds"]

    def variants(self, source: str, data: Path, seed: int) -> tuple[Path, float]:
        """Variants of each training image of a folder."""
        given: dict = {"dataset_name": str(data), "count": self.args.variants}
        if source.startswith("strength"):
            strength = float(source.split()[1])
            given |= {"method": "image_to_image", "model": str(self.args.model), "strength": strength}
            given["scheduler"] = "DDIMScheduler"
        elif source == "code":
            given |= {"method": "code", "model": str(self.trained("diffae_digits", "train_autoencoder", seed))}
        else:
            encoder, place = f"{MODELS / 'digits-ddpm'}:mid_block@100", self.work / "rcg-assigned"
            options = ["--method", "identity", "--over", "vector", "--out", str(place), "--quiet"]
            if not (place / "assigner").is_dir() and command(["assign", encoder, "digits", *options]):
                raise RuntimeError("The vectors of the digits could not be made; see above.")
            images = self.trained("rcg_pixels_digits", "train_conditional", seed, assignments_dir=str(place))
            given |= {"method": "representation", "model": str(images), "encoder": encoder}
            given["assigner"] = str(place / "assigner")
        return self.generated(f"{data.name} {source}", seed, **given)

    # Training

    def trained(self, recipe: str, script: str, seed: int, **changes: object) -> Path:
        """A source of variants, trained by its recipe."""
        place = self.work / recipe / f"seed{seed}"
        if not (place / "README.md").is_file():
            changes |= {} if self.args.source_steps is None else {"max_train_steps": self.args.source_steps}
            run(script, config=CONFIGS / f"{recipe}.yaml", output_dir=place, seed=seed, **changes)
        return place

    def classifier(self, kind: Kind) -> dict:
        steps = self.args.steps
        return {"student": json.dumps(kind.classifier), "image_channels": kind.channels, "resolution": kind.side,
                "cache_images": True, "train_batch_size": 64, "max_train_steps": steps, "learning_rate": 2e-3,
                "lr_scheduler": "cosine", "lr_warmup_steps": max(steps // 10, 1), "adam_weight_decay": 0.05,
                "ema_max_decay": 0.95, "checkpointing_steps": steps, **kind.moves}  # fmt: skip

    def zero_shot(self, name: str, data: Path, test: Path, kind: Kind, seed: int) -> dict:
        """A classifier of a generated set, its step chosen by held-out images of that set."""
        place = self.work / "runs" / f"{name}-seed{seed}".replace(" ", "-")
        chosen = {"dataset_name": data, "test_dataset_name": test, "held_out_share": 0.1,
                  "validation_steps": max(self.args.steps // SELECTED, 1)}  # fmt: skip
        run("train_zero_shot_set", output_dir=place, seed=seed, **self.classifier(kind), **chosen)
        line = last_line(place / "evaluation.jsonl")
        return {"accuracy": line["test_accuracy"], "held_out": line["held_out_accuracy"]}

    # Parts: row -> scores

    def zero(self, seed: int) -> dict[str, Callable[[], dict]]:
        model, test = str(self.args.class_model), self.real()
        rows = {REAL: lambda: self.zero_shot("zero real", test, test, self.kind, seed)}
        for name, scales in SCALES.items():

            def row(name: str = name, scales: list[float] = scales) -> dict:
                recipe = {"model": model, "method": "class", "count": self.args.per_class, "guidance_scale": scales}
                recipe["scheduler"] = "DDPMScheduler"  # DDIM that clips ruins images at large scales
                made, seconds = self.generated(f"classes {name}", seed, **recipe)
                return {**self.zero_shot(f"zero {name}", made, test, self.kind, seed), "generation": seconds}

            rows[name] = row
        return rows

    def tricks(self, seed: int) -> dict[str, Callable[[], dict]]:
        rows = {REAL: lambda: self.zero_shot("tricks real", self.scenes(), self.scenes(), SCENES, seed)}
        for name, (templates, domains, scales) in TRICKS.items():

            def row(name=name, templates=templates, domains=domains, scales=scales) -> dict:
                recipe = {"model": str(MODELS / "digits-text"), "method": "prompt", "classes": list(DIGIT_NAMES),
                          "templates": templates, "domains": domains, "guidance_scale": scales,
                          "count": self.args.per_class}  # fmt: skip
                made, seconds = self.generated(f"prompts {name}", seed, **recipe)
                return {**self.zero_shot(f"tricks {name}", made, self.scenes(), SCENES, seed), "generation": seconds}

            rows[name] = row
        return rows

    def few(self, seed: int) -> dict[str, Callable[[], dict]]:
        rows: dict[str, Callable[[], dict]] = {}
        for shots in self.args.shots:
            for source in (None, *(f"strength {strength:g}" for strength in self.args.strengths)):
                label = f"{shots} labels a class" + (f", {source}" if source else "")
                rows[label] = lambda shots=shots, source=source: self.few_labels(shots, source, seed)
        return rows

    def few_labels(self, shots: int, source: str | None, seed: int) -> dict:
        """Accuracy with some labels, and as many variants as copies of the real images."""
        real = self.real()

        def drawn() -> dict[str, Dataset]:
            data = load_images(str(real), "train")
            return {"train": rows_of(draw_rows(data, shots * len(data.label_names or []), seed))}

        few, seconds = self.folder(f"few {shots} seed{seed}", drawn), 0.0
        name = f"few {shots} {source}"
        if source is not None:
            made, seconds = self.variants(source, few, seed)
        test = load_images(str(real), "test")

        def mixed() -> dict[str, Dataset]:
            data = load_images(str(few), "train")
            images, labels = data.read(range(len(data))), data.labels()
            if source is not None:
                store = ImageStore.open(made)
                images = images * self.args.variants + list(store.pictures())
                labels = labels * self.args.variants + [int(str(key.condition)) for key in store.image_keys()]
            return {"train": dataset(images, labels, data.label_names or []), "test": rows_of(test)}

        place = self.work / "runs" / f"{name}-seed{seed}".replace(" ", "-")
        mixture = self.folder(f"{name} seed{seed}", mixed)
        run("train_student", output_dir=place, seed=seed, dataset_name=mixture, eval_split="test",
            **self.classifier(self.kind))  # fmt: skip
        return {"accuracy": last_line(place / "evaluation.jsonl")["eval_accuracy"], "generation": seconds}

    def views(self, seed: int) -> dict[str, Callable[[], dict]]:
        sources = [f"strength {strength:g}" for strength in self.args.strengths]
        sources += [source for source in CODES if self.digits and source not in self.args.without]
        rows: dict[str, Callable[[], dict]] = {}
        for method in self.args.methods:
            rows[method] = lambda method=method: self.encoder(method, None, seed)
            for source in sources if method == METHODS[0] else sources[:1]:
                rows[f"{method}, {source}"] = lambda method=method, source=source: self.encoder(method, source, seed)
            longer = sources[0]
            rows[f"{method}, longer by the making of {longer}"] = (
                lambda method=method, longer=longer: self.encoder(method, longer, seed, control=True)
            )  # fmt: skip
        return rows

    def encoder(self, method: str, source: str | None, seed: int, control: bool = False) -> dict:
        """Probes of an encoder; a control has no variants, and the CPU seconds that their making took instead."""
        name = f"views {method} {source or 'plain'}" + (" control" if control else "")
        place = self.work / "runs" / f"{name}-seed{seed}".replace(" ", "-")
        data, steps = self.real(), self.args.encoder_steps
        made, seconds = (None, 0.0) if source is None else self.variants(source, data, seed)
        if control:
            plain = self.encoder(method, None, seed)
            steps, made = round(steps * (1 + seconds / plain["training"])), None
        given = {"dataset_name": data, "eval_split": "test", "method": method, "max_train_steps": steps}
        given |= {} if made is None else {"variants_dir": made}
        took = place / "took.json"
        if not took.is_file():
            since = time.process_time()
            run("train_encoder", config=CONFIGS / "encoder_digits.yaml", output_dir=place, seed=seed,
                lr_warmup_steps=max(steps // 12, 1), **self.kind.encoder, **given)  # fmt: skip
            write_json(took, {"cpu_seconds": time.process_time() - since})
        line = last_line(place / "evaluation.jsonl")
        probes = ("class_token_linear", "class_token_knn", "patch_mean_linear", "patch_mean_knn")
        scores = {probe: line[f"trained_{probe}"] for probe in probes}
        trained = json.loads(took.read_text())["cpu_seconds"]
        return {**scores, "steps": steps, "training": trained, "generation": seconds}


def run(script: str, **given: object) -> None:
    """A script of `examples/` with flags, its output to stderr."""
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module(script).main(words)


def rows_of(data: ImageData) -> Dataset:
    """Images and labels alone."""
    return dataset(data.read(range(len(data))), data.labels(), data.label_names or [])


def dataset(images: Sequence, labels: Sequence[int], names: Sequence[str]) -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features)


def single_digits(split: str, count: int) -> Dataset:
    """Real scenes with one digit and nothing else, of a split of the digits."""
    images, labels, asked = [], [], 20 * count
    for row in load_scenes(split, asked):
        if len(row["things"]) == 1 and row["things"][0]["kind"] < len(DIGIT_NAMES):
            images.append(row["image"])
            labels.append(row["things"][0]["kind"])
    if len(images) < count:
        raise ValueError(f"{asked} scenes have {len(images)} single digits, fewer than the {count} asked for.")
    return dataset(images[:count], labels[:count], DIGIT_NAMES)


def last_line(path: Path) -> dict:
    return json.loads(path.read_text().splitlines()[-1])


def table(lines: Sequence[dict]) -> str:
    """Of each part a table: mean and standard deviation over the seeds."""
    told = []
    for part in dict.fromkeys(line["part"] for line in lines):
        own = [line for line in lines if line["part"] == part]
        keys = list(dict.fromkeys(key for line in own for key in line["scores"]))
        told += [f"`{part}`:", "", f"| | {' | '.join(keys)} | seeds |", f"|---|{'---|' * (len(keys) + 1)}"]
        for row in dict.fromkeys(line["row"] for line in own):
            found = [line["scores"] for line in own if line["row"] == row]
            cells = [cell(key, [scores[key] for scores in found if key in scores]) for key in keys]
            told.append(f"| {row} | {' | '.join(cells)} | {len(found)} |")
        told.append("")
    return "\n".join(told)


def cell(key: str, values: Sequence[float]) -> str:
    numbers = torch.tensor(list(values)).double()
    if not len(numbers):
        return ""
    if key in ("steps", "training", "generation"):  # steps, and CPU seconds
        return f"{float(numbers.mean()):.0f}"
    return f"{float(numbers.mean()):.3f}" + (f" ± {float(numbers.std()):.3f}" if len(numbers) > 1 else "")


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/generated-data"), help="folder of sets and runs")
    parser.add_argument("--results", type=Path, default=Path("outputs/generated-data-results"))
    parser.add_argument("--parts", nargs="+", default=None, choices=("zero", "tricks", "few", "views"))
    parser.add_argument("--rows", nargs="+", help="of the parts; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dataset_name", default="digits", help="another one: all but tricks")
    parser.add_argument("--model", type=Path, default=MODELS / "digits-ddpm", help="makes variants; unconditional")
    parser.add_argument("--class_model", type=Path, help="generator of zero; of digits digits-class-ddim")
    parser.add_argument("--train_images", type=int, help="drawn; default: all")
    parser.add_argument("--test_images", type=int, help="drawn; default: all, of scenes 500")
    parser.add_argument("--per_class", type=int, default=100, help="generated images of each class")
    parser.add_argument("--variants", type=int, default=4, help="of each image")
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--shots", nargs="+", type=int, default=[2, 5, 10], help="labels of each class")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--without", nargs="+", default=[], choices=CODES, help="sources of views to leave out")
    parser.add_argument("--source_steps", type=int, help="of training what makes them; default: its recipe's")
    parser.add_argument("--inference_steps", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300, help="of classifiers")
    parser.add_argument("--encoder_steps", type=int, default=1200)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parsed(argv)
    study = Study(args)
    others = ["few", "views"] if args.class_model is None else ["zero", "few", "views"]
    parts = args.parts or (["zero", "tricks", "few", "views"] if study.digits else others)
    if not study.digits and "tricks" in parts:
        raise ValueError(f"tricks are of the digits; on {args.dataset_name} there are zero, few and views.")
    if args.class_model is None and "zero" in parts:
        if not study.digits:
            raise ValueError(f"zero needs a generator of classes of {args.dataset_name}; name it by --class_model.")
        args.class_model = MODELS / "digits-class-ddim"
    file = args.results / "rows.jsonl"
    args.results.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    known = {(line["part"], line["row"], line["seed"]) for line in lines}
    for seed in args.seeds:
        for part in parts:
            for row, measure in getattr(study, part)(seed).items():
                if (part, row, seed) in known or (args.rows and row not in args.rows):
                    continue
                lines.append({"part": part, "row": row, "seed": seed, "data": args.dataset_name, "scores": measure()})
                print(json.dumps(lines[-1]), flush=True)
                file.write_text("".join(json.dumps(line) + "\n" for line in lines))
                (args.results / "table.md").write_text(table(lines))


if __name__ == "__main__":
    run_script(main)
