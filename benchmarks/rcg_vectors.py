"""RCG's vectors of a whole evaluation set, drawn at once, against one batch of images at a time; a report.

    python -m benchmarks.rcg_vectors [--count 1024] [--batch 64] [--steps 25]

The network is RCG's own size, 12 blocks of width 1536 on 256 channels.
"""

import argparse
import time

import torch
from diffusers import DDIMScheduler
from diffusers_repr.pipelines.rcg import RCGPipeline

from benchmarks.common import interleaved, median, report
from diffusers_repr.models import RepresentationMLPModel
from diffusers_repr.models.convert_representation import SCHEDULER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    network = RepresentationMLPModel(256).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pipe = RCGPipeline(network, DDIMScheduler(**SCHEDULER))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(args.count, 256)

    def draw(size):
        parts = [
            pipe.sample_representations(latents=noise[at : at + size], num_inference_steps=args.steps, eta=0.0)
            for at in range(0, args.count, size)
        ]
        return torch.cat(parts)

    far = float((draw(args.count) - draw(args.batch)).abs().max())
    runs = {"whole": lambda: draw(args.count), "by_batch": lambda: draw(args.batch)}
    times = interleaved(runs, args.repeats, time.process_time)
    whole, by_batch = median(times["whole"]), median(times["by_batch"])
    settings = {"count": args.count, "batch": args.batch, "steps": args.steps}
    report("rcg_vectors", ratio=by_batch / whole, whole=whole, by_batch=by_batch, differ=far, **settings)


if __name__ == "__main__":
    main()
