"""Seconds from a restart to the end of its first step: at step 1 of a run, and at step 1,000,000.

The data set is map-style and as long as ImageNet. The late checkpoint is the early one moved: equal weights, another
place. The peer finds its place as accelerate's `skip_first_batches` does, by drawing the indices of every batch before
it, no image read; a part of it is timed and extrapolated.
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.utils.data import BatchSampler, RandomSampler

from benchmarks.common import median, report
from diffusers_repr import Denoiser
from diffusers_repr.data import TrainData
from diffusers_repr.objectives import DiffusionObjective
from diffusers_repr.training import TrainingConfig, train
from diffusers_repr.training.checkpoints import list_checkpoints, read_state, read_tensors, save_checkpoint

ROWS, BATCH, LATE = 1_281_167, 256, 1_000_000
TIMED = 5_000  # batches of the peer


class Noise(TrainData):
    """As many rows as ImageNet, made when they are read."""

    class_names = None

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": torch.full((1, 8, 8), index % 255, dtype=torch.uint8)}

    def on_device(self, batch: dict) -> dict:
        return {"pixel_values": batch["pixel_values"] / 127.5 - 1}

    def fingerprint(self) -> dict:
        return {"rows": ROWS}


class Watched(DiffusionObjective):
    """Knows when its last step ended."""

    ended = 0.0

    def on_step_end(self, step: int, ema: object) -> None:
        self.ended = time.perf_counter()


def first_step(folder: Path, step: int) -> float:
    """Seconds from the call of `train` to the end of this step."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, **blocks)
    objective = Watched(Denoiser.from_pipe(DDPMPipeline(unet, DDPMScheduler())))
    config = TrainingConfig(
        output_dir=str(folder), train_batch_size=BATCH, max_train_steps=step, eval_batch_size=0, logging_steps=10**9
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(objective, Noise(), config)
    return objective.ended - start


def move(folder: Path, step: int, target: Path) -> None:
    """The newest checkpoint of a folder, as if it were of another step."""
    newest = list_checkpoints(folder)[-1]
    state = {k: v for k, v in read_state(newest).items() if k not in ("step", "files", "checksum")}
    state["progress"]["step"] = step
    tensors = {name: read_tensors(newest, name) for name in ("model", "ema", "optimizer")}
    save_checkpoint(target, step, tensors, state, keep=1)


def skipped(step: int) -> float:
    """The peer's seconds to find the place, extrapolated; a shuffle of an epoch is part of it."""
    start = time.perf_counter()
    batches = iter(BatchSampler(RandomSampler(range(ROWS)), BATCH, drop_last=True))
    for _ in range(TIMED):
        next(batches)
    return (time.perf_counter() - start) / TIMED * step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    times: dict[int, list[float]] = {1: [], LATE: []}
    with tempfile.TemporaryDirectory() as place:
        first_step(Path(place) / "base", 1)
        for repeat in range(args.repeats):
            for step, measured in times.items():
                folder = Path(place) / f"{step}-{repeat}"
                move(Path(place) / "base", step, folder)
                measured.append(first_step(folder, step + 1))
    early, late = (median(measured) for measured in times.values())
    report(
        "resume",
        rows=ROWS,
        batch=BATCH,
        step=LATE,
        seconds_at_step_1=early,
        seconds_at_late_step=late,
        ratio=late / early,
        peer_seconds_to_skip=skipped(LATE),
        peer_is_extrapolated=True,
        target="ratio about 1: no growth with the position",
    )


if __name__ == "__main__":
    main()
