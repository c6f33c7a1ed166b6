"""A DIFT-like extraction (ensemble 8, `up_blocks.1`, SD 1.5 size) against the plain way and against nnsight."""

import torch

from benchmarks.common import UP_BLOCK, interleaved, median, report, sd15_denoiser
from diffusers_repr import FeatureExtractor
from diffusers_repr.features.noise_policy import NoiseSource, pixel_keys

ENSEMBLE, TIMESTEP = 8, 261


def main(pixels: int = 256, repeats: int = 2) -> None:
    from nnsight import NNsight

    denoiser = sd15_denoiser()
    unet, vae = denoiser.model, denoiser.vae
    image = torch.rand(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    text = {"encoder_hidden_states": torch.randn(1, 77, 768)}
    extractor = FeatureExtractor(denoiser, [UP_BLOCK], TIMESTEP, ensemble_size=ENSEMBLE, image_size="keep")
    level = denoiser.level(TIMESTEP)
    side = pixels // 8
    noise = NoiseSource("per_image", 0).draw(pixel_keys(2 * image - 1) * ENSEMBLE, range(ENSEMBLE), (4, side, side))

    def network_inputs(copies: torch.Tensor) -> dict[str, torch.Tensor]:
        latents = vae.encode(2 * copies - 1).latent_dist.mode() * vae.config.scaling_factor
        return {
            "sample": level.alpha * latents + level.sigma * noise,
            "timestep": torch.full((ENSEMBLE,), TIMESTEP),
            "encoder_hidden_states": text["encoder_hidden_states"].expand(ENSEMBLE, -1, -1),
        }

    def ours() -> torch.Tensor:
        return extractor(image, embeddings=text)[UP_BLOCK]

    def plain() -> torch.Tensor:
        kept = []
        handle = unet.get_submodule(UP_BLOCK).register_forward_hook(lambda m, a, out: kept.append(out))
        unet(**network_inputs(image.repeat(ENSEMBLE, 1, 1, 1)))
        handle.remove()
        return kept[0].mean(0, keepdim=True)

    traced = NNsight(unet)

    def with_nnsight() -> torch.Tensor:
        inputs = network_inputs(image.repeat(ENSEMBLE, 1, 1, 1))
        with traced.trace(**inputs) as tracer:
            kept = traced.up_blocks[1].output.save()
            tracer.stop()
        return kept.mean(0, keepdim=True)

    with torch.no_grad():
        times = interleaved({"ours": ours, "plain": plain, "nnsight": with_nnsight}, repeats)
        results = ours(), plain(), with_nnsight()
    mine, peer, other = (median(times[name]) for name in ("ours", "plain", "nnsight"))
    report(
        "extraction",
        pixels=pixels,
        ensemble=ENSEMBLE,
        ours_s=mine,
        peer_s=peer,
        nnsight_s=other,
        ratio=peer / mine,
        ratio_nnsight=other / mine,
        target=">= 2.0 over the plain way",
        max_difference=float((results[0] - results[1]).abs().max()),
        max_difference_nnsight=float((results[0] - results[2]).abs().max()),
        peer="forward hook on a full forward, VAE per ensemble member; nnsight stops early, VAE per member",
    )


if __name__ == "__main__":
    main()
