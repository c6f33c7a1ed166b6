"""What is each assignment worth? Images sampled without a condition, by labels, clusters, neighbours, vectors.

    python examples/studies/conditions.py --work outputs/conditions --results outputs/conditions-results
    python examples/studies/conditions.py --cifar10 data/cifar10 --work outputs/conditions-cifar10 \
        --results outputs/conditions-cifar10-results

Every row trains one U-Net for equal steps on the training images, and samples by conditions that held-out images give:
their label, their cluster, their neighbours among the training images, or their own vector. The encoder is a layer of
a diffusion model that saw no label. A sample hits its condition where a classifier takes it for the class of the image
that the condition came from; its vector is compared with that image's, too. Two rows go on from the network without a
condition, for equal steps, by the plain and by the perceptual loss. Runs and rows that are done are not done again.
Writes rows.jsonl, table.md, samples.png, clusters.png and neighbours_*.png.
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
import yaml
from conditions_cases import Cifar10, Digits
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.rcg import RCGPipeline
from diffusers_repr.pipelines.retrieval_diffusion import RetrievalDiffusionPipeline
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
import train_unconditional

EXAMPLES = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """A row of the table: its script, recipe and changes, and how a held-out image becomes its condition."""

    recipe: str
    flags: list[str]
    pipeline: Any
    conditions: Callable[["Held", Path], dict[str, Any]]
    train: Callable[[list[str]], None] = train_conditional.main
    base: str | None = None  # the run that it goes on from


class Held:
    """Images that nothing was trained on, in [0, 1], their labels, and the encoder's vectors.

    Args:
        case: Of which images.
        count: How many, of the test split.
    """

    def __init__(self, case: Digits | Cifar10, count: int) -> None:
        images, labels = case.real("test")
        self.images, self.labels = images[:count], labels[:count]
        parts = split_layer(case.encoder)
        assert parts is not None
        self.encoder = layer_encoder(case.encoder, Denoiser.from_pretrained(parts[0]), 0)
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


def nothing(held: Held, folder: Path) -> dict[str, Any]:
    return {}


UNET = GuidedUnconditionalPipeline
RUNS = {
    "no condition": Run("self_guided", ["--assigner", "none"], UNET, nothing),
    "true labels": Run("self_guided", ["--assigner", "labels"], UNET, lambda held, _: {"class_labels": held.labels}),
    "10 clusters": Run("self_guided", ["--k", "10"], UNET, assigned_by(KMeansAssigner, "class_labels")),
    "50 clusters": Run("self_guided", ["--k", "50"], UNET, assigned_by(KMeansAssigner, "class_labels")),
    "online, 20 clusters": Run("online", [], UNET, online, train_online.main),
    "kNN-Diffusion": Run("knn", [], RetrievalDiffusionPipeline, neighbours),
    "RDM": Run("rdm", [], RetrievalDiffusionPipeline, neighbours),
    "RCG": Run("representation", [], RCGPipeline, assigned_by(IdentityAssigner, "condition")),
    "no condition, more steps": Run("perceptual", ["--assigner", "none"], UNET, nothing, base="no condition"),
    "no condition, perceptual steps": Run(
        "perceptual", [], UNET, nothing, train_unconditional.main, base="no condition"
    ),
}
COLUMNS = {
    "frechet": ("Fréchet distance", ".2f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "hits": ("samples of the class asked for", ".3f"),
    "cosine": ("cosine to its vector", ".3f"),
    "cosine_other": ("to another's", ".3f"),
}


def trained(name: str, seed: int, args: argparse.Namespace) -> Path:
    """Folder of a run, trained if it is not yet; the CPU seconds of all its parts beside it."""
    run, folder = RUNS[name], args.work / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    recipe, steps = EXAMPLES / "configs" / f"{run.recipe}_digits.yaml", args.max_train_steps
    changes = [] if run.train is train_online.main else ["--encoder", args.case.encoder]
    if run.base is not None:
        base, steps = str(trained(run.base, seed, args)), args.stage_steps
        changes = ["--perceptual_base", base]
        if run.train is train_conditional.main:  # the same settings, but for the loss
            recipe, changes = without(recipe, "perceptual_base", args.work), ["--pretrained_model", base]
    train_run(run.train, recipe, [*run.flags, *args.case.flags(run.recipe), *changes], folder, seed, steps)
    return folder


def without(recipe: Path, key: str, work: Path) -> Path:
    """A copy of a recipe without one of its keys."""
    path = work / f"{recipe.stem}-plain.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(recipe.read_text()).items() if k != key}))
    return path


def train_run(train: Callable, recipe: Path, flags: list[str], folder: Path, seed: int, steps: int) -> None:
    done = folder / "cpu_seconds.json"
    if done.is_file():
        return
    given = ["--config", str(recipe), "--output_dir", str(folder)]
    given += ["--seed", str(seed), "--max_train_steps", str(steps), "--eval_batch_size", "0", *flags]
    since = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        train(given)
    done.write_text(json.dumps(round(time.process_time() - since)))


def sampled(pipe: Any, given: Mapping[str, Any], scale: float, seed: int, args: argparse.Namespace) -> Tensor:
    """Images (N, C, H, W) in [0, 1], one a held-out image."""
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.steps, "output_type": "pt", **given}
    if "query" not in given:
        call["batch_size"] = args.images
    generator = torch.Generator().manual_seed(seed)
    return pipe(**call, guidance_scale=scale, generator=generator).images.float().clamp(0, 1)


def measure(images: Tensor, held: Held, judge: Any, args: argparse.Namespace) -> dict[str, float]:
    """How good samples are, and how well they hit what they were asked for, held-out image by image."""
    vectors = F.normalize(held.encode(images) - held.vectors.mean(0), dim=1)
    target = F.normalize(held.vectors - held.vectors.mean(0), dim=1)
    quality = precision_recall(judge.features(args.case.real("train")[0][: len(images)]), judge.features(images))
    return {
        "frechet": judge.frechet_distance(images),
        "precision": quality.precision,
        "recall": quality.recall,
        "hits": judge.accuracy(images, held.labels),
        "cosine": float((vectors * target).sum(1).mean()),
        "cosine_other": float((vectors * target.roll(1, 0)).sum(1).mean()),
    }


def rows_of(name: str, seed: int, held: Held, judge: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A run's rows: unguided and guided; of RCG also by vectors that its own model drew."""
    folder = trained(name, seed, args)
    pipe = RUNS[name].pipeline.from_pretrained(folder)
    given = RUNS[name].conditions(held, folder)
    steps = args.max_train_steps + (0 if RUNS[name].base is None else args.stage_steps)
    base = {"seed": seed, "steps": steps, "images": args.images}
    base["cpu_seconds"] = json.loads((folder / "cpu_seconds.json").read_text())
    rows = []
    for scale in args.scales if given else (1.0,):
        found = measure(sampled(pipe, given, scale, seed, args), held, judge, args)
        rows.append({"run": name, "scale": scale, **base, **found})
        if name == "RCG":
            drawn = {"prior": StoredPrior(drawn_vectors(seed, args), in_order=True)}
            found = measure(sampled(pipe, drawn, scale, seed, args), held, judge, args)
            for key in ("hits", "cosine", "cosine_other"):  # it was not asked for these
                del found[key]
            rows.append({"run": "RCG, vectors drawn", "scale": scale, **base, **found})
    return rows


