"""Masked images of a batch at once against a loop over its samples, each of whose levels is read back (MDM's code).

The loop cuts each image into patches, sorts its scores twice, gathers the patches that stay, puts zeros behind them
and gathers all back into their order. On a CPU reading back costs nothing, and what is saved is the small calls, less
and less of the whole as images grow; on a GPU the loop also waits for the device once a sample.
"""

import time

import torch
from torch import Tensor

from benchmarks.common import interleaved, median, report
from diffusers_repr.noise.patch_mask import mask_patches

BATCH, STEPS = 128, 1000  # the paper's batch
# Side, channels and patch: of the digits, of CIFAR-10, of the paper.
IMAGES = ((8, 1, 2), (32, 3, 4), (256, 3, 8))


def loop(x0: Tensor, times: Tensor, scores: Tensor, patch: int) -> Tensor:
    """One sample after another."""
    made = torch.zeros_like(x0)
    for n in range(len(x0)):
        share = int(times[n]) / STEPS
        patches = torch.nn.functional.unfold(x0[n : n + 1], patch, stride=patch).transpose(1, 2)
        keep = int(patches.shape[1] * (1 - share))
        order = scores[n : n + 1].flatten(1).argsort(dim=1)
        back = order.argsort(dim=1)
        index = order[:, :keep, None].expand(-1, -1, patches.shape[2])
        kept = patches.gather(1, index)
        zeros = torch.zeros(1, patches.shape[1] - keep, patches.shape[2], device=x0.device)
        shuffled = torch.cat([kept, zeros], dim=1)
        restored = shuffled.gather(1, back[:, :, None].expand(-1, -1, patches.shape[2]))
        made[n] = torch.nn.functional.fold(restored.transpose(1, 2), x0.shape[2:], patch, stride=patch)[0]
    return made


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    for side, channels, patch in IMAGES:
        x0 = torch.rand(BATCH, channels, side, side, generator=generator).to(device)
        scores = torch.rand(BATCH, side // patch, side // patch, generator=generator).to(device)
        times = torch.randint(STEPS, (BATCH,), generator=generator).to(device)
        seen = {}

        def one_by_one(x0=x0, times=times, scores=scores, patch=patch, seen=seen) -> None:
            seen["loop"] = loop(x0, times, scores, patch)

        def at_once(x0=x0, times=times, scores=scores, patch=patch, seen=seen) -> None:
            seen["at once"] = mask_patches(x0, times, scores, patch, STEPS)
            if device == "cuda":
                torch.cuda.synchronize()

        clock = time.perf_counter if device == "cuda" else time.process_time
        spent = interleaved({"loop": one_by_one, "at once": at_once}, repeats=9, clock=clock)
        slow, fast = median(spent["loop"]), median(spent["at once"])
        report("patch_masks", side=side, patches=scores[0].numel(), batch=BATCH, device=device, loop_seconds=slow,
               seconds=fast, ratio=slow / fast, target=">= 10",
               difference=float((seen["loop"] - seen["at once"]).abs().max()))  # fmt: skip


if __name__ == "__main__":
    main()
