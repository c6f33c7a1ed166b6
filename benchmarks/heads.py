"""Features of GDC, DifFormer and DifFeed on a network laid out as ADM's, against the passes of the papers' code.

The code runs the whole network for a layer in its decoder: once, once for each of three levels, or twice. Here each
forward ends after the last layer that is wanted, levels are one batch, and the second forward of DifFeed begins where
the first layer is fed. A quarter of ADM's channels at 128 px: shares of the work are alike. CPU seconds count, so that
other work on the machine does not. At the end, a step of an attention head whose features are computed anew against
one whose features are kept.
"""

import time

import torch
from torch.nn import functional

from benchmarks.common import interleaved, median, report
from diffusers_repr import Denoiser
from diffusers_repr.capture import FeedbackPasses, capture
from diffusers_repr.heads import AttentionHead, FeedbackHead

GDC, FUSED = "up_blocks.1.attentions.1", ["mid_block", "up_blocks.1.attentions.1", "up_blocks.3.resnets.1"]
LEVELS = (90, 150, 300)


def adm_denoiser(pixels: int, width: int):
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=pixels, out_channels=6, block_out_channels=tuple(width * k for k in (1, 1, 2, 2, 4, 4)),
        layers_per_block=2, attention_head_dim=64, upsample_type="resnet", downsample_type="resnet",
        down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32,
    )  # fmt: skip
    return Denoiser(unet.eval().requires_grad_(False), DDPMScheduler())


def whole(unet, x, timestep, layers, fed=()):
    """What layers return in a full forward, with `fed` added to the output of some."""
    found, handles = {}, []
    for path, value in dict(fed).items():

        def add(module, args, output, value=value):
            sized = functional.interpolate(value, output.shape[2:], mode="bilinear", align_corners=False)
            return output + sized

        handles.append(unet.get_submodule(path).register_forward_hook(add))  # fmt: skip
    for path in layers:

        def keep(module, args, output, path=path):
            found[path] = output

        handles.append(unet.get_submodule(path).register_forward_hook(keep))  # fmt: skip
    unet(x, timestep)
    for handle in handles:
        handle.remove()
    return found


def main(pixels: int = 128, width: int = 64, repeats: int = 3) -> None:
    denoiser = adm_denoiser(pixels, width)
    unet, x = denoiser.model, torch.randn(1, 3, pixels, pixels)
    noisy = {t: denoiser.add_noise(x, denoiser.level(t), torch.randn_like(x)) for t in LEVELS}
    stacked = torch.cat(list(noisy.values())), torch.tensor(LEVELS)
    size = [[pixels // 16] * 2]
    head = FeedbackHead([GDC], [4 * width], size, 10, width=256, **FeedbackHead.options_for(denoiser)).eval()
    sources = list(head.config["sources"])
    passes = FeedbackPasses(unet, sources, list(head.config["targets"]), [GDC])

    def early(layers, x_t, timestep):
        with capture(unet, layers) as tape:
            unet(x_t, timestep)
        return tape.features

    def their_feedback():
        first = whole(unet, noisy[150], 150, sources)
        return whole(unet, noisy[150], 150, [GDC], head.feedback(first))

    def our_feedback():
        def run():
            unet(noisy[150], 150)

        first = passes.first(run)
        return passes.second(run, first, head.feedback(first.features))

    runs = {
        "gdc": (lambda: whole(unet, noisy[150], 150, [GDC]), lambda: early([GDC], noisy[150], 150), 2.5),
        "difformer": (
            lambda: [whole(unet, noisy[t], t, FUSED) for t in LEVELS],
            lambda: early(FUSED, *stacked), 2.0,
        ),
        "diffeed": (their_feedback, our_feedback, 1.5),
    }  # fmt: skip
    with torch.no_grad():
        for name, (theirs, ours, target) in runs.items():
            times = interleaved({"theirs": theirs, "ours": ours}, repeats, time.process_time)
            a, b = theirs(), ours()
            if name == "difformer":
                a = {k: torch.cat([level[k] for level in a]) for k in FUSED}
            gap = max(float((a[k] - b[k]).abs().max()) for k in b)
            peer, own = median(times["theirs"]), median(times["ours"])
            report(f"heads_{name}", pixels=pixels, ours_s=own, peer_s=peer, ratio=peer / own, target=f">= {target}",
                   largest_difference=gap)  # fmt: skip
    kept = early([GDC], noisy[150], 150)
    small = AttentionHead([GDC], [4 * width], size, 10, width=256)
    optimizer = torch.optim.SGD(small.parameters(), 0.01)

    def step(features):
        optimizer.zero_grad()
        functional.cross_entropy(small(features), torch.tensor([1])).backward()
        optimizer.step()

    def anew():
        with torch.no_grad():
            features = early([GDC], noisy[150], 150)
        step(features)

    times = interleaved({"anew": anew, "kept": lambda: step(kept)}, repeats, time.process_time)
    peer, own = median(times["anew"]), median(times["kept"])
    report("heads_kept_features", pixels=pixels, ours_s=own, peer_s=peer, ratio=peer / own, target="reported")


if __name__ == "__main__":
    main()
