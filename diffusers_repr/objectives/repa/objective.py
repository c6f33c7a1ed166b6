"""`REPAObjective`: denoising with representation alignment, and whatever other losses are read in the same forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.objectives.auxiliary.alignment import AlignmentLoss
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss
from diffusers_repr.objectives.base import Batch
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.matching import MatchGrid


class REPAObjective(DiffusionObjective):
    """Denoising loss plus `coefficient` times the alignment loss (Yu et al. 2024, arXiv 2410.06940, eq. 8 and 9).

    The hidden states of one layer, through a small projector, are drawn to the patch features that frozen encoders
    give of the clean image. Any family of `Denoiser`, any noise process, any layer of maps or tokens. The projectors
    are no part of the network: the saved pipeline is a plain one.

    It is `DiffusionObjective(denoiser, losses=[AlignmentLoss(layer, coefficient, ...)], encoders=encoders)`.

    Args:
        denoiser: As in `DiffusionObjective`.
        encoders: `Encoder`s, or name -> `Encoder`; `CachedFeatures` where all features lie in a cache. None of them:
            the plain denoising loss.
        layer: As `AlignmentLoss`.
        coefficient: lambda.
        match_grid: As `AlignmentLoss`.
        projector_dim: Hidden width of the projector.
        alignment: The alignment loss where its settings are others than these, which are left alone then:
            `SpatialAlignmentLoss()` of iREPA, or one with a `stop_step`, of HASTE.
        losses: Further losses: `DispersiveLoss`, `AttentionAlignmentLoss`, `SelfAlignmentLoss`, or an `AuxiliaryLoss`
            of one's own.
        **options: `time_sampling`, `label_dropout`, `null_label` of `DiffusionObjective`.

    Raises:
        ValueError: For a layer that does not exist or is no image, grids that differ without `match_grid`, two losses
            of one name, settings of the alignment beside an `alignment`.
        RuntimeError: If the network is compiled already.

    Example:
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_repr.encoders import Encoder
        >>> unet = UNet2DModel(8, 3, 3, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> teacher = Encoder.from_module(torch.nn.Conv2d(3, 5, 2, stride=2), patch_size=2, name="teacher")
        >>> objective = REPAObjective(Denoiser(unet, DDPMScheduler()), [teacher], "mid_block", projector_dim=16)
        >>> sorted(objective({"pixel_values": torch.zeros(2, 3, 8, 8)}))
        ['alignment', 'denoising', 'loss']
    """

    def __init__(
        self,
        denoiser: Denoiser,
        encoders: Sequence[Any] | Mapping[str, Any] = (),
        layer: str | None = None,
        coefficient: float | None = None,
        *,
        match_grid: MatchGrid | None = None,
        projector_dim: int | None = None,
        alignment: AlignmentLoss | None = None,
        losses: Sequence[AuxiliaryLoss] = (),
        **options: Any,
    ) -> None:
        own: dict[str, Any] = {
            "layer": layer,
            "weight": coefficient,
            "match_grid": match_grid,
            "projector_dim": projector_dim,
        }
        given = {name: value for name, value in own.items() if value is not None}
        if alignment is not None and given:
            raise ValueError(f"`alignment` has its own settings; give it {', '.join(given)}.")
        if alignment is None and encoders:
            alignment = AlignmentLoss(**given)
        chosen = [*([] if alignment is None else [alignment]), *losses]
        super().__init__(denoiser, losses=chosen, encoders=encoders, **options)

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """`loss`, and unweighted `denoising` and each further loss."""
        return self.combine(*self.observe(self.noised(batch)))

    def identity(self) -> dict[str, Any]:
        """As `DiffusionObjective`, with the entries of losses and encoders also where there are none."""
        return {"terms": {}, "encoders": {}, **super().identity()}


__all__ = ["REPAObjective"]
