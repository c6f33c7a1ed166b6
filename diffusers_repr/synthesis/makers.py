"""What makes the images of keys: by class, by prompt, from an image, from the code of an image."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from diffusers_repr.data.image_data import ImageData
from diffusers_repr.data.variants import image_key
from diffusers_repr.denoiser import Denoiser, LabelConditioner
from diffusers_repr.guidance import CFG, ClassifierGuidance, Guidance, guide
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.hub.places import last_name
from diffusers_repr.store.image_store import ImageKey
from diffusers_repr.synthesis.draws import seed_of
from diffusers_repr.synthesis.guidance_scales import GuidanceSampler, PerImageScale, scale_argument
from diffusers_repr.synthesis.named_guidance import described, for_keys
from diffusers_repr.synthesis.prompts import PromptSampler
from diffusers_repr.synthesis.strength import noised_start, own_noise, starting_inside, truncated_steps

# A scale by which a pipeline runs the null condition, too, where `CFG` takes the place of the scale itself.
WITH_NULL = 2.0


class ImageMaker:
    """Base: a pipeline, and what all images are made by. `keys` names them, a call makes some of them.

    The noise of an image comes from its own seed, and its guidance scale from its key, so that no batch, process or
    order changes it.

    Args:
        denoiser: With a pipeline.
        name: What the model is called in keys; its folder's name or Hub id if None.
        num_inference_steps: Of the sampler.
        scales: Draws the scale of classifier-free guidance of each image; None: the pipeline's own default.
        guidance: Further guidance, as `diffusers_repr.guide` takes it. `CFG` takes the place of the scales;
            `ClassifierGuidance` without class_labels guides each image towards the class id in its key.
        seed: Of the whole.

    Raises:
        TypeError: For a denoiser without a pipeline.
        ValueError: For guidance scales that the pipeline does not take, and scales beside `CFG`.
    """

    kind = "image"

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        name: str | None = None,
        num_inference_steps: int = 50,
        scales: GuidanceSampler | None = None,
        guidance: Sequence[Guidance] = (),
        seed: int = 0,
    ) -> None:
        if denoiser.pipe is None:
            raise TypeError("Images are made by a pipeline; this Denoiser has none. Denoiser.from_pretrained(folder).")
        self.denoiser, self.steps, self.seed = denoiser, num_inference_steps, seed
        self.scales, self.guidance, self.pipe = scales, list(guidance), denoiser.pipe
        given = name or denoiser.name or type(denoiser.model).__name__
        self.name = last_name(given) if os.path.isdir(given) else given
        if scales is not None and "guidance_scale" not in self.known():
            raise ValueError(f"{type(self.pipe).__name__} takes no guidance_scale; leave the scales out.")
        self._has_cfg = any(isinstance(one, CFG) for one in self.guidance)
        self.check_scales()
        self.pipe.set_progress_bar_config(disable=True)
        self._weights = f"weights {weights_hash(denoiser.model)[:16]}"

    def check_scales(self) -> None:
        """Refuse two scales of one guidance.

        Raises:
            ValueError: For scales beside `CFG`.
        """
        if self.scales is not None and self._has_cfg:
            raise ValueError("CFG takes the place of the guidance scales, which would do nothing; give one of both.")

    def known(self) -> Mapping[str, Any]:
        """Parameters of a call of the pipeline."""
        return inspect.signature(type(self.pipe).__call__).parameters

    def how(self) -> dict[str, Any]:
        """What decides an image beside its key's own fields, as JSON."""
        told = {"kind": self.kind, "scheduler": type(self.pipe.scheduler).__name__, "dtype": str(self.denoiser.dtype)}
        return told | (described(self.guidance) if self.guidance else {})

    def key(self, variant: int, size: tuple[int, int] | None = None, **own: Any) -> ImageKey:
        """The key of an image.

        Args:
            variant: Which image of its source or class.
            size: (H, W); the model's own if None.
            **own: `prompt`, `condition`, `source`.
        """
        what: list[str | int] = [self.kind, str(own.get("condition")), str(own.get("source")), variant]
        how = self.how()
        if self.scales is not None:
            how["guidance_scale"] = self.scales(*what)
        height, width = size or self.denoiser.image_size
        return ImageKey(
            self.name, height, width, self.steps, seed_of(self.seed, *what), self._weights,
            guidance=json.dumps(how, sort_keys=True), variant=variant, **own,
        )  # fmt: skip

    def checked(self, keys: list[ImageKey]) -> list[ImageKey]:
        """Keys, if the guidance goes with all of them: it is known before the first image is made.

        Raises:
            ValueError: As `for_keys`.
        """
        for_keys(self.guidance, keys)
        return keys

    def __call__(self, keys: Sequence[ImageKey]) -> list[Image.Image]:
        """The images of some keys.

        Raises:
            RuntimeError: If the pipeline guides all images of a batch by one scale.
        """
        with self._guided(keys):
            return to_pictures(self.make(keys))

    def make(self, keys: Sequence[ImageKey]) -> np.ndarray:
        """`(B, H, W, C)` in [0, 1]."""
        raise NotImplementedError

    def call(self, keys: Sequence[ImageKey], **given: Any) -> np.ndarray:
        """Call the pipeline for some keys, each with its own noise and scale."""
        scales = [json.loads(key.guidance).get("guidance_scale") for key in keys]
        scale = None if self.scales is None else scale_argument(scales)
        own: dict[str, Any] = {} if scale is None else {"guidance_scale": scale}
        if self._has_cfg and "guidance_scale" in self.known():
            own["guidance_scale"] = WITH_NULL
        if "generator" in self.known():  # of the steps alone, where the start is given: no noise is used twice
            seeds = [seed_of(key.seed, "steps") if "latents" in given else key.seed for key in keys]
            own["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images = self.pipe(**given, **own, num_inference_steps=self.steps, output_type="np").images
        if isinstance(scale, PerImageScale):
            scale.check_used()
        return images

    def _guided(self, keys: Sequence[ImageKey]) -> AbstractContextManager[Any]:
        return guide(self.pipe, for_keys(self.guidance, keys)) if self.guidance else nullcontext()


class ClassMaker(ImageMaker):
    """Images of classes, by their ids; a network that takes none is guided by `ClassifierGuidance`."""

    kind = "class"

    def __init__(self, denoiser: Denoiser, **settings: Any) -> None:
        super().__init__(denoiser, **settings)
        by_classifier = any(isinstance(one, ClassifierGuidance) for one in self.guidance)
        self._labelled = count_classes(denoiser) > 0 or not by_classifier

    def keys(self, labels: Sequence[int], per_class: int) -> list[ImageKey]:
        """As many images of each class, one class after the other.

        Args:
            labels: Class ids.
            per_class: Images of each.
        """
        return self.checked(
            [self.key(variant, condition=str(label)) for label in labels for variant in range(per_class)]
        )

    def make(self, keys: Sequence[ImageKey]) -> np.ndarray:
        """See `ImageMaker`."""
        labels = {"class_labels": [int(str(key.condition)) for key in keys]} if self._labelled else {}
        return self.call(keys, **labels)


class PromptMaker(ImageMaker):
    """Images of named classes by prompts: data to train on without a real image (MA-ZSC, arXiv 2302.03298).

    Args:
        denoiser: Of a text-to-image pipeline.
        prompts: Which prompt an image of a class is made of.
        **settings: As `ImageMaker`.
    """

    kind = "prompt"

    def __init__(self, denoiser: Denoiser, prompts: PromptSampler, **settings: Any) -> None:
        super().__init__(denoiser, **settings)
        if "prompt" not in self.known():
            raise ValueError(f"{type(self.pipe).__name__} takes no prompts; make images by class or from images.")
        self.prompts = prompts

    def keys(self, per_class: int) -> list[ImageKey]:
        """As many images of each class, whose name is the condition."""
        return self.checked(
            [
                self.key(variant, condition=name, prompt=self.prompts(name, variant))
                for name in self.prompts.prompts
                for variant in range(per_class)
            ]
        )

    def make(self, keys: Sequence[ImageKey]) -> np.ndarray:
        """See `ImageMaker`."""
        return self.call(keys, prompt=[key.prompt for key in keys])


class GenerativeAugmenter(ImageMaker):
    """Variants of images, each made once and by its own noise (generative augmentation, arXiv 2403.05966).

    `image_to_image` noises the image and denoises it again. `code` keeps what a diffusion autoencoder's encoder sees
    of it and draws the rest anew. `RepresentationAugmenter` and `UnCLIPAugmenter` are for two further methods.

    Args:
        denoiser: Of the pipeline; for `code` of a `DiffusionAutoencoderPipeline`.
        data: The images.
        method: See above.
        strength: Of `image_to_image`: share of the schedule that is gone through, 0 leaves the image as it is.
        prompt: Of a text model: of all variants; a column of captions is taken by `captions=True`.
        captions: Take the caption of each image as its prompt.
        **settings: As `ImageMaker`.

    Raises:
        ValueError: For a strength outside of [0, 1], and a pipeline that the method does not go with.
    """

    kind = "variant"
    methods: tuple[str, ...] = ("image_to_image", "code")

    def __init__(
        self,
        denoiser: Denoiser,
        data: ImageData,
        method: str = "image_to_image",
        strength: float = 0.5,
        prompt: str | None = None,
        captions: bool = False,
        **settings: Any,
    ) -> None:
        self.data, self.method, self.strength = data, method, strength
        self.prompt, self.captions = prompt, captions
        super().__init__(denoiser, **settings)
        texts = "prompt" in self.known()
        if method not in self.methods:
            raise ValueError(f"method is {' or '.join(self.methods)}; got {method!r}.")
        self.check_pipe()
        if (prompt is not None or captions) and not texts:
            raise ValueError(f"{type(self.pipe).__name__} takes no prompts; leave them out.")
        self.kept = truncated_steps(self.steps, strength) if method == "image_to_image" else self.steps
        if texts and method == "image_to_image":
            self.pipe = diffusers.AutoPipelineForImage2Image.from_pipe(self.pipe)
            self.pipe.set_progress_bar_config(disable=True)

    def check_pipe(self) -> None:
        """Refuse a pipeline that the method does not go with.

        Raises:
            ValueError: With the method that does.
        """
        goes_with = method_of(self.pipe)
        if self.method != goes_with:
            raise ValueError(
                f"Variants of {type(self.pipe).__name__} are made by {goes_with}; got method={self.method!r}."
            )

    def how(self) -> dict[str, Any]:
        """With method and strength."""
        own = {"strength": self.strength} if self.method == "image_to_image" else {}
        return {**super().how(), "method": self.method, **own}

    def keys(self, variants: int, rows: Sequence[int] | None = None) -> list[ImageKey]:
        """The variants of each image, one image after the other.

        Args:
            variants: Of each.
            rows: Of the data; all if None.

        Raises:
            UnreadableImage: A ValueError that names the row.
        """
        found = []
        for row in range(len(self.data)) if rows is None else rows:
            own: dict[str, Any] = {"source": self._source(row)}
            if self.captions or self.prompt is not None:
                own["prompt"] = self.data.captions([row])[0] if self.captions else self.prompt
            if self.data.label_column is not None:
                own["condition"] = str(next(self.data.batches(1, row, row + 1))[1][0])  # type: ignore[index]
            found += [self.key(variant, **own) for variant in range(variants)]
        return self.checked(found)

    def _source(self, row: int) -> str:
        """A row, and the hash of its pixels: another image in its place is another source."""
        return f"{last_name(self.data.name)}/{self.data.split}/{row}#{image_key(np.asarray(self.data.read([row])[0]))}"

    def read(self, keys: Sequence[ImageKey]) -> list[Image.Image]:
        """The images that the variants of some keys are of."""
        return self.data.read(self.rows(keys))

    def rows(self, keys: Sequence[ImageKey]) -> list[int]:
        """Rows of the data that the variants of some keys are of."""
        return [int(str(key.source).rpartition("#")[0].rpartition("/")[2]) for key in keys]

    def make(self, keys: Sequence[ImageKey]) -> np.ndarray:
        """See `ImageMaker`."""
        images = self.read(keys)
        if self.method == "code":
            generators = [torch.Generator("cpu").manual_seed(key.seed) for key in keys]
            code = self.pipe.encode(images, None).code
            return self.pipe.decode(code, None, self.steps, generators, "np").images
        pixels = self.denoiser.pixels(images)
        if not self.kept:
            return self.denoiser.decode(self.denoiser.encode_pixels(pixels)).permute(0, 2, 3, 1).cpu().numpy()
        if "prompt" in self.known():
            texts = [key.prompt or "" for key in keys]
            return self.call(keys, prompt=texts, image=(pixels + 1) / 2, strength=self.strength)
        with starting_inside(self.denoiser, self.steps, self.strength) as timestep:
            x0 = self.denoiser.latent_size((pixels.shape[2], pixels.shape[3]))
            noise = own_noise((self.denoiser.family.channels(), *x0), [key.seed for key in keys])
            return self.call(keys, latents=noised_start(self.denoiser, pixels, timestep, noise))


def count_classes(denoiser: Denoiser) -> int:
    """Classes that a network is told by their ids; 0 for none."""
    conditioner = denoiser.conditioner
    return conditioner.num_classes if isinstance(conditioner, LabelConditioner) else 0


def method_of(pipe: Any) -> str:
    """How variants of images are made by a pipeline, where nothing but the pipeline and the images is needed."""
    if hasattr(pipe, "reconstruct"):
        return "code"
    return "image_variation" if hasattr(pipe, "image_noising_scheduler") else "image_to_image"


def to_pictures(images: np.ndarray) -> list[Image.Image]:
    """PIL images of `(B, H, W, C)` in [0, 1], rounded to the nearest of 256 values."""
    whole = np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in whole]


__all__ = [
    "WITH_NULL",
    "ClassMaker",
    "GenerativeAugmenter",
    "ImageMaker",
    "PromptMaker",
    "count_classes",
    "method_of",
    "to_pictures",
]
