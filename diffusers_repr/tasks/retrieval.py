"""`RetrievalAccuracy`: how often two towers find an image's caption, and a caption's image, among many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from diffusers_repr.data.train_data import InMemoryTrainData
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.objectives.contrastive import ContrastiveObjective


def retrieval(images: Tensor, texts: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """How often, by cosine, the text nearest to an image is its caption, and the image nearest to a text has it.

    Args:
        images: `(N, D)`.
        texts: `(N, D)`, of the captions.
        captions: Of the images; equal ones are one.

    Returns:
        `image_to_text`, `text_to_image`, and `chance`, what a random choice gives.
    """
    numbers = {text: number for number, text in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([numbers[text] for text in captions])
    cosines = F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    found = {"image_to_text": cosines.argmax(1).cpu(), "text_to_image": cosines.argmax(0).cpu()}
    shares = torch.bincount(labels)[labels].double() / len(labels)
    right = {name: float((labels[places] == labels).double().mean()) for name, places in found.items()}
    return {**right, "chance": float(shares.mean())}


class RetrievalAccuracy:
    """`retrieval` of splits of captioned images, by the towers that an objective trains.

    Args:
        objective: That trains them.
        splits: Name -> images with captions, in memory.
        batch_size: Images at a time.
    """

    def __init__(
        self, objective: ContrastiveObjective, splits: Mapping[str, InMemoryTrainData], batch_size: int = 256
    ) -> None:
        self.objective, self.splits, self.batch_size = objective, dict(splits), batch_size

    @torch.no_grad()
    def __call__(self, model: CLIPModel, step: int) -> dict[str, float]:
        """Three numbers a split."""
        found: dict[str, float] = {}
        for name, data in self.splits.items():
            parts = [self._embedded(model, data, rows) for rows in torch.arange(len(data)).split(self.batch_size)]
            images, texts = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            measured = retrieval(images, texts, [text for part in parts for text in part[2]])
            found |= {f"{name}_{key}": value for key, value in measured.items()}
        return found

    def _embedded(self, model: CLIPModel, data: InMemoryTrainData, rows: Tensor) -> tuple[Tensor, Tensor, list[str]]:
        batch, device = data.batch(rows.tolist()), next(model.parameters()).device
        images = self.objective.embed_images(model, to_unit(batch["pixel_values"]).to(device))
        texts = self.objective.embed_texts(model, self.objective.token_ids(batch["caption"]).to(device))
        return images, texts, batch["caption"]


__all__ = ["RetrievalAccuracy", "retrieval"]
