"""What `diffusers-repr generate` is told: which model makes which images, and how."""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import diffusers
import torch

from diffusers_repr.assign import IdentityAssigner
from diffusers_repr.config.recipe import REQUIRED, json_mapping, parse_recipe, setting
from diffusers_repr.data.image_data import load_images
from diffusers_repr.data.palette import Palette
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders import load_encoder
from diffusers_repr.guidance import ClassifierGuidance, Guidance
from diffusers_repr.hub.own_pipelines import named_pipeline
from diffusers_repr.models.controlnet import load_controlnet
from diffusers_repr.store.image_store import ImageKey
from diffusers_repr.synthesis.guidance_scales import GuidanceSampler
from diffusers_repr.synthesis.hints import HintMaker
from diffusers_repr.synthesis.makers import ClassMaker, GenerativeAugmenter, ImageMaker, PromptMaker, count_classes
from diffusers_repr.synthesis.named_guidance import GUIDANCES, check_named, open_named
from diffusers_repr.synthesis.prompts import BASE, PromptSampler
from diffusers_repr.synthesis.variations import RepresentationAugmenter, UnCLIPAugmenter

Method = Literal["class", "prompt", "image_to_image", "code", "representation", "image_variation", "hint"]
# Those that make variants of images.
VARIANTS = ("image_to_image", "code", "representation", "image_variation")
# Setting -> the methods on which it acts.
_OF = {
    "classes": ("class", "prompt"),
    "prompts": ("prompt",),
    "templates": ("prompt",),
    "domains": ("prompt",),
    "dataset_name": (*VARIANTS, "hint"),
    "dataset_revision": (*VARIANTS, "hint"),
    "image_column": (*VARIANTS, "hint"),
    "label_column": (*VARIANTS, "hint"),
    "caption_column": ("image_to_image", "image_variation", "hint"),
    "limit": (*VARIANTS, "hint"),
    "prompt": ("image_to_image", "image_variation", "hint"),
    "strength": ("image_to_image", "hint"),
    "encoder": ("representation",),
    "assigner": ("representation",),
    "noise_level": ("image_variation",),
    "controlnet": ("hint",),
    "controlnet_revision": ("hint",),
    "mask_column": ("hint",),
    "mask_colours": ("hint",),
    "guidance_scale": ("class", "prompt", "image_to_image", "representation", "image_variation", "hint"),
    "guidance": ("class", "prompt", "image_to_image", "representation", "image_variation", "hint"),
}


