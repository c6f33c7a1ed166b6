"""The report of `repa_study.py`: a table of means over seeds, curves, and what came out."""

import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers_repr.pictures.figure import png_of, require_matplotlib

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_png import write_small_png

CURVES = (
    ("frechet_distance", "Fréchet distance of samples\n(judge; lower is better)"),
    ("denoising", "training loss without the alignment\n(lower is better)"),
    ("probe_aligned", "linear probe, aligned layer\n(test accuracy)"),
    ("probe_middle", "linear probe, middle layer\n(test accuracy)"),
    ("cknna_aligned", "CKNNA with the teacher,\naligned layer"),
)
TITLES = {"baseline": "without REPA", "repa": "with REPA"}
COLUMNS = ("frechet_distance", "precision", "recall", "judge_accuracy", "probe_aligned", "probe_middle",
           "cknna_aligned", "cknna_middle", "denoising")  # fmt: skip


def series(rows: Sequence[dict], method: str, step: int, key: str) -> list[float]:
    """Values of all seeds."""
    return [r[key] for r in rows if r["method"] == method and r["step"] == step and r.get(key) is not None]


def mean_and_range(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def table(rows: Sequence[dict]) -> str:
    """A row for each method, at the middle and the last step; `rows.jsonl` has all."""
    every = sorted({r["step"] for r in rows})
    lines = [f"| step | | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for step in dict.fromkeys((every[(len(every) - 1) // 2], every[-1])):
        for method in dict.fromkeys(r["method"] for r in rows):
            cells = [mean_and_range(series(rows, method, step, key)) for key in COLUMNS]
            lines.append(f"| {step} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(rows: Sequence[dict], path: Path) -> None:
    """Each measure against steps: a thin line a seed, a thick one for the mean."""
    figure = require_matplotlib().Figure(figsize=(3.5 * len(CURVES), 3.6), layout="constrained", dpi=100)
    for axis, (key, title) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for place, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
            color = ("tab:grey", "tab:blue", "tab:orange", "tab:green")[place % 4]
            for seed in sorted({r["seed"] for r in rows}):
                line = sorted((r["step"], r[key]) for r in rows
                              if r["method"] == method and r["seed"] == seed and r.get(key) is not None)  # fmt: skip
                axis.plot(*zip(*line, strict=True), color=color, alpha=0.35, linewidth=1)
            steps = sorted({r["step"] for r in rows if series(rows, method, r["step"], key)})
            means = [statistics.mean(series(rows, method, step, key)) for step in steps]
            label = TITLES.get(method, method)
            axis.plot(steps, means, color=color, linewidth=2.2, marker="o", markersize=4, label=label)
        axis.set_title(title, fontsize=10)
        axis.set(xlabel="steps", xlim=(0, None))
        if key == "frechet_distance":
            axis.set_yscale("log")
            for part in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                part("{x:g}")
        axis.tick_params(which="both", labelsize=8)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=9)
    seeds = sorted({r["seed"] for r in rows})
    told = f"thin: each of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    figure.suptitle(f"The same SiT with and without REPA; {told}", fontsize=11)
    write_small_png(png_of(figure), path)


def paired(rows: Sequence[dict], key: str) -> str:
    """Difference of the last step, seed by seed."""
    last = max(r["step"] for r in rows)
    by = {(r["method"], r["seed"]): r[key] for r in rows if r["step"] == last}
    seeds = sorted({seed for method, seed in by if method == "repa" and ("baseline", seed) in by})
    gaps = [by["repa", seed] - by["baseline", seed] for seed in seeds]
    return ", ".join(f"{gap:+.4g}" for gap in gaps)


def wrapped(command: str, width: int = 112) -> str:
    """A command over as many lines as it needs, each going on with flags."""
    lines = [""]
    for part in re.split(r" (?=--)", command):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)


def write_report(out: Path, rows: Sequence[dict], facts: dict, recipe: str) -> None:
    """README.md and curves.png."""
    draw_curves(rows, out / "curves.png")
    seeds = len({r["seed"] for r in rows})
    text = f"""# REPA against the same SiT without it

```bash
{wrapped(facts["command"])}
```

Made by this command on {facts["device"]}. Equal steps, seeds, data order, noise and settings; the baseline has
`--encoder none`. Numbers are means over {seeds} seeds (lowest to highest), of the averaged weights.

- `frechet_distance`, `precision`, `recall`: {facts["samples"]:,} samples (Euler, 50 steps, no guidance, equally many
  of each class) against the training images, in the features of a judge: a supervised network, not the teacher, of
  test accuracy {facts["judge_accuracy"]:.1%}. Real test images have distance {facts["distance_of_test_images"]:.4g}.
  These are no Inception numbers.
- `judge_accuracy`: share of samples that the judge puts in the class asked for.
- `probe_*`: test accuracy of a linear probe of the layer's mean token, null label. `cknna_*`: alignment with the
  teacher of the same features. `aligned` is the layer that REPA aligns, `middle` one above it.

![Five measures against steps, with and without REPA](curves.png)

Differences at the last step, REPA minus baseline, seed by seed: Fréchet distance {paired(rows, "frechet_distance")};
probe of the aligned layer {paired(rows, "probe_aligned")}; of the middle layer {paired(rows, "probe_middle")}.

{table(rows)}

All steps that were measured: [rows.jsonl](rows.jsonl).

| baseline | REPA |
|---|---|
| ![CKNNA, baseline](alignment_baseline.png) | ![CKNNA, REPA](alignment_repa.png) |
| ![samples](samples_baseline.png) | ![samples](samples_repa.png) |

## Recipe

```yaml
{recipe.strip()}
```
"""
    (out / "README.md").write_text(text)
