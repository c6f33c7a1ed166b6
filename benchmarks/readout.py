"""Readout's feature aggregation on the maps of SD 1.5: 1x1 convolutions before the resize, against resize-first.

Aggregation: the twelve maps of the up-blocks to twelve maps of 96 + 384 channels at 64 x 64, each handed on at once.
Resize-first brings all maps to 64 x 64, as the reference does, and then projects each; `streamed` resizes one at a
time, which holds less. `whole` is F, with the residual blocks on top. Memory is the peak resident set (Linux) over
what maps and weights take, each way in a process of its own whose allocator keeps no freed block.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import interleaved, median, report
from diffusers_repr.heads import ReadoutHead
from diffusers_repr.heads.dense.parts import resize, resized_projections

SIZE = (64, 64)
MAPS = (
    [(1280, 8)] * 3 + [(1280, 16)] * 3 + [(640, 32)] * 3 + [(320, 64)] * 3
)  # channels and side, SD 1.5 at 512 pixels
REPEATS = 5


def held(layers: Iterator[torch.nn.Conv2d], maps: list[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
    resized = [resize(x, size) for x in maps]
    return (layer(x) for layer, x in zip(layers, resized, strict=True))


def streamed(layers: Iterator[torch.nn.Conv2d], maps: list[Tensor], size: tuple[int, int]) -> Iterator[Tensor]:
    return (layer(resize(x, size)) for layer, x in zip(layers, maps, strict=True))


WAYS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "ours": resized_projections,
    "resize_first": held,
    "resize_first_streamed": streamed,
}


@torch.no_grad()
def aggregate(head: ReadoutHead, maps: list[Tensor], way: str) -> Tensor:
    """The projected maps, each used as it comes: their sum."""
    total = torch.zeros(1, 96 + 384, *SIZE)
    for x in WAYS[way](iter(head.project), maps, SIZE):
        total += x
        del x  # before the next is made
    return total


@torch.no_grad()
def whole(head: ReadoutHead, maps: list[Tensor], way: str) -> Tensor:
    """The head's result from maps projected in this way."""
    time = head.time_embedding(torch.tensor([500.0], dtype=torch.float64), torch.float32)
    shares, total = head.weights.softmax(0), torch.zeros(1, 384, *SIZE)
    for share, block, x in zip(shares, head.blocks, WAYS[way](iter(head.project), maps, SIZE), strict=True):
        total += share * block(x, time)
        del x
    return total


def make() -> tuple[ReadoutHead, list[Tensor]]:
    torch.manual_seed(0)
    head = ReadoutHead([str(at) for at in range(len(MAPS))], [channels for channels, _ in MAPS]).eval()
    return head, [torch.randn(1, channels, side, side) for channels, side in MAPS]


def resident_mib(field: str) -> float:
    """`VmRSS`, what is resident, or `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(run: str, way: str) -> None:
    """In a process of its own: the peak of one run over what was resident before."""
    head, maps = make()
    head.project[0](resize(maps[0][..., :1, :1], (2, 2)))  # libraries set up what they keep
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_mib("VmRSS")
    {"aggregate": aggregate, "whole": whole}[run](head, maps, way)
    print(json.dumps(resident_mib("VmHWM") - before))


def added_mib(run: str, way: str) -> float:
    command = [sys.executable, "-m", "benchmarks.readout", run, way]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    head, maps = make()
    results = {way: aggregate(head, maps, way) for way in WAYS}
    error = max(float((results["ours"] - x).abs().max()) for x in results.values())
    for run, name in ((aggregate, "aggregate"), (whole, "whole")):
        times = interleaved({way: lambda w=way, r=run: r(head, maps, w) for way in WAYS}, REPEATS)
        seconds = {way: median(values) for way, values in times.items()}
        memory = {way: median([added_mib(name, way) for _ in range(3)]) for way in WAYS}
        report(
            f"readout_{name}",
            **{f"seconds_{way}": value for way, value in seconds.items()},
            **{f"mib_{way}": value for way, value in memory.items()},
            time_ratio=seconds["resize_first"] / seconds["ours"],
            memory_ratio=memory["resize_first"] / memory["ours"],
            **({"max_difference": error, "target": ">= 5 both"} if name == "aggregate" else {}),
        )


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()
