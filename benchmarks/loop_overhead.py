"""What `train` costs beyond forward, backward and optimizer: its loop against these three alone, a SiT-S/2 step.

On a CPU, where a call ends when its work is done, the three are also clocked inside the loop: the rest is its
overhead, gradient norm and moving average included.
"""

import argparse
import tempfile
import time

import torch
from accelerate import Accelerator
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from benchmarks.common import report
from diffusers_repr import Denoiser, SiTTransformer2DModel
from diffusers_repr.objectives import DiffusionObjective
from diffusers_repr.training import TrainingConfig
from diffusers_repr.training.batches import make_batches
from diffusers_repr.training.run import Run


class Latents:
    """Random latents and labels in memory."""

    num_classes, class_names = 1000, None

    def __init__(self) -> None:
        self.values = torch.randn(2048, 4, 32, 32)

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: list[int]) -> dict:
        rows = torch.as_tensor(indices)
        return {"pixel_values": self.values[rows], "class_labels": rows % 1000}

    def on_device(self, batch: dict) -> dict:
        return dict(batch)

    def fingerprint(self) -> dict:
        return {}


def objective() -> DiffusionObjective:
    torch.manual_seed(0)
    return DiffusionObjective(Denoiser(SiTTransformer2DModel.from_size("S/2"), FlowMatchODEScheduler()))


def clocked(run: Run, steps) -> float:
    """Share of the time that `steps`, which returns it, spends outside forward, backward and optimizer."""
    inside = 0.0

    def clock(call):
        def timed(*args, **kwargs):
            nonlocal inside
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                inside += time.perf_counter() - start

        return timed

    run.objective.forward = clock(run.objective.forward)
    run.accelerator.backward = clock(run.accelerator.backward)
    for update in run.updates.values():
        update.inner.step = clock(update.inner.step)
    whole = steps()
    return 1 - inside / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=None, help="256 on a GPU, 4 on a CPU")
    parser.add_argument("--steps", type=int, default=None)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    batch_size, steps = args.batch or (256 if gpu else 4), args.steps or (50 if gpu else 3)
    accelerator = Accelerator(mixed_precision="bf16" if gpu else "no")
    data = Latents()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(output_dir=folder, train_batch_size=batch_size, max_train_steps=10**6)
        run = Run(objective(), config, accelerator, {})
        batches = make_batches(data, config, accelerator, 0, None, run.objective)

        bare = objective()
        model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters(), 1e-4, fused=True))
        given = next(batches)

        def ours() -> None:
            run.step([next(batches)], data.on_device)
            if run.progress.step % config.logging_steps == 0:
                run.take_averages()

        def three() -> None:
            accelerator.backward(model(given)["loss"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def timed(step) -> float:
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if gpu:
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / steps

        timed(ours), timed(three)
        pairs = [(timed(ours), timed(three)) for _ in range(5)]
        rest = None if gpu else clocked(run, lambda: timed(ours) * steps)
    shares = sorted(full / bare - 1 for full, bare in pairs)
    report(
        "loop_overhead",
        batch=batch_size,
        device=torch.cuda.get_device_name() if gpu else "cpu",
        seconds=min(full for full, _ in pairs),
        three_seconds=min(bare for _, bare in pairs),
        overhead=shares[len(shares) // 2],
        overhead_range=[float(f"{shares[0]:.3g}"), float(f"{shares[-1]:.3g}")],
        **({} if rest is None else {"overhead_clocked": rest}),
        target="< 0.02",
    )


if __name__ == "__main__":
    main()
