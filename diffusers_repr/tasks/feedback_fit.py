"""DifFeed fitted on a frozen base: the network runs twice in every step, and only the head learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.capture.feedback import FeedbackPasses
from diffusers_repr.data.labelled import Labelled
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.extractor import ImageBatch
from diffusers_repr.features.noise_policy import pixel_keys
from diffusers_repr.features.pooling import pool
from diffusers_repr.heads import FeedbackHead
from diffusers_repr.heads.feedback_logits import feedback_logits
from diffusers_repr.heads.fitting.minibatch import descend
from diffusers_repr.heads.fitting.protocols import MinibatchProtocol


class FeedbackFit:
    """Fits and measures `FeedbackHead`s that read one layer at one level.

    Args:
        extractor: Of that layer and level, without pooling.
        train: To learn from.
        test: To be measured on.
        num_classes: K.
        map_size: Cells a side to which the map is averaged, at most.
        condition: Prompt and class label of every image.
        options: Arguments of the head's class.

    Raises:
        TypeError: For a network without the two halves of a U-Net.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        train: Labelled,
        test: Labelled,
        num_classes: int,
        map_size: int,
        condition: tuple[str | None, int | None],
        options: Mapping[str, Any],
    ) -> None:
        self.extractor = extractor.replace(batch_size=None)
        self.train, self.test, self.classes = train, test, num_classes
        self.size = map_size
        self.condition: dict[str, Any] = {"prompt": condition[0], "class_labels": condition[1]}
        pairs: dict[str, Any] = FeedbackHead.options_for(extractor.denoiser, extractor.resize)
        self.options = {**pairs, **options}
        names = (self.options["sources"], self.options["targets"], extractor.layers)
        self.passes = FeedbackPasses(extractor.denoiser.model, *names)
        self.rows = extractor.batch_size or 64

    def fit(self, rows: Sequence[int], protocol: MinibatchProtocol, seed: int) -> FeedbackHead:
        """A head that learned from these images of `train`.

        Args:
            rows: Their places.
            protocol: Of the steps.
            seed: Of the first weights and the order.
        """
        path, labels = self.extractor.layers[0], self.train.targets
        with torch.no_grad():
            found = self.extractor.from_pixels(self._pixels(self.train, rows[:1]), **self.condition)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
            small = pool(found.as_map(path), f"map:{self.size}")
            width = -(-small.shape[1] // 8) * 8
            head = FeedbackHead.for_maps({path: small}, self.classes, **{"width": width, **self.options})
        head = head.to(self.extractor.denoiser.device).train()

        def loss(places: Tensor) -> Tensor:
            chosen = [rows[at] for at in places.tolist()]
            logits = self.logits(head, self._pixels(self.train, chosen))
            return functional.cross_entropy(logits, labels[chosen].to(logits.device))

        descend(list(head.parameters()), loss, len(rows), protocol, generator)
        return head.eval()

    def logits(self, head: FeedbackHead, pixels: Tensor) -> Tensor:
        """`(B, K)` of images, with gradients of the head alone."""
        with self.extractor.reading():
            batch: ImageBatch = next(iter(self.extractor.batches(pixels, **self.condition, ids=pixel_keys(pixels))))
            denoiser = self.extractor.denoiser

            def run() -> Any:
                return denoiser.predict(batch.x_t, batch.level, batch.condition)

            size = tuple(batch.x_t.shape[2:])
            return feedback_logits(head, self.passes, run, denoiser, size, f"map:{self.size}")

    @torch.no_grad()
    def accuracy(self, head: FeedbackHead) -> float:
        """Share of `test` that is told right."""
        hits = 0
        for start in range(0, len(self.test), self.rows):
            places = list(range(start, min(start + self.rows, len(self.test))))
            guesses = self.logits(head, self._pixels(self.test, places)).argmax(1).cpu()
            hits += int((guesses == self.test.targets[places]).sum())
        return hits / len(self.test)

    def forwards(self, shares: Mapping[str, float]) -> float:
        """Forwards of the network that a prediction takes, what both share counted once.

        Args:
            shares: Layer -> share of a forward that is spent when it is done.
        """
        first = max(shares[path] for path in self.options["sources"])
        shared = min(shares[path] for path in self.options["targets"])
        return first + shares[self.extractor.layers[0]] - shared

    def _pixels(self, data: Labelled, rows: Sequence[int]) -> Tensor:
        denoiser = self.extractor.denoiser
        return to_pixels(data.read(rows), denoiser.image_channels, self.extractor.resize, rows)


__all__ = ["FeedbackFit"]
