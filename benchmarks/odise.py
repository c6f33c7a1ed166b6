"""The maps that ODISE reads in an image of six windows: in one batch with early exits, against one by one and whole.

    python -m benchmarks.odise

`whole` runs, window by window, the VAE's encoder, the U-Net and the VAE's decoder to their ends, with hooks, as the
reference does. A random U-Net and VAE of the form of Stable Diffusion's, a tenth and an eighth as wide, windows of 256
pixels in an image of 512 x 672. Both read the same maps. The text encoder, which the reference runs each time, is left
out of both.
"""

from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from benchmarks.common import interleaved, median, report
from diffusers_repr import Denoiser
from diffusers_repr.capture import capture
from diffusers_repr.features.taps import _noise_like, find_taps, read_taps
from diffusers_repr.features.windows import cut_windows, window_places

SIZE, SIDE, REPEATS = (512, 672), 256, 3


def made() -> Denoiser:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, block_out_channels=(32, 64, 128, 128), cross_attention_dim=64, attention_head_dim=8,
        norm_num_groups=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, norm_num_groups=8, latent_channels=4,
    )  # fmt: skip
    denoiser = Denoiser(unet.eval(), DDPMScheduler(), vae.eval())
    # Stands for a pipeline: what is read of it is that it has text, and where it runs.
    denoiser.pipe = SimpleNamespace(components={"text_encoder": True}, _execution_device="cpu")
    text = torch.randn(1, 77, 64)
    denoiser.condition = lambda prompt, batch, size: SimpleNamespace(  # type: ignore[method-assign]
        kwargs=lambda: {"encoder_hidden_states": text.expand(batch, -1, -1)}
    )
    return denoiser


@torch.no_grad()
def whole(denoiser: Denoiser, windows: Tensor) -> list[Tensor]:
    """Window by window, every part to its end."""
    taps, vae, rows = find_taps(denoiser), denoiser.vae, []
    paths = {part: [tap.path for tap in taps if tap.part == part] for part in ("encoder", "unet", "decoder")}
    for window in windows.split(1):
        with capture(vae.encoder, paths["encoder"], "input", stop_early=False) as encoder:
            latents = vae.encode(window).latent_dist.mode() * vae.config.scaling_factor
        x_t = denoiser.add_noise(latents, 0, _noise_like(denoiser, latents))
        with capture(denoiser.model, paths["unet"], "input", stop_early=False) as unet:
            denoiser.predict(x_t, 0, denoiser.condition("", batch=1, size=(SIDE, SIDE)).kwargs())
        with capture(vae.decoder, paths["decoder"], "input", stop_early=False) as decoder:
            vae.decode(latents / vae.config.scaling_factor)
        tapes = {"encoder": encoder, "unet": unet, "decoder": decoder}
        rows.append([tapes[tap.part][tap.path] for tap in taps])
    return [torch.cat(maps) for maps in zip(*rows, strict=True)]


@torch.no_grad()
def main() -> None:
    denoiser, image = made(), torch.rand(1, 3, *SIZE) * 2 - 1
    windows = cut_windows(image, window_places(SIZE, SIDE), SIDE)
    taps, found = find_taps(denoiser), {}
    ways = {"ours": lambda: read_taps(denoiser, windows, taps), "whole": lambda: whole(denoiser, windows)}
    times = interleaved({way: lambda way=way: found.update({way: ways[way]()}) for way in ways}, REPEATS)
    pairs = list(zip(found["ours"], found["whole"], strict=True))
    report(
        "odise",
        windows=len(windows),
        **{f"seconds_{way}": median(values) for way, values in times.items()},
        time_ratio=median(times["whole"]) / median(times["ours"]),
        max_difference=max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs),
        target=">= 1.6",
    )


if __name__ == "__main__":
    main()
