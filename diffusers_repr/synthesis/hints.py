"""Variants of images by a ControlNet on the classes of their pixels, guided over the hint (ScribbleGen)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from diffusers_repr.data.image_data import ImageData
from diffusers_repr.data.masked import placed
from diffusers_repr.data.variants import image_key
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance import HintGuidance, guide
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.models.hint_encoder import HintEncoder
from diffusers_repr.store.image_store import ImageKey
from diffusers_repr.synthesis.draws import seed_of
from diffusers_repr.synthesis.guidance_scales import GuidanceSampler
from diffusers_repr.synthesis.makers import WITH_NULL, GenerativeAugmenter
from diffusers_repr.synthesis.named_guidance import for_keys

CLASSES = "{classes}"


class HintMaker(GenerativeAugmenter):
    """Variants of images that keep the classes of some of their pixels (ScribbleGen, arXiv 2311.17121).

    An image is noised to `strength` of the schedule, which the paper calls the encode ratio, and denoised again with
    its scribbles as the hint of a ControlNet. Guidance is over the hint, `eps(null) + w (eps(hint) - eps(null))`, with
    the prompt in both branches; w = 1 is none. Masks are brought to the size of the images by the nearest pixel, and
    never pass through a VAE. Of strength 1 nothing of the image is left but what the last noise level leaves.

    Args:
        denoiser: Of a text-to-image pipeline that diffusers has a ControlNet pipeline for.
        data: The images, opened with a column of masks.
        controlnet: As `train_controlnet.py` trains it.
        hints: What it is shown masks by, with its null hint.
        strength: Share of the schedule that is gone through; 0 leaves the image as it is.
        prompt: Of all variants; `{classes}` becomes the names of the classes in the scribbles of each.
        captions: Take the caption of each image as its prompt.
        scales: Draws w of each image; 2 if None, as the paper has it.
        **settings: As `ImageMaker`.

    Raises:
        ValueError: For data without masks, or with other classes; a strength outside of [0, 1]; a pipeline that takes
            no ControlNet, and a ControlNet of other hints.
    """

    kind = "hint"

    def __init__(
        self,
        denoiser: Denoiser,
        data: ImageData,
        controlnet: Any,
        hints: HintEncoder,
        *,
        strength: float = 1.0,
        prompt: str | None = None,
        captions: bool = False,
        scales: GuidanceSampler | None = None,
        **settings: Any,
    ) -> None:
        if denoiser.pipe is None:
            raise TypeError("Images are made by a pipeline; this Denoiser has none. Denoiser.from_pretrained(folder).")
        if data.masks is None:
            raise ValueError(f"{data.name} was opened without masks; pass mask_column=... to load_images.")
        names, known = data.masks.names, list(hints.config["class_names"])
        if names is not None and list(names) != known:
            raise ValueError(f"The masks have the classes {list(names)}, the ControlNet's hints {known}.")
        channels = controlnet.config["conditioning_channels"]
        if channels != hints.channels:
            raise ValueError(f"The ControlNet takes hints of {channels} channels, these have {hints.channels}.")
        try:
            pipe = diffusers.AutoPipelineForImage2Image.from_pipe(denoiser.pipe, controlnet=controlnet)
        except ValueError as error:
            raise ValueError(
                f"diffusers has no pipeline of {type(denoiser.pipe).__name__} with a ControlNet for images."
            ) from error
        # The plain `to`: diffusers' warns of modules kept in float32, of which a ControlNet has none.
        self.controlnet = nn.Module.to(controlnet, denoiser.device, denoiser.dtype).eval()
        self.hints = hints.to(denoiser.device).eval()
        chosen = scales or GuidanceSampler(2, 2, int(settings.get("seed", 0)))
        made = Denoiser.from_pipe(pipe, name=denoiser.name)
        super().__init__(made, data, "image_to_image", strength, prompt, captions, scales=chosen, **settings)
        self._control = weights_hash(self.controlnet)[:16] + weights_hash(self.hints)[:16]

    def how(self) -> dict[str, Any]:
        """With the ControlNet's weights."""
        return {**super().how(), "method": "hint", "controlnet": self._control}

    def keys(self, variants: int, rows: Sequence[int] | None = None) -> list[ImageKey]:
        """As `GenerativeAugmenter.keys`, each with the hash of its scribbles.

        Raises:
            ValueError: For masks of another size than their image, and ids or colours that are no classes.
        """
        found: list[ImageKey] = []
        for row in range(len(self.data)) if rows is None else rows:
            mask = self._masks([row])[0]
            for key in super().keys(variants, [row]):
                told = {**json.loads(key.guidance), "hint": image_key(mask)}
                prompt, guidance = self._filled(key.prompt, mask), json.dumps(told, sort_keys=True)
                found.append(dataclasses.replace(key, prompt=prompt, guidance=guidance))
        return found

    def make(self, keys: Sequence[ImageKey]) -> np.ndarray:
        """See `ImageMaker`."""
        if not self.kept:
            return super().make(keys)
        pixels = self.denoiser.pixels(self.read(keys))
        size = (pixels.shape[2], pixels.shape[3])
        masks = torch.from_numpy(np.stack([placed(mask, size) for mask in self._masks(self.rows(keys))]))
        with torch.no_grad():
            hints: Tensor = self.hints(masks.to(self.hints.device)).to(self.denoiser.dtype)
        scales = [json.loads(key.guidance)["guidance_scale"] for key in keys]
        generators = [torch.Generator("cpu").manual_seed(seed_of(key.seed, "hint")) for key in keys]
        with ExitStack() as stack:
            terms = for_keys(self.guidance, keys)
            if any(scale != 1 for scale in scales):
                terms.append(HintGuidance(self.hints.null.detach(), scales=[scale - 1 for scale in scales]))
            if terms:
                stack.enter_context(guide(self.pipe, terms))
            return self.pipe(
                prompt=[key.prompt or "" for key in keys], image=(pixels + 1) / 2, control_image=hints,
                strength=self.strength, num_inference_steps=self.steps, generator=generators,
                guidance_scale=WITH_NULL if self._has_cfg else 1.0, controlnet_conditioning_scale=1.0,
                output_type="np",
            ).images  # fmt: skip

    def check_scales(self) -> None:
        """The scales are of the hint: `CFG` is over the prompt, beside it."""

    def _guided(self, keys: Sequence[ImageKey]) -> AbstractContextManager[Any]:
        return nullcontext()  # `make` guides, for the scales of its keys

    def _masks(self, rows: Sequence[int]) -> list[np.ndarray]:
        return [sample.mask for sample in self.data.samples(rows) if sample.mask is not None]

    def _filled(self, prompt: str | None, mask: np.ndarray) -> str | None:
        if prompt is None or CLASSES not in prompt:
            return prompt
        names = self.hints.config["class_names"]
        shown = [names[one] for one in np.unique(mask).tolist() if one != self.hints.config["ignore_index"]]
        return prompt.replace(CLASSES, ", ".join(shown))


__all__ = ["CLASSES", "HintMaker"]
