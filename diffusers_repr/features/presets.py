"""Published choices of layers, noise level, ensemble and size, each with its source, by architecture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.posterior import SamplePosterior
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.noise import LevelLike, NoiseLevel

# Architecture -> what it is. Checkpoints come and go; the layer paths belong to the architecture.
FAMILIES: dict[str, str] = {
    "sd": "UNet2DConditionModel of Stable Diffusion 1 and 2: four stages, 320 to 1280 channels",
    "adm-256": "UNet2DModel laid out as guided-diffusion's 256 px network: six stages, 256 to 1024 channels",
    "dit-xl-2": "DiTTransformer2DModel, 28 blocks of 1152 channels, patch 2",
    "ddpm-cifar10": "UNet2DModel of DDPM for 32 px: 128-256-256-256, two layers a stage, attention at 16 px",
    "edm-ddpm-cifar10": "the network of ddpm-cifar10 under EDM's preconditioning",
    "ddpmpp-cifar10": "UNet2DModel of DDPM++ for 32 px: 256-256-256, four layers a stage, attention at 16 px",
    "edm-ddpmpp-cifar10": "the network of ddpmpp-cifar10 under EDM's preconditioning",
}

_CIFAR10, _CIFAR10PP = {"block_out_channels": (128, 256, 256, 256)}, {"block_out_channels": (256, 256, 256)}
# Architecture -> class, and what of its config tells it from others of that class.
_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd": ("UNet2DConditionModel", {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}),
    "adm-256": ("UNet2DModel", {"block_out_channels": (256, 256, 512, 512, 1024, 1024), "layers_per_block": 2}),
    "dit-xl-2": ("DiTTransformer2DModel", {"num_layers": 28, "num_attention_heads": 16, "patch_size": 2}),
    "ddpm-cifar10": ("UNet2DModel", {**_CIFAR10, "layers_per_block": 2}),
    "edm-ddpm-cifar10": ("UNet2DModel", {**_CIFAR10, "layers_per_block": 2}),
    "ddpmpp-cifar10": ("UNet2DModel", {**_CIFAR10PP, "layers_per_block": 4}),
    "edm-ddpmpp-cifar10": ("UNet2DModel", {**_CIFAR10PP, "layers_per_block": 4}),
}


@dataclass(frozen=True)
class Preset:
    """What a paper reads, and at which noise level.

    Attributes:
        method: Name of the method; variants for other tasks have a suffix (`dift-davis`).
        family: Architecture, a key of `FAMILIES`.
        layers: Full module paths.
        timestep: One level, or a tuple of levels.
        ensemble_size: Noise draws that are averaged.
        image_size: Side in pixels; None where the source keeps the image's own shape (see `note`).
        noise: Policy. Where a source draws fresh noise it is `per_image` here: the same distribution, repeatable.
        pooling: As in `FeatureExtractor`.
        where: As in `FeatureExtractor`.
        sample_posterior: As in `FeatureExtractor`.
        prompt: Of text models, for the call; `{category}` stands for the object's name.
        source: Paper and the file or table the choice is read from.
        note: What differs from the source, or is left to the head.
    """

    method: str
    family: str
    layers: tuple[str, ...]
    timestep: LevelLike | tuple[LevelLike, ...]
    source: str
    ensemble_size: int = 1
    image_size: int | None = None
    noise: str = "per_image"
    pooling: str | None = None
    where: str = "output"
    sample_posterior: SamplePosterior = False
    prompt: str | None = None
    note: str = field(default="", repr=False)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `FeatureExtractor`: `FeatureExtractor(denoiser, **preset.arguments())`.

        `prompt` is not among them: it goes to the extractor's call.

        Example:
            >>> presets("gdc").arguments()["layers"]
            ['up_blocks.1.attentions.1']
        """
        levels = list(self.timestep) if isinstance(self.timestep, tuple) else self.timestep
        return {
            "layers": list(self.layers),
            "timestep": levels,
            "noise": self.noise,
            "ensemble_size": self.ensemble_size,
            "pooling": self.pooling,
            "where": self.where,
            "sample_posterior": self.sample_posterior,
            "image_size": "keep" if self.image_size is None else self.image_size,
        }


def presets(method: str, family: str | None = None) -> Preset:
    """The published choice of a method for an architecture.

    Args:
        method: As `list_presets` names it.
        family: Architecture, a key of `FAMILIES`; None where the method has one only.

    Raises:
        ValueError: If there is no such preset, or several and no family is given; lists those there are.

    Example:
        >>> preset = presets("dift", "sd")
        >>> preset.layers, preset.timestep, preset.ensemble_size, preset.image_size
        (('up_blocks.1',), 261, 8, 768)
    """
    found = _of_method(method)
    if family is None and len(found) == 1:
        return next(iter(found.values()))
    if family is None or family not in found:
        came = "needs a family" if family is None else f"has no preset for family {family!r}"
        raise ValueError(
            f"Method {method!r} {came}; it has {', '.join(map(repr, found))}. `list_presets()` shows all, "
            "`list_layers(denoiser)` the layers of a model, and `select_features` finds the best on your data."
        )
    return found[family]


