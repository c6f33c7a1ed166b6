"""`DenoiserTeacher`: maps of a frozen denoiser's layers, at a level an image, with or without noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffusers_repr.capture import capture
from diffusers_repr.capture.names import check_layers
from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.layers import Layer
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.noise import NoiseLevel, add_noise

TeacherNoise = Literal["match_t", "none"]


class DenoiserTeacher:
    """What students learn from. Its forward ends at the last layer that is read; it is never told a label.

    Args:
        denoiser: Of images; frozen by the objective that owns this.
        layers: Full module paths.
        noise: `match_t`: noise of the level that the network is told. `none`: the clean image beside any timestep.

    Raises:
        ValueError: For layers that do not exist (with the closest names) or give no image.

    Attributes:
        layers: What is known of each, in the order given.
    """

    def __init__(self, denoiser: Denoiser, layers: Sequence[str], noise: TeacherNoise = "match_t") -> None:
        require_images(denoiser, "Distillation")
        if noise not in ("match_t", "none"):
            raise ValueError(f"`noise` is match_t or none; got {noise!r}.")
        check_layers(denoiser.model, list(layers))
        known = {layer.path: layer for layer in list_layers(denoiser, detail="all")}
        wrong = [path for path in layers if path not in known]
        if wrong:
            raise ValueError(f"The layers {wrong} give no image; `list_layers(denoiser)` shows those that do.")
        self.denoiser, self.noise = denoiser, noise
        self.layers: list[Layer] = [known[path] for path in layers]
        self._null: dict[Any, dict[str, Any]] = {}

    @torch.no_grad()
    def read(
        self,
        pixels: Tensor,
        level: NoiseLevel,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        stop_early: bool = True,
    ) -> list[Tensor]:
        """Maps `(B, C, h, w)` of the layers.

        Args:
            pixels: `(B, C, H, W)` in [-1, 1].
            level: One an image, or one for all.
            generator: Of the noise.
            noise: As x_0, instead of drawn noise.
            stop_early: Whether the forward ends at the last layer; the maps are the same.
        """
        denoiser, network = self.denoiser, self.denoiser.model
        with torch.autocast(pixels.device.type, enabled=False):
            x0 = denoiser.encode_pixels(pixels).float()
            if self.noise == "match_t":
                if noise is None:
                    noise = torch.randn(x0.shape, device=x0.device, generator=generator)
                x_t = add_noise(x0, level, noise)
            else:
                x_t = x0 * denoiser.schedule.clean_alpha
            size = (pixels.shape[2], pixels.shape[3])
            condition = denoiser.condition(batch=len(x0), size=size, cache=self._null).kwargs()
            moved = {k: v.to(x0.device) if isinstance(v, Tensor) else v for k, v in condition.items()}
            inputs = denoiser.network_inputs(x_t.to(floating_dtype(network)), level, moved)
            paths = [layer.path for layer in self.layers]
            with denoiser.evaluating(), capture(network, paths, stop_early=stop_early) as tape:
                network(**inputs)
            return [denoiser.feature_map(path, tape[path], tuple(x0.shape[2:])).as_map() for path in paths]


def middle_layer(denoiser: Denoiser) -> str:
    """Where RepFusion reads a U-Net: the last convolution of its middle block, before the shortcut is added.

    Raises:
        ValueError: For a network without such a block.
    """
    modules = dict(denoiser.model.named_modules())
    count = sum(name.startswith("mid_block.resnets.") and name.count(".") == 2 for name in modules)
    path = f"mid_block.resnets.{count - 1}.conv2"
    if path not in modules:
        raise ValueError(
            f"{type(denoiser.model).__name__} has no middle block of a U-Net; name the layers to be read (`layers`). "
            "`list_layers(denoiser)` shows them."
        )
    return path


def decoder_layers(denoiser: Denoiser) -> list[str]:
    """Where DreamTeacher reads a U-Net: the last block of each level on the way up, before it is enlarged.

    Raises:
        ValueError: For a network without a way up.
    """
    ups = getattr(denoiser.model, "up_blocks", None)
    if ups is None:
        raise ValueError(
            f"{type(denoiser.model).__name__} has no up_blocks; name the layers to be read (`layers`), a stride each. "
            "`list_layers(denoiser)` shows them."
        )
    found = []
    for at, block in enumerate(ups):
        kind = "attentions" if len(getattr(block, "attentions", None) or ()) else "resnets"
        found.append(f"up_blocks.{at}.{kind}.{len(getattr(block, kind)) - 1}")
    return found


__all__ = ["DenoiserTeacher", "TeacherNoise", "decoder_layers", "middle_layer"]
