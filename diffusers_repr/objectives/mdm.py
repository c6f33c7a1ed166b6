"""`MDMObjective`: a network that paints masked patches of an image, told how many there are (MDM)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor

from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics import ssim_map
from diffusers_repr.noise.patch_mask import noise_mask, patch_grid
from diffusers_repr.objectives.auxiliary.base import Observation
from diffusers_repr.objectives.base import Batch
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.noisy import NoisyBatch
from diffusers_repr.objectives.teachers import Teachers
from diffusers_repr.schedulers_ext.scheduling_patch_mask import PatchMaskScheduler

MDMLoss = Literal["ssim", "l1", "l2"]
ERRORS = ("mse_masked", "mse_visible")  # logged, of no weight


@dataclasses.dataclass(frozen=True)
class MDMConfig:
    """The network, its masks and its loss; the fields are keys of a recipe.

    Raises:
        ValueError: If an argument of the network is unknown, or a value is out of range.
    """

    model: dict | str | None = setting(None, "arguments of UNet2DModel, a mapping (JSON in a flag)")
    mask_patch_size: int = setting(8, "side of a masked patch in pixels; it divides the images")
    num_train_timesteps: int = setting(1000, "T; at timestep t a share t / T of the patches is masked")
    reconstruction: MDMLoss = setting("ssim", "ssim, l1 or l2, over the whole image")
    ssim_window: int = setting(5, "side of the window in pixels, odd")

    def __post_init__(self) -> None:
        take_arguments(self, model=UNet2DModel)
        check_whole("`mask_patch_size`", self.mask_patch_size)
        check_whole("`num_train_timesteps`", self.num_train_timesteps, 2)
        _check_loss(self.reconstruction, self.ssim_window)

    def build(self) -> Denoiser:
        """A new network with its masks."""
        scheduler = PatchMaskScheduler(self.num_train_timesteps, self.mask_patch_size)
        return Denoiser.from_pipe(DDPMPipeline(UNet2DModel(**self.model), scheduler))  # type: ignore[arg-type]


def structural_dissimilarity(prediction: Tensor, x0: Tensor, window: int = 5) -> Tensor:
    """`(1 - SSIM) / 2` of images in [-1, 1], brought to [0, 1], the mean over pixels: 0 for equal ones, at most 1.

    The paper's code takes SSIM of images in [-1, 1], by which a negative is all but the image itself.

    Args:
        prediction: `(B, C, H, W)`, in [-1, 1] or a little beyond.
        x0: Of the same shape.
        window: Side of the Gaussian window, odd.
    """
    similar = ssim_map(prediction / 2 + 0.5, x0 / 2 + 0.5, window, edges="reflect")
    return ((1 - similar) / 2).clamp(0, 1).mean()


class MDMObjective(DiffusionObjective):
    """Masked diffusion (Pan et al. 2023, arXiv 2308.05695): an image, out of itself without `t / T` of its patches.

    The masks are the noise process of the denoiser, `PatchMaskScheduler`; all else is that of `DiffusionObjective` for
    a network that predicts the clean image, with the loss of the whole image: `ssim`, `l1` or `l2`. Logs it, and
    `mse_masked` and `mse_visible`, the squared errors of both kinds of pixels.

    Args:
        denoiser: From `Denoiser.from_pipe(DDPMPipeline(unet, PatchMaskScheduler(...)))`.
        reconstruction: The loss.
        ssim_window: Of `ssim`.
        **settings: Of `DiffusionObjective`.

    Raises:
        ValueError: For a denoiser of another process, one with a VAE, a loss that does not exist, and a patch that
            does not divide the images that the network was made for.
    """

    own_losses = ("loss", *get_args(MDMLoss), *ERRORS)
    card = {"kind": "masked diffusion model", "pipeline_tag": "image-feature-extraction",
            "tags": ["diffusers", "feature-extraction", "mdm"],
            "text": "Trained to paint masked patches (MDM, arXiv 2308.05695). Its layers are read by "
            '`FeatureExtractor(Denoiser.from_pretrained("{folder}"), layers, 50)` of `diffusers_repr`, which masks '
            "5 % of the patches; the paper reads its decoder so."}  # fmt: skip

    def __init__(
        self, denoiser: Denoiser, reconstruction: MDMLoss = "ssim", ssim_window: int = 5, **settings: Any
    ) -> None:
        schedule = denoiser.schedule
        if schedule.kind != "patch_mask" or denoiser.vae is not None:
            raise ValueError(
                f"MDM masks patches of pixels; this denoiser has a {schedule.kind} process"
                f"{' and a VAE' if denoiser.vae is not None else ''}. Make it by "
                "Denoiser.from_pipe(DDPMPipeline(unet, PatchMaskScheduler(patch_size=8)))."
            )
        patch_grid(denoiser.image_size, schedule.patch_size)
        super().__init__(denoiser, **settings)
        self.reconstruction, self.ssim_window = _check_loss(reconstruction, ssim_window), ssim_window
        if self.reconstruction == "ssim":  # does the window fit?
            grey = torch.zeros(1, 1, *denoiser.image_size)
            structural_dissimilarity(grey, grey, ssim_window)

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """`loss`, its terms, and the errors of masked and visible pixels, which have no weight in it."""
        terms, seen = self.observe(self.noised(batch))
        return {**self.combine(terms, seen), **self.errors(seen.noisy, seen.prediction)}

    def observe(self, noisy: NoisyBatch, teachers: Teachers | None = None) -> tuple[dict[str, Tensor], Observation]:
        """As `DiffusionObjective`, with the loss of the whole image."""
        _, seen = super().observe(noisy, teachers)
        prediction, x0 = seen.prediction, noisy.x0
        if self.reconstruction == "ssim":
            return {"ssim": structural_dissimilarity(prediction, x0, self.ssim_window)}, seen
        error = F.l1_loss if self.reconstruction == "l1" else F.mse_loss
        return {self.reconstruction: error(prediction, x0)}, seen

    @torch.no_grad()
    def errors(self, noisy: NoisyBatch, prediction: Tensor) -> dict[str, Tensor]:
        """Mean squared error of the masked pixels of a batch and of the visible ones; 0 where there are none."""
        visible = noise_mask(noisy.noise, noisy.level).expand_as(noisy.x0)
        squared, both = (prediction - noisy.x0).square(), (~visible, visible)
        means = ((squared * part).sum() / part.sum().clamp(min=1) for part in both)
        return dict(zip(ERRORS, means, strict=True))

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """The patch must divide the images too."""
        super().check_batch(batch)
        height, width = batch["pixel_values"].shape[-2:]
        patch_grid((height, width), self.denoiser.schedule.patch_size)

    def identity(self) -> dict[str, Any]:
        """With the masks and the loss."""
        schedule = self.denoiser.schedule
        own = {"reconstruction": self.reconstruction, "ssim_window": self.ssim_window}
        masks = {"mask_patch_size": schedule.patch_size, "num_train_timesteps": schedule.num_train_timesteps}
        return {**super().identity(), "mdm": {**own, **masks}}

    def preview(self, pipe: Any, count: int, generator: torch.Generator, steps: int) -> list[Any]:
        """Images out of nothing, a share of the patches at a time; the paper defines no sampler."""
        denoiser = Denoiser.from_pipe(pipe)
        images = denoiser.decode(sample_patches(denoiser, count, generator, steps))
        return pipe.numpy_to_pil(images.permute(0, 2, 3, 1).cpu().numpy())


@torch.no_grad()
def sample_patches(denoiser: Denoiser, count: int, generator: torch.Generator, steps: int) -> Tensor:
    """Images by `PatchMaskScheduler`, from an empty one, `(count, C, H, W)` in [-1, 1].

    Args:
        denoiser: With that scheduler.
        count: How many.
        generator: Of the order of the patches.
        steps: Network calls.
    """
    scheduler = denoiser.scheduler
    scheduler.set_timesteps(steps)
    x = torch.zeros(count, denoiser.image_channels, *denoiser.image_size, device=denoiser.device, dtype=denoiser.dtype)
    with denoiser.evaluating():
        for timestep in scheduler.timesteps.tolist():
            x = scheduler.step(denoiser.predict(x, timestep).x0, timestep, x, generator).prev_sample
    return x.float()


def _check_loss(loss: str, window: int) -> Any:
    if loss not in get_args(MDMLoss):
        raise ValueError(f"`reconstruction` is one of {', '.join(get_args(MDMLoss))}; got {loss!r}.")
    if check_whole("`ssim_window`", window) % 2 == 0:
        raise ValueError(f"`ssim_window` must be odd, to have a middle; got {window}.")
    return loss


__all__ = ["MDMConfig", "MDMLoss", "MDMObjective", "sample_patches", "structural_dissimilarity"]
