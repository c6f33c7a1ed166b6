"""Pipelines that hold the components of any other pipeline and make conditions by that one's own code."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any, Self

from diffusers.configuration_utils import ConfigMixin
from torch import nn

from diffusers_repr.denoiser.denoiser import Denoiser
from diffusers_repr.denoiser.parts import COMPONENTS
from diffusers_repr.hub.checked_loading import CheckedLoadingMixin
from diffusers_repr.hub.load import load_json_config
from diffusers_repr.hub.local_module import LocalModuleMixin
from diffusers_repr.hub.own_pipelines import is_own_pipeline, named_pipeline
from diffusers_repr.hub.signature_types import SignatureTypesMixin

logger = logging.getLogger(__name__)


class AnyPipelineMixin(CheckedLoadingMixin, LocalModuleMixin, SignatureTypesMixin, ConfigMixin):
    """Base, before `DiffusionPipeline`, of a pipeline that loads from the folder of any pipeline of a known family.

    `denoiser` is the model with its conditioning. A subclass has only to write `__call__`.

    Args:
        scheduler: Only its training-time noise process is read.
        unet: The network, or `transformer`.
        transformer: The network, or `unet`.
        vae: Autoencoder of a latent model.
        vqvae: As `vae`.
        text_encoder: With `text_encoder_2`, `text_encoder_3`: as the pipeline has them.
        text_encoder_2: See `text_encoder`.
        text_encoder_3: See `text_encoder`.
        tokenizer: With `tokenizer_2`, `tokenizer_3`: as the pipeline has them.
        tokenizer_2: See `tokenizer`.
        tokenizer_3: See `tokenizer`.
        image_encoder: Kept, as are `feature_extractor` and `safety_checker`.
        feature_extractor: See `image_encoder`.
        safety_checker: See `image_encoder`.
        class_name: Class of the pipeline that the components are of; read from its folder if None.
        requires_safety_checker: Setting of Stable Diffusion.
        force_zeros_for_empty_prompt: Setting of SDXL.
        requires_aesthetics_score: Setting of SDXL's refiner.
        add_watermarker: Setting of SDXL.
        is_distilled: Setting of distilled models.
        id2label: Names of DiT's classes.

    Raises:
        TypeError: Without a network.
    """

    model_cpu_offload_seq = (
        "text_encoder->text_encoder_2->text_encoder_3->image_encoder->vae->vqvae->unet->transformer->safety_checker"
    )
    _optional_components = [
        "unet",
        "transformer",
        "vae",
        "vqvae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "image_encoder",
        "feature_extractor",
        "safety_checker",
    ]

    # Components have no default: `DiffusionPipeline.from_pretrained` takes them for settings else.
    def __init__(
        self,
        scheduler: object,
        unet: nn.Module | None,
        transformer: nn.Module | None,
        vae: nn.Module | None,
        vqvae: nn.Module | None,
        text_encoder: nn.Module | None,
        text_encoder_2: nn.Module | None,
        text_encoder_3: nn.Module | None,
        tokenizer: object | None,
        tokenizer_2: object | None,
        tokenizer_3: object | None,
        image_encoder: nn.Module | None,
        feature_extractor: object | None,
        safety_checker: nn.Module | None,
        class_name: str | None = None,
        requires_safety_checker: bool | None = None,
        force_zeros_for_empty_prompt: bool | None = None,
        requires_aesthetics_score: bool | None = None,
        add_watermarker: bool | None = None,
        is_distilled: bool | None = None,
        id2label: dict[int, str] | None = None,
    ) -> None:
        super().__init__()
        if unet is None and transformer is None:
            raise TypeError(
                f"{type(self).__name__} got no {' or '.join(COMPONENTS)}. Make it by "
                f"{type(self).__name__}.from_pipe(pipe), or by from_pretrained(..., custom_pipeline=...)."
            )
        register_modules: Any = getattr(self, "register_modules")  # noqa: B009  of DiffusionPipeline
        register_modules(
            scheduler=scheduler,
            unet=unet,
            transformer=transformer,
            vae=vae,
            vqvae=vqvae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            text_encoder_3=text_encoder_3,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            safety_checker=safety_checker,
        )
        self.register_to_config(
            class_name=class_name,
            requires_safety_checker=requires_safety_checker,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            requires_aesthetics_score=requires_aesthetics_score,
            add_watermarker=add_watermarker,
            is_distilled=is_distilled,
            id2label=id2label,
        )
        self._made: tuple[Any, Denoiser] | None = None
        self._encoders_state: Any = None

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Arguments from a `model_index.json`; the pipeline class it names becomes `class_name`."""
        name = config_dict.get("_class_name")
        name = name[-1] if isinstance(name, (list, tuple)) else name
        if name and name != cls.__name__:
            # One of these pipelines, saved, tells what it was made of.
            config_dict = {**config_dict, "class_name": config_dict.get("class_name") or name}
            names = inspect.signature(cls.__init__).parameters
            lost = {k: v for k, v in config_dict.items() if k not in names and not k.startswith("_") and _is_set(v)}
            if lost:
                logger.warning("%s does not keep %s of %s.", cls.__name__, sorted(lost), name)
                config_dict = {k: v for k, v in config_dict.items() if k not in lost}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """A pipeline of this class with the components and settings of another; nothing is cast or copied.

        Args:
            pipeline: Any pipeline of a known family.
            **kwargs: Components or settings to take instead.

        Raises:
            TypeError: For an argument that is neither.
        """
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        unknown = [name for name in kwargs if name not in names]
        if unknown:
            raise TypeError(f"{cls.__name__}.from_pipe takes no {unknown[0]!r}. It takes: {', '.join(names)}.")
        given = {name: pipeline.components.get(name) for name in [*cls._optional_components, "scheduler"]}
        given |= {name: value for name, value in pipeline.config.items() if name in names and name not in given}
        if not isinstance(pipeline, AnyPipelineMixin):
            given["class_name"] = type(pipeline).__name__
        new: Any = cls(**{**given, **kwargs})
        if pipeline.config.get("_name_or_path") is not None:
            new.register_to_config(_name_or_path=pipeline.config["_name_or_path"])
        # Private: `set_progress_bar_config` has no counterpart that reads. Without it the new pipeline shows its bar.
        new._progress_bar_config = dict(getattr(pipeline, "_progress_bar_config", {}))
        return new

    @property
    def denoiser(self) -> Denoiser:
        """The model with its conditioning: made once, and again after a component was replaced.

        Encoded prompts are kept as long as the text encoders do not change.

        Raises:
            TypeError: If the class of the original pipeline is not known or not in the installed diffusers.
        """
        components: dict[str, Any] = getattr(self, "components")  # noqa: B009  of DiffusionPipeline
        present = {name: c for name, c in components.items() if c is not None}
        settings = {k: v for k, v in self.config.items() if k not in components and not k.startswith("_")}
        key = [(name, id(component)) for name, component in present.items()], settings
        if self._made is None or self._made[0] != key:
            pipe = rebuild_pipeline(self._original_class(), present, settings)
            origin = self.config.get("_name_or_path")
            made = Denoiser.from_pipe(pipe, name=None if origin is None else os.fspath(origin))
            self._made, self._encoders_state = (key, made), None
        denoiser = self._made[1]
        state = _state([c for name, c in present.items() if name.startswith("text_encoder")])
        if denoiser.prompts is None or self._encoders_state != state:
            denoiser.prompts, self._encoders_state = {}, state
        return denoiser

    def _original_class(self) -> str:
        name = self.config.get("class_name")
        origin = self.config.get("_name_or_path")
        if name is None and origin is not None:
            name = load_json_config(origin, "model_index.json").get("_class_name")
        if not isinstance(name, str) or name == type(self).__name__:
            raise TypeError(
                f"The class of the pipeline that these components are of is not known; pass it: "
                f"{type(self).__name__}(..., class_name='StableDiffusionPipeline'), or use from_pipe(pipe)."
            )
        return name