@dataclasses.dataclass(frozen=True)
class GenerationRecipe:
    """A recipe of `diffusers-repr generate`.

    Raises:
        ValueError: For settings that do not go together or would do nothing.
    """

    model: str = setting(REQUIRED, "pipeline folder or Hub id")
    method: Method = setting(
        REQUIRED,
        "images of classes by their ids or by prompts; variants of images: noised and denoised, by code, by a vector "
        "of an encoder (RCG), by unCLIP, or by the classes of some pixels",
    )
    count: int = setting(REQUIRED, "images of each class, or variants of each image")
    revision: str | None = setting(None, "branch, tag or commit of the model on the Hub")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "of the model")
    classes: list[str] | None = setting(None, "names for prompts, or ids; default: all classes of the model")
    prompts: str | None = setting(None, "text file of prompts, one a line: CLASS: PROMPT")
    templates: list[str] = setting([], "prompts with {class}, and perhaps {domain}; default: an image of a {class}")
    domains: list[str] = setting([], "what stands for {domain}")
    dataset_name: str | None = setting(None, "images to make variants of: a folder, a .parquet file, a Hub id, digits")
    dataset_split: str = setting("train", "of the data set")
    dataset_revision: str | None = setting(None, "branch, tag or commit of the data set on the Hub")
    image_column: str | None = setting(None, "of the images; default: found by type")
    label_column: str | None = setting(None, "of the class ids; default: found by type")
    caption_column: str | None = setting(None, "of texts, the prompts of the variants")
    controlnet: str | None = setting(None, "of hint: folder or Hub id of train_controlnet.py")
    controlnet_revision: str | None = setting(None, "branch, tag or commit of it on the Hub")
    mask_column: str | None = setting(None, "of hint: class ids of pixels, such as scribbles")
    mask_colours: list[str] | None = setting(
        None, "masks that are images of colours: #rrggbb of each class, and a last one of no class"
    )
    limit: int | None = setting(None, "images of the data set, the first; default: all")
    prompt: str | None = setting(None, "of all variants, of a text model; of hint with {classes}")
    strength: float = setting(0.5, "of image_to_image and hint: share of the schedule; 0 leaves the image as it is")
    encoder: str | None = setting(None, "representation: what the vectors are of, a folder or MODEL:layer@timestep")
    assigner: str | None = setting(None, "representation: folder of the fitted assigner that standardises vectors")
    noise_level: int = setting(0, "image_variation: noise on the image's embedding, a timestep from 0")
    guidance_scale: list[float] = setting(
        [], "one for all, or two between which each image draws its own; of hint: over the hint"
    )
    guidance: dict | str | None = setting(
        None, f"further guidance, name -> scale, or settings with what it needs: {', '.join(GUIDANCES)}"
    )
    num_inference_steps: int = setting(50, "steps of the sampler")
    scheduler: str | None = setting(None, "class of the sampler, of diffusers; default: as saved")
    seed: int = setting(0, "of noise, guidance scales and the order of prompts")

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance", json_mapping("guidance", self.guidance))
        for field in dataclasses.fields(self):
            value, plain = getattr(self, field.name), field.default
            if field.default_factory is not dataclasses.MISSING:
                plain = field.default_factory()
            given = value not in (plain, None, {})
            if given and field.name in _OF and self.method not in _OF[field.name]:
                raise ValueError(
                    f"`{field.name}` would do nothing: it is of {' and '.join(_OF[field.name])}; drop it."
                )
        for name in ("count", "num_inference_steps", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"`strength` lies from 0 to 1, got {self.strength}.")
        if len(self.guidance_scale) > 2:
            raise ValueError(f"`guidance_scale` is one number, or two; got {len(self.guidance_scale)}.")
        named = json_mapping("guidance", self.guidance)
        check_named(named)
        if "CFG" in named and self.guidance_scale and self.method != "hint":
            raise ValueError("`guidance: CFG` takes the place of `guidance_scale`, which would do nothing; drop it.")
        if self.prompts is not None and (self.templates or self.domains):
            raise ValueError("`prompts` names a file of prompts; drop templates and domains.")
        if self.method == "prompt" and not self.classes:
            raise ValueError("`method: prompt` makes images of named classes; name them by `classes`.")
        if self.method in (*VARIANTS, "hint") and self.dataset_name is None:
            raise ValueError(f"`method: {self.method}` makes variants of images; name them by `dataset_name`.")
        if self.method == "representation" and (self.encoder is None or self.assigner is None):
            raise ValueError("`method: representation` needs `encoder` and `assigner`, those of the model's training.")

        missing = [name for name in ("controlnet", "mask_column") if getattr(self, name) is None]
        if self.method == "hint" and missing:
            raise ValueError(f"`method: hint` shows masks to a ControlNet; name {' and '.join(missing)}.")

    @property
    def scales(self) -> GuidanceSampler | None:
        """What draws the scales of classifier-free guidance; None: the pipeline's default."""
        given = self.guidance_scale
        return GuidanceSampler(given[0], given[-1], self.seed) if given else None


def read_generation(path: str | os.PathLike[str]) -> GenerationRecipe:
    """A recipe from a YAML file.

    Raises:
        FileNotFoundError, ValueError: As `parse_recipe`.
    """
    return parse_recipe([GenerationRecipe], ["--config", str(path)], "Generate images.")[0]


def open_maker(recipe: GenerationRecipe, device: str = "cpu") -> tuple[ImageMaker, Callable[[], list[ImageKey]]]:
    """What makes the images of a recipe, and what gives their keys.

    Raises:
        ValueError: For a model or data that the recipe does not go with.
    """
    denoiser = Denoiser.from_pretrained(recipe.model, revision=recipe.revision, dtype=getattr(torch, recipe.dtype))
    pipe = denoiser.pipe
    if pipe is None:
        raise ValueError(f"{recipe.model!r} is a network alone; images are made by a pipeline.")
    classes = count_classes(denoiser)
    if "latents" not in inspect.signature(type(pipe).__call__).parameters and hasattr(pipe, "unet"):
        pipe = named_pipeline("GuidedUnconditionalPipeline")(pipe.unet, pipe.scheduler)  # DDPM, DDIM
    if recipe.scheduler is not None:
        kind: Any = getattr(diffusers, recipe.scheduler, None)
        if not is_scheduler(kind):
            raise ValueError(f"`scheduler` {recipe.scheduler!r} is none of diffusers.")
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    if "CFG" in (recipe.guidance or {}) or (recipe.scales is not None and recipe.scales.high > 1):
        _warn_of_clipping(pipe.scheduler)
    denoiser = Denoiser.from_pipe(pipe.to(device), name=denoiser.name)
    how: dict[str, Any] = {"num_inference_steps": recipe.num_inference_steps, "seed": recipe.seed}
    how |= {
        "name": recipe.model,
        "scales": recipe.scales,
        "guidance": open_named(json_mapping("guidance", recipe.guidance), denoiser),
    }
    if recipe.method == "class":
        return _of_classes(recipe, ClassMaker(denoiser, **how), classes or _classes_of_classifier(how["guidance"]))
    if recipe.method == "prompt":
        return _of_prompts(recipe, denoiser, how)
    if recipe.method == "hint":
        return _of_hints(recipe, denoiser, how)
    return _of_images(recipe, denoiser, how, device)


