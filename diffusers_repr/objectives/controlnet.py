"""`ControlNetObjective`: a ControlNet on the classes of pixels, beside a frozen text-to-image model."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from diffusers_repr.config.measured import take_back
from diffusers_repr.config.recipe import setting
from diffusers_repr.data.palette import Palette
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import forward_names
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.hub.places import without_places
from diffusers_repr.models.controlnet import HINTS, read_controlnet
from diffusers_repr.models.hint_encoder import HintEncoder
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact
from diffusers_repr.objectives.base import Batch
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.frozen_base import FrozenBaseConfig
from diffusers_repr.objectives.noisy import NoisyBatch
from diffusers_repr.objectives.times import TimeSampler

# Widths of the convolutions that bring a hint to the size of the latents, each but the first halving it.
_WIDTHS = (16, 32, 96, 256, 256, 256)
# What a ControlNet and its network have in common, by which the one's outputs fit into the other.
_ALIKE = ("in_channels", "block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim")


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(FrozenBaseConfig):
    """The frozen base, and how hints are shown and dropped; the fields are keys of a recipe.

    Raises:
        ValueError: Without a base, and for probabilities out of range.
    """

    pretrained_model_name_or_path: str | None = setting(None, "text-to-image pipeline folder or Hub id, frozen")
    controlnet_name_or_path: str | None = setting(
        None, "a trained ControlNet to go on from, folder or Hub id; default: a copy of the base's encoder"
    )
    controlnet_revision: str | None = setting(None, "branch, tag or commit of it on the Hub")
    hint: str = setting("one_hot", "one_hot: a channel a class; colours: red, green and blue")
    colours: list[str] | None = setting(None, "of `hint: colours`: #rrggbb of each class, and a last one of no class")
    hint_dropout: float = setting(0.1, "share of hints that become the learned null hint")
    new_lr_scale: float = setting(
        1.0, "learning rate of what is new (the hint's layers, those that begin at zero), times that of the copy"
    )
    caption_dropout: float = setting(0.1, "share of captions that become the empty one; 1: data without captions do")
    eval_split: str | None = setting(None, "split whose denoising errors are measured; none: no measurement")
    eval_images: int = setting(128, "images of it, the first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hint not in ("one_hot", "colours"):
            raise ValueError(f"`hint` is one_hot or colours, got {self.hint!r}.")
        if (self.hint == "colours") != (self.colours is not None):
            raise ValueError("`colours` are of `hint: colours`: one a class, and one of none; give both or neither.")
        for name in ("hint_dropout", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is a probability, got {getattr(self, name)}.")
        if not self.new_lr_scale > 0:
            raise ValueError(f"`new_lr_scale` must be positive, got {self.new_lr_scale}.")
        if self.eval_images < 1:
            raise ValueError(f"`eval_images` must be positive, got {self.eval_images}.")
        if self.controlnet_revision is not None and self.controlnet_name_or_path is None:
            raise ValueError("`controlnet_revision` is of `controlnet_name_or_path`; give both or neither.")
        take_back(self, "eval_split")

    def parts(self, class_names: Sequence[str], ignore_index: int) -> tuple[ControlNetModel | None, HintEncoder]:
        """The ControlNet to go on from, None for a new one; and the encoder of hints, with the null hint it has.

        Raises:
            ValueError: As `encoder` and `read_controlnet`, and for a ControlNet that was trained on other hints.
            OSError: If it cannot be read.
        """
        encoder = self.encoder(class_names, ignore_index)
        if self.controlnet_name_or_path is None:
            return None, encoder
        controlnet, found = read_controlnet(self.controlnet_name_or_path, self.controlnet_revision)
        if found is None:  # of others: hints as the recipe tells
            return controlnet, encoder
        for key in ("class_names", "ignore_index", "colours", "ignored_colour"):
            was, now = (json.dumps(one.config[key]) for one in (found, encoder))
            if was != now and (key != "ignored_colour" or encoder.config["colours"] is not None):
                raise ValueError(
                    f"{self.controlnet_name_or_path!r} was trained on hints with {key}={was}; this recipe has {now}. "
                    "Give the same, or begin a new one without --controlnet_name_or_path."
                )
        return controlnet, found

    def encoder(self, class_names: Sequence[str], ignore_index: int) -> HintEncoder:
        """The encoder of hints.

        Raises:
            ValueError: As `HintEncoder`, and for what is no colour.
        """
        if self.colours is None:
            return HintEncoder(list(class_names), ignore_index=ignore_index)
        palette = Palette.of(self.colours, ignore_index)
        colours = [list(one) for one in palette.colours]
        return HintEncoder(list(class_names), colours, list(palette.ignored), ignore_index)


class ControlNetObjective(DiffusionObjective):
    """The denoising loss of a frozen network with a ControlNet beside it (arXiv 2302.05543), on classes of pixels.

    The ControlNet begins as a copy of the network's encoder whose additions are zero. Hints are dropped for guidance
    over the hint, as ScribbleGen does (arXiv 2311.17121); the null hint that takes their place is learned with the
    ControlNet and saved with it. In the paper's code it is outside of the optimizer, and stays random.

    A batch has `masks` (B, H, W), class ids of pixels at the size of the images, and captions.

    Args:
        denoiser: The base: a pipeline with a `UNet2DConditionModel`, which is what diffusers' ControlNet copies.
        hints: What hints are made by.
        controlnet: A trained one to go on from; a copy of the network's encoder if None.
        hint_dropout: Share of hints that become the null one.
        caption_dropout: Share of captions that become the empty one.
        new_lr_scale: Learning rate of the layers that are no copies, and of the null hint, times that of the others:
            what begins at zero is slow to leave it.
        time_sampling: How noise levels are drawn.

    Raises:
        ValueError: For another network, a stride of the VAE that is no power of two, dropout out of range, and a
            ControlNet of another base or other hints.
    """

    own_losses = ("loss",)

    def __init__(
        self,
        denoiser: Denoiser,
        hints: HintEncoder,
        *,
        controlnet: ControlNetModel | None = None,
        hint_dropout: float = 0.1,
        caption_dropout: float = 0.1,
        new_lr_scale: float = 1.0,
        time_sampling: TimeSampler | None = None,
    ) -> None:
        if not isinstance(denoiser.model, UNet2DConditionModel):
            raise ValueError(
                f"diffusers' ControlNet copies the encoder of a UNet2DConditionModel; this base has a "
                f"{type(denoiser.model).__name__}. Take a pipeline such as Stable Diffusion's."
            )
        if not 0 <= hint_dropout <= 1:
            raise ValueError(f"hint_dropout is a probability; got {hint_dropout}.")
        super().__init__(denoiser, time_sampling=time_sampling, label_dropout=caption_dropout)
        unet = denoiser.model
        del self.network  # it is neither trained nor saved as a part of this
        self.freeze("network", unet)
        if controlnet is None:
            controlnet = ControlNetModel.from_unet(
                unet, conditioning_channels=hints.channels, conditioning_embedding_out_channels=widths(denoiser.stride)
            )
        else:
            check_controlnet(controlnet, denoiser, hints)
        self.controlnet = controlnet
        self.hints, self.hint_dropout, self.new_lr_scale = hints, hint_dropout, new_lr_scale
        self._known = forward_names(self.controlnet)
        self.card = self._about()

    def _about(self) -> dict[str, Any]:
        base, names = str(self.denoiser.name), self.hints.config["class_names"]
        text = f"""A ControlNet of `{without_places(base)}`, whose hints are the classes of pixels: {", ".join(names)}.