def _is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, (list, tuple)) and len(value) == 2 and value[0] is None)


def _state(encoders: list[nn.Module]) -> Any:
    """What encoded prompts depend on: the weights' identities and versions, and adapters' settings."""
    # Private: a tensor's count of changes in place (torch), and which adapters act (peft). Without them prompts that
    # were encoded before weights or adapters changed would be used again.
    weights = [(id(p), p._version, p.dtype, p.device) for encoder in encoders for p in encoder.parameters()]
    adapters = [
        (
            str(getattr(m, "scaling", None)),
            str(getattr(m, "_active_adapter", None)),
            getattr(m, "_disable_adapters", 0),
        )
        for encoder in encoders
        for m in encoder.modules()
        if hasattr(m, "_active_adapter")
    ]
    return weights, adapters


def rebuild_pipeline(name: str, components: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A pipeline of diffusers' class `name`, or of one of this package, that shares these components.

    They stay as they are.

    Args:
        name: Class name in diffusers or here.
        components: Name -> component; those the class does not take are left out. The scheduler is copied.
        settings: Its scalar arguments; None means not given.

    Raises:
        TypeError: If diffusers has no such pipeline, or it needs components that are not there.
    """
    import diffusers

    cls: Any = named_pipeline(name) if is_own_pipeline(name) else getattr(diffusers, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise TypeError(
            f"diffusers {diffusers.__version__} has no pipeline {name!r}, whose code makes the conditions. Load the "
            "model by its own code and use Denoiser.from_pipe(pipe)."
        )
    accepted = inspect.signature(cls.__init__).parameters
    given = {k: v for k, v in components.items() if k in accepted}
    given |= {k: v for k, v in settings.items() if k in accepted and v is not None}
    optional: list[str] = getattr(cls, "_optional_components", [])
    given |= {k: None for k in optional if k in accepted and k not in given}
    missing = [k for k, p in accepted.items() if k not in given and p.default is p.empty and k != "self"]
    if missing:
        raise TypeError(f"{name} needs {', '.join(missing)}; there are {', '.join(sorted(components))}.")
    # Constructors rewrite the config of the scheduler, and of networks saved long ago.
    given["scheduler"] = copy.deepcopy(components["scheduler"])
    # `_internal_dict` is where diffusers' ConfigMixin keeps a config, which is read-only by its public name.
    configs = [
        (c, c.__dict__["_internal_dict"]) for c in given.values() if "_internal_dict" in getattr(c, "__dict__", ())
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told when the pipeline was first loaded
            return cls(**given)
    finally:
        for component, config in configs:
            component._internal_dict = config


__all__ = ["AnyPipelineMixin", "rebuild_pipeline"]
