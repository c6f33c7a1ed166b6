"""`REPAConfig`: settings of REPA and its relatives as keys of a recipe, and the objective that they ask for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers.hf_argparser import HfArg

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.loading import spread_positions
from diffusers_repr.objectives.auxiliary.alignment import AlignmentLoss
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss
from diffusers_repr.objectives.auxiliary.dispersive import DispersiveLoss
from diffusers_repr.objectives.auxiliary.haste import AttentionAlignmentLoss
from diffusers_repr.objectives.auxiliary.irepa import SpatialAlignmentLoss
from diffusers_repr.objectives.auxiliary.sra import SelfAlignmentLoss, WeightFall
from diffusers_repr.objectives.repa.objective import REPAObjective
from diffusers_repr.objectives.repa.reg import REGObjective
from diffusers_repr.objectives.repa.repa_e import REPAEObjective
from diffusers_repr.objectives.times import TimeSampler


def _arg(default: Any, help: str) -> Any:
    return HfArg(default=default, help=help)


def _args(help: str) -> Any:
    return HfArg(default_factory=list, help=help)


_WITHOUT = (
    "REPA-E trains the VAE by L1, KL and alignment here: its perceptual loss (LPIPS) and its discriminator are no "
    "parts of this package, and without them reconstructions blur. Pass your own to REPAEObjective in Python."
)
_WEIGHTS = (
    "repa_coefficient", "dispersive_weight", "haste_weight", "sra_weight", "reg_weight", "repa_e_vae_coefficient",
    "repa_e_kl_weight",
)  # fmt: skip


@dataclass(frozen=True)
class REPAConfig:
    """What is aligned with what; read by transformers' `HfArgumentParser`. A weight of 0 leaves a loss out.

    Raises:
        ValueError: If a value is out of range, or a setting has no use.
    """

    encoder: list[str] = _args("folders or Hub ids of frozen encoders; none: the plain denoising loss")
    encoder_positions: list[str] = _args(
        "how they resample position embeddings: transformers (default), or repa as its code; one for all or one each"
    )
    repa_layer: str | None = _arg(None, help="path of the aligned layer; default: REPA's for the depth")
    repa_coefficient: float = _arg(0.5, help="weight of the alignment loss (iREPA: 1)")
    repa_stop_step: int | None = _arg(None, help="optimizer steps after which all alignment ends (HASTE)")
    match_grid: Literal["none", "resize_image", "pool_student", "interpolate_teacher"] = _arg(
        "none", help="what to do where the token grids of layer and encoder differ; none: refuse"
    )
    projector_dim: int = _arg(2048, help="hidden width of the projectors")
    projector_kind: Literal["mlp", "conv"] = _arg("mlp", help="conv: a convolution over the grid (iREPA)")
    projector_kernel: int = _arg(3, help="side of that convolution")
    projectors: Literal["load", "new"] = _arg(
        "load", help="with a pretrained model: take over the heads that were saved with it, where they fit"
    )
    spatial_norm: float | None = _arg(None, help="gamma of the standardisation of targets (iREPA: 0.6)")
    time_sampling: Literal["uniform", "logit_normal", "lognormal"] = _arg("uniform", help="how noise levels are drawn")
    time_mean: float = _arg(0.0, help="mean of the normal behind them (EDM: -1.2)")
    time_std: float = _arg(1.0, help="its standard deviation (EDM: 1.2)")
    label_dropout: float = _arg(0.1, help="share of labels that become null")
    dispersive_weight: float = _arg(0.0, help="weight of the dispersive loss (its paper: 0.5)")
    dispersive_layer: str | None = _arg(None, help="its layer; default: at a quarter of the depth")
    dispersive_temperature: float = _arg(0.5, help="its temperature")
    haste_weight: float = _arg(0.0, help="weight of the attention alignment (HASTE: 0.5)")
    haste_layers: list[str] = _args(
        "its self-attentions; default: blocks 4 to 7, of fewer than 8 blocks up to four that end with `repa_layer`"
    )
    haste_teacher_layers: list[int] = _args("blocks of the first encoder, as many; default: the last ones")
    sra_weight: float = _arg(
        0.0,
        help="weight of the alignment with the moving average (SRA: 0.5 for a cosine, 0.2 for smooth_l1, 0.04 DiT)",
    )
    sra_layer: str | None = _arg(None, help="its layer; default: block 4, counted from 1, of XL 8")
    sra_teacher_layer: str | None = _arg(None, help="layer of the average; default: block 8, of XL 20 (DiT: 16)")
    sra_max_shift: float = _arg(0.2, help="largest step in time towards the data")
    sra_distance: Literal["default", "cosine", "token_cosine", "smooth_l1", "l1", "l2"] = _arg(
        "default", help="of tokens; default: cosine, smooth_l1 for noise in whole timesteps (DiT)"
    )
    sra_fall_start: int | None = _arg(
        None, help="last epoch, from 0, of its full weight; default: as its code, 149, and never with a cosine"
    )
    sra_fall_length: int = _arg(1000, help="epochs in which the weight then falls tenfold")
    sra_epoch_steps: int = _arg(5004, help="optimizer steps of such an epoch (ImageNet in batches of 256); 1: steps")
    sra_ema_decay: float = _arg(0.9999, help="of the average that teaches, apart from `ema_max_decay`, no warm-up")
    reg_weight: float = _arg(0.0, help="weight of the class token's denoising loss (REG: 0.03)")
    repa_e: bool = _arg(False, help="train the VAE too (REPA-E), by L1, KL and alignment; without LPIPS and GAN loss")
    repa_e_vae_coefficient: float = _arg(1.5, help="weight of the alignment in the VAE's loss")
    repa_e_kl_weight: float = _arg(1e-6, help="weight of the KL divergence in the VAE's loss")

    def __post_init__(self) -> None:
        needing = [name for name in ("haste_weight", "reg_weight", "repa_e") if getattr(self, name)]
        if needing and not self.teachers:
            raise ValueError(f"`{'`, `'.join(needing)}` need a teacher; name one by `encoder`.")
        if self.repa_e and self.reg_weight:
            raise ValueError("`repa_e` trains the VAE, `reg_weight` a class token; choose one of them.")
        spread_positions(self.encoder_positions, len(self.teachers))
        if self.projectors not in ("load", "new"):
            raise ValueError(f"`projectors` is load or new, got {self.projectors!r}.")
        if self.projector_dim < 1:
            raise ValueError(f"`projector_dim` must be positive, got {self.projector_dim}.")
        for name in _WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"`label_dropout` is a probability, got {self.label_dropout}.")
        self.times()
        self.losses()  # their own checks

    @property
    def teachers(self) -> list[str]:
        """The encoders, without the word of a recipe for none."""
        return [name for name in self.encoder if name != "none"]

    def times(self) -> TimeSampler:
        """How noise levels are drawn."""
        return TimeSampler(self.time_sampling, self.time_mean, self.time_std)

    def alignment(self) -> AlignmentLoss:
        """The alignment with the encoders, REPA's or iREPA's."""
        match_grid = None if self.match_grid == "none" else self.match_grid
        common = (self.repa_layer, self.repa_coefficient, match_grid, self.projector_dim)
        own = {name: getattr(self, name) for name in ("projector_kind", "projector_kernel", "spatial_norm")}
        if own == {"projector_kind": "mlp", "projector_kernel": 3, "spatial_norm": None}:
            return AlignmentLoss(*common, stop_step=self.repa_stop_step)
        return SpatialAlignmentLoss(*common, **own, stop_step=self.repa_stop_step)

    def losses(self) -> list[AuxiliaryLoss]:
        """The losses beside the alignment, those of positive weight."""
        chosen: list[AuxiliaryLoss] = []
        if self.dispersive_weight:
            chosen.append(DispersiveLoss(self.dispersive_layer, self.dispersive_weight, self.dispersive_temperature))
        if self.haste_weight:
            layers, blocks = self.haste_layers or None, self.haste_teacher_layers or None
            chosen.append(
                AttentionAlignmentLoss(None, layers, blocks, self.haste_weight, stop_step=self.repa_stop_step)
            )
        if self.sra_weight:
            chosen.append(
                SelfAlignmentLoss(
                    self.sra_layer,
                    self.sra_teacher_layer,
                    self.sra_weight,
                    self.sra_max_shift,
                    distance=None if self.sra_distance == "default" else self.sra_distance,
                    fall=self.sra_fall(),
                    ema_decay=self.sra_ema_decay,
                )
            )
        return chosen

    def sra_fall(self) -> WeightFall | None:
        """How the weight of the self-alignment falls; None: as its code has it for the distance."""
        if self.sra_fall_start is not None:
            return WeightFall(self.sra_fall_start, self.sra_fall_length, self.sra_epoch_steps)
        if (self.sra_fall_length, self.sra_epoch_steps) != (WeightFall.length, WeightFall.epoch_steps):
            raise ValueError("`sra_fall_length` and `sra_epoch_steps` act with `sra_fall_start`; give it (SRA: 149).")
        return None


def build_repa(
    denoiser: Denoiser, encoders: Sequence[Any] | Mapping[str, Any], config: REPAConfig | None = None
) -> REPAObjective:
    """The objective that a recipe asks for.

    Args:
        denoiser: What is trained.
        encoders: The loaded ones of `config.encoder`, or stand-ins whose features are cached.
        config: Settings; REPA's own if None.

    Raises:
        ValueError: As `REPAObjective`.
    """
    config = config or REPAConfig()
    settings: dict[str, Any] = {
        "alignment": config.alignment() if encoders else None,
        "losses": config.losses(),
        "time_sampling": config.times(),
        "label_dropout": config.label_dropout,
    }
    if config.repa_e:
        warnings.warn(_WITHOUT, stacklevel=2)
        settings |= {"vae_coefficient": config.repa_e_vae_coefficient, "kl_weight": config.repa_e_kl_weight}
        return REPAEObjective(denoiser, encoders, **settings)
    if config.reg_weight:
        return REGObjective(denoiser, encoders, class_weight=config.reg_weight, **settings)
    return REPAObjective(denoiser, encoders, **settings)


__all__ = ["REPAConfig", "build_repa"]
