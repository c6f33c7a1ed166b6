"""Hyperfeatures of SD 1.5's maps: the sum that grows as maps come, against the stack of all of them, resized first.

    python -m benchmarks.hyperfeatures [--levels 4]

Twelve maps a level, as the residual branches of the up-blocks at 512 pixels. `held` brings each map to 64 x 64 and
keeps it in one float32 stack (levels, 10560, 64, 64), as the reference does, whose stack is made anew twice on the way
and is of 11 levels; then it joins them. Memory is the peak resident set (Linux) over what weights take, each way in a
process of its own whose allocator keeps no freed block. The maps are made one by one, as a network makes them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common import report, seconds
from benchmarks.readout import MAPS, SIZE, resident_mib
from diffusers_repr.heads import HyperfeaturesHead
from diffusers_repr.heads.dense.parts import resize

LAYERS = [f"up_blocks.{at // 3}.resnets.{at % 3}.conv2" for at in range(len(MAPS))]
CHANNELS = [channels for channels, _ in MAPS]


def made(levels: int) -> HyperfeaturesHead:
    torch.manual_seed(0)
    return HyperfeaturesHead(LAYERS, CHANNELS, steps=50, reads=list(range(levels))).eval()


def coming(levels: int) -> Iterator[tuple[int, int, Tensor]]:
    """`(level, layer, map)`, as an inversion hands them on."""
    generator = torch.Generator().manual_seed(1)
    for level in range(levels):
        for at, (channels, side) in enumerate(MAPS):
            yield level, at, torch.randn(1, channels, side, side, generator=generator)


@torch.no_grad()
def streamed(head: HyperfeaturesHead, levels: int) -> Tensor:
    total = None
    for level, at, maps in coming(levels):
        total = head.accumulate(total, level, LAYERS[at], maps, SIZE)
    return total


@torch.no_grad()
def held(head: HyperfeaturesHead, levels: int) -> Tensor:
    stack = torch.empty(levels, sum(CHANNELS), *SIZE)
    ends = torch.tensor(CHANNELS).cumsum(0).tolist()
    for level, at, maps in coming(levels):
        stack[level, ends[at] - CHANNELS[at] : ends[at]] = resize(maps, SIZE)[0]
    total, shares = torch.zeros(1, 384, *SIZE), head.shares()
    for level in range(levels):
        for at, end in enumerate(ends):
            maps = stack[level, None, end - CHANNELS[at] : end]
            total += shares[level, at] * head.blocks[at](head.project[at](maps), None)
    return total


WAYS = {"ours": streamed, "held": held}


def measure(way: str, levels: int, to: str) -> None:
    """In a process of its own: the peak of one run over what was resident before, the seconds, and the result."""
    head = made(levels)
    streamed(head, 1)  # libraries set up what they keep
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, kept = resident_mib("VmRSS"), []
    time = seconds(lambda: kept.append(WAYS[way](head, levels)))
    peak = resident_mib("VmHWM") - before
    torch.save(kept[0], to)
    print(json.dumps([peak, time]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--way")
    parser.add_argument("--to", default="")
    args = parser.parse_args()
    if args.way:
        measure(args.way, args.levels, args.to)
        return
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found, results = {}, {}
    for way in WAYS:
        to = os.path.join(tempfile.gettempdir(), f"hyperfeatures-{os.getpid()}-{way}.pt")
        command = [sys.executable, "-m", "benchmarks.hyperfeatures", "--way", way, "--levels", str(args.levels)]
        done = subprocess.run([*command, "--to", to], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        results[way] = torch.load(to, weights_only=True)
        os.remove(to)
    report(
        "hyperfeatures",
        levels=args.levels,
        **{f"mib_{way}": mib for way, (mib, _) in found.items()},
        **{f"seconds_{way}": time for way, (_, time) in found.items()},
        memory_ratio=found["held"][0] / found["ours"][0],
        time_ratio=found["held"][1] / found["ours"][1],
        max_difference=float((results["ours"] - results["held"]).abs().max()),
        target=">= 5 memory",
    )


if __name__ == "__main__":
    main()
