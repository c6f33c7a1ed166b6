"""The alignment loss, forward and backward, of one vectorised expression against a loop over samples and encoders."""

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved, median, report
from diffusers_repr.objectives import alignment_loss

SHAPE = (64, 256, 768)  # samples, tokens, channels


def looped(projected: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """Encoder by encoder and sample by sample, normalised first: the structure of the paper's code."""
    total, samples = torch.zeros(()), len(targets[0])
    for target, states in zip(targets, projected, strict=True):
        for z, h in zip(target, states, strict=True):
            h, z = F.normalize(h, dim=-1), F.normalize(z, dim=-1)
            total = total + (-(z * h).sum(dim=-1)).mean()
    return total / (len(targets) * samples)


def vectorised(projected: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([alignment_loss(h, z) for h, z in zip(projected, targets, strict=True)]).mean()


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    states, target = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    states.requires_grad_()
    grads = {}

    def run(loss):
        def once():
            states.grad = None
            loss([states], [target]).backward()
            grads[loss] = states.grad

        return once

    times = interleaved({"loop": run(looped), "vectorised": run(vectorised)}, repeats=31)
    loop, fast = (median(times[name]) for name in ("loop", "vectorised"))
    with torch.no_grad():
        difference = looped([states], [target]) - vectorised([states], [target])
    report(
        "repa_loss",
        shape=list(SHAPE),
        loop_seconds=loop,
        seconds=fast,
        ratio=loop / fast,
        target=">= 3",
        loss_difference=abs(float(difference)),
        gradient_difference=float((grads[looped] - grads[vectorised]).abs().max()),
    )


if __name__ == "__main__":
    main()
