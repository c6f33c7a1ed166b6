"""`describe`: what each guidance would do to a model by default, and where the defaults come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.default_layers import Method
from diffusers_repr.guidance.base import Guidance
from diffusers_repr.guidance.cfg import CFG
from diffusers_repr.guidance.pag import PAG
from diffusers_repr.guidance.sag import SAG


@dataclass(frozen=True)
class MethodDescription:
    """Defaults of one guidance for one model.

    Attributes:
        name: Class name of its config.
        scale: Default scale.
        layers: Full paths of the layers it acts on; empty where it takes none.
        source: Where the layers come from, or why it cannot act on this model as it is.
        works: Whether its defaults can act.
    """

    name: str
    scale: float
    layers: tuple[str, ...]
    source: str
    works: bool = True


@dataclass(frozen=True)
class GuidanceDescription:
    """What `describe` returns; printed, it is a table.

    Attributes:
        model: Class of the network.
        methods: One entry a guidance.
        self_attentions: All layers that PAG and SAG may be given, in module order.
    """

    model: str
    methods: tuple[MethodDescription, ...]
    self_attentions: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.self_attentions)} self-attention layers"]
        for method in self.methods:
            layers = ", ".join(method.layers) or "no layers"
            lines.append(f"  {method.name:<9} scale={method.scale:g}  {layers}  ({method.source})")
        return "\n".join(lines)


def describe(target: Any) -> GuidanceDescription:
    """Defaults of the training-free guidances for a model.

    Args:
        target: A pipeline, or a `Denoiser`.

    Raises:
        TypeError: For what is neither.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> describe(Denoiser(unet, DDPMScheduler())).methods[1].layers
        ('mid_block.attentions.0',)
    """
    if not isinstance(target, Denoiser) and not hasattr(target, "components"):
        raise TypeError(
            f"describe takes a diffusers pipeline or a Denoiser; got {type(target).__name__}. For a "
            "bare network: Denoiser(model, scheduler)."
        )
    denoiser = target if isinstance(target, Denoiser) else Denoiser.from_pipe(target)
    methods = [
        MethodDescription("CFG", CFG().scale, (), "in place of the pipeline's own guidance_scale"),
        _method(denoiser, PAG(), "pag"),
        _method(denoiser, SAG(), "sag"),
    ]
    attentions = denoiser.family.self_attentions(denoiser.model)
    return GuidanceDescription(type(denoiser.model).__name__, tuple(methods), tuple(attentions))


def _method(denoiser: Denoiser, config: Guidance, method: Method) -> MethodDescription:
    name = type(config).__name__
    try:
        config.bind(denoiser)
        found = denoiser.default_layers(method)
    except ValueError as error:
        return MethodDescription(name, config.scale, (), str(error), works=False)
    return MethodDescription(name, config.scale, found.layers, found.source)
