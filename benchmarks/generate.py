"""Images of classes as MA-ZSC's code makes them, against `diffusers-repr generate`; the store; two processes.

    python -m benchmarks.generate [--count 16] [--steps 20] [--processes]

The code makes one image at a time, and loads the model anew for every class, in a process of its own; here the loads
of the former are in one process, so that imports are not counted. CPU seconds count, so that other work on the machine
does not; of two processes against one, by `--processes`, images a second as the command tells them.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from diffusers.utils.logging import disable_progress_bar
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline

from benchmarks.common import interleaved, median, report
from diffusers_repr import Denoiser
from diffusers_repr.store.image_store import write_images
from diffusers_repr.synthesis import ClassMaker, GuidanceSampler

MODEL, CLASSES, SCALE = "examples/models/digits-class-ddim", 10, 3.0


def pipeline():
    found = Denoiser.from_pretrained(MODEL)
    pipe = GuidedUnconditionalPipeline(found.model, DDIMScheduler.from_config(found.scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one_at_a_time(folder: Path, count: int, steps: int) -> None:
    """A load a class, a call an image, a file an image."""
    for label in range(CLASSES):
        pipe = pipeline()
        for number in range(count):
            call = {"class_labels": [label], "guidance_scale": SCALE, "num_inference_steps": steps}
            image = pipe(**call, generator=torch.Generator().manual_seed(number)).images[0]
            image.save(folder / f"{label}-{number}.png")


class Timed:
    """A maker whose calls are timed.

    Args:
        maker: It.
    """

    def __init__(self, maker: ClassMaker) -> None:
        self.maker, self.seconds = maker, 0.0

    def __call__(self, keys):
        since = time.process_time()
        try:
            return self.maker(keys)
        finally:
            self.seconds += time.process_time() - since


def ours(folder: Path, count: int, steps: int) -> float:
    """One load, batches, a store; gives the seconds that are no generation."""
    scales = GuidanceSampler(SCALE, SCALE)
    maker = ClassMaker(Denoiser.from_pipe(pipeline()), num_inference_steps=steps, scales=scales, name="digits")
    keys, timed = maker.keys(range(CLASSES), count), Timed(maker)
    since = time.process_time()
    write_images(tempfile.mkdtemp(dir=folder) + "/out", keys, timed, batch_size=32, progress=False)
    return (time.process_time() - since - timed.seconds) / timed.seconds


def launched(folder: Path, processes: int, count: int, steps: int) -> float:
    """Images a second of the command."""
    recipe = folder / f"{processes}.yaml"
    recipe.write_text(f"model: {MODEL}\nmethod: class\ncount: {count}\nguidance_scale: [3]\n"
                      f"num_inference_steps: {steps}\n")  # fmt: skip
    sizes = ["--batch_size", "32", "--shard_size", str(max(count * CLASSES // 8, 1)), "--quiet"]
    options = ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0",
               "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    options += ["--multi_gpu"] if processes > 1 else []
    command = ["-m", "accelerate.commands.launch", *options, "-m", "diffusers_repr", "generate", str(recipe)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command += ["--out", str(folder / f"of-{processes}"), "--device", "cpu", *sizes]
    told = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=True)
    found = re.search(r": ([\d.]+) a second", told.stdout)
    assert found is not None
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=16, help="images of each of ten classes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", action="store_true", help="also two processes against one")
    args = parser.parse_args()
    disable_progress_bar()
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        folder, size = Path(place), (args.count, args.steps)
        runs = {"one_at_a_time": lambda: one_at_a_time(folder, *size),
                "ours": lambda: shares.append(ours(folder, *size))}  # fmt: skip
        times = interleaved(runs, args.repeats, time.process_time)
        images = CLASSES * args.count
        alone, whole = median(times["one_at_a_time"]), median(times["ours"])
        settings = {"images": images, "steps": args.steps}
        report("generate", images_a_second=images / whole, one_at_a_time=images / alone, ratio=alone / whole,
               target=">= 5", **settings)  # fmt: skip
        report("generate_store", share=median(shares), target="< 0.05", **settings)
        if args.processes:
            one, two = (launched(folder, number, 8 * args.count, args.steps) for number in (1, 2))
            report(
                "generate_processes", one=one, two=two, ratio=two / one, cores=os.cpu_count(), target="1.7, reported"
            )


if __name__ == "__main__":
    main()
