"""Taps of a text-to-image model: maps that its U-Net and both halves of its VAE take in, in one cheap pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.capture import capture
from diffusers_repr.capture.gradient import frozen
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.denoiser.require import require_denoiser
from diffusers_repr.denoiser.vae import decode_latents, encode_latents
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.noise import LevelLike

Part = Literal["encoder", "unet", "decoder"]
NOISE_SEED = 42  # of ODISE


@dataclass(frozen=True)
class Tap:
    """One map that is read: what a residual block takes in.

    Attributes:
        part: `encoder` or `decoder` of the VAE, or `unet`.
        path: The block's full module path in that part.
        channels: C of its input; of the U-Net with those of the skip, which is joined already.
        stride: Image pixels per cell.
    """

    part: Part
    path: str
    channels: int
    stride: int


def find_taps(denoiser: Denoiser) -> tuple[Tap, ...]:
    """The taps of ODISE (arXiv 2303.04803) in any text-to-image model of a `UNet2DConditionModel` and `AutoencoderKL`.

    The inputs of the last residual block of: the two deepest stages of the VAE's encoder; each stage of the U-Net on
    the way up; the first two stages of the VAE's decoder. Of Stable Diffusion 1 these are the paper's eight.

    Args:
        denoiser: The base.

    Raises:
        TypeError: For another network or autoencoder.
        ValueError: For a base without text, and a VAE that works on tiles or slices.
    """
    unet, vae = _parts(denoiser)
    stride = denoiser.stride
    encoder = _walk("encoder", "down_blocks", vae.encoder.down_blocks, 1, "downsamplers")
    decoder = _walk("decoder", "up_blocks", vae.decoder.up_blocks, stride, "upsamplers")
    deepest = stride * 2 ** sum(bool(getattr(block, "downsamplers", None)) for block in unet.down_blocks)
    return (*encoder[-2:], *_walk("unet", "up_blocks", unet.up_blocks, deepest, "upsamplers"), *decoder[:2])


def read_taps(
    denoiser: Denoiser,
    pixels: Tensor,
    taps: Sequence[Tap],
    *,
    timestep: LevelLike | None = 0,
    context: Tensor | None = None,
    time_shift: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The maps at taps, `(B, C, h, w)` each, in their order; frozen weights, gradients to `context` and `time_shift`.

    The VAE's posterior mean is noised with one noise for all images, `randn` of the network's own latent size from
    the seed 42, resized (bicubic) where the latents have another; at t = 0 the image is all but clean. The VAE's
    decoder gets the mean itself. The U-Net and the decoder stop at the last tap, where 92 % and 25 % of their work are
    done in Stable Diffusion 1; what is read is bit-equal to what full passes give.

    Args:
        denoiser: The base.
        pixels: `(B, 3, H, W)` in [-1, 1].
        taps: Of `find_taps`, all or some.
        timestep: Noise level; None reads the clean latents, beside the embedding of timestep 0.
        context: Added to the embedded empty prompt, `(B, tokens, width)`.
        time_shift: Added to the embedded timestep, `(B, width)`.

    Raises:
        TypeError: As `find_taps`.
        ValueError: As `find_taps`; for sizes the base does not take, and additions that do not fit.
    """
    unet, vae = _parts(denoiser)
    size = tuple(pixels.shape[2:])
    denoiser.check_size(size)
    pixels = pixels.to(denoiser.device)
    found: dict[Tap, Tensor] = {}
    paths = {part: [tap.path for tap in taps if tap.part == part] for part in ("encoder", "unet", "decoder")}
    with eval_mode(unet, vae):
        with _reading(vae.encoder, paths["encoder"], stop=False) as maps:
            latents = encode_latents(vae, pixels).to(denoiser.device, denoiser.dtype)
        found |= _named("encoder", maps, taps)
        if paths["unet"]:
            x_t, level = latents, denoiser.level(0 if timestep is None else timestep)
            if timestep is not None:
                x_t = denoiser.add_noise(latents, level, _noise_like(denoiser, latents))
            inputs = denoiser.condition("", batch=len(pixels), size=size).kwargs()
            inputs = _with_context(inputs, context)
            # Gradients go to what is added, never to the weights.
            with _shifted(unet, time_shift), frozen(unet), _reading(denoiser.model, paths["unet"]) as maps:
                denoiser.predict(x_t, level, inputs)
            found |= _named("unet", maps, taps)
        if paths["decoder"]:
            with _reading(vae.decoder, paths["decoder"]) as maps:
                decode_latents(vae, latents)
            found |= _named("decoder", maps, taps)
    return tuple(found[tap] for tap in taps)


