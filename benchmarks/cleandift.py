"""One training step of CleanDIFT, forward and backward: one pass of the student, against one for each of three levels.

    python -m benchmarks.cleandift [--batch 2]

`repeated` gives the student each clean image three times, as the reference does, and runs teacher and student to their
end. A random U-Net of the form of Stable Diffusion's, a tenth as wide, on latents of 32 x 32, with the paper's eleven
maps. Both have the same weights, images, noise and timesteps, and give the same gradients.
"""

import argparse

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional

from benchmarks.common import interleaved, median, report
from diffusers_repr import Denoiser
from diffusers_repr.capture import capture
from diffusers_repr.objectives import CleanDIFTConfig, CleanDIFTObjective

LEVELS, REPEATS, SIDE = 3, 5, 32


def made() -> CleanDIFTObjective:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=8,
        norm_num_groups=8,
    )  # fmt: skip
    objective = CleanDIFTObjective(Denoiser(unet, DDPMScheduler()), CleanDIFTConfig("made", levels=LEVELS))
    objective.condition = lambda batch, count, drop=True: {"encoder_hidden_states": batch["text"]}
    return objective.train()


def read(network: torch.nn.Module, layers: list[str], x: Tensor, t: Tensor, text: Tensor) -> dict[str, Tensor]:
    with capture(network, layers, stop_early=False) as tape:
        network(x, t, text)
    return {path: value.flatten(2).transpose(1, 2) for path, value in tape.features.items()}


def repeated(objective: CleanDIFTObjective, batch: dict[str, Tensor]) -> Tensor:
    x0, text = (batch[name].repeat_interleave(LEVELS, 0) for name in ("pixel_values", "text"))
    time = batch["time"].flatten()
    with torch.no_grad():
        x_t = objective.denoiser.add_noise(x0, time, batch["noise"].flatten(0, 1))
        targets = read(objective.teacher.model, objective.layers, x_t, time, text)
    features = read(objective.network, objective.layers, x0, torch.full_like(time, 261), text)
    adapted = objective.adapters(features, time)
    return -sum(functional.cosine_similarity(adapted[k], targets[k], dim=-1).mean() for k in objective.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=2)
    count = parser.parse_args().batch
    objective = made()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixel_values": torch.randn(count, 4, SIDE, SIDE, generator=generator),
        "text": torch.randn(count, 77, 64, generator=generator),
        "noise": torch.randn(count, LEVELS, 4, SIDE, SIDE, generator=generator),
        "time": torch.randint(1, 999, (count, LEVELS), generator=generator),
    }
    for block in objective.adapters.adapters.parameters():  # at first the identity, which hides their gradients
        torch.nn.init.normal_(block, std=0.05, generator=generator)
    gradients: dict[str, list[Tensor]] = {}
    losses = {"ours": lambda: objective(batch)["loss"], "repeated": lambda: repeated(objective, batch)}

    def step(way: str) -> None:
        objective.zero_grad()
        losses[way]().backward()
        gradients[way] = [p.grad for p in objective.parameters() if p.requires_grad]

    times = interleaved({way: lambda way=way: step(way) for way in losses}, REPEATS)
    largest = max(float(g.abs().max()) for g in gradients["ours"])
    difference = max(float((a - b).abs().max()) for a, b in zip(*gradients.values(), strict=True))
    report(
        "cleandift",
        batch=count,
        **{f"seconds_{way}": median(values) for way, values in times.items()},
        time_ratio=median(times["repeated"]) / median(times["ours"]),
        max_gradient_difference=difference / largest,
        target=">= 1.5",
    )


if __name__ == "__main__":
    main()
