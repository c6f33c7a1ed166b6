"""Few-shot segmentation at the sizes of DDPM-Seg's networks, against the way of its code.

Memory: the maps of one image of 256 pixels (five layers at three levels, 8,448 channels) against the features of its
every pixel; the peak resident set (Linux) over what maps take, each way in a process of its own. `with_batch` is that
with a mini-batch of all members. Prediction: ten members on the maps of one image, the first layer before the resize,
against all pixels' features through one network after another; `--full` at 256 pixels, else at 128. Training: ten
members in one batched pass on sampled pixels, against one after another on single rows of all pixels' features through
a `DataLoader`, as the paper's code does; equal weights, order and steps; CPU seconds, the least of several runs in
turn. At the width of the paper, at that of a small U-Net and at that of one narrow layer: the less there is to
multiply, the more one pass for all saves.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import interleaved, median, report
from diffusers_repr.features.sampled_maps import SampledMaps
from diffusers_repr.heads import PixelEnsembleHead
from diffusers_repr.heads.fitting.pixels import DDPM_SEG, PixelSet, draw_members, member_order, train_members

LEVELS, CLASSES, MEMBERS, BATCH = 3, 29, 10, 64
EQUAL = 16  # steps after which the trained members are compared
ADM = {"up1": (1024, 8), "up2a0": (512, 8), "up2a1": (512, 8), "up2": (512, 4), "up4r0": (256, 2)}  # channels, stride
SMALL = {"up0": (96, 4), "up1": (64, 2), "up2": (32, 1)}  # those of a small U-Net
NARROW = {"up1": (16, 1)}


def maps_of(layers: dict[str, tuple[int, int]], side: int, seed: int = 0) -> dict[str, Tensor]:
    """Random maps `(levels, 1, C, h, w)` of one image."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(LEVELS, 1, channels, side // stride, side // stride, generator=generator)
        for name, (channels, stride) in layers.items()
    }


def chunks(maps: dict[str, Tensor]) -> Iterator[Tensor]:
    for level in range(LEVELS):
        for one in maps.values():
            yield one[level]


def dense_features(maps: dict[str, Tensor], side: int) -> Tensor:
    """Features of every pixel, `(L, side, side)`, one map resized at a time into its place."""
    found = torch.empty(sum(one.shape[1] for one in chunks(maps)), side, side)
    start = 0
    for one in chunks(maps):
        found[start : start + one.shape[1]] = functional.interpolate(one, (side, side), mode="bilinear")[0]
        start += one.shape[1]
    return found


def held_maps(maps: dict[str, Tensor], side: int) -> SampledMaps:
    held = SampledMaps((side, side))
    held.add(list(chunks(maps)))
    return held


def make_head(layers: dict[str, tuple[int, int]], members: int = MEMBERS) -> PixelEnsembleHead:
    head = PixelEnsembleHead(list(layers), [c for c, _ in layers.values()], CLASSES, LEVELS, members)
    draw_members(head, 0, DDPM_SEG.init_std)
    return head.eval()


def networks(head: PixelEnsembleHead) -> list[nn.Sequential]:
    """The members as networks of torch."""
    made = []
    for member in range(head.config["members"]):
        parts: list[nn.Module] = []
        for layer, norm in zip([*head.linear, head.last], [*head.norm, None], strict=True):
            linear = nn.utils.skip_init(nn.Linear, layer.weight.shape[2], layer.weight.shape[1])
            linear.load_state_dict({"weight": layer.weight[member], "bias": layer.bias[member]})
            parts += [linear] if norm is None else [linear, nn.ReLU(), nn.BatchNorm1d(norm.weight.shape[1])]
        made.append(nn.Sequential(*parts).eval())
    return made


# Memory


def resident_mib(field: str) -> float:
    """`VmRSS`, what is resident, or `VmHWM`, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(way: str) -> None:
    maps = maps_of(ADM, 256)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident_mib("VmRSS")
    if way == "dense":
        held: object = dense_features(maps, 256)
    else:
        held = store = held_maps(maps, 256)
        if way == "ours_with_batch":  # of all members
            rows = torch.arange(BATCH * MEMBERS)
            held = store, store.sample(torch.zeros_like(rows), rows % 256, rows % 256)
    print(json.dumps(resident_mib("VmHWM") - before))
    del held


def memory() -> None:
    found = {}
    for way in ("ours", "ours_with_batch", "dense"):
        command = [sys.executable, "-m", "benchmarks.segmentation", "measure", way]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    side, maps = 32, maps_of(ADM, 32)
    y, x = (part.flatten() for part in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    sampled = held_maps(maps, side).sample(torch.zeros_like(y), y, x)
    error = float((sampled - dense_features(maps, side).flatten(1).T).abs().max())
    report(
        "segmentation_memory",
        **{f"mib_{way}": value for way, value in found.items()},
        memory_ratio=found["dense"] / found["ours"],
        ratio_with_batch=found["dense"] / found["ours_with_batch"],
        max_difference=error,
        target=">= 20",
    )


# Prediction


@torch.no_grad()
def predicted(head: PixelEnsembleHead, maps: dict[str, Tensor], side: int) -> tuple[Tensor, Tensor]:
    sums = head.predict(maps, (side, side))
    return sums.labels()[0], sums.uncertainty()[0]


@torch.no_grad()
def predicted_densely(members: list[nn.Sequential], maps: dict[str, Tensor], side: int) -> tuple[Tensor, Tensor]:
    """Every pixel's features through one network after another; votes by `torch.mode`."""
    pixels = dense_features(maps, side).flatten(1).T.contiguous()
    total, entropy, votes = torch.zeros(len(pixels), CLASSES), torch.zeros(len(pixels)), []
    for member in members:
        logits = member(pixels)
        entropy += torch.distributions.Categorical(logits=logits).entropy()
        total += logits.softmax(1)
        votes.append(logits.argmax(1))
    doubt = torch.distributions.Categorical(total / len(members)).entropy() - entropy / len(members)
    return torch.stack(votes, -1).mode(-1).values.view(side, side), doubt.view(side, side)


