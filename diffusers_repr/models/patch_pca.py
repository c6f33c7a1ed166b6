"""`PatchPCA`: an orthonormal basis of an image's patches, principal components first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.mixin import ReprModelMixin

Basis = Literal["pca", "pixels"]


class PatchPCA(ReprModelMixin, ModelMixin, ConfigMixin):
    """The space in which l-DAE adds noise (Chen et al. 2024, arXiv 2401.14404): patches by their principal directions.

    A patch of p x p pixels and C channels has `D = C p p` values, in the order of `torch.nn.Conv2d`'s weights. The
    coordinates of a patch x are `V (x - mean)` with an orthonormal V of D x D: nothing is lost unless some are left
    out.

    Args:
        patch_size: p.
        in_channels: C.
        num_directions: d, the coordinates that count; 1 to D.

    Raises:
        ValueError: For other numbers.

    Example:
        >>> images = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> pca = PatchPCA.fit([images], patch_size=2, num_directions=3)
        >>> patches = pca.patches(images)
        >>> patches.shape, bool((pca.unproject(pca.project(patches)) - patches).abs().max() < 1e-6)
        (torch.Size([50, 4, 4]), True)
    """

    _no_split_modules: list[str] = []
    directions: Tensor
    mean: Tensor
    variances: Tensor

    @register_to_config
    def __init__(self, patch_size: int, in_channels: int, num_directions: int) -> None:
        super().__init__()
        check_sizes(patch_size=patch_size, in_channels=in_channels, num_directions=num_directions)
        values = in_channels * patch_size**2
        if num_directions > values:
            raise ValueError(
                f"Patches of {patch_size} x {patch_size} pixels and {in_channels} channels have {values} directions; "
                f"got num_directions={num_directions}."
            )
        self.register_buffer("directions", torch.eye(values))  # rows
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("variances", torch.zeros(values))

    @classmethod
    def fit(cls, batches: Iterable[Tensor], patch_size: int, num_directions: int) -> PatchPCA:
        """Of the patches of images, seen once; memory holds one batch and a covariance of D x D float64 numbers.

        Args:
            batches: Images `(B, C, H, W)`, of the crops and range that are trained on.
            patch_size: p.
            num_directions: d.

        Returns:
            `variances` falling; a direction's value of largest size is positive.

        Raises:
            ValueError: If there are not more patches than directions, or images do not fit the patch or each other.
        """
        made, count = None, 0
        for images in batches:
            if made is None:
                made = cls(patch_size, images.shape[1], num_directions)
                first = made.patches(images).flatten(0, 1).double().mean(0)
                total, products = torch.zeros_like(first), torch.zeros_like(first[:, None] * first)
            # Around the first batch's mean: sums of squares of numbers far from 0 cancel out.
            x = made.patches(images).flatten(0, 1).double() - first
            count, total, products = count + len(x), total + x.sum(0), products + x.T @ x
        if made is None or count <= num_directions:
            raise ValueError(
                f"{count} patches tell at most {max(count - 1, 0)} directions; {num_directions} were asked for. Give "
                "more images, or ask for fewer."
            )
        mean = total / count
        variances, vectors = torch.linalg.eigh(products / count - mean[:, None] * mean)
        directions = vectors.T.flip(0)
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        made.directions.copy_(directions * torch.where(largest < 0, -1, 1))
        made.variances.copy_(variances.flip(0).clamp(min=0))
        made.mean.copy_(first + mean)
        return made

    @classmethod
    def of_pixels(cls, patch_size: int, in_channels: int, num_directions: int) -> PatchPCA:
        """No PCA but smaller pixels: the first d directions are means of q x q pixels, of which a patch has d / C.

        With `d = D` these are the pixels themselves: a denoising autoencoder without a latent space.

        Args:
            patch_size: p.
            in_channels: C.
            num_directions: d, C times a square whose root divides p.

        Raises:
            ValueError: For another d.
        """
        made = cls(patch_size, in_channels, num_directions)
        sides = [s for s in range(1, patch_size + 1) if patch_size % s == 0]
        side = next((s for s in sides if in_channels * s * s == num_directions), None)
        if side is None:
            known = ", ".join(str(in_channels * s * s) for s in sides)
            raise ValueError(
                f"num_directions={num_directions} are no whole pixels of a patch of {patch_size} x {patch_size} with "
                f"{in_channels} channels; take one of {known}."
            )
        cell = patch_size // side
        axis = torch.eye(side, dtype=torch.float64).repeat_interleave(cell, dim=1) / cell**0.5
        blocks = torch.kron(torch.eye(in_channels, dtype=torch.float64), torch.kron(axis, axis))
        others = torch.linalg.svd(blocks).Vh[num_directions:]
        made.directions.copy_(torch.cat([blocks, others]))
        return made

    def patches(self, images: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, N, D)`, row by row.

        Raises:
            ValueError: For other channels, and sides that are no multiples of the patch.
        """
        p, c = self.config["patch_size"], self.config["in_channels"]
        if images.ndim != 4 or images.shape[1] != c or images.shape[2] % p or images.shape[3] % p:
            raise ValueError(
                f"Images must be (B, {c}, H, W) with sides that are multiples of the patch, {p}; got "
                f"{tuple(images.shape)}."
            )
        return torch.nn.functional.unfold(images, p, stride=p).transpose(1, 2)

    def images(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """Undo `patches` for images of `size` (H, W)."""
        p = self.config["patch_size"]
        return torch.nn.functional.fold(patches.transpose(1, 2), size, p, stride=p)

    def project(self, patches: Tensor, centred: bool = True) -> Tensor:
        """Coordinates `(..., D)` of patches, or without the mean those of a difference of patches."""
        return (patches - self.mean if centred else patches) @ self.directions.T

    def unproject(self, coordinates: Tensor) -> Tensor:
        """Patches of their first coordinates `(..., k)`, the others being 0; k is up to D."""
        return coordinates @ self.directions[: coordinates.shape[-1]] + self.mean

    def forward(self, images: Tensor) -> Tensor:
        """What the first d directions keep of images, `(B, C, H, W)`."""
        kept = self.project(self.patches(images))[..., : self.config["num_directions"]]
        return self.images(self.unproject(kept), (images.shape[2], images.shape[3]))


__all__ = ["Basis", "PatchPCA"]
