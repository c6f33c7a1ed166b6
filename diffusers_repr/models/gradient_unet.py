"""`GradientUNet`: the decoder half of a U-Net that runs on what another U-Net's encoder half gave."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.hub.base_record import (
    BaseRecord,
    Dependent,
    refuse_other_class,
    refuse_other_config,
    same_marks,
)
from diffusers_repr.hub.identity import weight_marks
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.outputs import SampleOutput

UNETS = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel)}
# What is its own; all else of a U-Net comes before the middle block, and is replayed.
DECODER = ("mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out", "time_embed_act")
_ENCODED: ContextVar[Mapping[str, Any]] = ContextVar("what the encoder half gave")


class Replay(nn.Module):
    """Stands in the place of a module and returns what that one returned in another network.

    Args:
        name: Of the module there.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What was recorded under the name, whatever it is given."""
        return _ENCODED.get()[self.name]


class GradientUNet(ReprModelMixin, ModelMixin, ConfigMixin):
    """PDAE's gradient network G(x_t, t, z) (Zhang et al. 2022, arXiv 2212.12990, section 3.2).

    Middle block, up blocks and output of a U-Net; its encoder half, time embedding included, is that of a frozen base,
    whose activations `forward` is given. The U-Net's own forward runs: the modules before the middle block are
    replaced by ones that return what the base's returned. The code enters by `FiLM`. It predicts 0 until trained.

    Args:
        unet_class: Of the base: `UNet2DModel` or `UNet2DConditionModel`.
        unet_config: Its config.
        base_model: Its Hub id or folder, for messages.
        base_marks: The first values of a few of its weights, by which another base is noticed.

    Raises:
        ValueError: For another class, a U-Net without a middle block, and one with skip blocks (`SkipDownBlock2D`),
            whose image runs beside the activations.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        unet_class: str,
        unet_config: Mapping[str, Any],
        base_model: str | None = None,
        base_marks: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if unet_class not in UNETS:
            raise ValueError(f"A gradient network is of a {' or '.join(UNETS)}; got {unet_class!r}.")
        config = {name: value for name, value in unet_config.items() if name[0] != "_"}
        self.register_to_config(unet_config=config)
        # Of as many channels as the noise; a learned variance is the base's own.
        unet: Any = UNETS[unet_class](**{**config, "out_channels": config["in_channels"]})
        check_halves(unet)
        for name in encoder_parts(unet):
            parent, _, last = name.rpartition(".")
            place = unet.get_submodule(parent)
            if isinstance(place, nn.ModuleList):
                place[int(last)] = Replay(name)
            else:
                setattr(place, last, Replay(name))
        self.unet = unet
        for parameter in unet.conv_out.parameters():
            nn.init.zeros_(parameter)

    @classmethod
    def of(cls, unet: nn.Module, name: str | None = None) -> GradientUNet:
        """For a base: its decoder half begins as the base's, the output at 0.

        Args:
            unet: A `UNet2DModel` or `UNet2DConditionModel`.
            name: Its Hub id or folder.

        Raises:
            ValueError: As the class.
        """
        check_halves(unet)
        made = cls(_class_name(unet), dict(unet.config), name, weight_marks(unet))  # type: ignore[arg-type]
        own = {name for name, _ in made.unet.named_parameters() if not name.startswith("conv_out.")}
        base = unet.state_dict()
        made.unet.load_state_dict({name: base[name] for name in own}, strict=False)
        return made

    def forward(
        self,
        encoded: Mapping[str, Any],
        sample: Tensor,
        timestep: Tensor | float,
        return_dict: bool = True,
        **inputs: Any,
    ) -> SampleOutput | tuple[Tensor]:
        """G, before the code modulates it.

        Args:
            encoded: Name of each of `encoder_parts` that ran -> what it returned, of the base at this input.
            sample: x_t, `(B, C, H, W)`.
            timestep: As the U-Net takes it.
            return_dict: Whether to return an output object, else a tuple.
            **inputs: The base's further inputs.

        Returns:
            `sample`: `(B, C, H, W)`.
        """
        token = _ENCODED.set(encoded)
        try:
            out = self.unet(sample, timestep, **inputs, return_dict=False)[0]
        finally:
            _ENCODED.reset(token)
        return SampleOutput(sample=out) if return_dict else (out,)

    def check_base(self, unet: nn.Module | None) -> None:
        """Refuse a base that is missing, or that this network was not trained beside.

        Args:
            unet: The frozen base.

        Raises:
            ValueError: Naming what came and what is needed.
        """
        config = self.config
        name = "a base without a name" if config["base_model"] is None else repr(config["base_model"])
        if unet is None:
            raise ValueError(
                f"The frozen base of this autoencoder is missing; it was trained beside {name}. Load that U-Net and "
                f"pass it: unet={config['unet_class']}.from_pretrained(base, subfolder='unet')."
            )
        was = BaseRecord(
            config["base_model"],
            model_class=config["unet_class"],
            config={key: _plain(value) for key, value in config["unet_config"].items()},
            marks=config["base_marks"] or {},
        )
        own = {key: _plain(value) for key, value in unet.config.items() if key[0] != "_"}  # type: ignore[operator, union-attr]
        came = BaseRecord(model_class=_class_name(unet), config=own, marks=weight_marks(unet, was.marks))
        refuse_other_class(_GRADIENT, was, came)
        defaults = inspect.signature(UNETS[config["unet_class"]].__init__).parameters.values()
        free = {one.name: _plain(one.default) for one in defaults if one.default is not one.empty}
        refuse_other_config(_GRADIENT, was, came, free)
        if not same_marks(was, came):
            raise _GRADIENT.refusal(came, "has other weights", "those it was recorded with", was)


_REMEDY = "Pass the base that it was trained beside: unet=."
_GRADIENT = Dependent("GradientUNet", "network", "trained", _REMEDY)


def _class_name(unet: nn.Module) -> str:
    return next((one.__name__ for one in type(unet).__mro__ if one.__name__ in UNETS), type(unet).__name__)


def _plain(value: Any) -> Any:
    """As JSON gives it back: lists for tuples."""
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def encoder_parts(unet: nn.Module) -> list[str]:
    """Names of the modules of a U-Net that run before its middle block; down blocks one by one."""
    return list(_parts(unet))


def _parts(unet: nn.Module) -> Iterator[str]:
    for name, child in unet.named_children():
        if name == "down_blocks":
            yield from (f"{name}.{at}" for at in range(len(child)))  # type: ignore[arg-type]
        elif name not in DECODER:
            yield name


def check_halves(unet: nn.Module) -> None:
    """Refuse a network that cannot be cut before its middle block.

    Raises:
        ValueError: With the reason.
    """
    missing = [name for name in ("conv_in", "down_blocks", "mid_block", "up_blocks", "conv_out")
               if getattr(unet, name, None) is None]  # fmt: skip
    if missing:
        raise ValueError(
            f"{type(unet).__name__} has no {', '.join(missing)}; a gradient network is of a UNet2DModel or "
            "UNet2DConditionModel with a middle block."
        )
    skips = sorted({type(block).__name__ for block in unet.modules() if hasattr(block, "skip_conv")})
    if skips:
        raise ValueError(
            f"{type(unet).__name__} has {', '.join(skips)}: beside the activations they carry an image, which a "
            "decoder half cannot be given. Take a base of other blocks, or train without a frozen one (frozen_base: "
            "false)."
        )


__all__ = ["GradientUNet", "Replay", "check_halves", "encoder_parts"]
