"""What is where in composed scenes, in words: seen pairs of colour and kind, and pairs that no part of it ever saw.

    python examples/studies/panoptic_scenes.py --output_dir docs/results/panoptic

Two segmenters by the recipe `odise_scenes.yaml`: on the text-to-image model of scenes, and on the same networks with
random weights. What is trained already is taken as it is; what was stopped goes on. Both are measured on scenes whose
pairs were all in the training (`test`), and on scenes that each show a pair which neither the text-to-image model, nor
CLIP, nor the head has seen (`held_out`). Chance: the same segments, their names dealt anew among all pairs.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps

from diffusers_repr.cli.guard import run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.data.panoptic_data import PanopticConfig, load_panoptic
from diffusers_repr.heads.odise import Vocabulary
from diffusers_repr.hub import write_json
from diffusers_repr.metrics import panoptic_quality
from diffusers_repr.objectives.odise import OdiseConfig
from diffusers_repr.pictures.grid import image_grid
from diffusers_repr.pictures.segments import segment_picture
from diffusers_repr.tasks import OpenVocabularySegmenter
from diffusers_repr.tasks.matches import as_pil
from diffusers_repr.tasks.panoptic_fit import opened
from diffusers_repr.training import TrainingConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import train_odise

RECIPE = train_odise.RECIPES / "odise_scenes.yaml"
ARMS = {"trained": "the text-to-image model", "random": "the same networks, random weights"}
SAYS = {"both": None, "head alone": (0.0, 0.0), "CLIP alone": (1.0, 1.0)}
DEALS = 10  # times that names are dealt for chance
PAGE = """# Segments of scenes, named in words

```bash
python examples/studies/panoptic_scenes.py --output_dir docs/results/panoptic
```

