"""RepFusion's teacher for one batch: stopped at the middle block, against the whole U-Net as the paper's code runs it.

    python -m benchmarks.repfusion [--batch 4]

A random U-Net of the form of `google/ddpm-cifar10-32`, the paper's teacher, each image at a timestep of its own; CPU
seconds of the process. Both give the same maps, bit for bit.
"""

import argparse
import time

import torch
from diffusers import DDPMScheduler, UNet2DModel

from benchmarks.common import interleaved, median, report
from diffusers_repr import Denoiser
from diffusers_repr.objectives.distillation.teacher import DenoiserTeacher, middle_layer

REPEATS = 5


def made() -> DenoiserTeacher:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), downsample_padding=0,
    ).eval().requires_grad_(False)  # fmt: skip
    denoiser = Denoiser(unet, DDPMScheduler())
    return DenoiserTeacher(denoiser, [middle_layer(denoiser)], noise="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=4)
    count = parser.parse_args().batch
    teacher, generator = made(), torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1
    level = teacher.denoiser.level(torch.randint(1000, (count,), generator=generator))
    maps: dict[bool, torch.Tensor] = {}

    def read(early: bool) -> None:
        maps[early] = teacher.read(pixels, level, stop_early=early)[0]

    runs = {"ours": lambda: read(True), "full": lambda: read(False)}
    times = interleaved(runs, REPEATS, clock=time.process_time)
    report(
        "repfusion",
        batch=count,
        **{f"seconds_{way}": median(values) for way, values in times.items()},
        time_ratio=median(times["full"]) / median(times["ours"]),
        flops_share=teacher.layers[0].flops_share,
        bit_equal=torch.equal(maps[True], maps[False]),
        target=">= 3",
    )


if __name__ == "__main__":
    main()
