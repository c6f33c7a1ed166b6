"""Keys and values of retrieved neighbours made once a run, against anew in each step; equal bit for bit.

A U-Net of Stable Diffusion 1.5's size, whose tokens are the neighbours (k = 4, RDM) or a text's 77, under
classifier-free guidance.
"""

import argparse
import time

import torch
from diffusers import DDIMScheduler
from diffusers_repr.pipelines.retrieval_diffusion import RetrievalDiffusionPipeline

from benchmarks.common import interleaved, median, report, sd15_unet


@torch.no_grad()
def compare(pipe: RetrievalDiffusionPipeline, count: int, size: int, steps: int, repeats: int) -> None:
    call = {
        "tokens": torch.randn(1, count, 768),
        "latents": torch.randn(1, 4, size, size),
        "guidance_scale": 2.0,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    runs = {
        "kept": lambda: pipe(**call, cache_key_values=True).images,
        "anew": lambda: pipe(**call, cache_key_values=False).images,
    }
    equal = torch.equal(runs["kept"](), runs["anew"]())
    times = interleaved(runs, repeats, time.process_time)
    kept, anew = median(times["kept"]), median(times["anew"])
    report(
        f"retrieval_keys_{count}_tokens",
        kept_s=kept,
        anew_s=anew,
        ratio=kept / anew,
        target="reported",
        bit_equal=equal,
        latents=size,
        steps=steps,
        repeats=repeats,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=8, help="side of the latents")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    pipe = RetrievalDiffusionPipeline(sd15_unet(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    for count in (4, 77):
        compare(pipe, count, args.size, args.steps, args.repeats)


if __name__ == "__main__":
    main()