[ODISE](../../panoptic.md) by `odise_scenes.yaml`, {steps:,} steps of {batch_size} images, on a text-to-image model
of [composed scenes](../../data.md#where-they-lie), and on the same networks with random weights; CLIP is the same. A
class is a pair of a colour and a kind, as in captions; 75 pairs were in the training. The 15 others, one of each
kind, are in no training scene or caption of the VAE, CLIP, the text-to-image model or the head, and each scene of
`held_out` shows one. The first {images} scenes of each split, one seed. Raw numbers: [report.json](report.json).

{table}
PQ is the mean over the pairs that occur, with CLIP's share of ODISE (0.3 for names of the training, 0.7 for others),
the head alone, or CLIP alone. Chance: the same segments, their names drawn among all 90 pairs, mean of 10. The last
four columns take thing by thing: the share that has a mask (IoU above 0.5), and of those the share whose colour,
kind and whole name are right; by chance one in 6, in 15, in 90.

![Scenes, their truth, and what both segmenters say](test.png)

![The same for scenes with a pair that was never seen](held_out.png)

Both pictures: the first six scenes, not chosen.

## What it shows, and what not

New here are pairs of words that are known one by one. Nothing is said of a word that the training had not: the
vectors of such words are where no mask's vector was ever drawn to, and it would rest on CLIP alone. Things stand
apart on a dark ground, so that masks are easy, also from random features: a random base is the comparison that
counts, and what it reaches is reached without the text-to-image model. The networks have 2 M parameters and images
of 32 pixels; of the paper's numbers this says nothing.
"""


def random_base(model: str, folder: Path, seed: int = 0) -> None:
    """The pipeline with weights of the U-Net and the VAE as training starts from them."""
    if (folder / "model_index.json").is_file():
        return
    pipe = DiffusionPipeline.from_pretrained(model)
    torch.manual_seed(seed)
    for name in ("unet", "vae"):
        part = getattr(pipe, name)
        setattr(pipe, name, type(part).from_config(part.config))
    pipe.save_pretrained(folder)


def train(args: argparse.Namespace, base: str, folder: Path) -> None:
    """The recipe on a base, unless it is done."""
    if (folder / "panoptic.json").is_file():
        return
    flags = {
        "pretrained_model_name_or_path": base,
        "clip": args.clip,
        "dataset_name": args.dataset_name,
        "output_dir": folder,
        "eval_images": args.images,
    }
    flags |= {"max_train_steps": args.steps} if args.steps else {}
    train_odise.main(["--config", str(RECIPE), *(part for k, v in flags.items() for part in (f"--{k}", str(v)))])


def iou(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one & two).sum() / (one | two).sum())


def named(output, truth: list[PanopticMap], names: tuple[str, ...], among: set[int]) -> dict[str, float]:
    """Of true things of some classes: how many have a mask (IoU above 0.5), and of those the share of right names."""
    found = colours = kinds = both = things = 0
    for own, one in zip(output.maps, truth, strict=True):
        for number, label in one.classes.items():
            if label not in among:
                continue
            things += 1
            mask = one.ids == number
            shares = [(iou(own.ids == n, mask), n) for n in own.classes]
            best, at = max(shares, default=(0.0, 0))
            if best > 0.5:
                found += 1
                said, true = names[own.classes[at]].split(), names[label].split()
                colours += said[0] == true[0]
                kinds += said[-1] == true[-1]
                both += said == true
    share = max(found, 1)
    right = {"colour": colours / share, "kind": kinds / share, "name": both / share}
    return {"things": things, "masks": found / max(things, 1), **right}


def quality(maps: list[PanopticMap], truth: list[PanopticMap], pairs: int, among: set[int]) -> float:
    """Mean panoptic quality of the classes `among` that occur; behind the pairs comes the ground."""
    return panoptic_quality(maps, truth, pairs + 1).mean(sorted(among))


def dealt(maps: list[PanopticMap], pairs: int, generator: torch.Generator) -> list[PanopticMap]:
    """The same segments; each thing's name is drawn among all pairs."""
    made = []
    for one in maps:
        drawn = torch.randint(pairs, (len(one.classes),), generator=generator).tolist()
        new = {
            n: (name if label < pairs else label) for (n, label), name in zip(one.classes.items(), drawn, strict=True)
        }
        made.append(PanopticMap(one.ids, new))
    return made


def measure(folder: Path, base: str, data: dict, clip: str) -> tuple[dict, dict]:
    """Numbers of a segmenter on each split, and what it says of their images."""
    rows: dict = {}
    outputs: dict = {}
    for says, weights in SAYS.items():
        task = OpenVocabularySegmenter.from_pretrained(folder, base, clip, weights=weights)
        for split, (images, truth, words) in data.items():
            output = task(images, words)
            known = words.known(task.recipe.words)
            pairs = len(words.classes) - 1
            sets = {
                "seen": {at for at in range(pairs) if known[at]},
                "new": {at for at in range(pairs) if not known[at]},
            }
            row = rows.setdefault(split, {}).setdefault(says, {})
            for name, among in sets.items():
                if not any(label in among for one in truth for label in one.classes.values()):
                    continue
                row[name] = named(output, truth, words.names, among)
                row[name]["pq"] = quality(output.maps, truth, pairs, among)
                if says == "both":
                    deal = torch.Generator().manual_seed(0)
                    draws = [quality(dealt(output.maps, pairs, deal), truth, pairs, among) for _ in range(DEALS)]
                    row[name]["pq_chance"] = sum(draws) / DEALS
            row["ground"] = quality(output.maps, truth, pairs, {pairs})
            if says == "both":
                outputs[split] = output
    return rows, outputs


def picture(images: list, truth: list[PanopticMap], said: dict, names: tuple[str, ...], count: int) -> Image.Image:
    """The first scenes: themselves, the truth, and what each segmenter says; the ground is left as it is."""
    columns = {"scene": None, "truth": truth, **{ARMS[arm]: output.maps for arm, output in said.items()}}
    tiles = []
    for at in range(count):
        for maps in columns.values():
            one = None if maps is None else maps[at]
            things = {} if one is None else {n: names[c] for n, c in one.classes.items() if c < len(names) - 1}
            ids = torch.zeros(images[at].shape[1:], dtype=torch.long) if one is None else one.ids
            tiles.append(segment_picture(as_pil(images[at]), ids.numpy(), things, side=192))
    high = max(tile.height for tile in tiles)
    level = [ImageOps.pad(tile, (tile.width, high), color="white", centering=(0, 0)) for tile in tiles]
    return image_grid(level, len(columns), column_titles=list(columns))


def table(rows: dict) -> str:
    """The report's table."""
    head = "| names | base | PQ | chance | PQ, head alone | PQ, CLIP alone | masks | colour | kind | name |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for split, group, what in (
        ("test", "seen", "of the training (`test`)"),
        ("held_out", "seen", "of the training (`held_out`)"),
        ("held_out", "new", "never seen (`held_out`)"),
    ):
        for arm, base in ARMS.items():
            says = rows[arm][split]
            one = says["both"][group]
            values = [one["pq"], one["pq_chance"], says["head alone"][group]["pq"], says["CLIP alone"][group]["pq"]]
            values += [one[key] for key in ("masks", "colour", "kind", "name")]
            lines.append(f"| {what} | {base} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="examples/models/digits-text", help="text-to-image pipeline of scenes")
    parser.add_argument("--clip", default="examples/models/digits-text/clip")
    parser.add_argument("--dataset_name", default="data/scenes")
    parser.add_argument("--work_dir", default="outputs/panoptic", help="of both trainings")
    parser.add_argument("--output_dir", default="docs/results/panoptic")
    parser.add_argument("--images", type=int, default=400, help="of each split, the first")
    parser.add_argument("--steps", type=int, default=None, help="of each training; those of the recipe if not given")
    parser.add_argument("--only", choices=tuple(ARMS), default=None, help="train one of the two, and measure nothing")
    args = parser.parse_args(argv)
    work, folder = Path(args.work_dir), Path(args.output_dir)
    bases = {"trained": args.model, "random": str(work / "random-base")}
    random_base(args.model, work / "random-base")
    for arm in ARMS if args.only is None else [args.only]:
        train(args, bases[arm], work / arm)
    if args.only is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = parse_recipe((TrainingConfig, PanopticConfig, OdiseConfig), ["--config", str(RECIPE)])[1]
    config = dataclasses.replace(config, dataset_name=args.dataset_name, exclude=None)
    data, said, rows = {}, {}, {}
    for split in ("test", "held_out"):
        own = load_panoptic(dataclasses.replace(config, dataset_split=split), 3, (32, 32))
        images, truth, _ = opened(own)
        data[split] = images[: args.images], truth[: args.images], Vocabulary.of(own.class_names, [config.ground])
    for arm, base in bases.items():
        rows[arm], said[arm] = measure(work / arm, base, data, args.clip)
        print(json.dumps({arm: rows[arm]}), flush=True)
    for split, (images, truth, words) in data.items():
        shown = picture(images, truth, {arm: said[arm][split] for arm in ARMS}, words.names, min(6, len(truth)))
        shown.save(folder / f"{split}.png")
    protocol = json.loads((work / "trained" / "panoptic.json").read_text())["protocol"]
    report = {"images": len(data["test"][1]), "steps": protocol["steps"], "batch_size": protocol["batch_size"]}
    (folder / "README.md").write_text(PAGE.format(table=table(rows), **report))
    write_json(folder / "report.json", {**report, "rows": rows})


if __name__ == "__main__":
    run_script(main)
