"""Images from visual tokens that are fixed a few at a time, the most certain first. Needs `diffusers-repr`.

`TokenGenerationPipeline.from_pretrained(X)` without remote code, or `DiffusionPipeline.from_pretrained(X,
custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is a folder or Hub id that
`examples/train_mage.py`, `examples/train_addp.py` or `TokenGenerationPipeline.save_pretrained` wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import VQModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from diffusers_repr.denoiser import sampling
from diffusers_repr.denoiser.conditioner.tensors import given_vectors
from diffusers_repr.denoiser.parallel_decoding import Schedule, masked_counts, sample_tokens
from diffusers_repr.denoiser.prior import Prior
from diffusers_repr.hub.own_pipelines import OwnComponentsMixin
from diffusers_repr.models.masked_token_model import MaskedTokenModel
from diffusers_repr.models.maskgit_vq import MaskGITVQModel
from diffusers_repr.models.pixel_token_model import PixelTokenModel
from diffusers_repr.models.vq_tokens import (
    check_vocabulary,
    decode_embeddings,
    mixed_embeddings,
    token_embeddings,
)


@dataclass
class TokenGenerationOutput(BaseOutput):
    """What `TokenGenerationPipeline` returns.

    Attributes:
        images: PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)`.
        tokens: Their ids, `(B, h, w)`, int64.
        condition: The vectors they were made from, `(B, D)`, float32; None of a model without.
    """

    images: Any
    tokens: Tensor | None = None
    condition: Tensor | None = None


class TokenGenerationPipeline(sampling.SamplingMixin, OwnComponentsMixin, DiffusionPipeline):
    """Parallel decoding of visual tokens: MAGE (arXiv 2211.09117), RCG's generator (2312.03701), ADDP (2306.05423).

    All tokens are masked at first. In each step every masked token is drawn, the most certain of them stay, and the
    others are masked again, fewer and fewer. A `MaskedTokenModel` tells them from the tokens that stayed. A
    `PixelTokenModel` reads them from pixels: codes of those that stayed and expected codes of the others, decoded.

    Args:
        vqvae: The tokenizer.
        transformer: What tells the tokens, of the tokenizer's vocabulary.

    Raises:
        TypeError: For what is no tokenizer.
        ValueError: For a tokenizer of another vocabulary.
    """

    model_cpu_offload_seq = "transformer->vqvae"
    _callback_tensor_inputs = ["tokens", "mask", "embeddings", "condition"]

    def __init__(self, vqvae: VQModel | MaskGITVQModel, transformer: MaskedTokenModel | PixelTokenModel) -> None:
        super().__init__()
        check_vocabulary(transformer, vqvae)
        self.register_modules(vqvae=vqvae, transformer=transformer)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the network is called with null and conditional rows, in this order."""
        return self._guidance_scale > 1

    @property
    def condition_dim(self) -> int:
        """Width of the vectors that images are made from; 0 of a model without."""
        return int(self.transformer.config.get("condition_dim", 0))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        temperature: float = 6.0,
        schedule: Schedule = "cosine",
        generator: torch.Generator | list[torch.Generator] | None = None,
        condition: Tensor | None = None,
        prior: Prior | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens", "mask"),
        num_images_per_label: int = 1,
    ) -> TokenGenerationOutput | tuple[Any]:
        """Samples.

        Args:
            batch_size: Number of samples; as many as there are vectors or generators if None, else 1.
            guidance_scale: Classifier-free guidance to the vectors, off up to 1. It rises with the steps: in step k of
                S, from 1, the scale is `1 + (guidance_scale - 1) k / S`. RCG's `cfg` is `guidance_scale - 1`.
            num_inference_steps: Steps, at most as many as tokens; 20, or as many as tokens, if None.
            temperature: Of the noise in the choice of tokens that stay, which falls to 0 with the last step: 6 for the
                B and 11 for the L of RCG; 0 keeps the most certain.
            schedule: How many stay: `cosine`, few at first, or `linear`.
            generator: One, or one a sample, which makes a sample independent of its batch.
            condition: Vectors `(B, D)`, or one for all, of a model with such.
            prior: Draws the vectors instead; `stored_prior` if None.
            output_type: `pil`, `np` (B, H, W, C) and `pt` (B, C, H, W) in [0, 1], or `latent`: the codes (B, D, h, w).
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step, the timestep
                being the number of tokens that are still masked; tensors it returns take the place of these.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: `tokens` (B, N), guesses where they are
                still masked; `mask` (B, N); `embeddings` (B, N, D), the canvas, for `decode`; `condition`.
            num_images_per_label: Samples of each of the vectors, side by side.

        Returns:
            `.images`, `.tokens` and `.condition`.

        Raises:
            TypeError: For numbers that are none, and what is no generator.
            ValueError: For more steps than tokens, numbers of samples that differ, vectors that do not fit or are
                missing, and guidance that could not act.
        """
        prior = self.drawing(prior, condition) if self.condition_dim else prior
        given = self._check(output_type, guidance_scale, temperature, condition, prior)
        known = self._callback_tensor_inputs
        names = sampling.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs, known)
        (given,) = sampling.repeat_rows(num_images_per_label, condition=given)
        count = sampling.count_samples(batch_size=batch_size, condition=given, generator=generator)
        device, places = torch.device(self._execution_device), self.transformer.num_tokens
        steps = min(20, places) if num_inference_steps is None else num_inference_steps
        counts = masked_counts(places, steps, schedule)
        if prior is not None:
            given = given_vectors(prior.draw(count, generator), self.condition_dim)
        tensors: dict[str, Any] = {
            "tokens": torch.zeros(count, places, dtype=torch.int64, device=device),
            "mask": torch.ones(count, places, dtype=torch.bool, device=device),
            "embeddings": None,
            "condition": None if given is None else given.to(device, torch.float32).expand(count, -1),
        }
        self._guidance_scale, self._interrupt, self._num_timesteps = guidance_scale, False, len(counts)
        for step, left in enumerate(self.progress_bar(counts)):
            if self.interrupt:
                continue
            share = (step + 1) / len(counts)
            logits = self._logits(tensors, share)
            noise = temperature * (1 - share)
            tokens, mask = sample_tokens(logits, tensors["tokens"], tensors["mask"], left, noise, generator)
            tensors |= {"tokens": tokens, "mask": mask, "embeddings": self._canvas(tokens, mask, logits)}
            tensors = sampling.call_back(callback_on_step_end, self, step, torch.tensor(left), tensors, names)
        images = self._images(tensors, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        tokens = tensors["tokens"].unflatten(1, self.transformer.grid)
        return TokenGenerationOutput(images, tokens, tensors["condition"])

    def decode(self, embeddings: Tensor) -> Tensor:
        """Pixels `(B, C, H, W)` in [-1, 1], not clamped, of codes or mixtures of codes `(B, N, D)`.

        Args:
            embeddings: As a callback gets them.
        """
        return decode_embeddings(self.vqvae, embeddings, self.transformer.grid)

    def _logits(self, tensors: dict[str, Any], share: float) -> Tensor:
        """Scores of all ids, `(B, N, V)` float32, guided."""
        network, ids, mask = self.transformer, tensors["tokens"], tensors["mask"]
        if isinstance(network, PixelTokenModel):
            if tensors["embeddings"] is None:  # all are masked: no pixel is read
                side = network.config["patch_size"]
                channels, (height, width) = network.config["in_channels"], network.grid
                pixels = torch.zeros(len(ids), channels, side * height, side * width, device=ids.device)
            else:
                pixels = self.decode(tensors["embeddings"]).clamp(-1, 1)
            return network(pixels.to(network.dtype), ids, mask, return_dict=False)[0].float()
        ids, vectors = ids.masked_fill(mask, network.mask_token_id), tensors["condition"]
        if not self.do_classifier_free_guidance:
            return network(ids, vectors, return_dict=False)[0].float()
        null_rows = torch.arange(2 * len(ids), device=ids.device) < len(ids)
        both = network(torch.cat([ids, ids]), torch.cat([vectors, vectors]), null_rows, return_dict=False)[0]
        null, cond = both.float().chunk(2)
        return cond + (self.guidance_scale - 1) * share * (cond - null)

    def _canvas(self, tokens: Tensor, mask: Tensor, logits: Tensor) -> Tensor:
        """Codes of the tokens; what a network of pixels reads next has expected ones where they are masked."""
        if isinstance(self.transformer, PixelTokenModel):
            return mixed_embeddings(self.vqvae, tokens, mask, logits.softmax(-1))
        return token_embeddings(self.vqvae, tokens)

    def _check(self, output_type: str, scale: float, temperature: float, condition: Any, prior: Any) -> Tensor | None:
        """Vectors as given."""
        sampling.check_output_type(output_type)
        sampling.check_number("guidance_scale", scale)
        sampling.check_number("temperature", temperature, 0)
        width, given = self.condition_dim, sum(value is not None for value in (condition, prior))
        if not width and given:
            raise ValueError(
                "This model was trained without vectors (condition_dim=0); leave condition and prior out."
            )
        if width and given != 1:
            raise ValueError(
                f"The model makes images from vectors (B, {width}): give condition= or prior=, one of them."
            )
        if scale > 1 and not width:
            raise ValueError(f"guidance_scale={scale} guides to vectors, and this model takes none. Leave it at 1.")
        return None if condition is None else given_vectors(condition, width)

    def _images(self, tensors: dict[str, Any], output_type: str) -> Any:
        codes = token_embeddings(self.vqvae, tensors["tokens"])
        if output_type == "latent":
            return codes.transpose(1, 2).unflatten(2, self.transformer.grid)
        return sampling.pack_images(self.decode(codes).float(), output_type)
