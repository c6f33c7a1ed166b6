"""A REPA step with latents and teacher features from a cache, against encoding both on the fly (SiT-S/2, 256 px)."""

import argparse
import time

import torch
from accelerate import Accelerator
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from transformers import Dinov2Config, Dinov2Model

from benchmarks.common import median, report, sd15_vae
from diffusers_repr import Denoiser, Encoder, SiTTransformer2DModel
from diffusers_repr.denoiser.vae import encode_moments
from diffusers_repr.objectives import REPAObjective
from diffusers_repr.training import TrainingConfig
from diffusers_repr.training.run import Run

SIDE = 256


def teacher() -> Encoder:
    """DINOv2-B's size, with random weights."""
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(image_size=224, patch_size=14)).eval()
    return Encoder.from_module(
        model,
        patch_size=14,
        forward=lambda pixels: model(pixels).last_hidden_state,
        prefix_tokens=1,
        image_size=224,
        name="teacher",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=None, help="64 on a GPU, 2 on a CPU")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    size, steps = args.batch or (64 if gpu else 2), 5 if gpu else 1
    accelerator = Accelerator(mixed_precision="bf16" if gpu else "no")
    torch.manual_seed(0)
    network = SiTTransformer2DModel.from_size("S/2", sample_size=SIDE // 8, in_channels=4)
    pipe = SiTPipeline(transformer=network, scheduler=FlowMatchODEScheduler(), vae=sd15_vae())
    encoder = teacher()
    run = Run(REPAObjective(Denoiser.from_pipe(pipe), [encoder], "blocks.3"), TrainingConfig(), accelerator, {})
    encoder.to(accelerator.device)

    pixels = torch.rand(size, 3, SIDE, SIDE, device=accelerator.device) * 2 - 1
    labels = torch.zeros(size, dtype=torch.long, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        moments = encode_moments(pipe.vae, pixels).float()
        features = encoder.encode_pixels(pixels).tokens.half()
    batches = {
        "on_the_fly": {"pixel_values": pixels, "class_labels": labels},
        "cached": {"moments": moments, "features": {"teacher": features}, "class_labels": labels},
    }

    def timed(batch: dict) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            run.step([batch], dict)
        if gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    times: dict[str, list[float]] = {name: [] for name in batches}
    for batch in batches.values():
        timed(batch)
    for _ in range(args.repeats):
        for name, batch in batches.items():
            times[name].append(timed(batch))
    seconds = {name: median(values) for name, values in times.items()}
    report(
        "cached_training",
        batch=size,
        device=torch.cuda.get_device_name() if gpu else "cpu",
        **{f"{name}_images_per_second": size / value for name, value in seconds.items()},
        ratio=seconds["on_the_fly"] / seconds["cached"],
        target="reported",
    )


if __name__ == "__main__":
    main()