def _parts(denoiser: Denoiser) -> tuple[Any, Any]:
    """The U-Net and the VAE, if taps can be read in them."""
    require_denoiser(denoiser)
    unet, vae = plain_module(denoiser.model), denoiser.vae
    for what, part, wanted in (("network", unet, "UNet2DConditionModel"), ("VAE", vae, "AutoencoderKL")):
        if type(part).__name__ != wanted:
            got = "none" if part is None else type(part).__name__
            raise TypeError(
                f"The taps are those of a text-to-image model with a U-Net, such as Stable Diffusion: its {what} must "
                f"be of {wanted}; got {got}."
            )
    components = getattr(denoiser.pipe, "components", {})
    if not any(name.startswith("text_encoder") and part is not None for name, part in components.items()):
        raise ValueError(
            "This base has no text encoder, and the empty prompt has to be embedded. Make the denoiser of a whole "
            "pipeline: Denoiser.from_pipe(pipe), or Denoiser.from_pretrained(folder_or_id)."
        )
    if getattr(vae, "use_tiling", False) or getattr(vae, "use_slicing", False):
        raise ValueError(
            "The VAE works on tiles or slices, so that its maps are not those of whole images; call "
            "vae.disable_tiling() and vae.disable_slicing(), and read fewer windows at once."
        )
    return unet, vae


def _walk(part: Part, name: str, blocks: nn.ModuleList, stride: int, changes: str) -> list[Tap]:
    """The last residual block of each stage, with the stride inside the stage."""
    found = []
    for i, block in enumerate(blocks):
        last = len(block.resnets) - 1  # type: ignore[arg-type]
        channels = int(block.resnets[last].in_channels)  # type: ignore[index,union-attr]
        found.append(Tap(part, f"{name}.{i}.resnets.{last}", channels, stride))
        if getattr(block, changes, None):
            stride = stride // 2 if changes == "upsamplers" else stride * 2
    return found


@contextmanager
def _reading(model: nn.Module, paths: Sequence[str], stop: bool = True) -> Iterator[dict[str, Tensor]]:
    """Inside, what the modules at the paths take in is kept; nothing is where there are none."""
    maps: dict[str, Tensor] = {}
    if not paths:
        yield maps
        return
    with capture(model, list(paths), "input", stop_early=stop) as tape:
        yield maps
    maps.update(tape.features)


def _named(part: str, maps: dict[str, Tensor], taps: Sequence[Tap]) -> dict[Tap, Tensor]:
    return {tap: maps[tap.path] for tap in taps if tap.part == part}


def _noise_like(denoiser: Denoiser, latents: Tensor) -> Tensor:
    """`(B, C, h, w)` float32: one draw at the network's own size, resized if the latents have another."""
    generator = torch.Generator("cpu").manual_seed(NOISE_SEED)
    noise = torch.randn(1, latents.shape[1], *denoiser.family.size(), generator=generator)
    if noise.shape[2:] != latents.shape[2:]:
        noise = functional.interpolate(noise, tuple(latents.shape[2:]), mode="bicubic", align_corners=False)
    return noise.to(latents.device).expand(len(latents), -1, -1, -1)


def _with_context(inputs: dict[str, Any], context: Tensor | None) -> dict[str, Any]:
    if context is None:
        return inputs
    empty = inputs["encoder_hidden_states"]
    if context.shape != empty.shape:
        raise ValueError(f"The prompt is embedded as {tuple(empty.shape)}; {tuple(context.shape)} cannot be added.")
    return {**inputs, "encoder_hidden_states": empty + context.to(empty.device, empty.dtype)}


@contextmanager
def _shifted(unet: Any, shift: Tensor | None) -> Iterator[None]:
    """Inside, `shift` is added to the embedded timestep."""
    with ExitStack() as stack:
        if shift is not None:

            def add(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
                if shift.shape != output.shape:
                    raise ValueError(
                        f"The timestep is embedded as {tuple(output.shape)}; {tuple(shift.shape)} cannot be added."
                    )
                return output + shift.to(output.device, output.dtype)

            Hooks(stack).after(unet.time_embedding, add)
        yield


__all__ = ["NOISE_SEED", "Tap", "find_taps", "read_taps"]
