"""REPA's relatives on the digits: each recipe as it stands, one after the other, measured alike.

    accelerate launch examples/train_encoder.py --config examples/configs/encoder_digits.yaml   # the teacher, first
    python examples/studies/relatives.py --out docs/results/relatives

Each run is `train_repa.py` with a recipe of `examples/configs`, unchanged but for its folder; `none` is that of REPA
with `--encoder none`. Measured on the averaged weights at the end: the linear probe of the aligned layer and of one in
the middle, CKNNA with the teacher, and samples in the features of a judge that learned the labels, as in
`repa_study.py`. What is trained is kept, and goes on with more `--max_train_steps`. `--out` gets rows.jsonl, table.md
and samples.png.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from diffusers_repr.pipelines.sit import SiTPipeline
from judge import judged, the_judge
from repa_study import Evaluation, read_split

from diffusers_repr.cli.guard import run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig
from diffusers_repr.objectives.repa.config import REPAConfig
from diffusers_repr.pictures.grid import image_grid
from diffusers_repr.training import TrainingConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from train_repa import ModelConfig
from train_repa import main as train_repa

CONFIGS = Path(__file__).parents[1] / "configs"
# Name -> recipe and what is changed in it.
RUNS: dict[str, tuple[str, list[str]]] = {
    "none": ("repa", ["--encoder", "none"]),
    "REPA": ("repa", []),
    "iREPA": ("irepa", []),
    "HASTE": ("haste", []),
    "REG": ("reg", []),
    "REPA-E": ("repa_e", []),
    "dispersive": ("dispersive", []),
    "SRA": ("sra", []),
}
KINDS = (TrainingConfig, DataConfig, ModelConfig, REPAConfig)
COLUMNS = {
    "step": ("steps", "d"),
    "denoising": ("denoising loss", ".3f"),
    "probe_aligned": ("probe, block 2", ".3f"),
    "probe_middle": ("probe, block 5", ".3f"),
    "cknna_aligned": ("CKNNA, block 2", ".3f"),
    "cknna_middle": ("CKNNA, block 5", ".3f"),
    "judge_accuracy": ("samples of the class asked for", ".3f"),
    "cpu_seconds": ("CPU seconds", ".0f"),
}


def trained(name: str, folder: Path, flags: list[str]) -> SiTPipeline:
    """The run's pipeline; trained as far as it is not yet, the time of all its parts kept beside it."""
    recipe, changes = RUNS[name]
    given = ["--config", str(CONFIGS / f"{recipe}_digits.yaml"), "--output_dir", str(folder), *changes, *flags]
    wanted = parse_recipe(KINDS, given)[0].max_train_steps
    if not (folder / "cpu_seconds.json").is_file() or last_line(folder)["step"] < wanted:
        before = json.loads(text) if (text := read(folder / "cpu_seconds.json")) else 0.0
        since = time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            train_repa(given)
        (folder / "cpu_seconds.json").write_text(json.dumps(before + time.process_time() - since))
    pipe = SiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def last_line(folder: Path) -> dict:
    """Of the log of losses."""
    return json.loads((folder / "loss.jsonl").read_text().splitlines()[-1])


def measure(name: str, folder: Path, pipe: SiTPipeline, evaluation: Evaluation) -> dict:
    """A row: losses of the last lines of the log, and what the averaged weights are worth."""
    last = last_line(folder)
    losses = {key: value for key, value in last.items() if key not in ("learning_rate", "images_per_second")}
    numbers = evaluation(pipe, last["step"]) | {"cpu_seconds": json.loads((folder / "cpu_seconds.json").read_text())}
    rounded = {key: round(value, 4) for key, value in (losses | numbers).items()}
    return {"run": name, "samples": evaluation.args.samples, **rounded}


def table(rows: list[dict]) -> str:
    """A line a run; empty where a run has no such number (REPA-E denoises latents: `main_denoising`)."""
    lines = [f"| | {' | '.join(title for title, _ in COLUMNS.values())} |", f"|---|{'---|' * len(COLUMNS)}"]
    for row in rows:
        cells = [f"{row[key]:{form}}" if key in row else "" for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {row['run']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pictures(pipes: dict[str, SiTPipeline], path: Path) -> None:
    """One sample of each digit by each run, all from the same seed."""
    images = []
    for pipe in pipes.values():
        call = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 50, "output_type": "pt"}
        images.append(pipe(list(range(10)), **call).images.float())
    titles = {"row_titles": list(pipes), "column_titles": [str(digit) for digit in range(10)]}
    title = "Digits asked for, one sample each, not chosen"
    image_grid(torch.cat(images), 10, title=title, side=48, **titles).save(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/relatives-results"), help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("outputs/relatives"), help="folder of the runs")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--samples", type=int, default=500, help="judged of each run")
    parser.add_argument("--sample_batch", type=int, default=500)
    parser.add_argument("--probe_images", type=int, default=997, help="training images of the probes and CKNNA")
    parser.add_argument("--probe_test", type=int, default=500, help="test images of the probes")
    parser.add_argument("--middle_layer", default="blocks.5")
    parser.add_argument("--timestep", type=float, default=200.0, help="level of probes; larger is noisier")
    args, flags = parser.parse_known_args(argv)

    disable_progress_bar()  # of diffusers, when it loads a folder
    recipe = ["--config", str(CONFIGS / "repa_digits.yaml")]
    _, data_config, model_config, repa_config = parse_recipe(KINDS, [*recipe, *flags])
    train, test = (read_split(data_config, split, model_config.image_channels) for split in ("train", "test"))
    settings = {"flip": False, "steps": 300, "width": 32}
    judge = the_judge(args.work / "judge.safetensors", *train, torch.device("cpu"), **settings)
    print(f"judge: accuracy {float((judged(judge, test[0])[1] == test[1]).float().mean()):.4f} on the test split")
    evaluation = Evaluation(args, repa_config, train, test, judge)

    args.out.mkdir(parents=True, exist_ok=True)
    pipes, rows = {}, []
    for name in args.runs:
        folder = args.work / name
        pipes[name] = trained(name, folder, flags)
        rows.append(measure(name, folder, pipes[name], evaluation))
        print(json.dumps(rows[-1]), flush=True)
        (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.out / "table.md").write_text(table(rows))
    pictures(pipes, args.out / "samples.png")


if __name__ == "__main__":
    run_script(main)
