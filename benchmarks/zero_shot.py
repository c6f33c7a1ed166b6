"""Zero-shot classification: one (image, class, level) at a time against batches, and layers shared among prompts.

The class-conditional digits model on a few digits: every pair alone, its input noised anew, as a plain loop does,
against batches over images, classes and levels. And Stable Diffusion's U-Net, with random weights, on latents of 32 x
32 under five prompts: the layers before the first that reads the prompt run once for all of them against once for
each, and the share of a forward's FLOPs that these are.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DDIMScheduler

from benchmarks.common import interleaved, median, report, sd15_unet
from diffusers_repr.capture.flops import flops_shares
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.noise_policy import NoiseSource, pixel_keys
from diffusers_repr.tasks import Averaging, ZeroShotClassifier
from diffusers_repr.tasks.denoising_errors.conditions import ConditionRows
from diffusers_repr.tasks.denoising_errors.network import NetworkErrors
from diffusers_repr.tasks.denoising_errors.pairs import Asked

IMAGES, LEVELS, PROMPTS = 4, 2, 5


@torch.no_grad()
def one_at_a_time(classifier: ZeroShotClassifier, pixels: torch.Tensor) -> torch.Tensor:
    denoiser, noise, keys = classifier.denoiser, NoiseSource("per_image", 0), pixel_keys(pixels)
    levels = classifier.recipe.rule.levels(denoiser.schedule)
    found = torch.zeros(len(pixels), len(levels), len(classifier.recipe.classes))
    with denoiser.evaluating():
        rows, classes = range(len(pixels)), range(found.shape[2])
        for at, (place, level), label in itertools.product(rows, enumerate(levels), classes):
            x0 = denoiser.encode_pixels(pixels[at : at + 1])
            eps = noise.draw([f"{keys[at]}|{level!r}"], [0], x0.shape[1:])
            x_t = denoiser.add_noise(x0, level, eps)
            predicted = denoiser.predict(x_t, level, denoiser.condition(class_labels=label)).eps
            found[at, place, label] = (predicted - eps).square().mean()
    return found.mean(1)


def main() -> None:
    denoiser = Denoiser.from_pretrained("examples/models/digits-class-ddim")
    classifier = ZeroShotClassifier.of(denoiser, rule=Averaging(LEVELS), batch_size=128)
    images = load_digits_splits()["test"][:IMAGES]["image"]
    pixels = denoiser.pixels(images)
    runs = {"single": lambda: one_at_a_time(classifier, pixels), "batched": lambda: classifier(images).errors}
    difference = float((runs["single"]() - runs["batched"]()).abs().max())
    seconds = {name: median(values) for name, values in interleaved(runs, 3).items()}
    report(
        "zero_shot_batches",
        evaluations=IMAGES * LEVELS * 10,
        **{f"seconds_{name}": value for name, value in seconds.items()},
        time_ratio=seconds["single"] / seconds["batched"],
        max_difference=difference,
    )
    shared_layers()


def shared_layers() -> None:
    unet = sd15_unet()
    denoiser = Denoiser(unet, DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
    texts = [{"encoder_hidden_states": torch.randn(1, 77, 768)} for _ in range(PROMPTS)]
    find = NetworkErrors(denoiser, torch.randn(1, 4, 32, 32), ["0"], ConditionRows(texts, (), denoiser.device))
    same = torch.zeros(PROMPTS, dtype=torch.long)
    asked = Asked(same, torch.arange(PROMPTS), torch.full((PROMPTS,), 500.0, dtype=torch.float64), same)
    sharing = find._shared
    errors = {}

    def run(name: str, share: Callable[..., Any]) -> None:
        find._shared = share
        errors[name] = find(asked)

    runs = {
        "shared": lambda: run("shared", sharing),
        "each": lambda: run("each", lambda *args: nullcontext()),
    }
    seconds = {name: median(values) for name, values in interleaved(runs, 2, time.process_time).items()}
    inputs = {
        "sample": torch.empty(1, 4, 32, 32, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 77, 768, device="meta"),
    }
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    report(
        "zero_shot_shared_layers",
        prompts=PROMPTS,
        **{f"cpu_seconds_{name}": value for name, value in seconds.items()},
        time_ratio=seconds["each"] / seconds["shared"],
        max_relative_difference=float((errors["shared"] / errors["each"] - 1).abs().max()),
        flops_before_the_prompt=flops_shares(unet.to("meta"), [first], inputs)[first][0],
    )


if __name__ == "__main__":
    main()
