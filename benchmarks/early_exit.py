"""Early exit at `up_blocks.1` of an SD 1.5-size U-Net against the moment a full forward finishes that layer."""

import time

import torch

from benchmarks.common import UP_BLOCK, interleaved, median, report, sd15_denoiser
from diffusers_repr import list_layers
from diffusers_repr.capture import capture


def main(pixels: int = 256, repeats: int = 9) -> None:
    denoiser = sd15_denoiser()
    unet, side = denoiser.model, pixels // 8
    inputs = {
        "sample": torch.randn(1, 4, side, side),
        "timestep": torch.tensor([261]),
        "encoder_hidden_states": torch.randn(1, 77, 768),
    }
    moments: list[float] = []
    outputs: list[torch.Tensor] = []

    def full() -> None:
        def note(module, args, output):
            moments.append(time.perf_counter() - start)
            outputs.append(output)

        handle = unet.get_submodule(UP_BLOCK).register_forward_hook(note)
        start = time.perf_counter()
        unet(**inputs)
        handle.remove()

    def early() -> torch.Tensor:
        with capture(unet, [UP_BLOCK]) as tape:
            unet(**inputs)
        return tape[UP_BLOCK]

    with torch.no_grad():
        times = interleaved({"full": full, "early": early}, repeats)
        equal = torch.equal(early(), outputs[-1])
    share = next(layer.flops_share for layer in list_layers(denoiser, pixels) if layer.path == UP_BLOCK)
    ours, moment, whole = median(times["early"]), median(moments[1:]), median(times["full"])
    report(
        "early_exit",
        pixels=pixels,
        ours_s=ours,
        peer_s=moment,
        ratio=ours / moment,
        target="<= 1.05",
        full_forward_s=whole,
        share_of_full=ours / whole,
        flops_share=share,
        bit_equal=equal,
    )


if __name__ == "__main__":
    main()
