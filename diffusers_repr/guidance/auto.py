"""`AutoGuidance`: away from what a weaker version of the model predicts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.offload import is_offloaded
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode, forward_names
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.parts import COMPONENTS
from diffusers_repr.guidance.base import Guidance, GuidanceTerm
from diffusers_repr.guidance.step import GuidedStep

# What networks must have in common to be called with the same inputs and to mean the same by their outputs.
_SHARED = (
    "in_channels",
    "num_class_embeds",
    "class_embed_type",
    "cross_attention_dim",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "num_embeds_ada_norm",
    "caption_channels",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "use_additional_conditions",
    "time_embedding_type",
    "timestep_scale",
)


@dataclass(frozen=True)
class AutoGuidance(Guidance):
    """Guidance by a weaker version of the model: `eps + s (eps - eps_weak)` (Karras et al. 2024, arXiv 2406.02507).

    The weaker network (smaller, or trained less, or earlier in training; the same task, data and conditions) is called
    with the inputs of the conditional rows: one more lane, and one more pass, without gradient and in eval mode. The
    difference is of one input, so the same in every form of prediction. The paper's guidance weight w is `1 + s`.

    Attributes:
        weaker_model: The network; or a pipeline or `Denoiser` that holds it, whose noise process and prediction are
            then checked too. It is never moved: put it where the model is, in its dtype.
        scale: s; 0 is off. Default: EDM2-S at 512 pixels in the paper's code (w = 2.1).

    Example:
        >>> from diffusers import UNet2DModel
        >>> small = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> AutoGuidance(small, interval=(100, 900)).scale
        1.1
    """

    weaker_model: Any = field(repr=False)
    scale: float = field(default=1.1, kw_only=True)

    def bind(self, denoiser: Denoiser) -> AutoGuidanceTerm:
        """Ready for a model.

        Raises:
            TypeError: If the weaker model is no network and holds none.
            ValueError: If it is the model itself, on another device or in another dtype, or not called as the model.
        """
        return AutoGuidanceTerm(self, denoiser)


class AutoGuidanceTerm(GuidanceTerm):
    """The difference between the model's prediction and the weaker one's."""

    def __init__(self, config: AutoGuidance, denoiser: Denoiser) -> None:
        super().__init__(config, denoiser)
        self.weaker = network_of(config.weaker_model)
        if self.weaker is denoiser.model:
            raise ValueError("weaker_model is the guided network itself: the two predictions would be equal.")
        _check_process(config.weaker_model, denoiser)
        _check_inputs(self.weaker, denoiser)
        _check_place(self.weaker, denoiser)

    def correction(self, step: GuidedStep) -> Tensor:
        """`eps - eps_weak`: of one input, so the same in every form of the prediction."""
        with torch.no_grad(), eval_mode(self.weaker):
            return step.cond - step.run(step.call.batch.cond, model=self.weaker)


def network_of(holder: Any) -> nn.Module:
    """The weaker network: itself, or that of a pipeline or `Denoiser`."""
    if isinstance(holder, nn.Module):
        return holder
    for name in ("model", *COMPONENTS):
        model = getattr(holder, name, None)
        if isinstance(model, nn.Module):
            return model
    raise TypeError(f"weaker_model is a network, a pipeline or a Denoiser; got {type(holder).__name__}.")


def _check_process(holder: Any, denoiser: Denoiser) -> None:
    if isinstance(holder, nn.Module):
        return
    mine = denoiser.schedule
    other = (holder if isinstance(holder, Denoiser) else Denoiser.from_pipe(holder)).schedule
    if other.output != mine.output or not mine.same_process(other):
        raise ValueError(
            f"The weaker model predicts {other.output} on a {other.kind} process of {other.num_train_timesteps} "
            f"timesteps, the model {mine.output} on {mine.kind} of {mine.num_train_timesteps}"
            f"{'' if other.output != mine.output else ' with other noise levels'}; both must be the same."
        )


def _check_inputs(weaker: nn.Module, denoiser: Denoiser) -> None:
    model, mine = denoiser.model, denoiser.config
    other: Mapping[str, Any] = getattr(weaker, "config", {})
    names = (type(weaker).__name__, type(model).__name__)
    parameters = inspect.signature(weaker.forward).parameters.values()
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    missing = [name for name in forward_names(model) if name not in forward_names(weaker)]
    if missing and not takes_any:
        raise ValueError(f"The weaker {names[0]} takes no {', '.join(missing)}, which the {names[1]} takes.")
    if not mine or not other:
        return  # plain modules, which do not tell
    for key in _SHARED:
        if mine.get(key) != other.get(key):
            raise ValueError(
                f"The weaker {names[0]} has {key}={other.get(key)!r}, the {names[1]} {mine.get(key)!r}; it must take "
                "the same inputs."
            )
    channels = denoiser.family.channels()
    theirs = denoiser.family.bound_to(other).channels()
    if theirs != channels or _predicted(other, channels) != _predicted(mine, channels):
        raise ValueError(
            f"The weaker {names[0]} predicts {_predicted(other, channels)} channels, the {names[1]} "
            f"{_predicted(mine, channels)}."
        )


def _predicted(config: Mapping[str, Any], channels: int) -> int:
    """Without a learned variance."""
    return min(int(config.get("out_channels") or channels), channels)


def _check_place(weaker: nn.Module, denoiser: Denoiser) -> None:
    dtype = floating_dtype(weaker)
    first = next(weaker.parameters(), None)
    if first is None:
        return
    mine = denoiser.device
    elsewhere = (first.device.type, first.device.index or 0) != (mine.type, mine.index or 0)
    if dtype != denoiser.dtype or (elsewhere and not is_offloaded(weaker)):
        raise ValueError(
            f"The weaker model is on {first.device} in {dtype}, the model on {mine} in {denoiser.dtype}. "
            f"Move it: weaker_model.to({str(mine)!r}, {denoiser.dtype})."
        )