```python
from diffusers import StableDiffusionControlNetPipeline
from diffusers_repr.synthesis import load_controlnet

controlnet, hints = load_controlnet("{{folder}}")
pipe = StableDiffusionControlNetPipeline.from_pretrained("BASE", controlnet=controlnet)
images = pipe(prompt, hints(masks), guidance_scale=1.0).images  # masks: (B, H, W) class ids
```

`HintGuidance(hints.null)` of `diffusers_repr` guides over the hint."""
        return {**self.card, "kind": "`ControlNetModel`", "pipeline_tag": "image-to-image", "text": text,
                "tags": ["diffusers", "controlnet", "scribblegen"]}  # fmt: skip

    # Loss

    def hint(self, batch: Batch, drop: bool = True) -> Tensor:
        """Hints `(B, C, H, W)` of the masks, some of them the null one; `hint_dropped` (B,) in it is taken."""
        masks = batch["masks"]
        dropped = batch.get("hint_dropped")
        if dropped is None and drop:
            draw = torch.rand(len(masks), device=masks.device, generator=batch.get("generator"))
            dropped = draw < self.hint_dropout
        return self.hints(masks, dropped)

    def predict(self, noisy: NoisyBatch) -> Tensor:
        """What the frozen network returns with what the ControlNet adds to it, in float32."""
        return self.predict_with(self.controlnet, noisy, self.hint(noisy.batch))

    def predict_with(self, controlnet: Any, noisy: NoisyBatch, hint: Tensor | None) -> Tensor:
        """As `predict`, of another ControlNet and other hints; None: without any."""
        unet = self.denoiser.model
        inputs = self.denoiser.network_inputs(noisy.x_t.to(floating_dtype(unet)), noisy.level, noisy.condition)
        if hint is not None:
            dtype = floating_dtype(controlnet)
            given = {k: _cast(v, dtype) for k, v in inputs.items() if k in self._known and k != "return_dict"}
            down, mid = controlnet(**given, controlnet_cond=hint.to(dtype), return_dict=False)
            inputs["down_block_additional_residuals"] = [_cast(one, floating_dtype(unet)) for one in down]
            inputs["mid_block_additional_residual"] = _cast(mid, floating_dtype(unet))
        return self.denoiser.family.output(unet(**inputs), noisy.x_t).float()

    def param_groups(self, phase: str = "main") -> list[dict[str, Any]]:
        """The copied layers; and the new ones with the null hint, at a rate of their own."""
        own = dict(self.controlnet.named_parameters())
        fresh = [p for name, p in own.items() if name.startswith("controlnet_")]  # diffusers names the new layers so
        copied = [p for name, p in own.items() if not name.startswith("controlnet_")]
        return [{"params": copied}, {"params": [*fresh, *self.hints.parameters()], "lr_scale": self.new_lr_scale}]

    # Checks

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Masks must be there, of the size of the images and of known classes; captions, unless all are dropped.

        Raises:
            ValueError: Naming what is wrong.
        """
        super().check_batch(batch)
        masks, pixels = batch.get("masks"), batch.get("pixel_values")
        if masks is None:
            raise ValueError("A ControlNet on scribbles needs masks; name their column by --mask_column.")
        self.hints.check(masks)
        if pixels is not None and masks.shape[1:] != pixels.shape[2:]:
            raise ValueError(
                f"The hints are {tuple(masks.shape[1:])} (H, W), the images {tuple(pixels.shape[2:])}; they must be "
                "alike. Resize masks by the nearest pixel."
            )

    def identity(self) -> dict[str, Any]:
        """With the base's weights and what hints are."""
        hints = {name: value for name, value in self.hints.config.items() if not name.startswith("_")}
        own = {"hints": hints, "hint_dropout": self.hint_dropout}
        return {**super().identity(), **own, "base": weights_hash(self.denoiser.model)}

    # What is saved

    def artifacts(self) -> list[Artifact]:
        """The ControlNet as the folder itself, and the encoder of hints with the null one inside."""
        return [
            ModelArtifact(self.controlnet, "controlnet"),
            ModelArtifact(self.hints, "hints", folder=HINTS),
        ]


