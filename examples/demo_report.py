"""Pictures and words of the demo."""

from pathlib import Path

import torch
from PIL import Image
from small_png import write_small_png

from diffusers_repr.pictures.figure import png_of, require_matplotlib
from diffusers_repr.pictures.grid import image_grid


def draw_samples(images: list[Image.Image], path: Path) -> None:
    """Sixteen a row, enlarged."""
    image_grid(images, 16, title="Samples of the model, not chosen", side=48).save(path)


def draw_pca(features: torch.Tensor, pixels: torch.Tensor, labels: torch.Tensor, path: Path) -> None:
    """The first two principal components of the test digits: features of the model, and pixels."""
    figure = require_matplotlib().Figure(figsize=(10.4, 4.9), layout="constrained", dpi=110)
    axes = figure.subplots(1, 2)
    titles = ("features of the selected layer and level", "raw pixels")
    for axis, x, title in zip(axes, (features, pixels), titles, strict=True):
        centred = (x - x.mean(0)).double()
        centred = centred / centred.std(0).clamp(min=1e-6)
        points = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
        scatter = axis.scatter(*points.T, c=labels, cmap="tab10", s=14, vmin=-0.5, vmax=9.5)
        axis.set_title(title, fontsize=11)
        axis.set(xlabel="principal component 1", ylabel="principal component 2")
        axis.grid(alpha=0.3)
    bar = figure.colorbar(scatter, ax=axes, ticks=range(10), label="digit", aspect=30, pad=0.01)
    bar.minorticks_off()
    figure.suptitle(f"{len(labels)} test digits, coloured by what they are")
    write_small_png(png_of(figure), path)


def write_report(report: dict, path: Path) -> None:
    """The demo's numbers and pictures as one page."""
    best = report["best"]
    splits = ", ".join(f"{count} {split}" for split, count in report["splits"].items())
    rows = "\n".join(
        f"| {title} | {report[name + '_accuracy']:.3f} | {report[name + '_accuracy_10_per_class']:.3f} |"
        for name, title in (
            ("probe", "probe on diffusion features"),
            ("pixels", "raw pixels"),
            ("random_init", "same network, random weights (mean of 3)"),
        )
    )
    path.write_text(f"""# What a small diffusion model knows about digits

Model: {report["model"]}. Images: {splits}; the model was trained on the train split only.

![samples](samples.png)

Selected on the validation split: layer `{best["layer"]}` at timestep {best["timestep"]:g}, noise `{best["noise"]}`,
pooling `{best["pooling"]}`: Brier score {-best["validation_neg_brier"]:.3f}
(standard deviation over noise seeds {best["std_over_noise_seeds"]:.3f}; all cells below, lower is better).

![Brier score on validation by level and layer](heatmap.png)

| test accuracy of a logistic regression | all labels | 10 labels a class |
|---|---|---|
{rows}

The penalty of every logistic regression is tuned on the validation split. 10 labels a class: mean of 5 draws; level
and layer were selected with all training labels, for the untrained networks too. The probe loaded from its saved
folder scores {report["saved_probe_accuracy"]:.3f}.

![first two principal components](features_pca.png)
""")
