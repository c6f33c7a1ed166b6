"""Keys and values of retrieved neighbours made once a run, against anew in each step; equal bit for bit.

A latent U-Net of three stages, 128, 256 and 512 channels, with cross-attention of RDM's width 512 in each, under
classifier-free guidance; tokens: 4 (RDM's k), 20 (what it stores), 77 (a text's).
"""

import argparse
import time

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers_repr.pipelines.retrieval_diffusion import RetrievalDiffusionPipeline

from benchmarks.common import interleaved, median, report

WIDTH = 512


@torch.no_grad()
def compare(pipe: RetrievalDiffusionPipeline, count: int, size: int, steps: int, repeats: int) -> None:
    call = {
        "tokens": torch.randn(1, count, WIDTH),
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
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(128, 256, 512),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
    )
    pipe = RetrievalDiffusionPipeline(unet.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    for count in (4, 20, 77):
        compare(pipe, count, args.size, args.steps, args.repeats)


if __name__ == "__main__":
    main()
