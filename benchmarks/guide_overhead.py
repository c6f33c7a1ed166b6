"""`guide` with all weights 0 around a sampling run of an SD 1.5-size pipeline, against the run alone."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from benchmarks.common import interleaved, median, report, sd15_unet
from diffusers_repr import PAG, SAG, guide


@torch.no_grad()
def main(size: int = 32, steps: int = 3, repeats: int = 9) -> None:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    pipe = StableDiffusionPipeline(**parts, unet=sd15_unet(), scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": torch.randn(1, 77, 768),
        "latents": torch.randn(1, 4, size, size),
        "height": size * 8,
        "width": size * 8,
        "num_inference_steps": steps,
        "guidance_scale": 1.0,
        "output_type": "latent",
    }

    def alone() -> torch.Tensor:
        return pipe(**call).images

    def guided() -> torch.Tensor:
        with guide(pipe, [PAG(0.0), SAG(0.0)]):
            return pipe(**call).images

    times = interleaved({"alone": alone, "guided": guided}, repeats)
    # Pairs that ran one after the other: what is slow about the machine hits both.
    ratios = [after / before for before, after in zip(times["alone"], times["guided"], strict=True)]
    report(
        "guide_overhead",
        steps=steps,
        ours_s=median(times["guided"]),
        peer_s=median(times["alone"]),
        ratio=median(ratios),
        target="< 1.01",
        lowest=min(ratios),
        highest=max(ratios),
        bit_equal=torch.equal(alone(), guided()),
    )


if __name__ == "__main__":
    main()
