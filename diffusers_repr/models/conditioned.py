"""What transformers on patches share: input, timestep, classes and vectors, checked; conditions dropped to null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn


class ConditionedMixin:
    """Base of networks on patches that take a time, classes and vectors.

    Their settings: `in_channels`, `patch_size`, `num_classes`, `condition_dim`, `class_dropout_prob`, `time_divisor`,
    and `time_offset` if they have it. Their `null_condition` is a learned vector, or None where they take none.
    """

    config: Mapping[str, Any]
    training: bool
    null_condition: nn.Parameter | None

    def check_input(self, value: Tensor) -> Sequence[int]:
        """The shape of x_t.

        Raises:
            ValueError: If it is not `(B, C, H, W)`, or the patch does not divide it.
        """
        channels, patch = self.config["in_channels"], self.config["patch_size"]
        if value.ndim != 4 or value.shape[1] != channels or value.shape[2] % patch or value.shape[3] % patch:
            raise ValueError(
                f"{type(self).__name__} takes x_t (B, {channels}, H, W) with H and W multiples of {patch}; got "
                f"{tuple(value.shape)}."
            )
        return value.shape

    def refuse_conditions(self, class_labels: Tensor | None, condition: Tensor | None) -> None:
        """Raise ValueError for a class or a vector that the network does not take."""
        name = type(self).__name__
        if class_labels is not None and not self.config["num_classes"]:
            raise ValueError(f"This {name} has no classes (num_classes=0); drop class_labels.")
        if condition is not None and self.null_condition is None:
            raise ValueError(f"This {name} takes no vector (condition_dim=None); drop condition.")

    def time_waves(self, timestep: Tensor | float, like: Tensor, channels: int) -> Tensor:
        """Cosines and sines of what the network is told of the time, `(B, channels)`, in the dtype of `like`.

        Args:
            timestep: In the scheduler's units, a number for all or `(B,)`.
            like: x_t.
            channels: An even number.

        Raises:
            ValueError: For another number of timesteps.
        """
        times = torch.as_tensor(timestep, device=like.device).reshape(-1)
        if times.shape[0] not in (1, like.shape[0]):
            raise ValueError(
                f"{times.shape[0]} timesteps for {like.shape[0]} samples; pass one for all, or one for each."
            )
        # Half precision cannot tell neighbouring timesteps apart.
        times = times.to(torch.promote_types(times.dtype, torch.float32)) / self.config["time_divisor"]
        times = times + self.config.get("time_offset", 0.0)
        waves = get_timestep_embedding(
            times.expand(like.shape[0]), channels, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return waves.to(like.dtype)

    def drop_mask(self, mask: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        """Which samples lose their condition: as told, drawn in training mode, or None for none of them.

        Raises:
            ValueError: If `mask` is not boolean `(B,)`.
        """
        if mask is None:
            if not self.training or not self.config["class_dropout_prob"]:
                return None
            return torch.rand(batch, device=device) < self.config["class_dropout_prob"]
        if mask.shape != (batch,) or mask.dtype != torch.bool:
            raise ValueError(
                f"drop_mask must be boolean ({batch},), True where the condition is dropped; got {mask.dtype} "
                f"{tuple(mask.shape)}."
            )
        return mask.to(device)

    def label_ids(self, labels: Tensor | None, dropped: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """Class ids `(B,)`, the null class's where there are none or where they are dropped.

        Raises:
            ValueError: For another shape, and ids out of range.
        """
        null = self.config["num_classes"]
        if labels is None:
            return torch.full((batch,), null, device=device)
        if labels.shape != (batch,):
            raise ValueError(f"class_labels must be ({batch},); got {tuple(labels.shape)}.")
        # On a GPU the check would wait for all work before it.
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            outside = (labels < 0) | (labels > null)
            if bool(outside.any()):
                raise ValueError(
                    f"class_labels must lie in 0..{null} ({null} is the null class); got {labels.tolist()}."
                )
        labels = labels.to(device)
        return labels if dropped is None else torch.where(dropped, null, labels)

    def condition_rows(
        self, condition: Tensor | None, dropped: Tensor | None, batch: int, device: torch.device
    ) -> Tensor:
        """Vectors `(B, condition_dim)`, the learned null where there are none or where they are dropped.

        Raises:
            ValueError: For another shape.
        """
        null = self.null_condition
        assert null is not None
        if condition is None:
            return null.expand(batch, -1)
        if condition.shape != (batch, len(null)):
            raise ValueError(f"condition must be ({batch}, {len(null)}); got {tuple(condition.shape)}.")
        if dropped is None:
            dropped = torch.zeros(batch, dtype=torch.bool, device=device)
        # Always a choice, so that the null vector has a gradient in every step, as DDP wants.
        return torch.where(dropped[:, None], null, condition.to(device, null.dtype))


def check_patches(height: int, width: int, patch: int, dim: int, heads: int) -> None:
    """Raise ValueError unless the patch divides the image, and the heads and 4 the width."""
    if height % patch or width % patch:
        raise ValueError(f"sample_size {height} x {width} must be a multiple of patch_size={patch}.")
    if dim % 4 or dim % heads:
        raise ValueError(f"hidden_size={dim} must be a multiple of 4 and of num_attention_heads={heads}.")


def check_conditions(num_classes: int, class_dropout_prob: float, time_divisor: float) -> None:
    """Raise ValueError for settings out of their ranges."""
    if num_classes < 0 or not 0 <= class_dropout_prob <= 1 or not time_divisor > 0:
        raise ValueError(
            "num_classes must be at least 0, class_dropout_prob from 0 to 1 and time_divisor above 0; got "
            f"{num_classes}, {class_dropout_prob}, {time_divisor}."
        )


__all__ = ["ConditionedMixin", "check_conditions", "check_patches"]
