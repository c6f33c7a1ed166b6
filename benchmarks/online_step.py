"""A step of online guidance's second stage, against one whose moving average runs the whole network, as the paper's.

    python -m benchmarks.online_step [--blocks 13] [--batch 8] [--repeats 5]

Both ask the same average for the same conditions of the same batch, and are equal in what they get. A step is forward,
backward, AdamW and the average.
"""

import argparse
import time
from contextlib import contextmanager
from unittest import mock

import torch
from accelerate import Accelerator
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from benchmarks.common import interleaved, median, report
from diffusers_repr import Denoiser, UViTTransformer2DModel
from diffusers_repr.assign import SinkhornAssigner
from diffusers_repr.capture import capture
from diffusers_repr.objectives import OnlineGuidanceObjective, online
from diffusers_repr.training import TrainingConfig
from diffusers_repr.training.run import Run


@contextmanager
def whole_network(model, layers):
    """`capture` that lets the forward run to its end."""
    with capture(model, layers, stop_early=False) as tape:
        yield tape


def make_run(blocks: int, width: int, accelerator: Accelerator) -> Run:
    """In the second stage."""
    torch.manual_seed(0)
    network = UViTTransformer2DModel(
        sample_size=32, num_layers=blocks, hidden_size=width, num_attention_heads=width // 64, condition_dim=width,
        class_token=True,
    )  # fmt: skip
    denoiser = Denoiser(network, FlowMatchODEScheduler())
    objective = OnlineGuidanceObjective(denoiser, SinkhornAssigner(width, 300, output="vector"), 1)
    run = Run(objective, TrainingConfig(learning_rate=1e-4), accelerator, {})
    objective.on_step_end(1, run.ema)
    run.progress.step = 1
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=13)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=None, help="images a step; 256 on a GPU, 4 on a CPU")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    count = args.batch or (256 if gpu else 4)
    accelerator = Accelerator(mixed_precision="bf16" if gpu else "no")
    run, device = make_run(args.blocks, args.width, accelerator), accelerator.device
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(count, 4, 32, 32, generator=generator) for name in ("pixel_values", "noise")}
    batch = {name: value.to(device) for name, value in values.items()}
    batch["time"] = 1000 * torch.rand(count, generator=generator)

    def step() -> None:
        run.step([dict(batch)], lambda given: given)
        if gpu:
            torch.cuda.synchronize()

    def whole() -> None:
        with mock.patch.object(online, "capture", whole_network):
            step()

    noisy = run.objective.noised(batch)
    ours = run.objective.assigned(noisy)
    with mock.patch.object(online, "capture", whole_network):
        equal = torch.equal(ours, run.objective.assigned(noisy))
    # On a CPU what the step itself takes, whatever else runs there.
    clock = time.perf_counter if gpu else time.process_time
    found = interleaved({"ours": step, "whole": whole}, args.repeats, clock)
    times = {name: median(values) for name, values in found.items()}
    report(
        "online_step",
        blocks=args.blocks,
        width=args.width,
        batch=count,
        device=torch.cuda.get_device_name() if gpu else "cpu",
        seconds=times["ours"],
        ratio=times["whole"] / times["ours"],
        target=">= 1.1",
        equal_conditions=equal,
    )


if __name__ == "__main__":
    main()
