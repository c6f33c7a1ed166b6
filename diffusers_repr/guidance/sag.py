"""`SAG`: self-attention guidance."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.capture.batching import index_batch, without_rows
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.attention.layers import resolve_attentions
from diffusers_repr.guidance.attention.projections import check_supported, named_arguments
from diffusers_repr.guidance.attention.received import attention_received
from diffusers_repr.guidance.base import Guidance, GuidanceTerm, check_finite
from diffusers_repr.guidance.step import GuidedStep
from diffusers_repr.noise import expand


@dataclass(frozen=True)
class SAG(Guidance):
    """Self-attention guidance: `eps + s (eps - eps(x~))` (Hong et al. 2022, arXiv 2210.00939).

    `x~ = x + alpha M (blur(x_0) - x_0)`: the estimate x_0 is blurred where the network attends, and noised again with
    its own noise estimate. M is 1 on tokens that receive more attention than `threshold` times the mean, `a_j > 1.0`
    with `a_j = sum_i mean_heads A[i, j]`, in one self-attention layer. It needs no condition and no training.

    A, x_0 and eps are those of the null condition where the call holds it (classifier-free guidance in one batch, as
    diffusers' `StableDiffusionSAGPipeline`), of the conditional rows otherwise. One lane more is run, in a second
    pass. The two inputs differ, so the difference is one of eps, whatever the network predicts and the sampler steps.

    Attributes:
        scale: s, the paper's; 0 is off. `guide_scale` of its code is s + 1. Default: diffusers' `sag_scale`. The
            paper takes 0.5 to 0.8 for ImageNet 256 without classes, 0.1 for ImageNet 128, 0.01 to 0.05 for LSUN.
        layers: The self-attention module whose attention is read, by exact path or a whole-path pattern that matches
            one; None takes the default of the architecture (`describe(pipe)`).
        blur_sigma: Standard deviation of the Gaussian blur, in pixels of x_0; None takes `blur_default`.
        kernel_size: Its width in pixels, odd; borders are mirrored without repeating the border pixel, so each side
            of x_0 must be longer than half of it. None takes `blur_default`.
        threshold: Attention received above which a token is blurred; the mean over tokens is 1.
        clip: Clip x_0 to `[-clip, clip]` before the blur, as the paper's code does for pixel models (1.0); pixels
            that are not blurred then differ from x too. None does not clip, as diffusers.

    Example:
        >>> SAG(0.5, layers="mid_block.*", interval=(200, 900)).threshold
        1.0
    """

    scale: float = 0.75
    layers: str | Sequence[str] | None = None
    blur_sigma: float | None = None
    kernel_size: int | None = None
    threshold: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("SAG.threshold", self.threshold)
        for name, value in (("blur_sigma", self.blur_sigma), ("clip", self.clip)):
            if value is not None:
                check_finite(f"SAG.{name}", value)
                if value <= 0:
                    raise ValueError(f"SAG.{name} must be above 0; got {value}.")
        size = self.kernel_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % 2 == 0):
            raise ValueError(f"SAG.kernel_size must be an odd whole number of pixels; got {size!r}.")

    def bind(self, denoiser: Denoiser) -> SAGTerm:
        """Ready for a model.

        Raises:
            ValueError: For layers that match nothing, cross-attention only or more than one module, and for attention
                that gives no probabilities among image tokens alone (joint or linear attention, hidden q and k).
        """
        return SAGTerm(self, denoiser)


class BlurDefault(NamedTuple):
    """Blur that `SAG` takes by default.

    Attributes:
        sigma: Standard deviation in pixels of x_0.
        kernel_size: Width in pixels.
        source: Where the choice comes from.
    """

    sigma: float
    kernel_size: int
    source: str


def blur_default(denoiser: Denoiser) -> BlurDefault:
    """The blur that `SAG` takes for a model: by the size of x_0 for a `UNet2DModel`, one for all others.

    Returns:
        Sigma 9 with kernel 31 from 256 pixels on and sigma 3 with kernel 31 from 128 on (the paper's code); sigma 1
        with kernel 9 for smaller images (no published default) and latent models (diffusers' Stable Diffusion SAG).
    """
    return BlurDefault(*denoiser.family.sag_blur())


def _image_alone(denoiser: Denoiser) -> list[str]:
    """Layers that the family tells to be among image tokens alone, with probabilities."""
    family, found = denoiser.family, []
    for path in family.image_attentions(denoiser.model):
        layout = family.fixed_layout(path)
        if layout is not None and layout.text is None and not layout.linear:
            found.append(path)
    return found


class _Tapped(NamedTuple):
    """Attention received, `(B, 1, h, w)`, and whether the rows are those of the null condition."""

    received: Tensor
    of_null: bool


class SAGTerm(GuidanceTerm):
    """Reads attention in the call's own pass; runs the degraded lane in a second one."""

    def __init__(self, config: SAG, denoiser: Denoiser) -> None:
        super().__init__(config, denoiser)
        model = denoiser.model
        chosen = config.layers
        layers = denoiser.default_layers("sag").layers if chosen is None else resolve_attentions(denoiser, chosen)
        if len(layers) != 1:
            raise ValueError(
                f"SAG reads the attention of one layer; {config.layers!r} matches {len(layers)}: "
                f"{', '.join(layers[:4])}{', ...' if len(layers) > 4 else ''}. Take one of them."
            )
        self.layers = layers
        layout = check_supported(denoiser.family, model.get_submodule(layers[0]), layers[0], "queries")
        if layout.text is not None:
            alone = _image_alone(denoiser)
            raise ValueError(
                f"Layer {layers[0]!r} of {type(model).__name__} is {layout.name}: image tokens attend to text in "
                "the same softmax, and SAG is defined for attention among image tokens alone. "
                f"{f'Take one of {alone[:4]} by layers=, or PAG.' if alone else 'Use PAG for it.'}"
            )
        self._layout, blur = layout, blur_default(denoiser)
        self.blur_sigma = blur.sigma if config.blur_sigma is None else float(config.blur_sigma)
        self.kernel_size = blur.kernel_size if config.kernel_size is None else config.kernel_size
        self.threshold, self.clip = config.threshold, config.clip
        self.observers = {self.key: (layers[0], self._observe)}

    def _observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], call: NetworkCall) -> _Tapped:
        arguments = named_arguments(module, args, kwargs)
        hidden, path = arguments["hidden_states"], self.layers[0]
        # A pass runs all rows of the call, or the conditional ones alone.
        null = call.batch.null if hidden.shape[0] == call.rows else None
        if null is not None:
            arguments = index_batch(arguments, hidden.shape[0], null, without_rows(self.denoiser.family))
        if hidden.ndim == 4:
            grid = (hidden.shape[2], hidden.shape[3])
        else:
            found = self.denoiser.token_grid(path, hidden.shape[1], call.size)
            if found is None or found[1]:
                raise ValueError(
                    f"The {hidden.shape[1]} tokens of layer {path!r} are no grid of an image of {call.size[0]} x "
                    f"{call.size[1]} (H x W); SAG cannot place its mask."
                )
            grid = found[0]
        with torch.no_grad():
            received = attention_received(module, self._layout, arguments)
        return _Tapped(received.unflatten(1, grid)[:, None], null is not None)

    def correction(self, step: GuidedStep) -> Tensor:
        """`eps(x) - eps(x~)` as a change of the output at x."""
        call, observed = step.call, step.call.observers.get(self.key)
        if observed is None:
            raise RuntimeError(f"Layer {self.layers[0]!r} was not called in the forward; SAG has nothing to read.")
        output, rows = step.cond, call.batch.cond
        if observed.of_null:
            assert step.null is not None
            assert call.batch.null is not None
            output, rows = step.null, call.batch.null
        x = step.x(rows)
        x0 = step.prediction(output, x).x0
        mask = attention_mask(observed.received, self.threshold, (x0.shape[2], x0.shape[3])).to(x0.dtype)
        offset = blur_offset(x0, mask, self.blur_sigma, self.kernel_size, self.clip)
        degraded = step.run(rows, x=x + expand(step.level.alpha, offset) * offset)
        return step.difference(output, degraded, offset)


def attention_mask(received: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """Where tokens receive more attention than `threshold`, at the size of the image.

    Args:
        received: `(B, 1, h, w)`, mean 1.
        threshold: Exclusive lower bound.
        size: (H, W) of x_0; each pixel belongs to its nearest token.

    Returns:
        `(B, 1, H, W)`, 0 or 1, dtype of `received`.

    Example:
        >>> attention_mask(torch.tensor([[[[0.5, 1.5]]]]), 1.0, (1, 4))
        tensor([[[[0., 0., 1., 1.]]]])
    """
    return functional.interpolate((received > threshold).to(received.dtype), size=size, mode="nearest")


def blur_offset(x0: Tensor, mask: Tensor, sigma: float, kernel_size: int, clip: float | None = None) -> Tensor:
    """The degraded estimate minus the estimate, `M (blur(x_0) - x_0)`.

    Args:
        x0: `(B, C, H, W)`.
        mask: `(B, 1, H, W)`; where it is 0 the offset is exactly 0, unless x_0 is clipped there.
        sigma: Of the blur, in pixels.
        kernel_size: Of the blur, odd.
        clip: Bound of the estimate that is blurred, or None.

    Returns:
        `(B, C, H, W)`.

    Raises:
        ValueError: For an image too small for the kernel.
    """
    if clip is None:
        return mask * (gaussian_blur(x0, sigma, kernel_size) - x0)
    clipped = x0.clamp(-clip, clip)
    return clipped + mask * (gaussian_blur(clipped, sigma, kernel_size) - clipped) - x0


def gaussian_blur(image: Tensor, sigma: float, kernel_size: int) -> Tensor:
    """Separable Gaussian blur `exp(-i^2 / 2 sigma^2)`, cut off at the kernel, borders mirrored (`reflect`).

    Args:
        image: `(B, C, H, W)`, floating.
        sigma: Standard deviation in pixels, above 0.
        kernel_size: Odd.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: If a side is not longer than `(kernel_size - 1) / 2`; says which kernel fits.

    Example:
        >>> gaussian_blur(torch.eye(3)[None, None], 1.0, 3)[0, 0, 1]
        tensor([0.3715, 0.3544, 0.3715])
    """
    height, width = image.shape[-2:]
    reach, shorter = kernel_size // 2, min(height, width)
    if reach >= shorter:
        raise ValueError(
            f"kernel_size={kernel_size} mirrors {reach} pixels at each border, but x_0 is {height} x {width} (H x W); "
            f"kernel_size={2 * shorter - 1} or less fits."
        )
    # As products with small matrices: a convolution would round to TF32 on many GPUs, autocast to half precision.
    with torch.autocast(image.device.type, enabled=False):
        rows, columns = (
            _blur_matrix(length, sigma, kernel_size, image.device, image.dtype) for length in (height, width)
        )
        return rows @ image @ columns.T


@functools.lru_cache(maxsize=32)
def _blur_matrix(length: int, sigma: float, kernel_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Blur of `length` values with mirrored borders, `(length, length)`; rows sum to 1."""
    with torch.inference_mode(False):  # else a cached tensor could not serve a gradient later
        reach = kernel_size // 2
        offsets = torch.arange(-reach, reach + 1, device="cpu")
        weights = (-0.5 * (offsets.double() / sigma) ** 2).exp()
        place = (torch.arange(length, device="cpu")[:, None] + offsets).abs()
        place = torch.where(place >= length, 2 * (length - 1) - place, place)
        matrix = torch.zeros(length, length, dtype=torch.float64, device="cpu")
        matrix.scatter_add_(1, place, (weights / weights.sum()).expand(length, -1).contiguous())
        return matrix.to(device, dtype)


__all__ = ["SAG", "BlurDefault", "SAGTerm", "attention_mask", "blur_default", "blur_offset", "gaussian_blur"]
