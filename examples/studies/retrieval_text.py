"""Can a model that was trained without captions be asked by one? kNN-Diffusion and RDM on composed scenes.

    python examples/make_scenes.py --out data/scenes
    diffusers-repr cache --config examples/configs/knn_scenes.yaml
    python examples/studies/retrieval_text.py --work outputs/retrieval-text --results outputs/retrieval-text-results

Both networks see CLIP vectors of training scenes: RDM those of an image's neighbours, kNN-Diffusion its own before
them. Asked by a caption, whose vector lies in the same space, they are judged by the rule of scenes_text.py: are
colours, kinds and number of things those of the caption? Beside them the same networks asked by a scene with that
caption, the neighbours themselves as an answer, and the captions dealt anew, which is chance. Writes rows.jsonl,
table.md and a picture a network.
"""

import argparse
import contextlib
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers_repr.pipelines.retrieval_diffusion import RetrievalDiffusionPipeline
from PIL import Image
from scenes_text import Judge, score

from diffusers_repr.assign import RetrievalIndex
from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.scenes import Scene, scenes
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.pictures.grid import image_grid

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_conditional

EXAMPLES = Path(__file__).parents[1]
RUNS = {"kNN-Diffusion": [], "RDM": ["--include_query", "false"]}
PARTS = ("all", "colours", "kinds", "count")
SHOWN = 8


def trained(name: str, args: argparse.Namespace) -> Path:
    """Folder of a run, which goes on where it stopped; both read the same index."""
    folder = args.work / name
    if not (folder / "model_index.json").is_file():
        given = ["--config", str(EXAMPLES / "configs" / "knn_scenes.yaml"), "--output_dir", str(folder), *RUNS[name]]
        given += ["--assignments_dir", str(args.work / "neighbours"), "--max_train_steps", str(args.max_train_steps)]
        given += [] if args.dataset_name is None else ["--dataset_name", args.dataset_name]
        given += [] if args.latents_dir is None else ["--latents_dir", args.latents_dir]
        with contextlib.redirect_stdout(sys.stderr):
            train_conditional.main([*given, "--seed", str(args.seed), "--resume_from_checkpoint", "latest"])
    return folder


def drawn(pipe: Any, queries: list[Any], index: RetrievalIndex, encoder: Any, args: argparse.Namespace) -> list[Any]:
    """A sample a query, (H, W, 3) uint8, and the rows of its neighbours."""
    images, rows = [], []
    for start in range(0, len(queries), args.batch_size):
        out = pipe(
            queries[start : start + args.batch_size],
            index,
            encoder=encoder,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.steps,
            generator=torch.Generator().manual_seed(args.seed + start),
            output_type="np",
        )
        images += list(np.rint(out.images * 255).astype(np.uint8))
        rows.append(out.rows)
    return [images, torch.cat(rows)]


def rows_of(name: str, pipe: Any, held: list[Scene], known: list[Scene], tools: tuple, args: argparse.Namespace):
    """Rows of a network on a split, and its first samples by caption."""
    index, encoder, judge = tools
    wanted = [Counter((thing.colour, thing.kind) for thing in scene.things) for scene in held]
    by_text, rows = drawn(pipe, [scene.caption for scene in held], index, encoder, args)
    by_image, _ = drawn(pipe, [Image.fromarray(scene.image) for scene in held], index, encoder, args)
    found = [judge(image) for image in by_text]
    answers = {
        "by caption": score(found, wanted),
        "by a scene of that caption": score([judge(image) for image in by_image], wanted),
        "the nearest neighbour itself": score([judge(known[row].image) for row in rows[:, 0].tolist()], wanted),
        "captions dealt anew": score(found, random.Random(0).sample(wanted, len(wanted))),
    }
    shown = [[by_text[at], *(known[row].image for row in rows[at].tolist())] for at in range(SHOWN)]
    return [{"run": name, "asked": asked, **parts} for asked, parts in answers.items()], shown


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| split | network | asked | all right | colours | kinds | number of things |", "|---" * 7 + "|"]
    for row in rows:
        cells = " | ".join(f"{row[part]:.3f}" for part in PARTS)
        lines.append(f"| {row['split']} | {row['run']} | {row['asked']} | {cells} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("outputs/retrieval-text"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=Path("outputs/retrieval-text-results"))
    parser.add_argument("--clip", default=str(EXAMPLES / "models" / "digits-text" / "clip"), help="of the recipe")
    parser.add_argument("--dataset_name", help="scenes; default: those of the recipe")
    parser.add_argument("--latents_dir", help="their latents; default: those of the recipe")
    parser.add_argument("--known", type=int, default=20_000, help="scenes that the data have")
    parser.add_argument("--count", type=int, default=200, help="captions of each split")
    parser.add_argument("--max_train_steps", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    known, encoder, rows = list(scenes("train", args.known)), ImageTextEncoder.from_pretrained(args.clip), []
    tools = (None, encoder, Judge(min(args.known, 2000)))
    for name in RUNS:
        pipe = RetrievalDiffusionPipeline.from_pretrained(trained(name, args))
        pipe.set_progress_bar_config(disable=True)
        tools = (RetrievalIndex.open(args.work / "neighbours" / "index"), *tools[1:])
        pictures = []
        for split in ("test", "held_out"):
            held = list(scenes(split, args.count, colourless=0.0))
            found, shown = rows_of(name, pipe, held, known, tools, args)
            rows += [{"split": split, **row, "steps": args.max_train_steps, "captions": args.count} for row in found]
            pictures += [(held[at].caption, images) for at, images in enumerate(shown)]
        grid = [Image.fromarray(image) for _, images in pictures for image in images]
        width = len(pictures[0][1])
        title = f"{name}, asked by caption: the sample, then its neighbours among the training scenes (not chosen)"
        titles = [caption for caption, _ in pictures]
        columns = ["sample", *(f"neighbour {at}" for at in range(1, width))]
        picture = image_grid(grid, width, title=title, side=64, row_titles=titles, column_titles=columns)
        picture.save(args.results / f"{name.split('-')[0].lower()}.png")
    (args.results / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.results / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    run_script(main)
