"""Perturbed attention: what an attention module gives when image tokens no longer attend to each other as they should.

The image-image part of the attention is changed; text queries see everything, image queries see all text.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.denoiser.attention_layouts import AttentionLayout
from diffusers_repr.guidance.attention.image_prompts import image_prompt, prompt_beside, prompt_inside
from diffusers_repr.guidance.attention.interception import intercepted
from diffusers_repr.guidance.attention.projections import (
    Needs,
    Projections,
    finish,
    merge_heads,
    project,
    project_values,
)

_SCRATCH = 2**24  # scores held at once: 64 MiB in float32


@dataclass(frozen=True)
class Identity:
    """Each image token attends to itself (and to the text) only: PAG, arXiv 2403.17377.

    Self-attention becomes `to_out(to_v(h))`; queries and keys are not computed. In joint attention an image query sees
    its own key and all text keys.
    """

    needs: ClassVar[Needs] = "values"

    def of_values(self, value: Tensor) -> Tensor:
        """The weighted sum `(B, T, C)` of self-attention from its values alone: the values."""
        return value

    def attend(self, calls: Projections, grid: tuple[int, ...] | None = None) -> Tensor:
        """The weighted sum `(B, heads, S, D)`, from `1 + text` scores an image query; no mask is made."""
        query, own_key, own_value = (part[:, :, calls.image] for part in (calls.query, calls.key, calls.value))
        batch, heads, tokens, _ = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        keys, values = calls.key[:, :, calls.text].to(wide).transpose(-1, -2), calls.value[:, :, calls.text]
        mask = _rows_of_mask(calls, calls.image)
        bias = None if mask is None else _own_and_text(mask, calls, tokens)
        own = (query.to(wide) * own_key.to(wide)).sum(-1, keepdim=True)
        step = max(1, _SCRATCH // (batch * heads * (1 + keys.shape[-1])))
        parts = []
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            scores = torch.cat([own[:, :, rows], query[:, :, rows].to(wide) @ keys], dim=-1) * calls.scale
            if bias is not None:
                scores = scores + bias[..., rows if bias.shape[-2] > 1 else slice(None), :].to(wide)
            weights = scores.softmax(-1).to(query.dtype)
            parts.append(weights[..., :1] * own_value[:, :, rows] + weights[..., 1:] @ values)
        return _with_text(calls, torch.cat(parts, dim=2))


@dataclass(frozen=True)
class Drop:
    """The weighted sum is 0 on image tokens: nothing is carried from any token to an image token.

    What is no attention stays: the bias of `to_out` (a constant, the same for all tokens), the residual, and the text
    tokens' own attention in joint attention.
    """

    needs: ClassVar[Needs] = "values"

    def of_values(self, value: Tensor) -> Tensor:
        """The weighted sum `(B, T, C)` of self-attention: zeros."""
        return torch.zeros_like(value)

    def attend(self, calls: Projections, grid: tuple[int, ...] | None = None) -> Tensor:
        """The weighted sum `(B, heads, S, D)`: zeros for image tokens."""
        return _with_text(calls, torch.zeros_like(calls.value[:, :, calls.image]))


@dataclass(frozen=True)
class Blur:
    """Image queries are smoothed over the token grid: SEG, arXiv 2408.00760.

    The queries are those of the product with the keys (after norms and rotation), so the blur acts on the scores, as
    a function of the query's place. The Gaussian `exp(-x^2 / 2 sigma^2)`, x in tokens, is separable, not cut off, and
    at the borders the grid is continued by its mirror image, border tokens repeated, as often as needed. Hence it
    leaves the mean query as it is, works on any grid, and tends to the mean query for large sigma. (SEG's own code
    cuts at 3 sigma and mirrors without repeating the border tokens.)

    Attributes:
        sigma: Standard deviation in tokens, above 0; `math.inf` puts the mean query everywhere.
    """

    sigma: float = math.inf
    needs: ClassVar[Needs] = "queries"

    def __post_init__(self) -> None:
        if not _is_number(self.sigma) or not self.sigma > 0:
            raise ValueError(f"sigma must be above 0 (in tokens; math.inf for the mean query); got {self.sigma!r}.")

    def attend(self, calls: Projections, grid: tuple[int, ...] | None = None) -> Tensor:
        """The weighted sum `(B, heads, S, D)` with blurred image queries."""
        query, mask = calls.query[:, :, calls.image], _rows_of_mask(calls, calls.image)
        wide = torch.promote_types(query.dtype, torch.float32)
        if math.isinf(self.sigma):
            tokens = query.shape[2]
            query = query.to(wide).mean(2, keepdim=True).to(query.dtype)
            if mask is None or mask.shape[-2] == 1:  # one query: one row, for all
                return _with_text(calls, _softmax(query, calls, mask).expand(-1, -1, tokens, -1))
            query = query.expand(-1, -1, tokens, -1)
        else:
            query = self._blurred(query.to(wide), grid).to(query.dtype)
        return _with_text(calls, _softmax(query, calls, mask))

    def _blurred(self, query: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        if grid is None or math.prod(grid) != query.shape[2]:
            raise ValueError(
                f"Blur(sigma={self.sigma}) needs the token grid (h, w) of {query.shape[2]} image tokens; got {grid}. "
                "Blur(math.inf) works without one."
            )
        blurs = [_blur_matrix(length, self.sigma, query.device, query.dtype) for length in grid]
        product = "ij,kl,bhjld->bhikd" if len(grid) == 2 else "ij,kl,mn,bhjlnd->bhikmd"  # of a video with its frames
        return torch.einsum(product, *blurs, query.unflatten(2, grid)).flatten(2, -2)


@dataclass(frozen=True)
class Mask:
    """A fixed share of the image-image attention, the diagonal apart, is taken away (scores at minus infinity).

    The pairs are drawn once from `seed` on the CPU, each with probability `ratio`: the same for every step, layer of
    that many tokens, head, sample and device.

    Attributes:
        ratio: From 0 (plain attention) to 1 (as `Identity`).
        seed: Of the drawing.
    """

    ratio: float = 0.75
    seed: int = 0
    needs: ClassVar[Needs] = "queries"

    def __post_init__(self) -> None:
        if not _is_number(self.ratio) or not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be from 0 to 1; got {self.ratio!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed must be a whole number; got {self.seed!r}.")

    def kept(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Which pairs stay: `(tokens, tokens)`, boolean, rows are queries."""
        return _kept(tokens, self.ratio, self.seed, torch.device(device))

    def attend(self, calls: Projections, grid: tuple[int, ...] | None = None) -> Tensor:
        """The weighted sum `(B, heads, S, D)` under the mask."""
        query = calls.query[:, :, calls.image]
        kept = self.kept(query.shape[2], query.device)
        text = calls.text.stop - calls.text.start
        if text:
            kept = functional.pad(kept, (text, 0) if calls.text.start == 0 else (0, text), value=True)
        own = _rows_of_mask(calls, calls.image)
        mask = kept if own is None else own.masked_fill(~kept, -math.inf)
        return _with_text(calls, _softmax(query, calls, mask))


