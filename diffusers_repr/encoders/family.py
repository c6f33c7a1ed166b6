"""What differs between vision networks of transformers: one small adapter a model type, in an open registry."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from diffusers_repr.encoders.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Statistics
from diffusers_repr.encoders.stages import Stage
from diffusers_repr.hub.registry import Registry

# `model_type` of config.json -> module of its adapter; imported when first asked for.
_BUILTIN = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "convnext": "convnext",
    "convnextv2": "convnext",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "dinov3_vit": "dinov3",
    "ijepa": "ijepa",
    "resnet": "resnet",
    "siglip": "siglip",
    "siglip2": "siglip2",
    "siglip2_vision_model": "siglip2",
    "siglip_vision_model": "siglip",
    "swin": "swin",
    "vit": "vit",
    "vit_mae": "vit_mae",
}


class EncoderFamily:
    """How one vision transformer is loaded and read. Subclass, override what differs, and register.

    The defaults fit a network with a class token in front and `interpolate_pos_encoding` in its forward.

    Attributes:
        model_class: Name of the class in transformers, or a class with its `from_pretrained`.
        blocks: Path of the list of blocks; several where it depends on the version of transformers.
        class_token: Whether the first token is a class token.
        final_norm: Whether patch tokens are those after the network's final norm; else those of its last block.
        statistics: Mean and std of pixels, for folders without an image processor.
        interpolates: Whether the forward takes `interpolate_pos_encoding`.
        positions: Path of the module with the table `position_embeddings` and the method `interpolate_pos_encoding`,
            of networks whose table REPA's code resamples; None for the others.
    """

    model_class: str | type[nn.Module] = "AutoModel"
    blocks: str | tuple[str, ...] = ("layers", "encoder.layer")
    class_token: bool = True
    final_norm: bool = True
    statistics: Statistics = Statistics(IMAGENET_MEAN, IMAGENET_STD)
    interpolates: bool = True
    positions: str | None = None

    def loading(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Further arguments of the class's `from_pretrained`."""
        return {}

    def vision_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The vision half of `config.json`."""
        return config.get("vision_config") or config

    def block_list(self, model: nn.Module) -> str:
        """The path of `blocks` that a network has.

        Raises:
            TypeError: If it has none of them.
        """
        paths = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
        modules = dict(model.named_modules())
        found = next((path for path in paths if path in modules), None)
        if found is None:
            lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList)]
            raise TypeError(
                f"{type(model).__name__} of the transformers installed has no {' or '.join(map(repr, paths))}; its "
                f"lists of modules: {lists}. Name its blocks in `blocks` of the encoder family."
            )
        return found

    def side(self, config: Any) -> int | None:
        """Side of the square images that the network was configured for, in pixels.

        Raises:
            ValueError: If they are not square: position embeddings cannot be resampled then.
        """
        size = config.image_size
        if not isinstance(size, int):
            if len(set(size)) != 1:
                raise ValueError(f"The network is configured for images of {tuple(size)}; only square ones are known.")
            size = size[0]
        return int(size)

    def patch(self, config: Any) -> int:
        """Side of a patch in pixels."""
        patch = config.patch_size
        return int(patch if isinstance(patch, int) else patch[0])

    def prefix(self, config: Any) -> int:
        """Tokens in front of those of the patches: class and register tokens."""
        return int(self.class_token)

    def inputs(self, model: nn.Module, pixels: Tensor) -> dict[str, Any]:
        """Keyword inputs of the forward, for preprocessed `(B, C, H, W)` in the network's dtype."""
        extra: dict[str, Any] = {}
        if self.interpolates and tuple(pixels.shape[2:]) != (self.side(model.config),) * 2:
            extra["interpolate_pos_encoding"] = True
        return {"pixel_values": pixels, **extra}

    def global_features(self, output: Any) -> Tensor | None:
        """`(B, D)` of the forward's output; None: the class token of the sequence read, or the mean of the patches."""
        return None


class BackboneFamily(EncoderFamily):
    """A network of stages, each coarser than the one before, whose forward gives the last one's map.

    `patch` is the stride of the last stage, and `layer` of `Encoder.from_pretrained` counts stages. Subclass and write
    `stages`.
    """

    class_token = False
    final_norm = False
    interpolates = False

    def stages(self, config: Mapping[str, Any]) -> list[Stage]:
        """Its stages, finest first.

        Args:
            config: Of the network, all its values.
        """
        raise NotImplementedError

    def patch(self, config: Any) -> int:
        """Stride of the last stage."""
        return self.stages(config.to_dict())[-1].stride

    def side(self, config: Any) -> int | None:
        """As `EncoderFamily`; None where the config tells none."""
        return super().side(config) if getattr(config, "image_size", None) is not None else None

    def global_features(self, output: Any) -> Tensor | None:
        """The network's own pooled features."""
        return output.pooler_output.flatten(1)


def families_with_positions() -> list[str]:
    """Model types whose positions can be resampled as REPA's code does."""
    return [name for name in list_encoder_families() if encoder_family(name).positions]


_FAMILIES = Registry("encoder family", EncoderFamily, "register_encoder_family")


def register_encoder_family(*model_types: str) -> Callable[[type[EncoderFamily]], type[EncoderFamily]]:
    """Register an adapter for `model_type`s of `config.json`.

    Raises:
        ValueError: If a type has an adapter already.

    Example:
        >>> @register_encoder_family("my_vit")
        ... class MyFamily(EncoderFamily):
        ...     model_class = "ViTModel"
        >>> "my_vit" in list_encoder_families()
        True
        >>> _ = _FAMILIES.pop("my_vit")
    """

    def register(cls: type[EncoderFamily]) -> type[EncoderFamily]:
        for name in model_types:
            if name in _BUILTIN and cls.__module__ != _builtin_module(name):
                encoder_family(name)  # registers ours, so that the name is taken
        return _FAMILIES.register(*model_types)(cls)

    return register


def list_encoder_families() -> list[str]:
    """Model types with an adapter."""
    return sorted({*_BUILTIN, *_FAMILIES})


def encoder_family(model_type: str | None) -> EncoderFamily:
    """The adapter of a `model_type`.

    Raises:
        TypeError: If there is none; lists the known ones and says how to add one.
    """
    if model_type in _BUILTIN and model_type not in _FAMILIES:
        importlib.import_module(_builtin_module(model_type))
    if model_type is None or model_type not in _FAMILIES:
        raise TypeError(
            f"No encoder family for model_type {model_type!r}. Known: {', '.join(list_encoder_families())}. Write "
            f"one:\n    @register_encoder_family({model_type!r})\n    class MyFamily(EncoderFamily): ...\n"
            "or pass the network itself: Encoder.from_module(model, patch_size=...)."
        )
    return _FAMILIES[model_type]()


def _builtin_module(model_type: str) -> str:
    return f"{__package__}.families.{_BUILTIN[model_type]}"


__all__ = ["BackboneFamily", "EncoderFamily", "encoder_family", "list_encoder_families", "register_encoder_family"]
