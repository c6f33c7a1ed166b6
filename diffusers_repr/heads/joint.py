"""`JointHead`: a classifier on the pooled activations of a U-Net's encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.capture.unet_halves import UNetFeatures, encode_partial
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.heads.base import Head, register_head
from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.models.joint_vit import JointViTModel
from diffusers_repr.models.labels import label_names, named_ids
from diffusers_repr.models.layers import CastBatchNorm1d, CastLayerNorm, CastLinear
from diffusers_repr.models.outputs import ClassifierOutput, packed

NORMS = ("layer", "batch", "none")


@register_head("joint")
class JointHead(Head, ModelMixin, ConfigMixin):
    """Class logits from all levels of the encoder that denoises (Deja et al. 2023, arXiv 2301.13622, section 4).

    The middle block's output and every skip are averaged over space and joined: norm, dropout, a linear layer, leaky
    ReLU, norm, dropout and a linear layer, all in float32 whatever the network's dtype.

    The paper's code joins the raw timestep too and puts it through batch norm: where it is constant in training, its
    running variance falls to 0 and another timestep blows up the logits. Here it enters after the first norm, divided
    by `time_divisor`.

    Args:
        in_features: Channels of the middle block and of all skips together; `for_unet` counts them.
        num_classes: K.
        hidden_features: Width between the linear layers; half of `in_features` if None.
        norm: `layer`, the same for every number of rows and processes; `batch`, as the paper's code has it: each
            process normalises by its own rows, and the running statistics saved are those of the first; `none`.
        dropout: Before both linear layers; 0.7 in the paper's code.
        time_feature: Whether the timestep is a feature.
        time_divisor: What it is divided by, the number of training timesteps.
        id2label: Name of each class id, or the names in the order of the ids.
        dropout_first: Dropout in front of each norm, as the paper's code has it, instead of behind it: the norm then
            measures in training what dropout left over, and in use what it did not touch.

    Raises:
        ValueError: For sizes, norms or names that do not fit.

    Example:
        >>> head = JointHead(5, 3, norm="none", id2label=["a", "b", "c"])
        >>> head(torch.ones(2, 3, 1, 1), [torch.ones(2, 2, 4, 4)], 10).shape, head.labels
        (torch.Size([2, 3]), ['a', 'b', 'c'])
    """

    _supports_gradient_checkpointing = True  # so that it goes along with its network; nothing is worth recomputing

    @register_to_config
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden_features: int | None = None,
        norm: str = "layer",
        dropout: float = 0.7,
        time_feature: bool = True,
        time_divisor: float = 1000.0,
        id2label: Mapping[Any, str] | Sequence[str] | None = None,
        dropout_first: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        width = max(1, in_features // 2) if hidden_features is None else hidden_features
        check_sizes(in_features=in_features, num_classes=num_classes, hidden_features=width)
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}; expected one of {', '.join(NORMS)}.")
        if not 0 <= dropout < 1 or not time_divisor > 0:
            raise ValueError(
                f"dropout is from 0 to below 1 and time_divisor above 0; got {dropout} and {time_divisor}."
            )
        self.register_to_config(id2label=named_ids(id2label, num_classes))
        self.norm1, self.norm2 = _norm(norm, in_features), _norm(norm, width)
        self.linear1 = CastLinear(in_features + time_feature, width)
        self.linear2 = CastLinear(width, num_classes)

    @classmethod
    def for_unet(cls, unet: nn.Module, num_classes: int, **settings: Any) -> JointHead:
        """A new head of the size that a network's encoder has.

        Args:
            unet: A `UNet2DModel` without classes.
            num_classes: K.
            **settings: Further arguments of the class.

        Raises:
            TypeError: For another network.
        """
        config: Any = unet.config
        side = 2 ** max(0, len(config["block_out_channels"]) - 1)
        like = next(unet.parameters())
        tiny = torch.zeros(1, config["in_channels"], side, side, device=like.device, dtype=like.dtype)
        with eval_mode(unet), torch.no_grad():
            found = encode_partial(unet, tiny, torch.zeros(1, dtype=torch.long, device=like.device))
        return cls(sum(part.shape[1] for part in (found.hidden, *found.skips)), num_classes, **settings)

    def check_values(self) -> None:
        """Refuse running variances below 0."""
        for norm in (self.norm1, self.norm2):
            if isinstance(norm, nn.BatchNorm1d) and norm.running_var is not None and float(norm.running_var.min()) < 0:
                raise ValueError(f"The running variance of this {type(self).__name__} has values below 0.")

    @property
    def labels(self) -> list[str]:
        """Name of each class, in the order of the ids; the ids as text where none were given."""
        return label_names(self.config)

    def features(self, hidden: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """Means over space, `(B, in_features)`, in float32 or wider.

        Args:
            hidden: Output of the middle block, `(B, C, h, w)`.
            skips: `(B, C_i, h_i, w_i)` each.

        Raises:
            ValueError: For another number of channels.
        """
        wide = torch.promote_types(hidden.dtype, torch.float32)
        pooled = torch.cat([part.to(wide).mean((2, 3)) for part in (hidden, *skips)], dim=1)
        if pooled.shape[1] != self.config["in_features"]:
            raise ValueError(
                f"This JointHead takes {self.config['in_features']} channels; the network's encoder gave "
                f"{pooled.shape[1]}. Make it by JointHead.for_unet(unet, num_classes)."
            )
        return pooled

    def forward(
        self,
        hidden: Tensor,
        skips: Sequence[Tensor],
        timestep: Tensor | float,
        return_dict: bool | None = None,
    ) -> Tensor | ClassifierOutput | tuple[Tensor]:
        """Logits `(B, K)`, float32 or wider.

        Args:
            hidden: Output of the middle block, `(B, C, h, w)`.
            skips: `(B, C_i, h_i, w_i)` each, `conv_in`'s first.
            timestep: What the network was told, a number for all or `(B,)`.
            return_dict: None for the logits themselves, True for an output with `logits`, False for a tuple.

        Raises:
            ValueError: For another number of channels or timesteps.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            value = self.features(hidden, skips)
            value = self._regularized(self.norm1, value)
            if self.config["time_feature"]:
                times = torch.as_tensor(timestep, device=value.device).reshape(-1)
                if len(times) not in (1, len(value)):
                    raise ValueError(f"{len(times)} timesteps for {len(value)} samples; pass one, or one each.")
                times = times.to(value.dtype) / self.config["time_divisor"]
                value = torch.cat([value, times.expand(len(value))[:, None]], dim=1)
            value = F.leaky_relu(self.linear1(value))
            value = self._regularized(self.norm2, value)
            return packed(self.linear2(value), ClassifierOutput, return_dict)

    def _regularized(self, norm: nn.Module, value: Tensor) -> Tensor:
        """Norm and dropout, in the order asked for."""
        if self.config["dropout_first"]:
            return norm(F.dropout(value, self.config["dropout"], self.training))
        return F.dropout(norm(value), self.config["dropout"], self.training)

    def classify(self, features: UNetFeatures) -> Tensor:
        """Logits `(B, K)` of what `encode_partial` gave."""
        return self(features.hidden, features.skips, features.inputs["timestep"])


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return CastLayerNorm(width) if kind == "layer" else CastBatchNorm1d(width)


