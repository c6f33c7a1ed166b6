"""Patch masks as a noise process: at timestep t of T, `t / T` of an image's patches are 0 (MDM, arXiv 2308.05695)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_repr.noise.level import NoiseLevel


def visible_patches(timestep: float | Tensor, patches: int, num_train_timesteps: int) -> Tensor:
    """How many patches are left, `L - ceil(L t / T)`.

    Args:
        timestep: t from 0 to T, one number or `(B,)`; may be fractional.
        patches: L.
        num_train_timesteps: T.

    Returns:
        int64, of the shape of `timestep`, on its device.

    Example:
        >>> visible_patches(torch.tensor([0, 50, 500, 999]), 1024, 1000).tolist()
        [1024, 972, 512, 1]
    """
    time = torch.as_tensor(timestep)
    time = time.to(torch.float32 if time.device.type == "mps" else torch.float64)
    return patches - (patches * time / num_train_timesteps).ceil().long()


def patch_mask(scores: Tensor, visible: Tensor) -> Tensor:
    """The patches with the lowest scores: of independent scores a uniformly random choice.

    Args:
        scores: `(B, h, w)`.
        visible: How many are left, one number or `(B,)`.

    Returns:
        `(B, h, w)` boolean, true where a patch is left.
    """
    order = scores.flatten(1).argsort(dim=1)  # not a threshold: float32 scores may be equal
    first = torch.arange(order.shape[1], device=order.device) < visible.to(order.device).reshape(-1, 1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, first.expand_as(order)).view(scores.shape)


def mask_patches(
    x0: Tensor, timestep: float | Tensor, scores: Tensor, patch_size: int, num_train_timesteps: int
) -> Tensor:
    """Set random patches of each image to 0, the middle of [-1, 1]; all samples at once, nothing is read back.

    Args:
        x0: `(B, C, H, W)`.
        timestep: One for all or `(B,)`.
        scores: `(B, H / patch_size, W / patch_size)`, independent and alike; see `patch_mask`.
        patch_size: Side of a patch in pixels.
        num_train_timesteps: T.

    Returns:
        As `x0`; visible patches are bitwise those of it.

    Raises:
        ValueError: If the patch does not divide the image.
    """
    h, w = patch_grid((x0.shape[-2], x0.shape[-1]), patch_size)
    mask = patch_mask(scores, visible_patches(timestep, h * w, num_train_timesteps))
    columns = mask.repeat_interleave(patch_size, dim=2).to(x0.dtype)
    rows = x0.unflatten(-2, (h, patch_size))
    return (rows * columns[:, None, :, None]).flatten(2, 3)  # over whole rows: half the time of `where`


def patch_scores(noise: Tensor, patch_size: int) -> Tensor:
    """Scores of patches out of standard normal noise: its sum over each patch, so that equal noise masks alike.

    Args:
        noise: `(B, C, H, W)`.
        patch_size: Side of a patch.

    Returns:
        `(B, H / patch_size, W / patch_size)`.

    Raises:
        ValueError: If the patch does not divide the image.
    """
    h, w = patch_grid((noise.shape[-2], noise.shape[-1]), patch_size)
    return noise.float().reshape(len(noise), -1, h, patch_size, w, patch_size).sum(dim=(1, 3, 5))


def noise_mask(noise: Tensor, level: NoiseLevel) -> Tensor:
    """The pixels that `add_noise` leaves of images under a `patch_mask` process.

    Args:
        noise: What it was given, `(B, C, H, W)`.
        level: Resolved for that process.

    Returns:
        `(B, 1, H, W)` boolean.
    """
    patch, steps = level.schedule.patch_size, level.schedule.num_train_timesteps
    scores = patch_scores(noise, patch)
    mask = patch_mask(scores, visible_patches(level.timestep, scores[0].numel(), steps))
    return _pixels(mask, patch)


def patch_grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Patches along both sides of an image of `size` (H, W).

    Raises:
        ValueError: If the patch does not divide it; images are not padded.
    """
    h, w = size
    if h % patch_size or w % patch_size:
        fits = [p for p in range(1, min(h, w) + 1) if h % p == 0 and w % p == 0]
        raise ValueError(
            f"Patches of {patch_size} x {patch_size} do not divide images of {h} x {w}, and images are not padded; "
            f"take a patch of {', '.join(map(str, fits))}, or resize the images."
        )
    return h // patch_size, w // patch_size


def _pixels(mask: Tensor, patch_size: int) -> Tensor:
    """`(B, h, w)` to `(B, 1, H, W)`."""
    return mask.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=1)[:, None]


__all__ = ["mask_patches", "noise_mask", "patch_grid", "patch_mask", "patch_scores", "visible_patches"]
