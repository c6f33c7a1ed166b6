"""`NoisyClassifier`: p(c | x_t, t), the classifier of classifier guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from diffusers_repr.hub.base_record import (
    BaseRecord,
    Dependent,
    ProcessRecord,
    refuse_other_inputs,
    refuse_other_process,
)
from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.hub.schema import listing, number, optional, record, text
from diffusers_repr.models.labels import label_names, named_ids
from diffusers_repr.models.layers import CastLinear, keeping_weights
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.outputs import ClassifierOutput, packed
from diffusers_repr.models.unet_encoder import check_down_blocks, encoder_half
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.noise.process_record import process_record

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
POOLINGS = ("attention", "mean")
_SIGMAS = ("sigma_min", "sigma_max", "sigma_data")


_PROCESS = record(
    {
        "process": optional(
            record(
                {"kind": text(50)},
                {
                    "half_log_snr": listing(optional(number()), 1, 1000),
                    **dict.fromkeys(_SIGMAS, number(0)),
                },
                others=True,
            )
        ),
        "base": optional(text(1000)),
        "scale": optional(number(0)),
    }
)


class NoisyClassifier(ReprModelMixin, ModelMixin, ConfigMixin):
    """The downsampling half of a U-Net with a classifier on top (Dhariwal and Nichol 2021, section 4.1).

    It takes what the denoiser takes, `x_t = alpha x_0 + sigma eps` in pixels or latents of any height and width, and
    the training timestep, and gives logits of the class of x_0. Its config tells the forward process it was trained
    on, and `check_base` refuses a denoiser of another one.

    Args:
        in_channels: C, channels of x_0.
        num_classes: K.
        sample_size: Height and width of x_0 in training, a number if they are equal. Others are taken too.
        block_out_channels: Channels of each stage; all stages but the last halve height and width (rounded up).
        down_block_types: Of each stage, from `DOWN_BLOCKS`.
        layers_per_block: Residual blocks of a stage.
        attention_head_dim: Channels of an attention head, in the stages, the middle and the pooling.
        mid_block_attention: Whether the middle block has attention.
        norm_num_groups: Groups of every group norm.
        norm_eps: Their epsilon.
        resnet_time_scale_shift: `scale_shift` (adaptive group norm) or `default` (the embedding is added).
        dropout: In the residual blocks.
        pooling: `attention` (the mean attends to all places; it has no positions, so any size fits) or `mean`.
        num_train_timesteps: T of the forward process.
        noise_schedule: The rest of the process. `**describe_process(schedule)` gives both.
        base_model: Name of the pipeline that the process and the latents were taken from.
        latent_scale: Scaling factor of its VAE; None in pixels.
        id2label: Name of each class id, or the names in the order of the ids.

    Raises:
        ValueError: For sizes, blocks or names that do not fit together.

    Example:
        >>> model = NoisyClassifier(1, 10, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
        >>> model(torch.zeros(2, 1, 8, 6), torch.tensor([3, 900])).shape
        torch.Size([2, 10])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = [*DOWN_BLOCKS, "UNetMidBlock2D", "Attention"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        sample_size: int | tuple[int, int] | None = None,
        block_out_channels: Sequence[int] = (32, 64),
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D"),
        layers_per_block: int = 1,
        attention_head_dim: int = 16,
        mid_block_attention: bool = True,
        norm_num_groups: int = 8,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
        dropout: float = 0.0,
        pooling: str = "attention",
        num_train_timesteps: int = 1000,
        noise_schedule: dict[str, Any] | None = None,
        base_model: str | None = None,
        latent_scale: float | None = None,
        id2label: Mapping[Any, str] | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(
            in_channels=in_channels,
            num_classes=num_classes,
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            norm_num_groups=norm_num_groups,
            num_train_timesteps=num_train_timesteps,
        )
        _PROCESS({"process": noise_schedule, "base": base_model, "scale": latent_scale}, type(self).__name__)
        self.register_to_config(id2label=named_ids(id2label, num_classes))
        channels, kinds = list(block_out_channels), list(down_block_types)
        last_attends = mid_block_attention or pooling == "attention"
        check_down_blocks(channels, kinds, DOWN_BLOCKS, attention_head_dim, norm_num_groups, last_attends, even=True)
        if pooling not in POOLINGS or resnet_time_scale_shift not in ("scale_shift", "default"):
            raise ValueError(
                f"pooling={pooling!r}, resnet_time_scale_shift={resnet_time_scale_shift!r}; expected one of "
                f"{', '.join(POOLINGS)}, and scale_shift or default."
            )
        width, embedded = channels[-1], 4 * channels[0]
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], embedded)
        self.down_blocks, self.mid_block = encoder_half(
            channels,
            kinds,
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            groups=norm_num_groups,
            eps=norm_eps,
            dropout=dropout,
            middle_attends=mid_block_attention,
            time_channels=embedded,
            time_scale_shift=resnet_time_scale_shift,
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, width, eps=norm_eps)
        self.pool = (
            Attention(width, heads=width // attention_head_dim, dim_head=attention_head_dim, bias=True)
            if pooling == "attention"
            else None
        )
        self.classifier = CastLinear(width, num_classes)

    @property
    def labels(self) -> list[str]:
        """Name of each class, in the order of the ids; the ids as text where none were given."""
        return label_names(self.config)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool | None = None
    ) -> Tensor | ClassifierOutput | tuple[Tensor]:
        """Logits `(B, K)` of the class of x_0, float32 or wider whatever the dtype of the network.

        Args:
            sample: x_t, `(B, C, H, W)`, scaled as the denoiser takes it.
            timestep: Training timestep (`NoiseLevel.timestep`), a number for all or `(B,)`; may be fractional.
            return_dict: None for the logits themselves, True for an output with `logits`, False for a tuple.

        Raises:
            ValueError: For an input of another shape, or another number of timesteps.
        """
        channels = self.config["in_channels"]
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"NoisyClassifier takes x_t (B, {channels}, H, W); got {tuple(sample.shape)}.")
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if len(times) not in (1, len(sample)):
            raise ValueError(
                f"NoisyClassifier got {len(times)} timesteps for {len(sample)} samples; pass one or each."
            )
        dtype = self.dtype  # the one computed in: layerwise casting stores weights in another
        with keeping_weights(self.conv_in.weight.dtype, dtype):
            pooled = self._pooled(sample.to(dtype), times.expand(len(sample)))
        with torch.autocast(sample.device.type, enabled=False):
            logits = self.classifier(pooled.to(torch.promote_types(dtype, torch.float32)))
        return packed(logits, ClassifierOutput, return_dict)

    def _pooled(self, sample: Tensor, times: Tensor) -> Tensor:
        """`(B, width)` of x_t and timesteps `(B,)`, in the dtype of x_t."""
        emb = self.time_embedding(self.time_proj(times).to(sample.dtype))
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden, _ = block(hidden, emb)
        hidden = nn.functional.silu(self.conv_norm_out(self.mid_block(hidden, emb)))
        pooled = hidden.mean((2, 3))
        if self.pool is None:
            return pooled
        tokens = torch.cat([pooled[:, None], hidden.flatten(2).transpose(1, 2)], dim=1)
        return self.pool(pooled[:, None], encoder_hidden_states=tokens)[:, 0]

    def check_base(self, schedule: Any, channels: int, latent_scale: float | None = None) -> None:
        """Check that a denoiser's x_t and timesteps mean what they meant in training.

        Args:
            schedule: Forward process of the denoiser, a `NoiseSchedule`.
            channels: Of its x_0.
            latent_scale: Scaling factor of its VAE; None leaves it unchecked.

        Raises:
            ValueError: If process, channels or latents are others; names both sides. Also if the config tells no
                process.
        """
        config = self.config
        if config["noise_schedule"] is None:
            raise ValueError(
                "This NoisyClassifier's config does not tell the noise process it was trained on, so it cannot be "
                "checked against the base. Make it with NoisyClassifier(..., **describe_process(schedule))."
            )
        process = _recorded(config["num_train_timesteps"], config["noise_schedule"])
        was = BaseRecord(
            config["base_model"], process=process, channels=config["in_channels"], latent_scale=config["latent_scale"]
        )
        came = BaseRecord(process=process_record(schedule), channels=channels, latent_scale=latent_scale)
        refuse_other_process(_CLASSIFIER, was, came)
        refuse_other_inputs(_CLASSIFIER, was, came)


_REMEDY = "Use a classifier trained for this base (examples/train_classifier.py)."
_CLASSIFIER = Dependent("NoisyClassifier", "classifier", "trained", _REMEDY)


def describe_process(schedule: NoiseSchedule) -> dict[str, Any]:
    """A forward process as the config of a `NoisyClassifier` keeps it; what the network predicts is no part of it.

    Args:
        schedule: The process.

    Returns:
        `num_train_timesteps` and `noise_schedule`: `kind`, for `vp` `half_log_snr` at timesteps evenly spread over
        the table (None where the signal is gone), for `edm` and `ve` their sigmas.
    """
    found = process_record(schedule)
    points = {"half_log_snr": list(found.half_log_snr)} if found.half_log_snr else {}
    return {
        "num_train_timesteps": found.num_train_timesteps,
        "noise_schedule": {"kind": found.kind, **points, **found.sigmas},
    }


def _recorded(steps: int, fields: Mapping[str, Any]) -> ProcessRecord:
    sigmas = {name: fields[name] for name in _SIGMAS if name in fields}
    return ProcessRecord(fields["kind"], steps, tuple(fields.get("half_log_snr", ())), sigmas)
