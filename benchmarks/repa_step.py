"""One training step of REPA, teacher features given, against a plain loop that is built as the paper's code is.

    python -m benchmarks.repa_step [--size S/2 B/2] [--batch 256] [--steps 20] [--compile]

Both train the same network on the same batches, times and noise. The plain loop: a cosine for every sample and encoder
in turn, clipping, AdamW as torch has it by default, the moving average parameter by parameter, and the losses and the
norm gathered and read in every step.
"""

import argparse
import copy
import time

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from torch import Tensor, nn

from benchmarks.common import median, report
from diffusers_repr import Denoiser, SiTTransformer2DModel
from diffusers_repr.objectives import CachedFeatures, REPAObjective
from diffusers_repr.training import TrainingConfig
from diffusers_repr.training.run import Run

LAYER, WIDTH, GRID = "blocks.3", 768, (16, 16)


def make_batches(count: int, size: int, device: torch.device) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        batch = {
            "pixel_values": torch.randn(size, 4, 32, 32, generator=generator),
            "noise": torch.randn(size, 4, 32, 32, generator=generator),
            "time": 1000 * torch.rand(size, generator=generator),
            "class_labels": torch.randint(1000, (size,), generator=generator),
        }
        on_device = {k: v if k == "time" else v.to(device) for k, v in batch.items()}
        teacher = torch.randn(
            size, GRID[0] * GRID[1], WIDTH, generator=torch.Generator(device).manual_seed(1), device=device
        )
        batches.append({**on_device, "features": {"teacher": teacher}})
    return batches


def make_network(size: str) -> SiTTransformer2DModel:
    torch.manual_seed(0)
    return SiTTransformer2DModel.from_size(size, sample_size=32, in_channels=4, class_dropout_prob=0.0)


def make_projector(width: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, WIDTH))


class Plain(nn.Module):
    """Network and projector in one module, as the paper's code has them."""

    def __init__(self, size: str) -> None:
        super().__init__()
        self.network = make_network(size)
        self.projector = make_projector(self.network.config.hidden_size)
        self.kept = None
        self.network.get_submodule(LAYER).register_forward_hook(lambda module, args, out: setattr(self, "kept", out))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        mask = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        out = self.network(x_t, t, class_labels=labels, drop_mask=mask).sample
        return out, [self.projector(self.kept)]


class PlainLoop:
    """The peer."""

    def __init__(self, size: str, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        model = Plain(size)
        self.ema = copy.deepcopy(model.network).to(accelerator.device).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)

    def step(self, batch: dict) -> float:
        x0, noise, labels = batch["pixel_values"], batch["noise"], batch["class_labels"]
        t = (batch["time"] / 1000).to(x0.device).view(-1, 1, 1, 1)
        out, projected = self.model((1 - t) * x0 + t * noise, 1000 * t.flatten(), labels)
        denoising = ((out - (noise - x0)) ** 2).flatten(1).mean(1)
        alignment, teachers = torch.zeros((), device=x0.device), [batch["features"]["teacher"]]
        for z, h in zip(teachers, projected, strict=True):
            for z_j, h_j in zip(z, h, strict=True):
                h_j, z_j = F.normalize(h_j.float(), dim=-1), F.normalize(z_j.float(), dim=-1)
                alignment = alignment - (z_j * h_j).sum(dim=-1).mean()
        alignment = alignment / (len(teachers) * len(x0))
        loss = denoising.mean() + 0.5 * alignment
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            network = self.accelerator.unwrap_model(self.model).network
            for mean, parameter in zip(self.ema.parameters(), network.parameters(), strict=True):
                mean.mul_(0.9999).add_(parameter.data, alpha=1 - 0.9999)
        read = [self.accelerator.gather(value).mean().item() for value in (denoising.mean(), alignment, norm)]
        return read[0] + 0.5 * read[1]


class OurLoop:
    """`Run`, as `train` drives it, with a line of the log every 50 steps."""

    def __init__(self, size: str, accelerator: Accelerator, compiled: bool = False) -> None:
        network = make_network(size)
        denoiser = Denoiser(network, FlowMatchODEScheduler())
        teacher = CachedFeatures("teacher", WIDTH, GRID)
        objective = REPAObjective(denoiser, [teacher], LAYER, 0.5, label_dropout=0.0)
        (projector,) = [m for m in objective.modules() if type(m).__name__ == "Projector"]
        own = [m for m in projector.modules() if isinstance(m, nn.Linear)]
        theirs = [m for m in make_projector(network.config.hidden_size) if isinstance(m, nn.Linear)]
        for mine, other in zip(own, theirs, strict=True):
            mine.load_state_dict(other.state_dict())
        if compiled:
            network.compile()
        config = TrainingConfig(learning_rate=1e-4, ema_max_decay=0.9999, ema_warmup=False)
        self.run = Run(objective, config, accelerator, {})

    def step(self, batch: dict) -> None:
        self.run.step([batch], lambda given: dict(given))
        if self.run.progress.step % 50 == 0:
            self.run.take_averages()


def timed(loop, batches: list[dict], steps: int, device: torch.device) -> float:
    """Seconds of a step."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for place in range(steps):
        loop.step(batches[place % len(batches)])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def curves(loops: dict, batches: list[dict], steps: int) -> float:
    """Largest relative difference of the losses of the first steps, before anything is timed."""
    worst = 0.0
    for place in range(steps):
        batch = batches[place % len(batches)]
        plain = loops["plain"].step(batch)
        loops["ours"].step(batch)
        ours = loops["ours"].run.take_averages()["loss"]
        worst = max(worst, abs(plain - ours) / abs(plain))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", nargs="+", default=["S/2"])
    parser.add_argument("--batch", type=int, default=None, help="images a step; 256 on a GPU, 4 on a CPU")
    parser.add_argument("--steps", type=int, default=None, help="timed steps a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also ours with the network compiled")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    batch_size, steps = args.batch or (256 if gpu else 4), args.steps or (20 if gpu else 2)
    for size in args.size:
        accelerator = Accelerator(mixed_precision="bf16" if gpu else "no")
        batches = make_batches(4 if gpu else 2, batch_size, accelerator.device)
        loops = {"plain": PlainLoop(size, accelerator), "ours": OurLoop(size, accelerator)}
        difference = curves(loops, batches, 10 if gpu else 2)
        if args.compile:
            loops["compiled"] = OurLoop(size, accelerator, compiled=True)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for loop in loops.values():
            timed(loop, batches, 3 if gpu else 1, accelerator.device)
        for _ in range(args.repeats):
            for name, loop in loops.items():
                times[name].append(timed(loop, batches, steps, accelerator.device))
        seconds = {name: median(values) for name, values in times.items()}
        report(
            "repa_step",
            size=size,
            batch=batch_size,
            device=torch.cuda.get_device_name() if gpu else "cpu",
            **{f"{name}_images_per_second": batch_size / value for name, value in seconds.items()},
            ratio=seconds["plain"] / seconds["ours"],
            **({"ratio_compiled": seconds["plain"] / seconds["compiled"]} if args.compile else {}),
            target=">= 1.3 for S/2 on a GPU",
            loss_difference=difference,
        )
        del loops, accelerator


if __name__ == "__main__":
    main()
