"""`finetune_probe`: how good is a representation as a start, if all of its network may learn?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.data.labelled import Labelled, open_labelled
from diffusers_repr.encoders import Encoder
from diffusers_repr.heads import LinearHead
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.encoding import Which, check_which, encode_images, pick
from diffusers_repr.sweep.probes import ProbeScore

_CLIP = 1.0  # of the gradient's norm


@dataclass(frozen=True)
class FinetuneProtocol:
    """How network and head are tuned; AdamW, a linear rise and a cosine to 0.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step.
        learning_rate: Of the head.
        network_lr_scale: Rate of the network, times that of the head.
        weight_decay: Of both.
        warmup: Share of the steps in which the rates rise.
        name: In records.
        version: Likewise.

    Raises:
        ValueError: For values out of range.
    """

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 2e-3
    network_lr_scale: float = 0.25
    weight_decay: float = 0.05
    warmup: float = 0.1
    name: str = "finetune"
    version: int = 1

    def __post_init__(self) -> None:
        check_whole("epochs", self.epochs, 1)
        check_whole("batch_size", self.batch_size, 2)
        if not (self.learning_rate > 0 and self.network_lr_scale > 0 and self.weight_decay >= 0):
            raise ValueError("learning_rate and network_lr_scale are above 0, weight_decay is 0 or more.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps below 1; got {self.warmup}.")

    def rate(self, step: int, steps: int) -> float:
        """Factor of the rates at a step, from 0.

        Example:
            >>> FinetuneProtocol(warmup=0.5).rate(0, 4), FinetuneProtocol(warmup=0.5).rate(2, 4)
            (0.5, 1.0)
        """
        rising = int(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1))) / 2


def finetune_probe(
    encoder: Encoder,
    train: Any,
    test: Any,
    *,
    features: Which = "global",
    protocol: FinetuneProtocol | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
) -> ProbeScore:
    """Accuracy of a linear head and the network under it, tuned together on labelled images.

    The encoder stays as it is: a copy is tuned. Features are standardised by their statistics before the first step,
    and the head starts at 0. Compare with `encoder.untrained(seed)` under the same protocol: that is training from
    scratch on the same labels.

    Args:
        encoder: Whose network takes a gradient.
        train: Labelled images; see `open_labelled`.
        test: Likewise.
        features: `global`, or the mean of the `tokens`.
        protocol: How.
        image_size: Resize all images before the encoder does.
        seed: Of the order of the images, dropout, and a network's own draws.

    Returns:
        The score; its head lies on the tuned copy's features, which are not kept.

    Raises:
        ValueError: For labels or images that do not fit, and features that no trainable parameter reaches.
        FloatingPointError: If the loss is not finite.
    """
    protocol, which = protocol or FinetuneProtocol(), check_which(features)
    data, held = (open_labelled(one, role) for one, role in ((train, "train"), (test, "test")))
    labels, truth = data.class_ids(), held.class_ids()
    classes = int(labels.max()) + 1
    if int(truth.max()) >= classes:
        raise ValueError(f"The test images have class {int(truth.max())}, the training images {classes} classes.")
    tuned = encoder.copy()
    start = encode_images(tuned, data, which, image_size=image_size)  # type: ignore[arg-type]
    head = LinearHead(start.features.shape[1], classes)
    std, mean = torch.std_mean(start.features.double(), dim=0, correction=0)
    head.set_statistics(mean, std.clamp(min=1e-6))
    torch.nn.init.zeros_(head.linear.weight)
    torch.nn.init.zeros_(head.linear.bias)
    head.to(tuned.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _tune(tuned, head, data, labels, protocol, which, image_size, seed)
    tuned.module.eval()
    head.eval()
    found = encode_images(tuned, held, which, image_size=image_size).features  # type: ignore[arg-type]
    with torch.no_grad():
        right = head(found.to(tuned.device)).argmax(1).cpu() == truth
    return ProbeScore(float(right.double().mean()), asdict(protocol), len(data), len(held), head)


def _tune(
    tuned: Encoder,
    head: LinearHead,
    data: Labelled,
    labels: Tensor,
    protocol: FinetuneProtocol,
    which: str,
    image_size: int | tuple[int, int] | None,
    seed: int,
) -> None:
    network = [p for p in tuned.module.requires_grad_(True).parameters()]
    tuned.module.train()
    rate = protocol.learning_rate
    groups = [{"params": list(head.linear.parameters()), "lr": rate},
              {"params": network, "lr": rate * protocol.network_lr_scale}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, weight_decay=protocol.weight_decay)
    per_epoch = -(-len(data) // protocol.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: protocol.rate(at, per_epoch * protocol.epochs))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(protocol.epochs):
        order = torch.randperm(len(data), generator=generator).tolist()
        for rows, pixels in data.pixels(protocol.batch_size, tuned.channels, image_size, order):
            if len(rows) > 1:  # batch norm takes no single image
                output = tuned.encode_with_gradient(pixels)
                loss = F.cross_entropy(head(pick(output, which)), labels[list(rows)].to(tuned.device))
                if not bool(torch.isfinite(loss)):
                    raise FloatingPointError("The loss is not finite; lower learning_rate of the FinetuneProtocol.")
                loss.backward()
                if all(p.grad is None for p in network):
                    raise ValueError(
                        f"No parameter of {type(tuned.module).__name__} gets a gradient from what {tuned.name!r} "
                        "reads, so it cannot be tuned. Leave the fine-tuning probe out."
                    )
                torch.nn.utils.clip_grad_norm_([p for p in network if p.grad is not None], _CLIP)
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()


__all__ = ["FinetuneProtocol", "finetune_probe"]
