"""What is each assignment worth? Digits sampled without a condition, by labels, clusters, neighbours, representations.

    python examples/studies/conditions_digits.py --work outputs/conditions --results outputs/conditions-results

Every row trains one U-Net for equal steps on the training digits, and samples by conditions that held-out digits
give: their label, their cluster, their neighbours among the training digits, or their own vector. The encoder is a
layer of a diffusion model that saw no label. A sample hits its condition where a classifier takes it for the digit
that the condition came from; its vector is compared with that digit's, too. Runs and rows that are done are not done
again. Writes rows.jsonl, table.md and samples.png.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.rcg import RCGPipeline
from diffusers_repr.pipelines.retrieval_diffusion import RetrievalDiffusionPipeline
from digits_metrics import DigitsJudge, real_digits
from torch import Tensor

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.assign import IdentityAssigner, KMeansAssigner, RetrievalIndex, SinkhornAssigner
from diffusers_repr.assign.images import vectors_of
from diffusers_repr.cli.guard import run_script
from diffusers_repr.denoiser.prior import StoredPrior
from diffusers_repr.encoders.loading import layer_encoder, split_layer
from diffusers_repr.metrics import precision_recall
from diffusers_repr.pictures.grid import image_grid

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_conditional
import train_online
import train_representation

EXAMPLES = Path(__file__).parents[1]
ENCODER = f"{EXAMPLES / 'models' / 'digits-ddpm'}:mid_block@100"
U_NET = json.dumps({
    "sample_size": 8, "in_channels": 1, "layers_per_block": 1, "block_out_channels": [32, 80],
    "down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2, "attention_head_dim": 16,
    "norm_num_groups": 8,
})  # fmt: skip
SCHEDULER = json.dumps({"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"})
ONLINE = ["--network", "UNet2DModel", "--model", U_NET, "--scheduler", SCHEDULER, "--condition", "id",
          "--num_prototypes", "20", "--train_batch_size", "128"]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A row of the table: its script, recipe and changes, and how a held-out digit becomes its condition."""

    recipe: str
    flags: list[str]
    pipeline: Any
    conditions: Callable[["Held", Path], dict[str, Any]]
    train: Callable[[list[str]], None] = train_conditional.main


class Held:
    """Digits that nothing was trained on: images in [0, 1], labels, and the encoder's vectors.

    Args:
        count: How many, of the test split.
    """

    def __init__(self, count: int) -> None:
        images, labels = real_digits("test")
        self.images, self.labels = images[:count], labels[:count]
        parts = split_layer(ENCODER)
        assert parts is not None
        self.encoder = layer_encoder(ENCODER, Denoiser.from_pretrained(parts[0]), 0)
        self.vectors = self.encode(self.images)

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([vectors_of(self.encoder, 2 * part - 1) for part in images.split(64)]).cpu()


def assigned_by(kind: Any, name: str) -> Callable[[Held, Path], dict[str, Any]]:
    return lambda held, folder: {name: kind.from_pretrained(beside(folder) / "assigner").assign(held.vectors)}


def neighbours(held: Held, folder: Path) -> dict[str, Any]:
    return {"query": held.vectors, "index": RetrievalIndex.open(beside(folder) / "index")}


def online(held: Held, folder: Path) -> dict[str, Any]:
    """The clusters that the model itself assigns, as in its training."""
    assigner = SinkhornAssigner.from_pretrained(folder / "assigner")
    denoiser = Denoiser.from_pipe(GuidedUnconditionalPipeline.from_pretrained(folder))
    extractor = FeatureExtractor(denoiser, ["mid_block"], timestep=150, pooling="mean")
    return {"class_labels": assigner.assign(extractor(held.images)["mid_block"].cpu())}


def beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-assigned")