Perturbation = Identity | Drop | Blur | Mask
PERTURBATIONS: Mapping[str, type] = {"identity": Identity, "drop": Drop, "blur": Blur, "mask": Mask}


def perturbed(
    module: nn.Module,
    layout: AttentionLayout,
    arguments: Mapping[str, Any],
    perturbation: Perturbation,
    grid: tuple[int, ...] | None = None,
    image: slice | Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The output of an attention module under a perturbation, for the rows given.

    Nothing is drawn from the global generators, and the module is not changed. Its submodules are called as modules,
    so adapters in them act.

    Args:
        module: Attention that `check_supported` accepts.
        layout: What it returned.
        arguments: The call's arguments by name, for these rows only.
        perturbation: What is done to the attention.
        grid: Token grid `(h, w)` of the image tokens; for `Blur` with a finite sigma.
        image: Where the image tokens lie in `hidden_states`, in single-stream attention: a slice, or places `(B, N)`.

    Returns:
        As the module's own forward: `(B, T, C)` or `(B, C, h, w)`; `(image, text)` where the text is a second input,
        `(image, text, image prompt)` in FLUX with an IP-Adapter.

    Raises:
        ValueError: A grid that is missing or does not fit, a single stream whose image tokens are not told.

    Example:
        >>> from diffusers.models.attention_processor import Attention
        >>> from diffusers_repr.denoiser.attention_layouts import SELF
        >>> layer, tokens = Attention(8, heads=2, dim_head=4), torch.ones(1, 6, 8)
        >>> out = perturbed(layer, SELF, {"hidden_states": tokens}, Identity())
        >>> torch.equal(out, layer.to_out[0](layer.to_v(tokens)))
        True
    """
    if not layout.processors:
        return intercepted(module, layout, arguments, functools.partial(perturbation.attend, grid=grid), image)
    assert not isinstance(image, Tensor)
    prompted = image_prompt(module, layout, arguments)
    if layout.text is None and isinstance(perturbation, Identity | Drop) and prompted is None:
        return finish(module, layout, arguments, perturbation.of_values(project_values(module, layout, arguments)))
    calls = project(module, layout, arguments, image)
    attended = perturbation.attend(calls, grid)
    if prompted == "inside":
        prompt = perturbation.attend(prompt_inside(module, arguments), grid) * module.processor.scale  # type: ignore[union-attr, operator]
        attended = attended + functional.pad(prompt, (0, 0, 0, attended.shape[2] - prompt.shape[2]))
    out = finish(module, layout, arguments, merge_heads(attended), calls.image)
    return (*out, prompt_beside(module, arguments)) if prompted == "beside" else out


def _softmax(query: Tensor, calls: Projections, mask: Tensor | None = None) -> Tensor:
    return functional.scaled_dot_product_attention(query, calls.key, calls.value, attn_mask=mask, scale=calls.scale)


def _rows_of_mask(calls: Projections, queries: slice) -> Tensor | None:
    """The mask's rows for some queries; one row that serves all stays."""
    return calls.mask if calls.mask is None or calls.mask.shape[-2] == 1 else calls.mask[..., queries, :]


def _own_and_text(mask: Tensor, calls: Projections, tokens: int) -> Tensor:
    """Of a mask's image rows what is added to a token's score with itself, and to those with the text."""
    image = mask[..., calls.image].expand(*mask.shape[:-2], tokens, -1)
    own = image.diagonal(dim1=-2, dim2=-1)[..., None]
    return torch.cat([own, mask[..., calls.text].expand(*own.shape[:-1], -1)], dim=-1)


def _with_text(calls: Projections, image: Tensor) -> Tensor:
    """The image tokens' weighted sum joined with the text tokens' own, which see everything."""
    query = calls.query[:, :, calls.text]
    if not query.shape[2]:
        return image
    text = _softmax(query, calls, _rows_of_mask(calls, calls.text))
    return torch.cat([text, image] if calls.text.start == 0 else [image, text], dim=2)


@functools.lru_cache(maxsize=32)
def _blur_matrix(length: int, sigma: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Gaussian blur of `length` values with mirrored borders, as a doubly stochastic matrix."""
    with torch.inference_mode(False):  # else a cached tensor could not serve a gradient later
        if sigma >= 4 * length:  # there the slowest cosine is damped by exp(-8 pi^2) < 1e-34
            return torch.full((length, length), 1 / length, dtype=dtype, device=device)
        reach = math.ceil(9 * sigma)
        offsets = torch.arange(-reach, reach + 1)
        weights = (-0.5 * (offsets.double() / sigma) ** 2).exp()
        place = (torch.arange(length)[:, None] + offsets) % (2 * length)
        place = torch.minimum(place, 2 * length - 1 - place)
        matrix = torch.zeros(length, length, dtype=torch.float64)
        matrix.scatter_add_(1, place, (weights / weights.sum()).expand(length, -1).contiguous())
        return matrix.to(device, dtype)


@functools.lru_cache(maxsize=4)
def _kept(tokens: int, ratio: float, seed: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator("cpu").manual_seed(seed)
        step = max(1, _SCRATCH // tokens)
        kept = torch.empty(tokens, tokens, dtype=torch.bool)
        for start in range(0, tokens, step):
            rows = kept[start : start + step]
            torch.ge(torch.rand(rows.shape, generator=generator), ratio, out=rows)
        return kept.fill_diagonal_(True).to(device)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
