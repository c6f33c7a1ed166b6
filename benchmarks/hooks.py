"""Capture of every block of an SD 1.5-size U-Net with pooling, against the bare forward."""

import torch

from benchmarks.common import interleaved, median, report, sd15_denoiser
from diffusers_repr import list_layers
from diffusers_repr.capture import capture
from diffusers_repr.features import pool


def main(pixels: int = 256, repeats: int = 15) -> None:
    denoiser = sd15_denoiser()
    unet, side = denoiser.model, pixels // 8
    layers = {layer.path: (layer.grid, layer.text_tokens) for layer in list_layers(denoiser, pixels)}
    inputs = {
        "sample": torch.randn(1, 4, side, side),
        "timestep": torch.tensor([261]),
        "encoder_hidden_states": torch.randn(1, 77, 768),
    }

    def bare() -> None:
        unet(**inputs)

    def captured() -> None:
        with capture(unet, list(layers), stop_early=False, transform=lambda x, path: pool(x, "mean", layers[path])):
            unet(**inputs)

    with torch.no_grad():
        times = interleaved({"bare": bare, "captured": captured}, repeats)
    ours, peer = median(times["captured"]), median(times["bare"])
    best = min(times["captured"]) / min(times["bare"])
    report(
        "hooks",
        pixels=pixels,
        layers=len(layers),
        ours_s=ours,
        peer_s=peer,
        ratio=ours / peer,
        ratio_of_best=best,
        target="<= 1.05",
    )


if __name__ == "__main__":
    main()