def drawn_vectors(seed: int, args: argparse.Namespace) -> Tensor:
    """Vectors of the representation diffusion model, standardised as those of the images' network."""
    folder = args.work / f"vectors-{seed}"
    flags = ["--encoder", args.case.encoder, "--over", "column", *args.case.flags("rcg_representation")]
    flags += ["--assignments_dir", str(args.work / f"vectors-{seed}-assigned")]
    recipe = EXAMPLES / "configs" / "rcg_representation_digits.yaml"
    train_run(train_representation.main, recipe, flags, folder, seed, args.vector_steps)
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
    return "\n".join([*lines, f"| held-out images themselves | | {' | '.join(ends)} | |"]) + "\n"


def picture(held: Held, args: argparse.Namespace) -> Any:
    """One held-out image of each class, and what each run makes of it."""
    rows = one_of_each(held)
    images, titles = [held.images[rows]], ["held out"]
    for name in args.runs:
        run = RUNS[name]
        folder = trained(name, args.seeds[0], args)
        given = run.conditions(held, folder)
        own = {key: value[rows] if isinstance(value, Tensor) else value for key, value in given.items()}
        pipe, few = run.pipeline.from_pretrained(folder), argparse.Namespace(steps=args.steps, images=10)
        images.append(sampled(pipe, own, max(args.scales) if given else 1.0, 0, few))
        titles.append(name)
    title = "What a held-out image is asked for by; one sample each, not chosen"
    return image_grid(torch.cat(images), 10, title=title, side=48, row_titles=titles)