def find_preset(method: str, denoiser: Denoiser) -> Preset:
    """The published choice of a method for the architecture that a model has.

    Args:
        method: As `list_presets` names it.
        denoiser: The model; its class and its config tell the architecture.

    Raises:
        ValueError: If there is no such method, or none for this architecture; says how to find a choice of one's own.
    """
    found = _of_method(method)
    network: Any = plain_module(denoiser.model)
    kind, config = type(network).__name__, network.config
    edm = denoiser.schedule.kind == "edm"
    for family, preset in found.items():
        wanted, shape = _SHAPES[family]
        same = all(_listed(config.get(name)) == _listed(value) for name, value in shape.items())
        if kind == wanted and same and edm == family.startswith("edm-"):
            return preset
    raise ValueError(
        f"{method!r} has published choices for {', '.join(found)}, and this {kind} has another architecture. "
        "`select_features` finds layer and level on your data, `list_layers(denoiser)` shows the layers."
    )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def list_presets(method: str | None = None, family: str | None = None) -> list[Preset]:
    """All presets, or those of a method or an architecture."""
    return [p for p in _PRESETS if method in (None, p.method) and family in (None, p.family)]


def edm_sigma(index: int, steps: int = 18, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> float:
    """Noise of EDM's grid, ascending: index 0 is none, 1 is `low`, `steps` is `high` (Karras et al. 2022, eq. 5).

    Example:
        >>> round(edm_sigma(4), 4)
        0.0599
    """
    if not 0 <= index <= steps:
        raise ValueError(f"EDM's grid has indices 0..{steps}; got {index}.")
    if index == 0:
        return 0.0
    part = (index - 1) / (steps - 1)
    return float((low ** (1 / rho) + part * (high ** (1 / rho) - low ** (1 / rho))) ** rho)


def _of_method(method: str) -> dict[str, Preset]:
    """The presets of a method by architecture."""
    found = {preset.family: preset for preset in _PRESETS if preset.method == method}
    if not found:
        names = dict.fromkeys(preset.method for preset in _PRESETS)
        raise ValueError(f"No preset for method {method!r}. Methods: {', '.join(names)}.")
    return found


_DIFT = "DIFT (arXiv 2306.03881), README of Tsingularity/dift"
_DDAE = "DDAE (arXiv 2303.09769), config/*.yaml of FutureXiang/ddae"
_DDAE_DIT = "DDAE (arXiv 2303.09769), DiT/linear.py of FutureXiang/ddae"
_DIFFSSL = "(arXiv {}), scripts/*.sh of soumik-kanad/diffssl"
_ONCE = "The source encodes the image once for each of its 8 posterior samples; here once for all."
_DAVIS = "The source resizes the short side to 480 and floors the other to a multiple of 32; resize before the call."

_PRESETS: tuple[Preset, ...] = (
    Preset(
        "dift", "sd", ("up_blocks.1",), 261, _DIFT + ", SPair-71k",
        ensemble_size=8, image_size=768, sample_posterior="per_member", prompt="a photo of a {category}", note=_ONCE,
    ),
    Preset(
        "dift", "adm-256", ("up_blocks.1.attentions.1",), 101, _DIFT + ", SPair-71k",
        ensemble_size=8, image_size=512,
    ),
    Preset(
        "dift-hpatches", "sd", ("up_blocks.2",), 0, _DIFT + ", HPatches",
        ensemble_size=8, image_size=768, sample_posterior="per_member", prompt="", note=_ONCE,
    ),
    Preset(
        "dift-hpatches", "adm-256", ("up_blocks.3",), 41, _DIFT + ", HPatches",
        ensemble_size=4, image_size=768,
    ),
    Preset(
        "dift-davis", "sd", ("up_blocks.2",), 51, _DIFT + ", DAVIS",
        ensemble_size=8, sample_posterior="per_member", prompt="", note=f"{_DAVIS} {_ONCE}",
    ),
    Preset(
        "dift-davis", "adm-256", ("up_blocks.2.attentions.1",), 51, _DIFT + ", DAVIS",
        ensemble_size=4, note=_DAVIS,
    ),
    Preset(
        "cleandift", "sd",
        (
            "mid_block", "up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0",
            "up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.1",
            "up_blocks.2.attentions.0", "up_blocks.2.attentions.1", "up_blocks.2", "up_blocks.3.attentions.0",
        ),
        261, "CleanDIFT (arXiv 2412.03439), src/sd_feature_extraction.py of CompVis/cleandift",
        image_size=768, noise="clean", prompt="",
        note="For weights tuned by CleanDIFT. Correspondence and depth read `up_blocks.1` alone. 512 px for SD 1.5.",
    ),
    Preset(
        "hyperfeatures", "sd", tuple(f"up_blocks.{i}.resnets.{j}" for i in range(4) for j in range(3)),
        0, "Diffusion Hyperfeatures (arXiv 2305.14334), configs of diffusion-hyperfeatures/diffusion_hyperfeatures",
        image_size=512, noise="clean", where="residual", prompt="",
        note="The shipped one-step variant: a clean pass, at t = -1 in the source, which lies outside the training "
        "range. `Hyperfeatures` of diffusers_repr.heads walks the inversion of the multi-step variant.",
    ),
    Preset(
        "odise", "sd", tuple(f"up_blocks.{i}.resnets.2" for i in range(4)),
        0, "ODISE (arXiv 2303.04803), configs/common/models of NVlabs/ODISE",
        image_size=512, noise="shared", where="input", prompt="",
        note="The taps of the U-Net; the source adds taps of the VAE, an implicit caption and windows of 512 px.",
    ),
    Preset(
        "ddpm-seg", "adm-256",
        (
            "up_blocks.1", "up_blocks.2.attentions.0", "up_blocks.2.attentions.1", "up_blocks.2",
            "up_blocks.4.resnets.0",
        ),
        (50, 150, 250), "DDPM-Seg (arXiv 2112.03126), experiments/*/ddpm.json of yandex-research/ddpm-segmentation",
        image_size=256, noise="shared",
        note="Maps are resized to the image and put side by side by the head, timesteps in the outer loop.",
    ),
    Preset(
        "ddpm-seg-v1", "adm-256",
        ("up_blocks.2.attentions.0", "up_blocks.2.attentions.1", "up_blocks.2", "up_blocks.3.resnets.0"),
        (50, 150, 250, 350), "DDPM-Seg (arXiv 2112.03126), README of yandex-research/ddpm-segmentation",
        image_size=256, noise="shared",
        note="What the authors took before March 2022: blocks 6 to 9 of the decoder.",
    ),
    Preset(
        "gdc", "adm-256", ("up_blocks.1.attentions.1",), 150, "GDC " + _DIFFSSL.format("2307.08702"),
        image_size=256, pooling="adaptive:2",
    ),
    Preset(
        "difformer", "adm-256", ("mid_block", "up_blocks.1.attentions.1", "up_blocks.3.resnets.1"), (90, 150, 300),
        "DifFormer " + _DIFFSSL.format("2311.17921"),
        image_size=256, pooling="map:16", note="For an `AttentionHead`; each map is pooled to at most 16 x 16 tokens.",
    ),
    Preset(
        "gdc-attention", "adm-256", ("up_blocks.1.attentions.1",), 150, "GDC " + _DIFFSSL.format("2307.08702"),
        image_size=256, pooling="map:16", note="For an `AttentionHead`.",
    ),
    Preset(
        "diffeed", "adm-256", ("up_blocks.1.attentions.1",), 150, "DifFeed " + _DIFFSSL.format("2311.17921"),
        image_size=256, pooling="map:16",
        note="For a `FeedbackHead`, which reads it in a second forward; `feedback_pairs` tells what is fed back.",
    ),
    Preset(
        "ddae", "ddpm-cifar10", ("up_blocks.1.resnets.2",), 10, _DDAE,
        image_size=32, pooling="mean", note="Timestep 11 of the source, which counts from 1.",
    ),
    Preset(
        "ddae", "edm-ddpm-cifar10", ("up_blocks.2.attentions.0",), NoiseLevel(nsr=edm_sigma(4)), _DDAE,
        image_size=32, pooling="mean",
    ),
    Preset(
        "ddae", "ddpmpp-cifar10", ("up_blocks.1.attentions.0",), 10, _DDAE,
        image_size=32, pooling="mean", note="Timestep 11 of the source, which counts from 1.",
    ),
    Preset(
        "ddae", "edm-ddpmpp-cifar10", ("up_blocks.1.attentions.1",), NoiseLevel(nsr=edm_sigma(4)), _DDAE,
        image_size=32, pooling="mean",
    ),
    Preset(
        "ddae", "dit-xl-2", ("transformer_blocks.13",), 121, _DDAE_DIT + ", CIFAR-10",
        image_size=256, pooling="mean", note="Null label. The source samples the VAE's posterior.",
    ),
    Preset(
        "ddae-tiny-imagenet", "dit-xl-2", ("transformer_blocks.13",), 81, _DDAE_DIT + ", Tiny-ImageNet",
        image_size=256, pooling="mean", note="Null label. The source samples the VAE's posterior.",
    ),
)  # fmt: skip
