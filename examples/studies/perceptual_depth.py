"""Behind which block of a transformer is a perceptual stage to read? Fréchet distance of digits, by layer and seed.

    python examples/studies/perceptual_depth.py --results docs/results/conditions

A SiT of 12 blocks learns the digits with their classes (`repa_digits.yaml` without an encoder), and goes on by the
perceptual loss alone (`perceptual_digits.yaml`) behind several of its blocks, or by its plain loss for as many steps.
Measured are 2,000 samples without guidance: the distance to the training digits, and the share that a classifier of
digits takes for the class asked for. What is trained is kept: the same command goes on where it was. `--results` gets
perceptual_depth.jsonl.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from diffusers_repr.pipelines.sit import SiTPipeline
from digits_metrics import AUGMENTATION, CLASSES, DigitsJudge

from diffusers_repr.cli.guard import run_script
from diffusers_repr.config.recipe import read_recipe

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_repa
import train_unconditional

CONFIGS = Path(__file__).parents[1] / "configs"
MODEL = {"num_layers": 12, "hidden_size": 96, "num_attention_heads": 4}
LAYERS = ("blocks.3", "blocks.5")  # a third and a half of its depth
PLAIN, CHUNK = "plain loss", 500
MOVES = {f"random_{name}": AUGMENTATION[name] for name in ("rotation", "shift", "scale")}


def trained(script, folder: Path, **given: object) -> Path:
    """The folder of a run with these flags; trained if it is not there."""
    if not (folder / "model_index.json").is_file():
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        with contextlib.redirect_stdout(sys.stderr):
            script.main([*words, "--output_dir", str(folder)])
    return folder


def second_stage(row: str, base: Path, seed: int, args: argparse.Namespace) -> Path:
    """The base after a second stage, of the recipe's settings in either loss."""
    given = read_recipe(CONFIGS / "perceptual_digits.yaml") | {"train_batch_size": 64, "eval_batch_size": 0}
    given |= {"max_train_steps": args.steps, "seed": seed}
    del given["output_dir"], given["perceptual_base"]
    folder = args.work / f"{row.replace(' ', '-')}-{seed}"
    if row == PLAIN:
        return trained(train_repa, folder, pretrained_model=base, encoder="none", **given)
    return trained(train_unconditional, folder, perceptual_base=base, perceptual_layer=row, **given)


def measured(folder: Path, judge: DigitsJudge, samples: int) -> dict[str, float]:
    """Of samples of every class in turn."""
    pipe = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    labels, images = [i % CLASSES for i in range(samples)], []
    for start in range(0, samples, CHUNK):
        how = {"num_inference_steps": 50, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(start)}
        images.append(torch.as_tensor(pipe(labels[start : start + CHUNK], output_type="pt", **how).images))
    made = torch.cat(images)
    return {"frechet": judge.frechet_distance(made), "accuracy": judge.accuracy(made, torch.tensor(labels))}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/perceptual-depth"), help="where runs are kept")
    parser.add_argument("--results", type=Path, default=Path("outputs/perceptual-depth-results"))
    parser.add_argument("--rows", nargs="+", default=[*LAYERS, PLAIN], help=f"layers, or {PLAIN!r}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the second stage")
    parser.add_argument("--base_steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=400, help="of the second stage")
    parser.add_argument("--samples", type=int, default=2000, help="of each row")
    args = parser.parse_args(argv)
    judge, file = DigitsJudge.train(0), args.results / "perceptual_depth.jsonl"
    args.results.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    known = {(line["row"], line["seed"]) for line in lines}
    base = trained(
        train_repa, args.work / "base", config=CONFIGS / "repa_digits.yaml", encoder="none", model=json.dumps(MODEL),
        max_train_steps=args.base_steps, validation_steps=0, **MOVES,
    )  # fmt: skip
    for row, seed in [("base", 0), *((row, seed) for seed in args.seeds for row in args.rows)]:
        if (row, seed) in known:
            continue
        since = time.process_time()
        folder = base if row == "base" else second_stage(row, base, seed, args)
        spent = round(time.process_time() - since, 1)
        lines.append({"row": row, "seed": seed, **measured(folder, judge, args.samples), "cpu_seconds": spent})
        print(json.dumps(lines[-1]), flush=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    run_script(main)
