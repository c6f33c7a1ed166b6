"""What heads on maps share: named layers, checked maps, the record of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads.base import Head
from diffusers_repr.heads.dense.features import readout_layers, tap_channels
from diffusers_repr.heads.dense.parts import timestep_vector
from diffusers_repr.heads.dense.record import LABELS, RECORD, describe_base, refuse_other_base
from diffusers_repr.hub.checks import check_channels, check_sizes
from diffusers_repr.models.layers import wide_dtype
from diffusers_repr.models.outputs import SampleOutput, packed


class RecordedHead(Head):
    """Base of heads on maps of named layers: they record their base, and refuse another.

    A subclass registers `layers`, `channels` and what `describe_base` gives, and calls `check_inputs`.
    """

    def check_inputs(self, widths: Mapping[str, int]) -> None:
        """Check the registered layers, channels and base, and the widths given.

        Raises:
            ValueError: For layers and channels that do not pair up, widths below 1, or a record of the base that is
                none.
        """
        RECORD(dict(self.config), type(self).__name__)
        check_channels(list(self.config["layers"]), list(self.config["channels"]))
        check_sizes(**widths)
        self._check_range("timestep_range")

    def _check_range(self, name: str) -> None:
        low, high = self.config[name]
        if not low < high:
            raise ValueError(f"{name} must be (low, high) with low < high; got ({low}, {high}).")

    @staticmethod
    def inputs_of(
        denoiser: Denoiser, layers: Sequence[str] | None = None, image_size: int | tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """The arguments that tell what a new head reads: the base, `layers`, and their `channels`.

        Args:
            denoiser: The base.
            layers: Full module paths; `readout_layers(denoiser.model)` if None.
            image_size: Pixels at which sizes are looked up, where the network's config tells none.

        Raises:
            ValueError: For layers that do not exist or give no map.
        """
        paths = readout_layers(denoiser.model) if layers is None else list(layers)
        return {**describe_base(denoiser), "layers": paths, "channels": tap_channels(denoiser, paths, image_size)}

    def check_base(self, denoiser: Denoiser) -> None:
        """Refuse another base than the one the head was trained on.

        Raises:
            TypeError: If `denoiser` is no `Denoiser`.
            ValueError: If class, config, layers, channels or noise process differ; names both sides.
        """
        refuse_other_base(denoiser, type(self).__name__, self.config)


class MapHead(RecordedHead):
    """Base of heads that take maps of named layers to maps `(B, out, H, W)`.

    A subclass registers `layers`, `channels`, `label_range`, `level_range` and what `describe_base` gives, calls
    `check_arguments`, and writes `readout`.
    """

    def check_arguments(self, widths: Mapping[str, int]) -> None:
        """Check the registered layers, channels and ranges, and the widths given.

        Raises:
            ValueError: As `check_inputs`; for a range the wrong way round.
        """
        LABELS(dict(self.config), type(self).__name__)
        self.check_inputs(widths)
        for name in ("label_range", "level_range"):
            self._check_range(name)

    @classmethod
    def for_base(
        cls,
        denoiser: Denoiser,
        layers: Sequence[str] | None = None,
        image_size: int | tuple[int, int] | None = None,
        **options: Any,
    ) -> Any:
        """A new head for a network: its channels are looked up and the base is recorded.

        Args:
            denoiser: The base.
            layers: As in `inputs_of`.
            image_size: As there.
            **options: Further arguments of the class.

        Raises:
            ValueError: As there.
        """
        options.setdefault("level_range", denoiser.schedule.timestep_range)
        return cls(**{**cls.inputs_of(denoiser, layers, image_size), **options})

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest label the head was trained on."""
        low, high = self.config["label_range"]
        return float(low), float(high)

    def readout(self, maps: Mapping[str, Tensor], timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """Checked maps of one dtype, timesteps `(B,)` float64 and the common size to `(B, out, H, W)`."""
        raise NotImplementedError

    def forward(
        self,
        features: Mapping[str, Tensor],
        timestep: Tensor | float,
        size: tuple[int, int] | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | SampleOutput | tuple[Tensor]:
        """Read a map out of features.

        Args:
            features: Layer path -> map `(B, C_l, h_l, w_l)`, any floating dtype; others than the head's are ignored.
            timestep: Training timestep that the network was told, one or `(B,)`.
            size: (H, W) of the result; the largest height and width among the maps if None.
            return_dict: None for the map itself, True for an output with `sample`, False for a tuple.

        Returns:
            `(B, out, H, W)`, float32 (float64 for a head in float64), differentiable with respect to the features.

        Raises:
            ValueError: If a layer is missing or a map has another shape than the head was made for.
        """
        dtype = wide_dtype(self)
        taken = self._take(features)
        first = next(iter(taken.values()))
        if size is None:
            size = (max(x.shape[2] for x in taken.values()), max(x.shape[3] for x in taken.values()))
        times = timestep_vector(timestep, first.shape[0], first.device)
        with torch.autocast(first.device.type, enabled=False):
            wide = {path: x.to(dtype) for path, x in taken.items()}
            value = self.readout(wide, times, (int(size[0]), int(size[1])))
        return packed(value, SampleOutput, return_dict)

    def _take(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        name, taken = type(self).__name__, {}
        for path, channels in zip(self.config["layers"], self.config["channels"], strict=True):
            if path not in features:
                raise ValueError(f"{name} reads layer {path!r}, which is not among the features {list(features)}.")
            x = features[path]
            if x.ndim != 4 or x.shape[1] != channels:
                raise ValueError(
                    f"{name} takes {path!r} as a map (B, {channels}, h, w); got {tuple(x.shape)}."
                    + (" `denoiser.feature_map(...).as_map()` turns tokens into maps." if x.ndim == 3 else "")
                )
            taken[path] = x
        rows = {x.shape[0] for x in taken.values()}
        if len(rows) > 1:
            raise ValueError(f"The features have {sorted(rows)} rows; {name} takes one batch.")
        return taken


__all__ = ["MapHead", "RecordedHead"]
