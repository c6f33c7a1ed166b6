"""Where the noise of a feature comes from: four policies, none of which touches the global random state."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Policy = Literal["per_image", "shared", "fresh", "clean"]


def check_policy(policy: str) -> str:
    """The policy, if it is one; ValueError with those there are else."""
    if policy not in get_args(Policy):
        raise ValueError(f"Unknown noise policy {policy!r}; expected one of {', '.join(get_args(Policy))}.")
    return policy


def pixel_keys(pixels: Tensor) -> list[str]:
    """A key for each preprocessed image `(B, C, H, W)`: a hash of its float32 pixels."""
    array = pixels.detach().float().cpu().contiguous().numpy()
    return [hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest() for image in array]


def keyed_generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by a hash of the key; equal keys give equal numbers on every machine."""
    digest = hashlib.blake2b("|".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


class NoiseSource:
    """Draws standard normal noise for (image, member) pairs.

    Args:
        policy: `per_image`: keyed by (seed, image key, member), so that a feature depends on neither neighbours nor
            batch size. `shared`: keyed by (seed, member), one draw for all images (DDPM-Seg, arXiv 2112.03126).
            `fresh`: a stream that starts from the seed and goes on with every call. `clean`: none; x_t = x_0.
        seed: Any int.
    """

    def __init__(self, policy: str, seed: int) -> None:
        self.policy, self.seed = check_policy(policy), seed
        self._stream = torch.Generator("cpu").manual_seed(seed)

    def draw(self, keys: Sequence[str], members: Sequence[int], shape: Sequence[int]) -> Tensor | None:
        """Noise `(len(keys), *shape)` float32 on the CPU; None for `clean`."""
        if self.policy == "clean":
            return None
        if self.policy == "fresh":
            return torch.randn(len(keys), *shape, generator=self._stream)
        if self.policy == "shared":
            return torch.stack([self._keyed(shape, self.seed, "shared", member) for member in members])
        return torch.stack([self._keyed(shape, self.seed, k, m) for k, m in zip(keys, members, strict=True)])

    @staticmethod
    def _keyed(shape: Sequence[int], *key: object) -> Tensor:
        return torch.randn(*shape, generator=keyed_generator(*key))
