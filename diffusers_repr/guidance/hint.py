"""`HintGuidance`: guidance over the hint of a ControlNet; text, class and all else are the same in both branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.batching import index_batch, without_rows
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode, forward_names
from diffusers_repr.guidance.base import Guidance, GuidanceTerm, check_finite
from diffusers_repr.guidance.engine.callers import running_argument
from diffusers_repr.guidance.step import GuidedStep

_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")


@dataclass(frozen=True)
class HintGuidance(Guidance):
    """`eps(hint) + s (eps(hint) - eps(null hint))`, with the text in both (ScribbleGen, arXiv 2311.17121).

    Of a pipeline with a ControlNet, whose own classifier-free guidance takes the text away and keeps the hint. The
    paper writes `eps(null) + w (eps(hint) - eps(null))`; `s` is `w - 1`. One lane more, of the ControlNet and of the
    network. With the pipeline's own guidance beside it, its correction is added to both of the pipeline's branches.

    Attributes:
        null: The hint that stands for none, as the ControlNet has seen it in training: one value a channel `(C,)`,
            such as `HintEncoder.null`, or a whole hint `(C, H, W)` of the size of the others.
        scale: s; 0 is off, and the default is the paper's w of 2.
        scales: One s a sample of the call, in place of `scale`, which then stays 1.
        conditioning_scale: Factor on what the ControlNet adds; None: as the pipeline is called with. A loop of your
            own says it.

    Raises:
        ValueError: For a null hint of another number of dimensions, `scales` beside a scale, or an empty one.

    Example:
        >>> HintGuidance(torch.full((3,), 0.5), scales=[0.0, 1.0, 4.0]).scales
        (0.0, 1.0, 4.0)
    """

    null: Tensor = field(repr=False)
    scale: float = field(default=1.0, kw_only=True)
    scales: Sequence[float] | None = field(default=None, kw_only=True)
    conditioning_scale: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.null, Tensor) or self.null.ndim not in (1, 3):
            raise ValueError(
                "null is a value a channel (C,), or a hint (C, H, W), as a tensor; got "
                f"{tuple(self.null.shape) if isinstance(self.null, Tensor) else type(self.null).__name__}."
            )
        if self.scales is None:
            return
        for value in self.scales:
            check_finite("HintGuidance.scales", value)
        object.__setattr__(self, "scales", tuple(float(value) for value in self.scales))
        if not self.scales or self.scale != 1:
            raise ValueError(f"scales is one number a sample, and scale stays 1 beside it; got scale={self.scale}.")

    def bind(self, denoiser: Denoiser) -> HintTerm:
        """Ready for a model.

        Raises:
            ValueError: For a pipeline without one ControlNet, or a null hint of another number of channels.
        """
        return HintTerm(self, denoiser)


class HintTerm(GuidanceTerm):
    """Runs the ControlNet on the null hint, and the network on what that adds."""

    config: HintGuidance

    def __init__(self, config: HintGuidance, denoiser: Denoiser) -> None:
        super().__init__(config, denoiser)
        controlnet: Any = getattr(denoiser.pipe, "controlnet", None)
        known = forward_names(controlnet) if isinstance(controlnet, nn.Module) else []
        if "controlnet_cond" not in known or isinstance(getattr(controlnet, "nets", None), nn.ModuleList):
            found = "none" if controlnet is None else f"a {type(controlnet).__name__}"
            raise ValueError(
                f"HintGuidance guides over the hint of one ControlNet, and this pipeline has {found}. Take a pipeline "
                "such as StableDiffusionControlNetPipeline."
            )
        self.controlnet: Any = controlnet
        channels = controlnet.config["conditioning_channels"]
        if config.null.shape[0] != channels:
            raise ValueError(
                f"The ControlNet takes hints of {channels} channels; the null hint has {config.null.shape[0]}."
            )
        self._names = [name for name in known if name not in ("controlnet_cond", "conditioning_scale", "guess_mode")]

    def correction(self, step: GuidedStep) -> Tensor:
        """`eps(hint) - eps(null hint)`: of one input, so the same in every form of the prediction."""
        call, model = step.call, self.denoiser.model
        if any(call.inputs.get(name) is None for name in _RESIDUALS):
            raise ValueError("The network was called without what a ControlNet adds; HintGuidance has nothing to do.")
        if running_argument(model, "guess_mode"):
            raise ValueError("guess_mode takes the hint out of the null branch by itself; leave it at False.")
        inputs = index_batch(call.inputs, call.rows, call.batch.cond, without_rows(self.denoiser.family))
        given: dict[str, Any] = {name: inputs[name] for name in self._names if name in inputs}
        stride = self.denoiser.stride
        null = self.config.null.to(call.x.device, self.controlnet.dtype)
        size = (call.size[-2] * stride, call.size[-1] * stride)
        hint = (null.view(-1, 1, 1) if null.ndim == 1 else null).expand(call.samples, -1, *size)
        given |= {"controlnet_cond": hint, "conditioning_scale": self._conditioning_scale(), "return_dict": False}
        with torch.no_grad(), eval_mode(self.controlnet):
            added = self.controlnet(**given)
        other = step.run(call.batch.cond, condition=dict(zip(_RESIDUALS, added, strict=True)))
        difference = step.cond - other
        if self.config.scales is None:
            return difference
        if len(self.config.scales) != len(difference):
            raise ValueError(f"{len(self.config.scales)} scales of the hint for {len(difference)} samples.")
        return difference.new_tensor(self.config.scales).view(-1, 1, 1, 1) * difference

    def _conditioning_scale(self) -> float:
        """As the config says, or what the pipeline's running step multiplies by."""
        given = self.config.conditioning_scale
        found = running_argument(self.denoiser.model, "cond_scale") if given is None else given
        if found is None:
            raise ValueError(
                "How much of the ControlNet's output the caller adds is not known; say it by "
                "HintGuidance(conditioning_scale=...)."
            )
        return found


__all__ = ["HintGuidance", "HintTerm"]
