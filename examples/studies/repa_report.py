"""The report of `repa_study.py`: a table of means over seeds, curves, and what came out."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CURVES = (
    ("frechet_distance", "Fréchet distance (judge), lower is better"),
    ("probe_aligned", "linear probe, aligned layer"),
    ("probe_middle", "linear probe, middle layer"),
    ("denoising", "training loss without the alignment"),
)
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
    """A row a step and method."""
    lines = [f"| step | | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for step in sorted({r["step"] for r in rows}):
        for method in dict.fromkeys(r["method"] for r in rows):
            cells = [mean_and_range(series(rows, method, step, key)) for key in COLUMNS]
            lines.append(f"| {step} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_curves(rows: Sequence[dict], path: Path) -> None:
    """Each measure against steps: a thin line a seed, a thick one for the mean."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(4.2 * len(CURVES), 3.4), constrained_layout=True)
    for axis, (key, title) in zip(axes, CURVES, strict=True):
        for place, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
            color = ("tab:grey", "tab:blue", "tab:orange", "tab:green")[place % 4]
            for seed in sorted({r["seed"] for r in rows}):
                line = sorted((r["step"], r[key]) for r in rows
                              if r["method"] == method and r["seed"] == seed and r.get(key) is not None)  # fmt: skip
                axis.plot(*zip(*line, strict=True), color=color, alpha=0.35, linewidth=1)
            steps = sorted({r["step"] for r in rows if series(rows, method, r["step"], key)})
            means = [statistics.mean(series(rows, method, step, key)) for step in steps]
            axis.plot(steps, means, color=color, linewidth=2.2, marker="o", label=method)
        axis.set(title=title, xlabel="steps", xticks=sorted({r["step"] for r in rows}))
        if key == "frechet_distance":
            axis.set_yscale("log")
            for part in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                part("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def paired(rows: Sequence[dict], key: str) -> str:
    """Difference of the last step, seed by seed."""
    last = max(r["step"] for r in rows)
    by = {(r["method"], r["seed"]): r[key] for r in rows if r["step"] == last}
    seeds = sorted({seed for method, seed in by if method == "repa" and ("baseline", seed) in by})
    gaps = [by["repa", seed] - by["baseline", seed] for seed in seeds]
    return ", ".join(f"{gap:+.4g}" for gap in gaps)


def write_report(out: Path, rows: Sequence[dict], facts: dict, recipe: str) -> None:
    """README.md and curves.png."""
    draw_curves(rows, out / "curves.png")
    seeds = len({r["seed"] for r in rows})
    text = f"""# REPA against the same SiT without it

```bash
{facts["command"]}
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

![curves](curves.png)

Differences at the last step, REPA minus baseline, seed by seed: Fréchet distance {paired(rows, "frechet_distance")};
probe of the aligned layer {paired(rows, "probe_aligned")}; of the middle layer {paired(rows, "probe_middle")}.

{table(rows)}

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
