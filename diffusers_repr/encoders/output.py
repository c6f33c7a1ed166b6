"""What an encoder returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusers_repr.denoiser.feature_map import FeatureMap


@dataclass(frozen=True, repr=False)
class EncoderOutput:
    """Features of a batch of images; `["global"]` and `["tokens"]` read them too.

    Attributes:
        global_features: `(B, D)`, one vector an image.
        tokens: `(B, N, D)`, one vector a patch, row by row, N = h * w; neither class nor register tokens.
        grid: `(h, w)` in tokens.
    """

    global_features: Tensor
    tokens: Tensor
    grid: tuple[int, int]

    def __getitem__(self, name: str) -> Tensor:
        if name not in ("global", "tokens"):
            raise KeyError(f"An encoder gives 'global' and 'tokens'; got {name!r}.")
        return self.tokens if name == "tokens" else self.global_features

    def __repr__(self) -> str:
        shapes = f"global={tuple(self.global_features.shape)}, tokens={tuple(self.tokens.shape)}"
        return f"EncoderOutput({shapes}, grid={self.grid})"

    def as_map(self) -> Tensor:
        """The tokens as `(B, D, h, w)`."""
        return self.feature_map().as_map()

    def feature_map(self) -> FeatureMap:
        """The tokens with their grid."""
        return FeatureMap(self.tokens, self.grid)
