"""Images from the neighbours of a picture, a text or nothing: kNN-Diffusion and RDM. Needs `diffusers-repr`.

`RetrievalDiffusionPipeline.from_pretrained(X)` without remote code, or `DiffusionPipeline.from_pretrained(X,
custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is a folder or Hub id that a training
script or `RetrievalDiffusionPipeline.save_pretrained` wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

# diffusers loads a component of a class that is imported already, and imports none because a folder names it.
from diffusers_repr.schedulers_ext import scheduling_flow_match_ode, scheduling_flow_match_sde  # noqa: F401
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer, CLIPTokenizerFast

from diffusers_repr.assign.index import RetrievalIndex
from diffusers_repr.assign.neighbour_tokens import neighbour_tokens
from diffusers_repr.assign.retrieval_prior import FrequencyPrior
from diffusers_repr.capture.key_values import cached_key_values, can_cache
from diffusers_repr.data.teacher_features import encoder_fingerprint
from diffusers_repr.denoiser import TokenConditioner, sampling
from diffusers_repr.denoiser.conditioner import bare_conditioner
from diffusers_repr.denoiser.family_registry import family_of
from diffusers_repr.denoiser.prior import Prior
from diffusers_repr.denoiser.vae import decode_latents
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.encoders.preprocessing import CLIP_MEAN, CLIP_STD
from diffusers_repr.encoders.queries import encode_queries
from diffusers_repr.guidance import Guidance
from diffusers_repr.guidance.pipeline import GuidedPipelineMixin
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.own_pipelines import OwnComponentsMixin
from diffusers_repr.models.null_tokens import NullTokens


@dataclass
class RetrievalDiffusionOutput(BaseOutput):
    """What `RetrievalDiffusionPipeline` returns.

    Attributes:
        images: PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)`.
        rows: Of the neighbours in the index, `(B, k)`, the nearest first; None where tokens were given.
        scores: Their cosines to the query, `(B, k)`.
    """

    images: Any
    rows: Tensor | None = None
    scores: Tensor | None = None


class RetrievalDiffusionPipeline(GuidedPipelineMixin, sampling.SamplingMixin, OwnComponentsMixin, DiffusionPipeline):
    """Samples a `UNet2DConditionModel` whose cross-attention sees vectors of images near a query.

    With the query among them it is kNN-Diffusion (arXiv 2204.02849), without it RDM (arXiv 2204.11824): one network
    and one loss, the plain denoising one. The index is not a part of the pipeline: it may be another one than that of
    training, of other images, if it is of the same encoder. The order of the neighbours does not matter.

    Args:
        unet: The network; `cross_attention_dim` is the length of the vectors.
        scheduler: Its sampler.
        vae: Decodes the samples; None of a model that works on pixels in [-1, 1].
        null_tokens: The null condition, learned or fixed (`NullTokens`); None: zeros.
        clip: Both towers of CLIP, for queries where no encoder is given.
        tokenizer: Of its texts.
        image_mean: Of the images in [0, 1] that CLIP takes, one a channel; the published CLIP's if None.
        image_std: As `image_mean`.
        k: Neighbours that it was trained with.
        include_query: Whether the query was among the tokens in training.
        index_encoder: Record of the encoder whose vectors it was trained on; an index of another is refused.
    """

    model_cpu_offload_seq = "clip->unet->vae"
    _optional_components = ["vae", "null_tokens", "clip", "tokenizer"]
    _exclude_from_cpu_offload = ["null_tokens"]
    _callback_tensor_inputs = ["latents", "tokens"]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        null_tokens: NullTokens | None = None,
        clip: CLIPModel | None = None,
        tokenizer: CLIPTokenizer | CLIPTokenizerFast | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        k: int = 4,
        include_query: bool = False,
        index_encoder: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        parts = {"unet": unet, "scheduler": scheduler, "vae": vae, "null_tokens": null_tokens}
        self.register_modules(**parts, clip=clip, tokenizer=tokenizer)
        self.register_to_config(
            image_mean=None if image_mean is None else list(image_mean),
            image_std=None if image_std is None else list(image_std),
            k=k,
            include_query=include_query,
            index_encoder=None if index_encoder is None else dict(index_encoder),
        )

    def _folder_class(self) -> str:
        return type(self).__name__

    @property
    def conditioner(self) -> TokenConditioner:
        """What the network is conditioned on, for training and guidance; batches have it in `condition`."""
        count = self.config.k + self.config.include_query
        null = 0.0 if self.null_tokens is None else self.null_tokens
        return TokenConditioner(column="condition", null=null, count=count)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the network is called with null and conditional rows, in this order."""
        return self._guidance_scale > 1

    @torch.no_grad()
    def __call__(
        self,
        query: Any = None,
        index: RetrievalIndex | None = None,
        batch_size: int | None = None,
        k: int | None = None,
        include_query: bool | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        encoder: Any = None,
        tokens: Tensor | None = None,
        prior: Prior | None = None,
        top: float | None = None,
        weighted: bool = False,
        num_images_per_query: int = 1,
        cache_key_values: bool | None = None,
        guidance: Guidance | Sequence[Guidance] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> RetrievalDiffusionOutput | tuple[Any]:
        """Samples.

        Args:
            query: Images, texts, or vectors `(B, D)` of the encoder; one, or a list. None: pseudo-queries, drawn from
                the index by the generator after the noise.
            index: Where neighbours are looked for.
            batch_size: Number of samples; as many as there are queries, tokens or latents if None, else 1.
            k: Neighbours of each; as in training if None. 0 is the query alone.
            include_query: Whether the query is one of the tokens; as in training if None.
            guidance_scale: Classifier-free guidance, `null + guidance_scale (cond - null)`; off up to 1.
            num_inference_steps: Steps of the scheduler.
            generator: One, or one a sample, which makes a sample independent of its batch.
            eta: Noise of DDIM, from 0 to 1. Other schedulers take none but 0.
            latents: Standard normal noise `(B, C, h, w)` to start from, in place of drawing it.
            output_type: `pil`, `np` (B, H, W, C) and `pt` (B, C, H, W) in [0, 1], or `latent`: what the sampler gave.
            return_dict: False returns the tuple `(images,)`.
            encoder: `Encoder` or `ImageTextEncoder` of the queries; the pipeline's CLIP if None.
            tokens: The token sets themselves, `(B, k, D)` or `(k, D)` for all, in place of query and index.
            prior: Draws the tokens, in place of query and index; `stored_prior` if None.
            top: Share of the index that pseudo-queries are drawn from, those rows that were neighbours of training
                images most often; all if None.
            weighted: Draw pseudo-queries by how often they were neighbours.
            num_images_per_query: Samples of each query or token set, side by side.
            cache_key_values: Make keys and values of the tokens once for all steps, the same bit for bit. None: where
                the network is not compiled. True refuses a compiled one.
            guidance: As `diffusers_repr.guide` takes it: `[PAG(3.0)]`.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step; tensors that it
                returns by name take the place of these.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: `latents`, `tokens`.

        Returns:
            `.images`, and `.rows` and `.scores` of the neighbours.

        Raises:
            TypeError: For queries that are none, and numbers that are none.
            ValueError: For an index of other vectors than the network was trained on, more neighbours than it has,
                texts for an encoder without texts, shapes and numbers that do not fit, and settings without effect.
        """
        prior = self.drawing(prior, query, index, tokens)
        self._check(output_type, guidance_scale, query, index, tokens, prior, top, weighted)
        known = self._callback_tensor_inputs
        names = sampling.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs, known)
        extra = sampling.step_arguments(self.scheduler, generator, eta)
        k = check_whole("k", self.config.k if k is None else k, 0)
        include_query = self.config.include_query if include_query is None else include_query
        pseudo, found = None, None
        if query is not None:
            assert index is not None
            found = neighbour_tokens(index, self._queries(query, encoder, index), k, include_query)
            tokens = found.tokens
        elif index is not None:
            share = 1.0 if top is None else top
            pseudo = FrequencyPrior(
                index, k + include_query, include_query=include_query, share=share, weighted=weighted
            )
        kept = (None, None) if found is None else (found.rows, found.scores)
        tokens, rows, scores = _repeated(num_images_per_query, self._given_tokens(tokens), *kept)
        batch_size = sampling.count_samples(batch_size=batch_size, query=tokens, latents=latents, generator=generator)
        noise = self._noise(batch_size, generator, latents)
        if pseudo is not None:
            found = pseudo.neighbours(pseudo.draw_rows(batch_size, generator))
            tokens, rows, scores = self._given_tokens(found.tokens), found.rows, found.scores
        elif prior is not None:
            tokens = self._given_tokens(prior.draw(batch_size, generator))
        tokens, rows, scores = (
            None if value is None else value.expand(batch_size, *value.shape[1:]) for value in (tokens, rows, scores)
        )
        self._guidance_scale, self._interrupt = guidance_scale, False

        with self.guided(guidance), self._keeping(cache_key_values):
            self._num_timesteps = sampling.set_timesteps(self.scheduler, num_inference_steps, noise.device)
            noise = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
            tensors: dict[str, Any] = {"latents": noise, "tokens": tokens}
            steps, samplers = self.scheduler.timesteps, {"latents": self.scheduler}
            predict = _Predictor(self)
            tensors = self._denoise(steps, tensors, predict, samplers, extra, callback_on_step_end, names)

        images = self._images(tensors["latents"], output_type)
        self.maybe_free_model_hooks()
        return RetrievalDiffusionOutput(images, rows, scores) if return_dict else (images,)

    # Checks

    def _check(
        self,
        output_type: str,
        scale: float,
        query: Any,
        index: Any,
        tokens: Any,
        prior: Any,
        top: float | None,
        weighted: bool,
    ) -> None:
        sampling.check_output_type(output_type)
        sampling.check_number("guidance_scale", scale)
        given = [name for name, value in (("index", index), ("tokens", tokens), ("prior", prior)) if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"What is it conditioned on? Pass one of index, tokens and prior; got {' and '.join(given) or 'none'}."
            )
        if index is None:
            if query is not None:
                raise ValueError("A query finds its neighbours in an index; pass index=.")
        else:
            self._check_index(index)
        if (query is not None or index is None) and (top is not None or weighted):
            raise ValueError("top and weighted say which pseudo-queries are drawn: pass an index and no query.")

    def _check_index(self, index: Any) -> None:
        if not isinstance(index, RetrievalIndex):
            raise TypeError(f"index is a RetrievalIndex; got {type(index).__name__}. RetrievalIndex.open(folder).")
        width = self._width()
        if index.dim != width:
            raise ValueError(
                f"The vectors of the index have {index.dim} values, those that this {type(self.unet).__name__} is "
                f"conditioned on {width}: the index is of another encoder."
            )
        if self.config.index_encoder and index.encoder:
            try:
                index.check_encoder(self.config.index_encoder)
            except ValueError as error:
                raise ValueError(f"The network was trained on vectors of another encoder. {error}") from error

    def _width(self) -> int:
        width = self.unet.config.cross_attention_dim
        return int(width[0] if isinstance(width, (list, tuple)) else width)

    def _queries(self, query: Any, encoder: Any, index: RetrievalIndex) -> Tensor:
        """Vectors of queries."""
        if encoder is None and self.clip is not None:
            mean, std = self.config.image_mean or CLIP_MEAN, self.config.image_std or CLIP_STD
            encoder = ImageTextEncoder(self.clip, self.tokenizer, mean, std)
        elif hasattr(encoder, "fingerprint") and index.encoder:
            index.check_encoder(encoder_fingerprint(encoder))
        return encode_queries(query, encoder)

    def _given_tokens(self, tokens: Any) -> Tensor | None:
        """Token sets `(B, k, D)` on the device."""
        if tokens is None:
            return None
        tokens = torch.as_tensor(tokens)
        tokens = tokens[None] if tokens.ndim == 2 else tokens
        conditioner = bare_conditioner(self.unet, self.conditioner)
        conditioner.check(tokens)
        return tokens.to(self._execution_device, self.unet.dtype)

    # Sampling

    def _keeping(self, wanted: bool | None) -> AbstractContextManager[Any]:
        """Keys and values kept over the steps."""
        if wanted is None:
            wanted = can_cache(self.unet)
        return cached_key_values(self.unet) if wanted else nullcontext()

    def _noise(self, batch_size: int, generator: Any, latents: Tensor | None) -> Tensor:
        """Noise to start from, `(B, C, h, w)`, before the scheduler's scale."""
        family, device, dtype = family_of(self.unet), self._execution_device, self.unet.dtype
        if latents is None:
            shape = (batch_size, family.channels(), *family.size())
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        sampling.check_latents(latents, family.channels())
        return latents.to(device, dtype)

    def _images(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = latents if self.vae is None else decode_latents(self.vae, latents)
        return sampling.pack_images(images.float(), output_type)


class _Predictor:
    """What the scheduler steps with, classifier-free guidance included.

    The network gets the same tensor in every step, unless a callback changes the tokens: by that its keys and values
    are kept.
    """

    def __init__(self, pipe: RetrievalDiffusionPipeline) -> None:
        self.pipe = pipe
        self.conditioner = bare_conditioner(pipe.unet, pipe.conditioner)
        self._made: tuple[Any, ...] = (None, None, None)
        self._entered: Tensor | None = None

    def __call__(self, step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
        pipe, latents = self.pipe, tensors["latents"]
        guided, channels = pipe.do_classifier_free_guidance, latents.shape[1]
        x = torch.cat([latents] * 2) if guided else latents
        if hasattr(pipe.scheduler, "scale_model_input"):
            x = pipe.scheduler.scale_model_input(x, t)
        output = pipe.unet(x, t, encoder_hidden_states=self.enter(tensors["tokens"], guided), return_dict=False)[0]
        if guided:
            null, cond = output[:, :channels].chunk(2)
            combined = null + pipe.guidance_scale * (cond - null)
            output = torch.cat([combined, output[len(latents) :, channels:]], 1)
        return {"latents": sampling.without_variance(pipe.scheduler, output, channels)}

    def enter(self, tokens: Tensor, guided: bool) -> Tensor:
        """The network's input of tokens, the null condition's first where it guides."""
        kept, version, how = self._made
        if self._entered is None or kept is not tokens or version != tokens._version or how != guided:
            both = torch.cat([tokens] * 2) if guided else tokens
            dropped = torch.arange(len(both), device=tokens.device) < len(tokens) if guided else None
            self._made = (tokens, tokens._version, guided)
            self._entered = self.conditioner.inputs(both, dropped)["encoder_hidden_states"]
        return self._entered


def _repeated(times: int, *values: Tensor | None) -> list[Tensor | None]:
    """Each row as often as `num_images_per_query` says, copies side by side."""
    if check_whole("num_images_per_query", times) > 1 and values[0] is None:
        raise ValueError(f"num_images_per_query={times} repeats queries, and there are none: pass batch_size.")
    return [None if value is None else value.repeat_interleave(times, 0) for value in values]