UNET = GuidedUnconditionalPipeline
RUNS = {
    "no condition": Run("self_guided", ["--assigner", "none"], UNET, lambda held, folder: {}),
    "true labels": Run("self_guided", ["--assigner", "labels"], UNET, lambda held, _: {"class_labels": held.labels}),
    "10 clusters": Run("self_guided", ["--k", "10"], UNET, assigned_by(KMeansAssigner, "class_labels")),
    "50 clusters": Run("self_guided", ["--k", "50"], UNET, assigned_by(KMeansAssigner, "class_labels")),
    "online, 20 clusters": Run("online", ONLINE, UNET, online, train_online.main),
    "kNN-Diffusion": Run("knn", [], RetrievalDiffusionPipeline, neighbours),
    "RDM": Run("rdm", [], RetrievalDiffusionPipeline, neighbours),
    "RCG": Run("representation", [], RCGPipeline, assigned_by(IdentityAssigner, "condition")),
}
COLUMNS = {
    "frechet": ("Fréchet distance", ".2f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "hits": ("samples of the digit asked for", ".3f"),
    "cosine": ("cosine to its vector", ".3f"),
    "cosine_other": ("to another's", ".3f"),
}


def trained(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Folder of a run, trained if it is not yet; the CPU seconds of all its parts beside it."""
    run, folder = RUNS[name], args.work / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    changes = [] if run.train is train_online.main or "--assigner" in run.flags else ["--encoder", ENCODER]
    train_run(run.train, run.recipe, [*run.flags, *changes], folder, seed, args.max_train_steps)
    return folder


def train_run(train: Callable, recipe: str, flags: list[str], folder: Path, seed: int, steps: int) -> None:
    done = folder / "cpu_seconds.json"
    if done.is_file():
        return
    given = ["--config", str(EXAMPLES / "configs" / f"{recipe}_digits.yaml"), "--output_dir", str(folder)]
    given += ["--seed", str(seed), "--max_train_steps", str(steps), "--eval_batch_size", "0", *flags]
    since = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        train(given)
    done.write_text(json.dumps(round(time.process_time() - since)))


def sampled(pipe: Any, given: Mapping[str, Any], scale: float, seed: int, args: argparse.Namespace) -> Tensor:
    """Images (N, 1, 8, 8) in [0, 1], one a held-out digit."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.steps, "output_type": "pt", **given}
    if "query" not in given:
        call["batch_size"] = args.images
    generator = torch.Generator().manual_seed(seed)
    return pipe(**call, guidance_scale=scale, generator=generator).images.float().clamp(0, 1)


def measure(images: Tensor, held: Held, judge: DigitsJudge) -> dict[str, float]:
    """How good samples are, and how well they hit what they were asked for, held-out digit by digit."""
    vectors = F.normalize(held.encode(images) - held.vectors.mean(0), dim=1)
    target = F.normalize(held.vectors - held.vectors.mean(0), dim=1)
    quality = precision_recall(judge.features(real_digits("train")[0])[: len(images)], judge.features(images))
    return {
        "frechet": judge.frechet_distance(images),
        "precision": quality.precision,
        "recall": quality.recall,
        "hits": judge.accuracy(images, held.labels),
        "cosine": float((vectors * target).sum(1).mean()),
        "cosine_other": float((vectors * target.roll(1, 0)).sum(1).mean()),
    }


def rows_of(name: str, seed: int, held: Held, judge: DigitsJudge, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A run's rows: unguided and guided; of RCG also by vectors that its own model drew."""
    folder = trained(name, seed, args)
    pipe = RUNS[name].pipeline.from_pretrained(folder)
    given = RUNS[name].conditions(held, folder)
    base = {"seed": seed, "steps": args.max_train_steps, "images": args.images}
    base["cpu_seconds"] = json.loads((folder / "cpu_seconds.json").read_text())
    rows = []
    for scale in args.scales if given else (1.0,):
        found = measure(sampled(pipe, given, scale, seed, args), held, judge)
        rows.append({"run": name, "scale": scale, **base, **found})
        if name == "RCG":
            drawn = {"prior": StoredPrior(drawn_vectors(seed, args), in_order=True)}
            found = measure(sampled(pipe, drawn, scale, seed, args), held, judge)
            for key in ("hits", "cosine", "cosine_other"):  # it was not asked for these digits
                del found[key]
            rows.append({"run": "RCG, vectors drawn", "scale": scale, **base, **found})
    return rows


def drawn_vectors(seed: int, args: argparse.Namespace) -> Tensor:
    """Vectors of the representation diffusion model, standardised as those of the images' network."""
    folder, parts = args.work / f"vectors-{seed}", split_layer(ENCODER)
    assert parts is not None
    flags = ["--encoder", parts[0], "--standardize", "column"]
    train_run(train_representation.main, "rcg_representation", flags, folder, seed, args.vector_steps)
    pipe = RCGPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe.sample_representations(args.images, generator=torch.Generator().manual_seed(seed))


def table(rows: list[dict[str, Any]], floor: Mapping[str, float]) -> str:
    """Means over the seeds, lowest to highest in brackets."""
    lines = [f"| condition | scale | {' | '.join(title for title, _ in COLUMNS.values())} | CPU seconds |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    names = [*RUNS, "RCG, vectors drawn"]
    for name, scale in sorted({(r["run"], r["scale"]) for r in rows}, key=lambda p: (names.index(p[0]), p[1])):
        own = [row for row in rows if (row["run"], row["scale"]) == (name, scale)]
        cells = []
        for key, (_, form) in COLUMNS.items():
            values = [row[key] for row in own if key in row]
            spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):{form}}{spread}" if values else "")
        seconds = sum(row["cpu_seconds"] for row in own) / len(own)
        lines.append(f"| {name} | {scale:g} | {' | '.join(cells)} | {seconds:.0f} |")
    ends = [f"{floor[key]:{form}}" if key in floor else "" for key, (_, form) in COLUMNS.items()]
    return "\n".join([*lines, f"| held-out digits themselves | | {' | '.join(ends)} | |"]) + "\n"


def picture(held: Held, args: argparse.Namespace) -> Any:
    """One held-out digit of each class, and what each run makes of it."""
    rows = [int((held.labels == digit).nonzero()[0]) for digit in range(10)]
    images, titles = [held.images[rows]], ["held out"]
    for name, run in RUNS.items():
        folder = trained(name, args.seeds[0], args)
        given = run.conditions(held, folder)
        own = {key: value[rows] if isinstance(value, Tensor) else value for key, value in given.items()}
        pipe, few = run.pipeline.from_pretrained(folder), argparse.Namespace(steps=args.steps, images=10)
        images.append(sampled(pipe, own, max(args.scales) if given else 1.0, 0, few))
        titles.append(name)
    title = "What a held-out digit is asked for by; one sample each, not chosen"
    return image_grid(torch.cat(images), 10, title=title, side=48, row_titles=titles)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/conditions"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("outputs/conditions-results"))
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 2.0])
    parser.add_argument("--images", type=int, default=500, help="held-out digits, of 500")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--max_train_steps", type=int, default=800)
    parser.add_argument("--vector_steps", type=int, default=2000, help="of RCG's model of vectors")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    path, held, judge = args.results / "rows.jsonl", Held(args.images), DigitsJudge.train()
    for seed in args.seeds:
        for name in args.runs:
            if any((row["run"], row["seed"]) == (name, seed) for row in read_rows(path)):
                continue
            with path.open("a") as lines:
                for row in rows_of(name, seed, held, judge, args):
                    lines.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)
    text = table(read_rows(path), measure(held.images, held, judge))
    (args.results / "table.md").write_text(text)
    picture(held, args).save(args.results / "samples.png")
    print(text)


if __name__ == "__main__":
    run_script(main)