def check_joint_parts(unet: Any, classifier: Any) -> None:
    """Refuse a network and a classifier that do not belong together in a `JointDiffusionPipeline`.

    Raises:
        TypeError: For a network that is neither U-Net nor `JointViTModel`, and a classifier that is no `JointHead`.
        ValueError: For a U-Net with classes or without a head, and a `JointViTModel` with one.
    """
    unet = plain_module(unet)
    if isinstance(unet, JointViTModel):
        if classifier is not None:
            raise ValueError(
                f"A JointViTModel brings its own classifier; leave classifier out (got a {type(classifier).__name__})."
            )
        return
    if not isinstance(unet, UNet2DModel):
        raise TypeError(f"unet is a UNet2DModel or a JointViTModel; got {type(unet).__name__}.")
    if classifier is None:
        raise ValueError(
            "classifier is missing: joint diffusion with a UNet2DModel needs the JointHead that was trained with it, "
            "JointHead.from_pretrained(folder, subfolder='classifier') of a folder that examples/train_joint.py "
            "wrote. A U-Net alone is sampled by DDPMPipeline, DDIMPipeline or GuidedUnconditionalPipeline."
        )
    if not isinstance(classifier, JointHead):
        raise TypeError(f"The classifier of a UNet2DModel is a JointHead; got {type(classifier).__name__}.")
    if unet.config.num_class_embeds is not None or unet.config.class_embed_type is not None:
        raise ValueError(
            "This UNet2DModel takes class labels itself; joint diffusion guides one that takes none by its classifier."
        )


__all__ = ["JointHead", "check_joint_parts"]