def prediction(side: int, repeats: int) -> None:
    head, maps = make_head(ADM), maps_of(ADM, side)
    members = networks(head)
    runs = {
        "ours": lambda: predicted(head, maps, side),
        "dense": lambda: predicted_densely(members, maps, side),
    }
    ours, theirs = runs["ours"](), runs["dense"]()
    seconds = {name: median(values) for name, values in interleaved(runs, repeats).items()}
    report(
        "segmentation_prediction",
        side=side,
        **{f"seconds_{name}": value for name, value in seconds.items()},
        time_ratio=seconds["dense"] / seconds["ours"],
        equal_labels=float((ours[0] == theirs[0]).float().mean()),
        max_difference=float((ours[1] - theirs[1]).abs().max()),
        target=">= 5",
    )


# Training


def trained_together(layers: dict[str, tuple[int, int]], pixels: PixelSet) -> PixelEnsembleHead:
    head = PixelEnsembleHead(list(layers), [c for c, _ in layers.values()], CLASSES, LEVELS, MEMBERS)
    train_members(head, pixels, DDPM_SEG.replace(max_epochs=1), 0)
    return head


class Rows(torch.utils.data.Sampler[int]):
    """The order of a member."""

    def __init__(self, member: int, count: int) -> None:
        self.order = member_order(0, member, 0, count).tolist()

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


def trained_in_turn(layers: dict[str, tuple[int, int]], features: Tensor, labels: Tensor) -> list[nn.Sequential]:
    """One epoch of each, as the paper's loop: single rows, torch's Adam as it comes, the loss read at each step."""
    members = networks(make_head(layers))
    for member, network in enumerate(members):
        network.train()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        data = TensorDataset(features, labels)
        loader = DataLoader(data, batch_size=BATCH, sampler=Rows(member, len(labels)), drop_last=True)
        for batch, target in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(batch), target)
            loss.backward()
            optimizer.step()
            loss.item()
        network.eval()
    return members


def training(name: str, layers: dict[str, tuple[int, int]], steps: int, repeats: int) -> None:
    side, count = 64, BATCH * steps
    maps = maps_of(layers, side)
    places = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(side), torch.arange(side))[:count]
    labels = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(0))
    features = dense_features(maps, side).flatten(1).T[:count].contiguous()
    held = held_maps(maps, side)

    def together(n: int = count) -> PixelEnsembleHead:
        return trained_together(layers, PixelSet(held, places[:n], labels[:n]))

    def in_turn(n: int = count) -> list[nn.Sequential]:
        return trained_in_turn(layers, features[:n], labels[:n])

    # Equal after some steps: later, units that hardly ever fire make 1e-3 of a rounding, in either way.
    head, members = together(EQUAL * BATCH), in_turn(EQUAL * BATCH)
    with torch.no_grad():
        ours = head.classify(features[:BATCH].expand(MEMBERS, -1, -1))
        theirs = torch.stack([network(features[:BATCH]) for network in members])
    times = interleaved({"ours": together, "in_turn": in_turn}, repeats, time.process_time)
    least = {way: min(values) for way, values in times.items()}
    middle = {way: median(values) for way, values in times.items()}
    report(
        f"segmentation_training_{name}",
        channels=features.shape[1],
        steps=steps,
        **{f"cpu_seconds_{way}": value for way, value in least.items()},
        time_ratio=least["in_turn"] / least["ours"],
        ratio_of_medians=middle["in_turn"] / middle["ours"],
        equal_after_steps=EQUAL,
        max_difference=float((ours - theirs).abs().max()),
        largest_logit=float(theirs.abs().max()),
        target=">= 5",
    )


def main(argv: list[str]) -> None:
    parts = {
        "memory": memory,
        "narrow": lambda: training("narrow", NARROW, 64, 7),
        "small": lambda: training("small", SMALL, 64, 7),
        "paper": lambda: training("paper", ADM, 32, 3),
        "prediction": lambda: prediction(256 if "--full" in argv else 128, 2),
    }
    for name, part in parts.items():
        if name in argv or not set(parts) & set(argv):
            part()


if __name__ == "__main__":
    measure(sys.argv[2]) if sys.argv[1:2] == ["measure"] else main(sys.argv[1:])
