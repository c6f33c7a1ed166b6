"""`Family`: all that is known of one architecture; one small adapter a model class."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.family_layers import FamilyLayers
from diffusers_repr.noise import NoiseLevel

# Cells along each axis, two for an image and three for a video (hence `Any`, which fits both), and the first token.
Grid = tuple[tuple[Any, ...], int]
# Under this name a condition has the map that is concatenated to x_t; no network's forward has such an input.
MAP_INPUT = "map_channels"


@dataclass(frozen=True)
class BatchLanes:
    """Which rows of one network call are conditional, and which have the null condition.

    Attributes:
        cond: Rows with the condition.
        null: Rows with the null condition, as many; None where the call has none.
    """

    cond: slice
    null: slice | None = None


class Family(FamilyLayers):
    """All that is known of one architecture. Subclass, override what differs, `@register_family("ModelClass")`.

    The defaults fit a U-Net that takes `(sample, timestep, **condition)`. `FamilyLayers` says what there is to tell of
    blocks, attention and default layers.

    Args:
        config: Of the network it is bound to; a `Denoiser` binds its family.

    Attributes:
        axes: Of the grid of x_0: 2, `(H, W)`, or 3 of a video, `(frames, H, W)`; 0 of vectors `(B, D)`.
        conditioning: `"text"` (made by the pipeline's own call), `"class"` (`class_labels`) or `"none"`.
        unbatched: Names of condition inputs without a batch dimension (position ids).
        batched: Names that mean no batch elsewhere (`image_rotary_emb`) and have a row a sample in its modules.
        not_image: Parts of paths whose modules give no image: text, time, single heads.
        pipeline_arguments: What is passed to the pipeline's call besides the prompt and the size.
        null_arguments: What is passed on top where the prompt is a negative one.
        prompts_together: Whether the pipeline makes of each prompt of a list what it makes of it alone: all that fills
            texts up to one length, whatever the others are. Prompts of a batch are then encoded in one call.
        sample_name: Name of the noisy input in the network's forward.
        timestep_name: Name of the timestep.
        early_rows: Path of a top-level module -> index in what it returns of a tensor that the network's own forward
            adds to the image after the last block; lanes that join on the way are given their rows of it at once.
        joins: Whether lanes may join the batch on the way through the network, at one of its top-level modules.
        read_late: Names of conditions that the network's own forward hands on as they came, so that nothing before the
            first module that takes one depends on them.
    """

    axes: int = 2
    conditioning: str = "none"
    sample_name: str = "sample"
    timestep_name: str = "timestep"
    early_rows: Mapping[str, int] = {}
    joins: bool = False
    read_late: tuple[str, ...] = ()
    unbatched: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()
    not_image: tuple[str, ...] = ("time_proj", "time_embedding", "time_embed", "class_embedding", "add_embedding")
    pipeline_arguments: Mapping[str, Any] = {}
    null_arguments: Mapping[str, Any] = {}
    prompts_together: bool = False

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        self.config: Mapping[str, Any] = {} if config is None else config

    def bound_to(self, config: Mapping[str, Any]) -> Self:
        """The same adapter for the network of this config."""
        bound = copy.copy(self)
        bound.config = config
        return bound

    # How it is called

    def channels(self) -> int:
        """Channels of x_0, the pixel or latent tensor."""
        return int(self.config["in_channels"])

    def size(self) -> tuple[int, int]:
        """(H, W) of x_0, of one frame of a video, that the network was configured for.

        Raises:
            ValueError: If the config does not tell.
        """
        size = self.config.get("sample_size")
        if size is None:
            raise ValueError("The model's config has no sample_size; pass image_size=(H, W).")
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def multiple(self) -> int:
        """Height and width of x_0 must be multiples of this."""
        return 1

    def square(self) -> bool:
        """Whether only square inputs are right."""
        return False

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """What the network is told of the level: `(B,)`; whole timesteps as int64, as pipelines pass them."""
        value = torch.as_tensor(level.timestep)
        # What lies on another device is not looked at: reading it back would wait for all that runs there.
        looked = value.device.type == "cpu"
        whole = not value.is_floating_point() or (looked and bool((value == value.round()).all()))
        return (value.long() if whole else value.float()).to(x_t.device).expand(x_t.shape[0])

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword inputs of the network's forward: x_t and the timestep by their names, and the condition."""
        return {self.sample_name: x_t, self.timestep_name: self.timestep(level, x_t), **condition}

    def check_names(self, inputs: Mapping[str, Any]) -> None:
        """Raise ValueError unless a call has inputs named `sample_name` and `timestep_name`."""
        for attribute in ("sample_name", "timestep_name"):
            if getattr(self, attribute) not in inputs:
                raise ValueError(
                    f"{type(self).__name__}.{attribute} is {getattr(self, attribute)!r}, and the network is called "
                    f"with {', '.join(inputs)}. Set {attribute} to the name that its forward has."
                )

    def output(self, raw: Any, x_t: Tensor) -> Tensor:
        """The prediction `(B, C, H, W)` in what forward returned; a learned variance is split off."""
        out = raw if isinstance(raw, Tensor) else raw[0]
        return out[:, : x_t.shape[1]]

    def sample(self, inputs: Mapping[str, Any]) -> Tensor:
        """x_t `(B, C, H, W)` in the inputs of a call, without the further channels of inpainting."""
        value = inputs[self.sample_name]
        return value[:, : self.sample_channels(value)]

    def with_sample(self, inputs: Mapping[str, Any], x_t: Tensor) -> dict[str, Any]:
        """The inputs of a call with another x_t."""
        extra = inputs[self.sample_name][:, x_t.shape[1] :]
        return {**inputs, self.sample_name: torch.cat([x_t, extra], 1) if extra.shape[1] else x_t}

    def with_condition(self, inputs: Mapping[str, Any], condition: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a call with other condition inputs; a map takes the place of what stands behind x_t.

        Raises:
            ValueError: For a map of another size, or where the network takes no channels beside x_t.
        """
        inputs = {**inputs, **{name: value for name, value in condition.items() if name != MAP_INPUT}}
        if MAP_INPUT not in condition:
            return inputs
        x_t, maps = self.sample(inputs), condition[MAP_INPUT]
        if inputs[self.sample_name].ndim != 4 or maps.shape[::2] != x_t.shape[::2] or maps.shape[3] != x_t.shape[3]:
            raise ValueError(
                f"Maps {tuple(maps.shape)} do not fit x_t {tuple(x_t.shape)}: they have its rows, height and width, "
                "and a network that takes both as one (B, C, H, W)."
            )
        return {**inputs, self.sample_name: torch.cat([x_t, maps.to(x_t)], 1)}

    def sample_channels(self, value: Tensor) -> int:
        """Channels of x_t in the network's input: as many as it predicts, at most."""
        return min(value.shape[1], int(self.config.get("out_channels") or value.shape[1]))

    def with_output(self, raw: Tensor, prediction: Tensor) -> Tensor:
        """The network's output tensor with another prediction `(B, C, H, W)`; a learned variance stays."""
        extra = raw[:, prediction.shape[1] :]
        return torch.cat([prediction, extra], 1) if extra.shape[1] else prediction

    def sampler_value(self, given: Tensor, value: Tensor) -> Tensor:
        """A tensor that the pipeline gives its scheduler (prediction or latents) with another value `(B, C, H, W)`."""
        return self.with_output(given, value)

    def stacked(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of a call with a tensor where the network takes a list of rows, so that rows can be taken."""
        return dict(inputs)

    def listed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `stacked`: as the network takes them."""
        return dict(inputs)

    def stacked_output(self, raw: Any) -> Any:
        """The network's output as one tensor, where it gives a list of rows."""
        return raw

    def listed_output(self, raw: Tensor) -> Any:
        """The inverse of `stacked_output`."""
        return raw

    def training_timestep(self, model_timestep: Tensor) -> Tensor:
        """The training timestep, from what the network is told: the inverse of `timestep`."""
        return model_timestep

    def joins_at(self, inputs: Mapping[str, Any], units: Collection[str]) -> bool:
        """Whether lanes may join at the first of these top-level modules, in a call with these inputs."""
        return self.joins

    def late_inputs(self, units: Collection[str]) -> tuple[str, ...]:
        """Inputs that the network's own forward adds to the image after lanes have joined at one of `units`."""
        return ()

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """Which rows of a call of `pipe` are conditional and which null.

        Args:
            pipe: The running pipeline, or None for a loop without one.
            inputs: Keyword inputs of the call.

        Raises:
            ValueError: If the call does not tell.
        """
        on = getattr(pipe, "do_classifier_free_guidance", None)
        rows = inputs[self.sample_name].shape[0]
        if pipe is None or on is False or (on is None and self.conditioning != "text"):
            return BatchLanes(slice(0, rows))
        if not equal_halves(inputs[self.sample_name]):
            if on is None:
                return BatchLanes(slice(0, rows))
            raise ValueError(
                f"{type(pipe).__name__} guides by itself, but its batch of {rows} is not the null and the conditional "
                "half of one input; which rows are which is not known. Call it with guidance_scale=1."
            )
        if on is None:
            raise ValueError(
                f"{type(pipe).__name__} does not tell whether it guides, and the halves of its batch of {rows} are "
                "equal; which rows have the condition is not known. Call it with guidance_scale=1, or with latents "
                "that differ."
            )
        return null_first(rows)

    # Where the image is

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """Token grid of a sequence of `tokens`, for x_0 of `size` (H, W), or (frames, H, W) of a video.

        Returns:
            `((h, w), start)` or `((frames, h, w), start)`: the image's tokens are those from `start` on, as many as
            the grid has cells; what stands before and after is text. None if the sequence is no image.
        """
        h, w = size[-2:]
        while True:
            if h * w == tokens:
                return (h, w), 0
            if max(h, w) == 1:
                return None
            h, w = -(-h // 2), -(-w // 2)

    def class_token_at(self) -> int | None:
        """Place of a class token in sequences that hold the image: 0, -1 for the last; None where there is none."""
        return None

    def is_image(self, path: str) -> bool:
        """Whether the module at `path` may carry the image."""
        return not any(part in self.not_image for part in path.split("."))

    # Conditions

    @property
    def has_null_call(self) -> bool:
        """Whether the pipeline encodes a negative prompt otherwise than a prompt."""
        return bool(self.null_arguments) or type(self).null_call is not Family.null_call

    def null_call(self, pipe: Any, text: str) -> dict[str, Any]:
        """Arguments of the pipeline's call whose condition is the null one of the negative prompt `text`."""
        return {"prompt": text, **self.null_arguments}

    def condition_rows(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Condition inputs as the pipeline gives them, with rows where the network takes lists."""
        return dict(inputs)

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """Condition inputs of the right shapes for `batch` samples, for the layer table."""
        return {}

    def classes(self) -> tuple[int, int | None]:
        """Number of classes that the network is told of (0: none), and the id of its null class.

        The id is None where the config does not tell: then the number counts all ids, the null's among them. It is -1
        where there is none.
        """
        count = int(self.config.get("num_classes") or 0) if self.conditioning == "class" else 0
        return count, count or None

    def vector_input(self) -> str | None:
        """Name of the network's input of vectors `(B, D)` that it is conditioned on, whose width `example` shows."""
        return None

    def map_channels(self) -> int:
        """Channels of the network's input behind x_t that say what is where, by its config (`LayoutConditioner`)."""
        return 0

    def from_class_labels(self, labels: Tensor | None) -> dict[str, Any]:
        """Condition inputs from class labels `(B,)`; None asks for the null class."""
        if labels is not None:
            write = " Write `def from_class_labels(self, labels)`." if self.conditioning == "class" else ""
            raise ValueError(f"{type(self).__name__} takes no class_labels.{write}")
        return {}


class PatchTransformerFamily(Family):
    """Shared by transformers on a `(H / patch, W / patch)` grid."""

    patch_key = "patch_size"
    sample_name = "hidden_states"
    not_image: tuple[str, ...] = (
        "time_embed",
        "time_text_embed",
        "adaln_single",
        "caption_projection",
        "caption_norm",
        "context_embedder",
        # the text's half of a joint block
        "norm1_context",
        "norm2_context",
        "ff_context",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "norm_added_q",
        "norm_added_k",
        "to_add_out",
        # queries and keys by head: four dimensions, but no map
        "norm_q",
        "norm_k",
    )

    def multiple(self) -> int:
        """The patch size."""
        return int(self.config[self.patch_key])

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """One grid for the whole depth."""
        patch = self.multiple()
        h, w = size[0] // patch, size[1] // patch
        return ((h, w), 0) if tokens == h * w else None


def equal_halves(value: Tensor) -> bool:
    """Whether the batch is one half twice, bit by bit, as pipelines make it for classifier-free guidance."""
    half = value.shape[0] // 2
    return value.shape[0] % 2 == 0 and torch.equal(value[:half], value[half:])


def null_first(rows: int) -> BatchLanes:
    """The null condition in the first half, the condition in the second."""
    return BatchLanes(slice(rows // 2, rows), slice(0, rows // 2))


def floating_dtype(model: nn.Module) -> torch.dtype:
    """Floating dtype of a model's parameters; float32 for a model without any."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def lanes_by_halves(pipe: Any, value: Tensor) -> BatchLanes:
    """Which rows are null where a pipeline does not tell: of two equal halves the first, else none.

    Not to be asked where the pipeline's own guidance is known to be off: samples that start from equal latents would
    be taken for a guided batch.
    """
    if pipe is not None and equal_halves(value):
        return null_first(value.shape[0])
    return BatchLanes(slice(0, value.shape[0]))


__all__ = [
    "MAP_INPUT",
    "BatchLanes",
    "Family",
    "PatchTransformerFamily",
    "equal_halves",
    "floating_dtype",
    "lanes_by_halves",
    "null_first",
]
