"""Clusters as a condition: a lookup of their ids against one-hot rows through a linear layer, as the paper's code."""

import time

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved, median, report

CLUSTERS, WIDTH, BATCH = 5000, 256, 160  # of self-guided diffusion on ImageNet 64: K, d / 2, images


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLUSTERS, WIDTH, generator=generator).requires_grad_()
    ids = torch.randint(CLUSTERS, (BATCH,), generator=generator)
    upstream = torch.randn(BATCH, WIDTH, generator=generator)
    seen = {}

    def lookup() -> torch.Tensor:
        return F.embedding(ids, weight)

    def one_hot() -> torch.Tensor:
        return F.linear(F.one_hot(ids, CLUSTERS).float(), weight.T)

    def step(condition):
        def once():
            weight.grad = None
            made = condition()
            made.backward(upstream)
            seen[condition] = made.detach(), weight.grad

        return once

    runs = {"one_hot": step(one_hot), "lookup": step(lookup)}
    times = interleaved(runs, repeats=31, clock=time.process_time)
    slow, fast = median(times["one_hot"]), median(times["lookup"])
    with torch.no_grad():
        forward = interleaved({"one_hot": one_hot, "lookup": lookup}, repeats=31, clock=time.process_time)
    report(
        "cluster_lookup",
        clusters=CLUSTERS,
        width=WIDTH,
        batch=BATCH,
        one_hot_seconds=slow,
        seconds=fast,
        ratio=slow / fast,
        sampling_ratio=median(forward["one_hot"]) / max(median(forward["lookup"]), 1e-9),
        target=">= 3",
        difference=float((seen[one_hot][0] - seen[lookup][0]).abs().max()),
        gradient_difference=float((seen[one_hot][1] - seen[lookup][1]).abs().max()),
    )


if __name__ == "__main__":
    main()