def _of_images(
    recipe: GenerationRecipe, denoiser: Denoiser, how: dict[str, Any], device: str
) -> tuple[ImageMaker, Callable[[], list[ImageKey]]]:
    columns = {name: getattr(recipe, name) for name in ("image_column", "label_column", "caption_column")}
    data = load_images(str(recipe.dataset_name), recipe.dataset_split, revision=recipe.dataset_revision, **columns)
    rows = range(len(data) if recipe.limit is None else min(recipe.limit, len(data)))
    texts: dict[str, Any] = {"prompt": recipe.prompt, "captions": recipe.caption_column is not None}
    maker: GenerativeAugmenter
    if recipe.method == "representation":
        assert recipe.encoder is not None
        encoder = load_encoder(recipe.encoder).to(torch.device(device))
        assigner = IdentityAssigner.from_pretrained(recipe.assigner)
        maker = RepresentationAugmenter(denoiser, data, encoder, assigner, **how)
    elif recipe.method == "image_variation":
        maker = UnCLIPAugmenter(denoiser, data, recipe.noise_level, **texts, **how)
    else:
        maker = GenerativeAugmenter(denoiser, data, recipe.method, recipe.strength, **texts, **how)
    return maker, lambda: maker.keys(recipe.count, rows)


def _of_hints(
    recipe: GenerationRecipe, denoiser: Denoiser, how: dict[str, Any]
) -> tuple[ImageMaker, Callable[[], list[ImageKey]]]:
    controlnet, hints = load_controlnet(str(recipe.controlnet), recipe.controlnet_revision)
    columns = {name: getattr(recipe, name) for name in ("image_column", "label_column", "caption_column")}
    ignored = hints.config["ignore_index"]
    columns |= {"mask_column": recipe.mask_column, "mask_names": list(hints.config["class_names"])}
    if recipe.mask_colours is not None:
        columns["palette"] = Palette.of(recipe.mask_colours, ignored)
    data = load_images(
        str(recipe.dataset_name), recipe.dataset_split, revision=recipe.dataset_revision, ignore_index=ignored,
        **columns,
    )  # fmt: skip
    rows = range(len(data) if recipe.limit is None else min(recipe.limit, len(data)))
    told: dict[str, Any] = {"prompt": recipe.prompt, "captions": recipe.caption_column is not None}
    maker = HintMaker(denoiser, data, controlnet, hints, strength=recipe.strength, **told, **how)
    return maker, lambda: maker.keys(recipe.count, rows)


def _classes_of_classifier(guidance: Sequence[Guidance]) -> int:
    """Of the classifier that guides a network without classes; 0 for none."""
    found = [one.classifier for one in guidance if isinstance(one, ClassifierGuidance)]
    return int(getattr(found[0], "config", {}).get("num_classes", 0)) if found else 0


def _warn_of_clipping(scheduler: Any) -> None:
    """DDIM steps along the noise that belonged to x_0 before it was clipped: guidance clips much of it."""
    config = scheduler.config
    if isinstance(scheduler, diffusers.DDIMScheduler) and (config.clip_sample or config.thresholding):
        warnings.warn(
            "DDIMScheduler clips x_0 here and keeps the noise of the unclipped one, which ruins images at large "
            "guidance scales; look at some, or set `scheduler: DDPMScheduler`.",
            stacklevel=3,
        )


def is_scheduler(kind: object) -> bool:
    """Whether it is a class of samplers."""
    return inspect.isclass(kind) and issubclass(kind, diffusers.SchedulerMixin)


def _of_classes(
    recipe: GenerationRecipe, maker: ClassMaker, classes: int
) -> tuple[ImageMaker, Callable[[], list[ImageKey]]]:
    if not classes:
        raise ValueError(f"{recipe.model!r} has no classes; make variants of images, or images by prompts.")
    labels = list(range(classes)) if recipe.classes is None else [_class_id(name, classes) for name in recipe.classes]
    return maker, lambda: maker.keys(labels, recipe.count)


def _class_id(name: str, classes: int) -> int:
    if not (name.isascii() and name.isdigit()) or int(name) >= classes:
        raise ValueError(f"`classes` are ids from 0 to {classes - 1}; got {name!r}.")
    return int(name)


def _of_prompts(
    recipe: GenerationRecipe, denoiser: Denoiser, how: dict[str, Any]
) -> tuple[ImageMaker, Callable[[], list[ImageKey]]]:
    classes: Sequence[str] = recipe.classes or []
    if recipe.prompts is not None:
        prompts = PromptSampler.from_file(recipe.prompts, classes, recipe.seed)
    else:
        prompts = PromptSampler.of_templates(classes, recipe.templates or BASE, recipe.domains, recipe.seed)
    maker = PromptMaker(denoiser, prompts, **how)
    return maker, lambda: maker.keys(recipe.count)


__all__ = ["GenerationRecipe", "is_scheduler", "open_maker", "read_generation"]
