"""Alignment by training steps and by size, against several encoders: REPA's figure 2, on the digits.

    accelerate launch examples/train_encoder.py --config examples/configs/encoder_digits.yaml   # the teacher, first
    python examples/studies/alignment_digits.py --out docs/results/alignment \
        --encoders outputs/digits-encoder outputs/digits-encoder-small

SiTs of several widths are trained by `train_repa.py` with the recipe of `repa_digits.yaml`, each with alignment (its
teacher is the first encoder) and without, and kept at some steps: plain pipelines, in `--work`. Measured is the CKNNA
of each block with each encoder, on test images, which neither SiTs nor encoders have seen. Two encoders are added: a
layer of the repository's trained digits-ddpm, and the teacher's network with random weights. Finished runs are kept.
`--out` gets rows.jsonl (best block and level of each), steps.png, size.png and table.md.
"""

import argparse
import contextlib
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar
from transformers import ViTConfig, ViTModel

from diffusers_repr import Denoiser, Encoder
from diffusers_repr.cli.guard import run_script
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.encoders import load_encoders
from diffusers_repr.pictures.figure import png_of, require_matplotlib
from diffusers_repr.sweep import AlignmentComparison, compare_alignments

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_png import write_small_png
from train_repa import main as train_repa

CONFIG = Path(__file__).parents[1] / "configs" / "repa_digits.yaml"
DIGITS_DDPM = Path(__file__).parents[1] / "models" / "digits-ddpm"
METHODS = {"without": ["--encoder", "none"], "REPA": []}
UNTRAINED = "untrained ViT"


class Keep:
    """Called by the training at every `every` steps; keeps the pipeline of the averaged weights at some of them."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.folder, self.steps = folder, steps

    def __call__(self, pipe: Any, step: int) -> dict[str, float]:
        if step in self.steps:
            pipe.save_pretrained(self.folder / f"step-{step}")
        return {}


def train(args: argparse.Namespace, method: str, width: int) -> dict[int, Path]:
    """Step -> folder; trains what is not there yet."""
    folder = args.work / f"{method}-{width}"
    kept = {step: folder / "kept" / f"step-{step}" for step in args.steps}
    if not all((path / "model_index.json").is_file() for path in kept.values()):
        model = {"num_layers": 8, "hidden_size": width, "num_attention_heads": 4}
        teacher = ["--encoder", args.encoders[0]] if method == "REPA" else []
        flags = {
            "config": CONFIG,
            "output_dir": folder,
            "model": json.dumps(model),
            "max_train_steps": max(args.steps),
            "validation_steps": math.gcd(*args.steps),
            "eval_batch_size": 0,
        }
        given = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
        with contextlib.redirect_stdout(sys.stderr):
            train_repa([*given, *METHODS[method], *teacher, *args.flags], evaluate=Keep(folder / "kept", args.steps))
    return kept


def make_encoders(folders: Sequence[str]) -> list[Encoder]:
    """The encoders of the folders, a layer of a denoiser, and the first one's network untrained."""
    denoiser = Denoiser.from_pretrained(DIGITS_DDPM)
    torch.manual_seed(0)
    config = ViTConfig.from_pretrained(folders[0])
    module = ViTModel(config, add_pooling_layer=False).eval()
    shape = {"patch_size": config.patch_size, "channels": config.num_channels, "image_size": config.image_size}
    random = Encoder.from_module(
        module, forward=lambda pixels: module(pixels).last_hidden_state, prefix_tokens=1, name=UNTRAINED, **shape
    )
    layer = Encoder.from_denoiser(denoiser, "mid_block", 100, name="digits-ddpm, mid_block at 100")
    return [*load_encoders(folders), layer, random]


def measure(args: argparse.Namespace) -> AlignmentComparison:
    """Every kept SiT against every encoder."""
    folders = {(m, width, step): folder for width in args.widths for m in METHODS
               for step, folder in train(args, m, width).items()}  # fmt: skip
    return compare_alignments(
        {json.dumps(key): functools.partial(Denoiser.from_pretrained, folder) for key, folder in folders.items()},
        make_encoders(args.encoders),
        load_digits_splits()["test"],
        args.timesteps,
        [f"blocks.{place}" for place in range(8)],
        steps=[step for _, _, step in folders],
        k=args.k,
        batch_size=500,
    )


def rows_of(found: AlignmentComparison) -> list[dict]:
    """The best block and level of each SiT against each encoder, and encoders against each other."""
    rows: list[dict] = []
    for best in found.best():
        method, width, step = json.loads(best["model"])
        about = {"method": method, "width": width, "parameters": best["parameters"], "step": step}
        at = {"layer": best["layer"], "timestep": best["timestep"]}
        rows.append({**about, "encoder": best["encoder"], **at, "cknna": round(best["score"], 4)})
    for one, others in found.between.items():
        rows += [{"encoder": one, "other": other, "cknna": round(score or 0.0, 4)} for other, score in others.items()]
    return rows


