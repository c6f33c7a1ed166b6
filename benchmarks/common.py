"""What the benchmarks share: an SD 1.5-size U-Net and VAE with random weights, a stopwatch, one line of JSON."""

import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

UP_BLOCK = "up_blocks.1"


def sd15_unet() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().requires_grad_(False)


def sd15_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return (
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        )
        .eval()
        .requires_grad_(False)
    )


def sd15_denoiser():
    from diffusers import DDIMScheduler

    from diffusers_repr import Denoiser

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return Denoiser(sd15_unet(), scheduler, sd15_vae())


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


def interleaved(
    runs: dict[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run, taken in turn so that a slow moment of the machine hits all; one warm-up each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, clock))
    return times


def report(benchmark: str, **values: object) -> None:
    values = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    machine = {"threads": torch.get_num_threads(), "processor": platform.machine(), "torch": torch.__version__}
    print(json.dumps({"benchmark": benchmark, **values, **machine}), flush=True)


median = statistics.median