def check_controlnet(controlnet: ControlNetModel, denoiser: Denoiser, hints: HintEncoder) -> None:
    """Refuse a ControlNet that does not go beside a network, or takes other hints.

    Raises:
        ValueError: With what differs.
    """
    own: Any = controlnet.config
    for key in _ALIKE:
        was, base = json.dumps(own.get(key)), json.dumps(denoiser.config.get(key))
        if was != base:
            raise ValueError(f"The ControlNet is of another base: it has {key}={was}, this base {base}.")
    if own["conditioning_channels"] != hints.channels:
        raise ValueError(
            f"The ControlNet takes hints of {own['conditioning_channels']} channels, these have {hints.channels}. One "
            "of three takes `hint: colours`."
        )
    stride = 2 ** (len(own["conditioning_embedding_out_channels"]) - 1)
    if stride != denoiser.stride:
        raise ValueError(
            f"The ControlNet makes its hints {stride} times smaller, this base has a stride of {denoiser.stride}."
        )


def widths(stride: int) -> tuple[int, ...]:
    """Channels of the convolutions that bring a hint from pixels to latents.

    Args:
        stride: Pixels of an image per latent.

    Raises:
        ValueError: For a stride that is no power of two up to 32.

    Example:
        >>> widths(8), widths(2)
        ((16, 32, 96, 256), (16, 32))
    """
    steps = math.log2(stride)
    if steps != int(steps) or steps >= len(_WIDTHS):
        raise ValueError(f"A ControlNet halves its hints to the size of the latents; a stride of {stride} is none.")
    return _WIDTHS[: int(steps) + 1]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


__all__ = ["ControlNetConfig", "ControlNetObjective", "check_controlnet", "widths"]
