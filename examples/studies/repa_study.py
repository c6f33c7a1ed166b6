"""Does alignment help? The same SiT with and without REPA, at equal steps and seeds: samples, probes, CKNNA.

    python examples/studies/repa_study.py --config examples/configs/repa_digits.yaml --out docs/results/repa

Each run is `train_repa.py` with the recipe; the baseline has `--encoder none` and all else equal. At every
`--validation_steps`, an eighth of the run if not given: Fréchet distance, precision and recall in the features of a
judge that learned the labels (`judge.py`), and the linear probe of the aligned layer and of one in the middle. At the
end CKNNA with the teacher, by layer and level. `--out` gets rows.jsonl, curves.png, alignment pictures and README.md.
Finished runs are kept.
"""

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from judge import Judge, judged, the_judge
from repa_report import write_report

from diffusers_repr import Denoiser, Encoder
from diffusers_repr.cli.guard import run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.metrics import frechet_distance, precision_recall
from diffusers_repr.objectives.repa.config import REPAConfig
from diffusers_repr.sweep import measure_alignment
from diffusers_repr.training import TrainingConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_png import write_small_png
from train_repa import ModelConfig
from train_repa import main as train_repa

CURVE_POINTS = 8  # measurements of a run, unless --validation_steps is given


def read_split(data_config: DataConfig, split: str, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images and labels of a split."""
    fields = {**vars(data_config), "dataset_split": split, "cache_images": True}
    data = load_train_data(DataConfig(**fields), channels, data_config.resolution)
    batch = data.batch(range(len(data)))
    return batch["pixel_values"], batch["class_labels"]


class Evaluation:
    """What is measured on a pipeline; the global random state does not enter it."""

    def __init__(self, args, repa: REPAConfig, train: tuple, test: tuple, judge: Judge) -> None:
        self.args, self.judge, self.train, self.test = args, judge, train, test
        self.teacher = Encoder.from_pretrained(repa.encoder[0])
        self.real = judged(judge, train[0])[0]
        self.layers = [repa.repa_layer, args.middle_layer]

    @torch.no_grad()
    def sample(self, pipe) -> tuple[torch.Tensor, torch.Tensor]:
        """`args.samples` images in [0, 1] and their classes, every class equally often."""
        classes = pipe.transformer.config.num_classes
        labels = torch.arange(self.args.samples) % classes
        generator, images = torch.Generator("cpu").manual_seed(1234), []
        half = pipe.device.type == "cuda"
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=half):
            for part in labels.split(self.args.sample_batch):
                out = pipe(part.tolist(), generator=generator, num_inference_steps=50, output_type="pt")
                images.append(out.images.float().cpu())
        return torch.cat(images), labels

    def __call__(self, pipe, step: int) -> dict[str, float]:
        images, labels = self.sample(pipe)
        features, predicted = judged(self.judge, images)
        shares = precision_recall(self.real[:5000], features[:5000])
        numbers = {"frechet_distance": frechet_distance(self.real, features), "precision": shares.precision,
                   "recall": shares.recall, "judge_accuracy": float((predicted == labels).float().mean())}  # fmt: skip
        aligned = self.align(pipe, self.layers, [self.args.timestep], ("linear", "cknna"), self.args.probe_images)
        for place, layer in zip(("aligned", "middle"), self.layers, strict=True):
            numbers[f"probe_{place}"] = aligned.score(layer, self.args.timestep, "linear")
            numbers[f"cknna_{place}"] = aligned.score(layer, self.args.timestep, "cknna")
        return numbers

    def align(self, pipe, layers: list[str], timesteps: list[float], metrics: tuple[str, ...], samples: int):
        """Scores of layers against the teacher, on the same images for every model."""
        self.teacher.to(pipe.device)
        train = (self.train[0], self.train[1])
        test = (self.test[0][: self.args.probe_test], self.test[1][: self.args.probe_test])
        return measure_alignment(
            Denoiser.from_pipe(pipe), self.teacher, train, timesteps, layers, metrics=metrics,
            samples=min(samples, len(train[0])), test=test, batch_size=500)  # fmt: skip


def run(args, method: str, seed: int, evaluation: Evaluation) -> list[dict]:
    """Train one model, or read what a finished run measured."""
    folder = Path(args.work) / f"{method}-seed{seed}"
    flags = ["--config", args.config, "--output_dir", str(folder), "--seed", str(seed), *args.flags]
    if not any(flag.split("=")[0] == "--validation_steps" for flag in args.flags):
        flags += ["--validation_steps", str(max(1, args.max_train_steps // CURVE_POINTS))]
    if method == "baseline":
        flags += ["--encoder", "none"]
    since = time.perf_counter()
    if not (folder / "README.md").is_file():
        with contextlib.redirect_stdout(sys.stderr):
            train_repa(flags, evaluate=evaluation)
    print(f"{method}, seed {seed}: {time.perf_counter() - since:.0f} s", flush=True)
    lines = [json.loads(line) for line in (folder / "evaluation.jsonl").open()]
    losses = {line["step"]: line["denoising"] for line in map(json.loads, (folder / "loss.jsonl").open())}
    return [{"method": method, "seed": seed, "denoising": losses.get(line["step"]), **line} for line in lines]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="recipe of train_repa.py, with one encoder")
    parser.add_argument("--out", required=True, help="folder of the results")
    parser.add_argument("--work", default="outputs/repa-study", help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["baseline", "repa"])
    parser.add_argument("--samples", type=int, default=2000, help="images for the Fréchet distance")
    parser.add_argument("--sample_batch", type=int, default=500)
    parser.add_argument("--probe_images", type=int, default=5000, help="training images of the probes")
    parser.add_argument("--probe_test", type=int, default=5000, help="test images of the probes")
    parser.add_argument("--cknna_images", type=int, default=2000, help="training images of CKNNA at the end")
    parser.add_argument("--middle_layer", default="blocks.5")
    parser.add_argument("--timestep", type=float, default=200.0, help="level of probes; larger is noisier")
    parser.add_argument("--levels", type=float, nargs="+", default=[100, 300, 500, 700, 900], help="of CKNNA")
    parser.add_argument("--prepare", action="store_true", help="make the judge and stop; runs may then go in parallel")
    parser.add_argument("--judge_steps", type=int, default=2000)
    parser.add_argument("--judge_width", type=int, default=64)
    args, args.flags = parser.parse_known_args(argv)

    kinds = (TrainingConfig, DataConfig, ModelConfig, REPAConfig)
    flags = ["--config", args.config, *args.flags]
    config, data_config, model_config, repa_config = parse_recipe(kinds, flags)
    train, test = (read_split(data_config, split, model_config.image_channels) for split in ("train", "test"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"flip": data_config.random_flip, "steps": args.judge_steps, "width": args.judge_width}
    judge = the_judge(Path(args.work) / "judge.safetensors", *train, device, **settings)
    accuracy = float((judged(judge, test[0])[1] == test[1]).float().mean())
    print(f"judge: accuracy {accuracy:.4f} on the test split", flush=True)
    if args.prepare:
        return
    evaluation = Evaluation(args, repa_config, train, test, judge)
    floor = frechet_distance(evaluation.real, judged(judge, test[0])[0])

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows, args.max_train_steps = [], config.max_train_steps
    for seed in args.seeds:
        for method in args.methods:
            rows += run(args, method, seed, evaluation)
            (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in args.methods:
        folder = Path(args.work) / f"{method}-seed{args.seeds[0]}"
        alignment = sweep(evaluation, folder, args.levels, device)
        alignment.save(out / f"alignment_{method}", plot=False)
        write_small_png(alignment.plot(), out / f"alignment_{method}.png")
        shutil.copy(folder / "samples.png", out / f"samples_{method}.png")
    facts = {
        "judge_accuracy": accuracy,
        "distance_of_test_images": floor,
        "device": describe(device),
        "command": f"python examples/studies/repa_study.py {' '.join(argv)}",
        "samples": args.samples,
    }
    write_report(out, rows, facts, Path(args.config).read_text())


def sweep(evaluation: Evaluation, folder: Path, levels: list[float], device: torch.device):
    """CKNNA of every block at every level, of a finished run."""
    from diffusers_repr.pipelines.sit import SiTPipeline

    pipe = SiTPipeline.from_pretrained(folder).to(device)
    blocks = [f"blocks.{place}" for place in range(pipe.transformer.config.num_layers)]
    return evaluation.align(pipe, blocks, levels, ("cknna",), evaluation.args.cknna_images)


def describe(device: torch.device) -> str:
    threads = torch.get_num_threads()
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} CPU thread{'s' * (threads > 1)}"


if __name__ == "__main__":
    run_script(main)
