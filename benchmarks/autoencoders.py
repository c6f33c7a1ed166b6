"""Diffusion autoencoders against how their papers' code runs them; three reports.

    python -m benchmarks.autoencoders [--size 32] [--batch 8] [--steps 4]

`sampling`: DiffAE with the code made once, against a code made again in every step. `encoder`: a training step of
InfoDiffusion with half a U-Net as its encoder, against a whole one that ends in a linear layer. `frozen_base`: a
training step of PDAE whose decoder half runs on the base's encoder half, against a second whole U-Net beside the base.
The results are equal, but for those of `encoder`, where the networks differ.
"""

import argparse
import copy
import time

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers_repr.pipelines.diffusion_autoencoder import DiffusionAutoencoderPipeline
from torch import nn

from benchmarks.common import interleaved, median, report
from diffusers_repr import Denoiser
from diffusers_repr.capture.semantic_decoder import SemanticDecoder
from diffusers_repr.models import FiLM, SemanticEncoder, film_blocks
from diffusers_repr.models.semantic_encoder import SemanticEncoderOutput
from diffusers_repr.objectives import DiffusionAutoencoderObjective, PenaltyConfig

CHANNELS, DIM = (64, 128, 256), 256


def unet(size: int) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3}
    return UNet2DModel(size, 3, 3, block_out_channels=CHANNELS, layers_per_block=2,
                       resnet_time_scale_shift="scale_shift", **blocks)  # fmt: skip


def encoder(size: int, channels: tuple[int, ...] = CHANNELS, layers: int = 2) -> SemanticEncoder:
    torch.manual_seed(1)
    return SemanticEncoder(3, DIM, size, block_out_channels=channels, layers_per_block=layers)


class WholeEncoder(nn.Module):
    """InfoDiffusion's: a whole U-Net to one channel, and a linear layer on all its pixels."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.unet = unet(size)
        self.unet.conv_out = nn.Conv2d(CHANNELS[0], 1, 3, padding=1)
        self.linear, self.config = nn.Linear(size * size, DIM), {"in_channels": 3, "code_dim": DIM}

    def forward(self, images: torch.Tensor) -> SemanticEncoderOutput:
        still = torch.zeros(len(images), device=images.device)
        return SemanticEncoderOutput(self.linear(self.unet(images, still).sample.flatten(1)))


def acting(*modules: nn.Module) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))


def compare(name: str, runs: dict, differ: float | None, repeats: int, **settings: object) -> None:
    times = {key: median(values) for key, values in interleaved(runs, repeats, time.process_time).items()}
    report(f"autoencoders_{name}", ratio=times["theirs"] / times["ours"], differ=differ, **times, **settings)


def sampling(images: torch.Tensor, steps: int, repeats: int) -> None:
    size = images.shape[2]
    network = unet(size).eval()
    film = FiLM(DIM, film_blocks(network), "scale")
    acting(film)
    pipe = DiffusionAutoencoderPipeline(encoder(size).eval(), film, DDIMScheduler(clip_sample=False), network)
    noise, scheduler, decoder = torch.randn_like(images), DDIMScheduler(clip_sample=False), pipe.denoiser.model

    def ours() -> torch.Tensor:
        return pipe.decode(pipe.encode(images / 2 + 0.5, None).code, noise, steps, output_type="latent").images

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(decoder(x, t, pipe.encoder(images).code)[0], t, x).prev_sample
        return x

    differ = float((ours() - theirs()).abs().max())
    compare("sampling", {"ours": ours, "theirs": theirs}, differ, repeats, steps=steps, size=size, batch=len(images))


def step_of(objective: nn.Module, data: dict) -> float:
    objective.zero_grad()
    loss = objective(data)["loss"]
    loss.backward()
    return float(loss.detach())


def half_encoder(data: dict, repeats: int) -> None:
    size = data["pixel_values"].shape[2]
    denoiser = Denoiser.from_pipe(DDPMPipeline(unet(size), DDPMScheduler()))
    made = {
        name: DiffusionAutoencoderObjective(copy.deepcopy(denoiser), own, PenaltyConfig(penalty="mmd"))
        for name, own in {"ours": encoder(size), "theirs": WholeEncoder(size)}.items()
    }
    runs = {name: lambda objective=objective: step_of(objective, data) for name, objective in made.items()}
    compare("encoder", runs, None, repeats, size=size, batch=len(data["pixel_values"]))


def frozen_base(data: dict, repeats: int) -> None:
    size = data["pixel_values"].shape[2]
    base = unet(size)
    denoiser = Denoiser.from_pipe(DDPMPipeline(base, DDPMScheduler()))
    light = encoder(size, (32, 64, 128), 1)  # PDAE's is a stack of a few convolutions
    objective = DiffusionAutoencoderObjective(denoiser, light, frozen_base=True)
    acting(objective.film, objective.gradient.unet.conv_out)
    whole = unet(size)
    whole.load_state_dict({**base.state_dict(), **objective.gradient.unet.state_dict()})
    second = SemanticDecoder(whole, objective.film)
    x0, noise, t = data["pixel_values"], data["noise"], data["time"]
    x_t = DDPMScheduler().add_noise(x0, noise, t)
    coefficients = objective.decoder.model._at(t, x_t)[1][:, None, None, None]

    def theirs() -> float:
        for part in (objective, whole):
            part.zero_grad()
        with torch.no_grad():
            frozen = base(x_t, t).sample
        loss = (frozen - coefficients * second(x_t, t, objective.encoder(x0).code)[0] - noise).square().mean()
        loss.backward()
        return float(loss.detach())

    differ = abs(theirs() - step_of(objective, data))
    runs = {"ours": lambda: step_of(objective, data), "theirs": theirs}
    compare("frozen_base", runs, differ, repeats, size=size, batch=len(x0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("sampling", "encoder", "frozen_base"), help="one of the reports")
    args = parser.parse_args()
    torch.manual_seed(3)
    images = torch.rand(args.batch, 3, args.size, args.size) * 2 - 1
    data = {"pixel_values": images, "noise": torch.randn_like(images), "time": torch.randint(1, 1000, (args.batch,))}
    parts = {
        "sampling": lambda: sampling(images, args.steps, args.repeats),
        "encoder": lambda: half_encoder(data, args.repeats),
        "frozen_base": lambda: frozen_base(data, args.repeats),
    }
    for name, run in parts.items():
        if args.only in (None, name):
            run()


if __name__ == "__main__":
    main()
