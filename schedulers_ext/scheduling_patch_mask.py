"""`PatchMaskScheduler`: random patches are masked, instead of noise that is added, and shown again step by step.

For networks that predict the clean image of one with masked patches (MDM, arXiv 2308.05695): at timestep t of T a
share `t / T` of the patches is 0. Needs torch and diffusers only.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class PatchMaskScheduler(SchedulerMixin, ConfigMixin):
    """The masking of MDM (Pan et al. 2023, arXiv 2308.05695): of L patches `L - ceil(L t / T)` are left.

    The paper defines no sampler. `step` fills in: it keeps the visible patches and shows as many predicted ones, drawn
    at random, as the next timestep has; a run starts from an image of zeros.

    Args:
        num_train_timesteps: T.
        patch_size: Side of a patch in pixels; it divides both sides of an image.

    Raises:
        ValueError: For numbers below 1.

    Example:
        >>> scheduler = PatchMaskScheduler(patch_size=2)
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps.tolist()
        [999, 749, 499, 249]
    """

    order = 1
    init_noise_sigma = 0.0  # a run starts from nothing at all

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, patch_size: int = 8) -> None:
        if num_train_timesteps < 1 or patch_size < 1:
            raise ValueError(
                f"num_train_timesteps and patch_size are 1 or more; got {num_train_timesteps} and {patch_size}."
            )
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set a grid of equal steps that begins at T - 1.

        Args:
            num_inference_steps: N, from 1 to T.
            device: Of `timesteps`.

        Raises:
            ValueError: For another number.
        """
        count = len(self)
        if not 1 <= num_inference_steps <= count:
            raise ValueError(f"num_inference_steps is 1 to {count}; got {num_inference_steps}.")
        self.num_inference_steps = num_inference_steps
        left = torch.arange(num_inference_steps, 0, -1, dtype=torch.float64)
        self.timesteps = ((left * count / num_inference_steps).round().long() - 1).to(device)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """Show some of the predicted patches.

        Args:
            model_output: Predicted clean images `(B, C, H, W)`.
            timestep: One of `timesteps`.
            sample: Images whose masked patches are 0.
            generator: One, or one a sample, for the choice of patches.
            return_dict: False returns a tuple.

        Returns:
            `.prev_sample`.

        Raises:
            ValueError: For a timestep that is none of the grid, and a sample that shows more than the next one may.
        """
        places = (self.timesteps == int(timestep)).nonzero().flatten().tolist()
        if not places:
            raise ValueError(f"Timestep {int(timestep)} is none of this grid: {self.timesteps.tolist()}.")
        last = places[0] + 1 == len(self.timesteps)
        after = torch.zeros(1) if last else self.timesteps[places[0] + 1]
        shown = _patches(sample, self.config["patch_size"]).ne(0).any(dim=5).any(dim=3).any(dim=1)
        wanted = self._visible(after, shown[0].numel())
        if bool((shown.flatten(1).sum(1).cpu() > wanted.cpu()).any()):
            raise ValueError(
                f"The sample shows {int(shown.flatten(1).sum(1).max())} patches before timestep {int(after)}, which "
                f"has {int(wanted)}. Start from zeros: torch.zeros(B, C, H, W), not from noise."
            )
        scores = randn_tensor(tuple(shown.shape), generator=generator, device=sample.device, dtype=torch.float32)
        kept = self._lowest(scores.masked_fill(shown, -torch.inf), wanted)
        size = self.config["patch_size"]
        filled = torch.where(_spread(shown), _patches(sample, size), _patches(model_output, size))
        x = torch.where(_spread(kept), filled, 0).reshape(sample.shape)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: float | torch.Tensor
    ) -> torch.Tensor:
        """Mask random patches: those where the noise has the largest sums.

        Args:
            original_samples: `(B, C, H, W)`.
            noise: Standard normal, of the same shape.
            timesteps: One for all or one a sample.

        Raises:
            ValueError: If the patch does not divide the images.
        """
        size = self.config["patch_size"]
        scores = _patches(noise.float(), size).sum(dim=(1, 3, 5))
        kept = self._lowest(scores, self._visible(timesteps, scores[0].numel()))
        return torch.where(_spread(kept), _patches(original_samples, size), 0).reshape(original_samples.shape)

    def _visible(self, timesteps: float | torch.Tensor, patches: int) -> torch.Tensor:
        time = torch.as_tensor(timesteps).cpu().double().reshape(-1)
        return patches - (patches * time / len(self)).ceil().long()

    @staticmethod
    def _lowest(scores: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        order = scores.flatten(1).argsort(dim=1)
        first = torch.arange(order.shape[1], device=order.device) < count.to(order.device)[:, None]
        return torch.zeros_like(order, dtype=torch.bool).scatter(1, order, first.expand_as(order)).view(scores.shape)


def _patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """`(B, C, H, W)` to `(B, C, h, p, w, p)`."""
    height, width = images.shape[-2:]
    if height % size or width % size:
        raise ValueError(f"Patches of {size} x {size} do not divide images of {height} x {width}.")
    return images.reshape(len(images), -1, height // size, size, width // size, size)


def _spread(mask: torch.Tensor) -> torch.Tensor:
    """`(B, h, w)` for what `_patches` gives."""
    return mask[:, None, :, None, :, None]
