"""PAG by `guide` against diffusers' own way, equal outputs: the lanes shared up to the first perturbed layer.

SD 1.5-size U-Net: `StableDiffusionPAGPipeline`, whole sampling runs. DiT-XL/2-size transformer, which has no such
pipeline: diffusers' processors on the batch with the lanes concatenated, at the network's call.
"""

import sys

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0

from benchmarks.common import interleaved, median, report, sd15_unet
from diffusers_repr import PAG, Denoiser, guide, list_layers

SCALE = 3.0


def share_before(denoiser: Denoiser, attention: str) -> float:
    """Share of the forward's FLOPs spent before the block that holds `attention` has begun its attention."""
    table = list_layers(denoiser, detail="all")
    own = next(at for at, layer in enumerate(table) if layer.path.startswith(attention.rsplit(".", 1)[0]))
    return table[own - 1].flops_share


def summary(name: str, times: dict[str, list[float]], share: float, lanes: int, slack: float, worst: float) -> None:
    ours, theirs = median(times["ours"]), median(times["theirs"])
    target = (lanes - share) / lanes + slack
    report(
        name,
        ours_s=ours,
        peer_s=theirs,
        ratio=ours / theirs,
        target=f"<= {target:.3f}",
        share_before_first_perturbed_layer=share,
        lanes=lanes,
        max_difference=worst,
        repeats=len(times["ours"]),
    )


@torch.no_grad()
def sd15(size: int, repeats: int, steps: int) -> None:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    parts |= {"unet": sd15_unet(), "scheduler": scheduler}
    plain = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pag = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False)
    share = share_before(Denoiser.from_pipe(plain), "mid_block.attentions.0.transformer_blocks.0.attn1")
    for pipe in (plain, pag):
        pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt_embeds": torch.randn(1, 77, 768),
        "negative_prompt_embeds": torch.randn(1, 77, 768),
        "latents": torch.randn(1, 4, size, size),
        "height": size * 8,
        "width": size * 8,
        "num_inference_steps": steps,
        "output_type": "latent",
    }
    for lanes, cfg in ((2, 1.0), (3, 5.0)):

        def ours(cfg: float = cfg) -> torch.Tensor:
            with guide(plain, PAG(SCALE)):
                return plain(**call, guidance_scale=cfg).images

        def theirs(cfg: float = cfg) -> torch.Tensor:
            return pag(**call, guidance_scale=cfg, pag_scale=SCALE).images

        times = interleaved({"ours": ours, "theirs": theirs}, repeats)
        worst = (ours() - theirs()).abs().max().item()
        summary(f"pag_sd15_{lanes}_lanes", times, share, lanes, 0.05, worst)


@torch.no_grad()
def dit(repeats: int) -> None:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(sample_size=32).eval().requires_grad_(False)  # the default is XL/2
    denoiser = Denoiser(model, DDIMScheduler())
    path = f"transformer_blocks.{len(model.transformer_blocks) // 2}.attn1"
    share = share_before(denoiser, path)
    attention = model.get_submodule(path)
    own = attention.processor
    x, t = torch.randn(1, 4, 32, 32), torch.tensor([500])
    # The pipeline is what tells the conditional rows from the null ones; its loop is not run.
    pipe = DiTPipeline(model, AutoencoderKL(), denoiser.scheduler)
    for lanes, labels in ((2, [207]), (3, [207, 1000])):
        rows = x.expand(lanes - 1, -1, -1, -1)
        given = torch.tensor(labels)

        def ours(rows: torch.Tensor = rows, given: torch.Tensor = given) -> torch.Tensor:
            with guide(pipe, PAG(SCALE, layers=path)):
                return model(rows, t.expand(len(rows)), given).sample[:, :4]

        def theirs(rows: torch.Tensor = rows, given: torch.Tensor = given) -> torch.Tensor:
            """Null, condition, perturbed, as diffusers' PAG pipelines have it."""
            alone = len(rows) == 1
            attention.processor = PAGIdentitySelfAttnProcessor2_0() if alone else PAGCFGIdentitySelfAttnProcessor2_0()
            try:
                every = torch.cat([rows, rows[:1]])
                out = model(every, t.expand(len(every)), torch.cat([given.flip(0), given[:1]])).sample[:, :4]
            finally:
                attention.processor = own
            return (out[:-1] + SCALE * (out[-2:-1] - out[-1:])).flip(0)

        times = interleaved({"ours": ours, "theirs": theirs}, repeats)
        worst = (ours() - theirs()).abs().max().item()
        summary(f"pag_dit_xl_{lanes}_lanes", times, share, lanes, 0.08, worst)


def main() -> None:
    size, repeats = (int(value) for value in (sys.argv[1:] or ["64", "7"]))
    dit(repeats)
    sd15(size, repeats, 1)


if __name__ == "__main__":
    main()
