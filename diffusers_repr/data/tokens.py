"""`TokenData`: the visual tokens of a data set's images, encoded once and held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffusers_repr.data.base import TrainData
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.models.vq_tokens import check_tokenizer, encode_tokens

_MOVES = ("random_flip", "random_rotation", "random_shift", "random_scale")


class TokenData(TrainData):
    """Ids `(N, n)` of the images of some data, in place of their pixels; a batch has them in `tokens`.

    A token is held in two bytes, or in four of a vocabulary above 32,767: a million images of 256 tokens take half a
    gigabyte. Classes and conditions of the images are kept.

    Args:
        images: Without augmentation, which each pass draws anew.
        vqvae: The tokenizer, on the device that it is to work on.
        batch_size: Images that it encodes at a time.

    Raises:
        TypeError: For a stream, which has no end to be encoded to, and for what is no tokenizer.
        ValueError: For images that are augmented.
    """

    def __init__(self, images: Any, vqvae: Any, batch_size: int = 256) -> None:
        if not isinstance(images, ImageTrainData):
            raise TypeError(f"Tokens are encoded once of map-style images; got {type(images).__name__}.")
        drawn = [name for name in _MOVES if getattr(images.config, name)]
        if drawn:
            raise ValueError(
                f"Tokens that are encoded once are those of the images as they are; {', '.join(drawn)} would do "
                "nothing. Leave it out, or encode the tokens in every step."
            )
        self.images, self.name = images, images.name
        self._tokenizer = weights_hash(check_tokenizer(vqvae))
        kind = torch.int16 if vqvae.config["num_vq_embeddings"] <= 32767 else torch.int32
        parts = []
        for first in range(0, len(images), batch_size):
            rows = range(first, min(first + batch_size, len(images)))
            pixels = torch.stack([images[row]["pixel_values"] for row in rows])
            parts.append(encode_tokens(vqvae, to_unit(pixels).to(vqvae.device)).flatten(1).to(kind).cpu())
        self.tokens = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.tokens[index].long(), **self.images.annotations(index)}

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """What joining `self[i]` for each of `indices` gives, of data without captions."""
        if self.images.config.caption_column is not None:
            return torch.utils.data.default_collate([self[index] for index in indices])
        rows = torch.as_tensor(list(indices))
        batch: dict[str, Any] = {"tokens": self.tokens[rows].long(), "index": rows}
        if self.images.labels is not None:
            batch["class_labels"] = torch.from_numpy(self.images.labels[rows.numpy()])
        if self.images.assigned is not None and self.images.assigned.has_values:
            batch["condition"] = self.images.assigned.values(rows)
        return batch

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As it is."""
        return dict(batch)

    def fingerprint(self) -> dict[str, Any]:
        """That of the images, and the tokenizer."""
        return {**self.images.fingerprint(), "tokenizer": self._tokenizer}

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class id; None without labels."""
        return self.images.class_names


__all__ = ["TokenData"]
