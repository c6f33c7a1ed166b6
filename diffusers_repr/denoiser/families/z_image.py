"""`ZImageTransformer2DModel`: Z-Image (arXiv 2511.22699)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffusers_repr.denoiser.attention_layouts import SINGLE_IMAGE_FIRST, AttentionLayout
from diffusers_repr.denoiser.family import BatchLanes, Grid, PatchTransformerFamily, equal_halves
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel

_LENGTHS = "cap_lengths"  # beside padded captions, where a condition is held


@register_family("ZImageTransformer2DModel")
class ZImageFamily(PatchTransformerFamily):
    """Blocks over the image alone, then over image and caption. It takes and gives lists of images.

    Time and velocity run from noise to image there. Image and caption are padded to a multiple of 32 tokens each.
    """

    conditioning = "text"
    sample_name = "x"
    timestep_name = "t"
    not_image = (
        *PatchTransformerFamily.not_image,
        "context_refiner",
        "cap_embedder",
        "t_embedder",
        "siglip_embedder",
        "siglip_refiner",
        "adaLN_modulation",
    )
    stacks = ("layers",)
    attentions = {"noise_refiner.*.attention": SINGLE_IMAGE_FIRST, "layers.*.attention": SINGLE_IMAGE_FIRST}
    other_attentions = ("context_refiner.*", "siglip_refiner.*")
    pipeline_arguments = {"guidance_scale": 0.0}  # it guides by `cond + scale (cond - null)`

    def size(self) -> tuple[int, int]:
        """1024 pixels: the config has no size, the pipeline takes 128 latent pixels."""
        return 128, 128

    def multiple(self) -> int:
        """The first patch size, which the forward takes by default."""
        return int(self.config["all_patch_size"][0])

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """`(1000 - t) / 1000`: 0 is noise."""
        timestep = torch.as_tensor(level.timestep, dtype=torch.float32, device=x_t.device)
        return ((1000 - timestep) / 1000).expand(x_t.shape[0])

    def training_timestep(self, model_timestep: Tensor) -> Tensor:
        """The inverse."""
        return 1000 - model_timestep * 1000

    def condition_rows(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Captions padded to one tensor, beside their lengths."""
        rows = {name: value for name, value in inputs.items() if name != self.timestep_name}
        captions = rows.get("cap_feats")
        if isinstance(captions, list):
            rows[_LENGTHS] = torch.tensor([len(caption) for caption in captions])
            rows["cap_feats"] = _padded(captions)
        return rows

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """One frame `(C, 1, H, W)` and one caption a row."""
        return self.listed({"x": x_t, "t": self.timestep(level, x_t), **condition})

    def listed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Lists of frames and of captions."""
        listed = {name: value for name, value in inputs.items() if name != _LENGTHS}
        listed["x"] = list(inputs["x"].unsqueeze(2).unbind(0))
        if isinstance(inputs["cap_feats"], Tensor):
            lengths = inputs[_LENGTHS].tolist()
            listed["cap_feats"] = [row[:length] for row, length in zip(inputs["cap_feats"], lengths, strict=True)]
        return listed

    def stacked(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Frames and captions as tensors.

        Raises:
            ValueError: For a call with several images a row.
        """
        if isinstance(inputs["x"][0], list):
            raise ValueError(
                "The network is called with several images a row (Z-Image-Omni), of which one is made; guidance is "
                "known for one image a row."
            )
        stacked = self.condition_rows(inputs)
        return {**stacked, "x": self.sample(inputs), self.timestep_name: inputs[self.timestep_name]}

    def stacked_output(self, raw: Any) -> Any:
        """`(B, C, 1, H, W)`."""
        return torch.stack(raw) if isinstance(raw, list) else raw

    def listed_output(self, raw: Tensor) -> Any:
        """Frames `(C, 1, H, W)`."""
        return list(raw.unbind(0))

    def output(self, raw: Any, x_t: Tensor) -> Tensor:
        """The negative of what the network gives, as the pipeline takes it."""
        raw = raw if isinstance(raw, (list, Tensor)) else raw[0]
        return -self.stacked_output(raw).squeeze(2)

    def with_output(self, raw: Tensor, prediction: Tensor) -> Tensor:
        """The negative again, as frames."""
        return -prediction.unsqueeze(2)

    def sampler_value(self, given: Tensor, value: Tensor) -> Tensor:
        """The pipeline has turned the sign before its scheduler sees it."""
        return value

    def sample(self, inputs: Mapping[str, Any]) -> Tensor:
        """The frames as a batch."""
        x = inputs["x"]
        return x if isinstance(x, Tensor) else torch.stack(list(x)).squeeze(2)

    def with_sample(self, inputs: Mapping[str, Any], x_t: Tensor) -> dict[str, Any]:
        """As frames again where the inputs have them."""
        return {**inputs, "x": x_t if isinstance(inputs["x"], Tensor) else list(x_t.unsqueeze(2).unbind(0))}

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """The condition in the first half, the null one in the second; without it where the pipeline leaves it out."""
        x, rows = self.sample(inputs), len(inputs["x"])
        if getattr(pipe, "do_classifier_free_guidance", False) and equal_halves(x):
            return BatchLanes(slice(0, rows // 2), slice(rows // 2, rows))
        return BatchLanes(slice(0, rows))

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """Sequences begin with the image."""
        patch = self.multiple()
        h, w = size[0] // patch, size[1] // patch
        return ((h, w), 0) if tokens >= h * w else None

    def image_tokens(self, layout: AttentionLayout, inputs: Mapping[str, Any], tokens: int) -> slice:
        """The first; what fills them up to a multiple of 32 counts as text, as does the caption."""
        height, width = self.sample(inputs).shape[-2:]
        return slice(0, height * width // self.multiple() ** 2)

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """512 caption tokens."""
        width = self.config["cap_feat_dim"]
        return {"cap_feats": [torch.zeros(512, width, device=device) for _ in range(batch)]}


def _padded(captions: list[Tensor]) -> Tensor:
    """`(B, L, D)`, L a multiple of 512, the pipeline's longest: captions made one at a time can be joined."""
    rows = pad_sequence(captions, batch_first=True)
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[1] % 512))
