"""A step of training by perceptual loss, against one that runs the whole frozen network twice.

    python -m benchmarks.perceptual [--batch 4] [--repeats 5]

The peer's features are read by a hook, its true side without a graph; both make the same loss and the same gradients.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from benchmarks.common import interleaved, median, report
from diffusers_repr import Denoiser, PerceptualObjective, SiTTransformer2DModel
from diffusers_repr.noise import Prediction, add_noise
from diffusers_repr.objectives.perceptual import noised_again

AT_LEAST = {"unet": 1.4, "unet_adm": None, "transformer": 1.25}
CIFAR10 = Path(__file__).parents[1] / "examples" / "models" / "cifar10-ddpm"


def unet() -> Denoiser:
    """The one that the examples' CIFAR-10 model has: 21 % of its operations lie before the end of its middle."""
    return denoiser_of(UNet2DModel.from_config(UNet2DModel.load_config(CIFAR10, subfolder="unet")))


def unet_adm() -> Denoiser:
    """ADM's shape at a quarter of its width: 27 %, with which 1.39 times is all that there is to gain."""
    blocks = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    model = UNet2DModel(
        32, 3, 3, block_out_channels=(64, 128, 192, 256), down_block_types=blocks, layers_per_block=2,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(blocks)), attention_head_dim=32,
    )  # fmt: skip
    return denoiser_of(model)


def denoiser_of(model: UNet2DModel) -> Denoiser:
    return Denoiser(model, DDPMScheduler(clip_sample=False, prediction_type="v_prediction"))


def transformer() -> Denoiser:
    model = SiTTransformer2DModel.from_size("S/2", sample_size=16, num_classes=0)
    return Denoiser(model, FlowMatchODEScheduler())


class Whole:
    """The peer."""

    def __init__(self, objective: PerceptualObjective) -> None:
        self.objective, loss = objective, objective.losses["perceptual"]
        self.frozen, self.kept = copy.deepcopy(loss.frozen), None
        self.frozen.get_submodule(loss.layer).register_forward_hook(
            lambda module, args, out: setattr(self, "kept", out)
        )

    def middle(self, x_t, level, condition):
        self.frozen(**self.objective.denoiser.network_inputs(x_t, level, condition))
        return self.kept

    def __call__(self, batch):
        objective, noisy = self.objective, self.objective.noised(batch)
        output, schedule = objective.predict(noisy), objective.denoiser.schedule
        level = objective.losses["perceptual"].time_sampling.draw(schedule, len(noisy.x0))
        with torch.no_grad():
            wanted = self.middle(add_noise(noisy.x0, level, noisy.noise), level, noisy.condition)
        guess = noised_again(Prediction(output, noisy.x_t, noisy.level, schedule), level)
        return F.mse_loss(self.middle(guess, level, noisy.condition), wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for name, make in (("unet", unet), ("unet_adm", unet_adm), ("transformer", transformer)):
        torch.manual_seed(0)
        denoiser = make()
        with torch.no_grad():
            for parameter in denoiser.model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))  # a new transformer predicts 0
        objective = PerceptualObjective(denoiser, label_dropout=0.0).train()
        whole, size = Whole(objective), denoiser.family.size()
        batch = {"pixel_values": torch.randn(args.batch, denoiser.image_channels, *size).clamp(-1, 1)}
        values = {}

        def step(loss, key, objective=objective, values=values):
            torch.manual_seed(1)
            objective.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            values[key] = [float(value.detach()), *(float(p.grad.norm()) for p in objective.network.parameters())]

        runs = {
            "ours": lambda step=step, o=objective, b=batch: step(lambda: o(b)["loss"], "ours"),
            "whole": lambda step=step, w=whole, b=batch: step(lambda: w(b), "whole"),
        }
        times = interleaved(runs, args.repeats, time.process_time)
        far = max(abs(a - b) / (abs(b) + 1e-12) for a, b in zip(values["ours"], values["whole"], strict=True))
        assert far < 1e-4, f"{name}: losses or gradients differ by {far}"
        ours, theirs = median(times["ours"]), median(times["whole"])
        report(f"perceptual_{name}", ratio=theirs / ours, at_least=AT_LEAST[name], ours=ours, whole=theirs, differ=far)


if __name__ == "__main__":
    main()