def cluster_picture(held: Held, args: argparse.Namespace) -> Any:
    """Three samples of each of ten clusters."""
    folder = trained("10 clusters", args.seeds[0], args)
    few = argparse.Namespace(steps=args.steps, images=30)
    ids = {"class_labels": torch.arange(10).repeat(3)}
    samples = sampled(UNET.from_pretrained(folder), ids, max(args.scales), 0, few)
    return image_grid(samples, 10, title="A cluster a column; three samples each, not chosen", side=48)


def neighbour_picture(name: str, held: Held, args: argparse.Namespace) -> Any:
    """Held-out images beside their neighbours and three samples of each."""
    folder = trained(name, args.seeds[0], args)
    given = neighbours(held, folder)
    query = given["query"][one_of_each(held)]
    pipe = RetrievalDiffusionPipeline.from_pretrained(folder)
    found, _ = given["index"].search(query, pipe.config.k)
    images = [held.images[one_of_each(held)], *args.case.real("train")[0][found].unbind(1)]
    titles = ["query", *[f"neighbour {place + 1}" for place in range(pipe.config.k)]]
    for seed in range(3):
        few = argparse.Namespace(steps=args.steps, images=10)
        images.append(sampled(pipe, {**given, "query": query}, max(args.scales), seed, few))
        titles.append(f"sample {seed + 1}")
    title = f"{name}: held-out queries, their neighbours among the training images, samples (not chosen)"
    return image_grid(torch.cat(images), 10, title=title, side=48, row_titles=titles)


def one_of_each(held: Held) -> list[int]:
    """Row of the first held-out image of each class."""
    return [int((held.labels == digit).nonzero()[0]) for digit in range(10)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/conditions"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("outputs/conditions-results"))
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--cifar10", help="folder with CIFAR-10; default: the digits")
    parser.add_argument("--encoder", help="of CIFAR-10, MODEL:layer@timestep")
    parser.add_argument("--seeds", nargs="+", type=int, help="0 1 2; of CIFAR-10 0")
    parser.add_argument("--scales", nargs="+", type=float, default=[1.0, 2.0])
    parser.add_argument("--images", type=int, help="held-out images; default: 500")
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--max_train_steps", type=int, help="800, of CIFAR-10 2000")
    parser.add_argument("--stage_steps", type=int, default=300, help="that two runs go on for")
    parser.add_argument("--vector_steps", type=int, default=2000, help="of RCG's model of vectors")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    args.case = Digits() if args.cifar10 is None else Cifar10(args.cifar10, args.work, args.encoder)
    args.images, args.seeds = args.images or args.case.images, args.seeds or list(args.case.seeds)
    args.max_train_steps = args.max_train_steps or args.case.steps
    path, held, judge = args.results / "rows.jsonl", Held(args.case, args.images), args.case.judge()
    for seed in args.seeds:
        for name in args.runs:
            if any((row["run"], row["seed"]) == (name, seed) for row in read_rows(path)):
                continue
            with path.open("a") as lines:
                for row in rows_of(name, seed, held, judge, args):
                    lines.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)
    text = table(read_rows(path), measure(held.images, held, judge, args))
    (args.results / "table.md").write_text(text)
    picture(held, args).save(args.results / "samples.png")
    if "10 clusters" in args.runs:
        cluster_picture(held, args).save(args.results / "clusters.png")
    for name in {"kNN-Diffusion", "RDM"} & set(args.runs):
        neighbour_picture(name, held, args).save(args.results / f"neighbours_{name.split('-')[0].lower()}.png")
    print(text)


if __name__ == "__main__":
    run_script(main)
