"""Parts of heads on maps: 1x1 convolutions before the resize, a time embedding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_timestep_embedding
from torch import Tensor, nn

from diffusers_repr.models.layers import CastGroupNorm, CastLinear


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned, no antialiasing: weights sum to 1, so 1x1 convolutions commute with it."""
    return x if tuple(x.shape[-2:]) == size else nn.functional.interpolate(x, size, mode="bilinear")


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm of 32 groups, or of as many as divide both 32 and the channels."""
    return CastGroupNorm(math.gcd(32, channels), channels)


class TimeEmbedding(nn.Module):
    """Sinusoid of the timestep, then `Linear, SiLU, Linear, SiLU`.

    Timesteps are first mapped from `timestep_range` to [0, 1000], so that every noise process spans the frequencies.

    Args:
        width: Values of the embedding; the sinusoid has a quarter of them.
        timestep_range: Smallest and largest timestep of the base's noise process.
    """

    def __init__(self, width: int, timestep_range: Sequence[float]) -> None:
        super().__init__()
        self.low, self.high = float(timestep_range[0]), float(timestep_range[1])
        self.frequencies = max(width // 8, 1)
        self.layers = nn.ModuleList([CastLinear(2 * self.frequencies, width), CastLinear(width, width)])

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Timesteps `(B,)` to embeddings `(B, width)` in `dtype`."""
        place = 1000 * (timestep - self.low) / (self.high - self.low)
        power = torch.arange(self.frequencies, dtype=torch.float64, device=timestep.device) / self.frequencies
        angle = place[:, None] * torch.exp(-math.log(10_000) * power)
        x = torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)
        for layer in self.layers:
            x = nn.functional.silu(layer(x))
        return x


class NetworkTimeEmbedding(nn.Module):
    """The time embedding that a U-Net of diffusers computes: its sinusoid, then `Linear, SiLU, Linear`; not trained.

    Args:
        width: Values of the embedding; the sinusoid has a quarter of them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = max(width // 8, 1)
        self.layers = nn.ModuleList([CastLinear(2 * self.frequencies, width), CastLinear(width, width)])
        self.layers.requires_grad_(False)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Timesteps `(B,)` to embeddings `(B, width)` in `dtype`."""
        # Its own function, in float32 as it does: angles of 999 radians differ by 6e-5 from those in float64.
        waves = get_timestep_embedding(timestep, 2 * self.frequencies, flip_sin_to_cos=True, downscale_freq_shift=0)
        first, second = self.layers
        return second(nn.functional.silu(first(waves.to(dtype))))

    @torch.no_grad()
    def take(self, network: nn.Module) -> None:
        """Copy the weights of a network.

        Raises:
            ValueError: For a network whose time embedding is of another form.
        """
        weights = network_time_layers(network)
        if weights[1].out_features != self.layers[1].out_features:
            raise ValueError(
                f"The time embedding of this {type(network).__name__} has {weights[1].out_features} values; the head "
                f"takes {self.layers[1].out_features} (time_width)."
            )
        for own, given in zip(self.layers, weights, strict=True):
            own.load_state_dict(given.state_dict())


def network_time_layers(network: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The two layers of a U-Net's time embedding.

    Raises:
        ValueError: If it has none, or one of another form than Stable Diffusion's: a sinusoid of a quarter of its
            width, cosines first, and SiLU between the layers.
    """
    waves, embedding = getattr(network, "time_proj", None), getattr(network, "time_embedding", None)
    if isinstance(waves, Timesteps) and isinstance(embedding, TimestepEmbedding):
        first, second = embedding.linear_1, embedding.linear_2
        plain = waves.flip_sin_to_cos and waves.downscale_freq_shift == 0 and waves.scale == 1
        usual = isinstance(embedding.act, nn.SiLU) and embedding.post_act is None
        if plain and usual and 4 * first.in_features == second.out_features:
            return first, second
    raise ValueError(
        f"This {type(network).__name__} has no time embedding as Stable Diffusion's U-Nets have; give the head its "
        'own, time_source="own".'
    )


def timestep_vector(timestep: Tensor | float, batch: int, device: torch.device) -> Tensor:
    """Timesteps as float64 `(batch,)`.

    Raises:
        ValueError: If there are several and not `batch`.
    """
    values = torch.as_tensor(timestep, dtype=torch.float64, device=device)
    if values.ndim > 1 or (values.numel() not in (1, batch)):
        raise ValueError(f"timestep must be one number or ({batch},), one a sample; got {tuple(values.shape)}.")
    return values.reshape(-1).expand(batch)


def resized_projections(
    layers: Iterable[nn.Module], maps: Sequence[Tensor], size: tuple[int, int]
) -> Iterator[Tensor]:
    """Each map through its 1x1 convolution at its own resolution, then to `size`; one at a time is held.

    Bilinear weights sum to 1 and a 1x1 convolution is affine in the channels, so the two commute: this equals resizing
    first, with the resize on fewer channels and the convolution on fewer pixels.
    """
    for layer, x in zip(layers, maps, strict=True):
        yield resize(layer(x), size)


__all__ = [
    "NetworkTimeEmbedding",
    "TimeEmbedding",
    "group_norm",
    "network_time_layers",
    "resize",
    "resized_projections",
    "timestep_vector",
]
