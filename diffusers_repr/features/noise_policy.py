"""Where the noise of a feature comes from: four policies, none of which touches the global random state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Policy = Literal["per_image", "shared", "fresh", "clean"]


def check_policy(policy: str) -> str:
    """The policy, if it is one; ValueError with those there are else."""
    if policy not in get_args(Policy):
        raise ValueError(f"Unknown noise policy {policy!r}; expected one of {', '.join(get_args(Policy))}.")
    return policy


def validation_seed(policy: str, seed: int) -> int:
    """Seed with which a second split is read.

    A stream of `fresh` noise starts anew with every extractor; two splits must not get the same one.
    """
    return seed + 2**32 if policy == "fresh" else seed


def pixel_keys(pixels: Tensor) -> list[str]:
    """A key for each preprocessed image `(B, C, H, W)`: a hash of its float32 pixels.

    Example:
        >>> a, b, c = pixel_keys(torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.zeros(1, 2, 2)]))
        >>> a == c, a == b
        (True, False)
    """
    array = pixels.detach().float().cpu().contiguous().numpy()
    return [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in array]


def image_keys(ids: Sequence[Any] | None, pixels: Tensor) -> list[str]:
    """The key of each image: its id as text, or a hash of its pixels without ids.

    Args:
        ids: One per image: text or whole numbers. Equal ids get equal noise, and `1` is the id `"1"`.
        pixels: `(B, C, H, W)`.

    Raises:
        TypeError: For a bare text, or ids that are neither text nor whole numbers.
        ValueError: For a wrong number of ids.
    """
    if ids is None:
        return pixel_keys(pixels)
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"ids={ids!r} is one text; pass a list with one id per image.")
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if len(values) != len(pixels):
        raise ValueError(f"{len(values)} ids for {len(pixels)} images; pass one per image.")
    for value in values:
        if isinstance(value, bool) or not (isinstance(value, str) or hasattr(value, "__index__")):
            raise TypeError(f"An id is a text or a whole number; got {value!r} ({type(value).__name__}).")
    return [value if isinstance(value, str) else str(int(value)) for value in values]


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of the key; equal keys give equal numbers on every machine."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


class NoiseSource:
    """Draws standard normal noise for (image, member) pairs.

    Args:
        policy: `per_image`: keyed by (seed, image key, member), so that a feature depends on neither neighbours nor
            batch size. `shared`: keyed by (seed, member), one draw for all images (DDPM-Seg, arXiv 2112.03126).
            `fresh`: a stream that starts from the seed and goes on with every call. `clean`: none, the network sees
            the image itself beside the timestep.
        seed: A whole number.

    Example:
        >>> source = NoiseSource("per_image", seed=0)
        >>> one, two = source.draw(["cat", "dog"], [0, 0], (1, 2, 2)), source.draw(["dog"], [0], (1, 2, 2))
        >>> torch.equal(one[1], two[0])
        True
    """

    def __init__(self, policy: str, seed: int) -> None:
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise TypeError(f"seed must be a whole number; got {seed!r} ({type(seed).__name__}).")
        self.policy, self.seed = check_policy(policy), int(seed)
        self._stream = keyed_generator(self.seed, "fresh")

    def draw(self, keys: Sequence[str], members: Sequence[int], shape: Sequence[int]) -> Tensor | None:
        """Noise `(len(keys), *shape)` float32 on the CPU; None for `clean`."""
        if self.policy == "clean":
            return None
        if self.policy == "fresh":  # row by row, so that the batch size does not matter
            return torch.stack([torch.randn(*shape, generator=self._stream) for _ in keys])
        if self.policy == "shared":
            drawn = {member: self._keyed(shape, "shared", member) for member in sorted(set(members))}
            return torch.stack([drawn[member] for member in members])
        return torch.stack([self._keyed(shape, k, m) for k, m in zip(keys, members, strict=True)])

    def _keyed(self, shape: Sequence[int], *key: object) -> Tensor:
        return torch.randn(*shape, generator=keyed_generator(self.seed, *key))