def points(rows: Sequence[dict], **wanted: Any) -> list[dict]:
    return [row for row in rows if wanted.items() <= row.items()]


def draw(rows: Sequence[dict], by_step: bool, chance: float, path: Path) -> None:
    """PNG with a panel each encoder: CKNNA by training step, a curve each SiT, or by size after the last step."""
    from matplotlib import colormaps

    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    widths = sorted({row["width"] for row in rows if "width" in row})
    last = max(row.get("step", 0) for row in rows)
    figure = require_matplotlib().Figure(figsize=(3.1 * len(encoders) + 1.2, 3.6), layout="constrained", dpi=100)
    axes = figure.subplots(1, len(encoders), squeeze=False, sharey=True)[0]
    for axis, encoder in zip(axes, encoders, strict=True):
        for method, style in (("REPA", "o-"), ("without", "s--")):
            if by_step:
                for place, width in enumerate(widths):
                    line = points(rows, method=method, width=width, encoder=encoder)
                    color = colormaps["viridis"](0.85 * place / max(len(widths) - 1, 1))
                    size = f"{line[0]['parameters'] / 1e6:.2g} M"
                    axis.plot(*_xy(line, "step"), style, ms=4, color=color, label=f"{size}, {method}")
            else:
                line = points(rows, method=method, step=last, encoder=encoder)
                color = "tab:blue" if method == "REPA" else "tab:grey"
                axis.plot(*_xy(line, "parameters", 1e-6), style, ms=5, color=color, label=method)
        if not by_step:
            ticks = sorted({row["parameters"] / 1e6 for row in rows if "width" in row})
            axis.set_xscale("log")
            axis.minorticks_off()
            axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axis.axhline(chance, color="0.5", ls=":", lw=1)
        axis.set_title(f"with {encoder}" + (" (the teacher)" if encoder == encoders[0] else ""), fontsize=9)
        axis.set_xlabel("training steps" if by_step else f"million parameters; {last:,} steps", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CKNNA, best block and level")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    figure.suptitle(f"SiTs of digits against {len(encoders)} encoders; dotted: features that have nothing in common")
    write_small_png(png_of(figure), path)


def _xy(line: Sequence[dict], key: str, unit: float = 1.0) -> tuple[list[float], list[float]]:
    line = sorted(line, key=lambda row: row[key])
    return [row[key] * unit for row in line], [row["cknna"] for row in line]


def table(rows: Sequence[dict]) -> str:
    """The last step of each SiT, and the encoders against each other."""
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    lines = [f"| | parameters | {' | '.join(encoders)} |", f"|---|---|{'---|' * len(encoders)}"]
    steps = sorted({row["step"] for row in rows if "step" in row})
    of_sits = [row for row in rows if "width" in row]
    for width in sorted({row["width"] for row in of_sits}):
        for method in METHODS:
            for step in (steps[0], steps[-1]):
                found = {row["encoder"]: row for row in points(rows, method=method, width=width, step=step)}
                size = f"{found[encoders[0]]['parameters'] / 1e6:.2f} M"
                cells = [f"{found[name]['cknna']:.3f}" for name in encoders]
                lines.append(f"| {width} wide, {method}, step {step} | {size} | {' | '.join(cells)} |")
    for other in encoders:
        found = {row["encoder"]: row["cknna"] for row in points(rows, other=other)}
        cells = [f"{found[name]:.3f}" if name in found else "" for name in encoders]
        lines.append(f"| *{other}* | | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/alignment-results"), help="folder of the results")
    parser.add_argument("--work", type=Path, default=Path("outputs/alignment-digits"), help="folder of the runs")
    parser.add_argument("--encoders", nargs="+", default=["outputs/digits-encoder"], help="the first is the teacher")
    parser.add_argument("--widths", type=int, nargs="+", default=[24, 48, 96], help="of the SiTs, divisible by 8")
    parser.add_argument("--steps", type=int, nargs="+", default=list(range(100, 900, 100)), help="that are kept")
    parser.add_argument("--timesteps", type=float, nargs="+", default=[100, 300, 500], help="larger is noisier")
    parser.add_argument("--k", type=int, default=10, help="neighbours of CKNNA")
    args, args.flags = parser.parse_known_args(argv)
    disable_progress_bar()  # of diffusers, when it loads a folder
    found = measure(args)
    rows = rows_of(found)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.out / "table.md").write_text(table(rows))
    chance = args.k / (found.recipe["data"]["samples"] - 1)
    draw(rows, True, chance, args.out / "steps.png")
    draw(rows, False, chance, args.out / "size.png")
    print(table(rows))


if __name__ == "__main__":
    run_script(main)
