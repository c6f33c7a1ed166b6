"""How attention modules are laid out: where image and text tokens lie, and what their processors do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ProcessorRule:
    """What a processor of diffusers does around `softmax(q k^T scale) v`.

    Attributes:
        qk_norm: It applies `norm_q` and `norm_k`.
        spatial_norm: It applies `spatial_norm`.
        own_scale: It scales by `module.scale`; else by `1 / sqrt(head width)`.
        upcast: It computes in float32 where `module.upcast_attention` or `upcast_softmax` says so.
        masks: It uses an `attention_mask`.
        rotary: It turns queries and keys by `image_rotary_emb`.
        fused: It uses `to_qkv` where the module's projections are fused; then its own forward runs.
        image_prompt: It attends to an image prompt (IP-Adapter) too: `inside`, added to the weighted sum before
            `to_out`, or `beside`, a third output; None where it takes none.
    """

    qk_norm: bool = True
    spatial_norm: bool = True
    own_scale: bool = False
    upcast: bool = False
    masks: bool = True
    rotary: bool = False
    fused: bool = False
    image_prompt: Literal["inside", "beside"] | None = None


@dataclass(frozen=True)
class AttentionLayout:
    """Which tokens take part in one softmax of an attention module, and where the image's are.

    A layout without `processors` is all that a new family need tell: the module's own forward runs, and the one call
    of `scaled_dot_product_attention` in it is perturbed, whatever norms and rotations come before it.

    Attributes:
        name: For messages.
        text: Where the text tokens stand beside the image's: `first`, `last`, or None where there are none.
        text_input: Argument of the module that holds the text tokens; None where they are in `hidden_states`, among
            the image tokens (`Family.image_tokens` tells them apart).
        linear: It has no probabilities.
        processors: Processor class -> what it does. Under one of them queries, keys and values are made by the
            module's own submodules, and values alone are computed where they are all that counts; under any other
            (fused projections are one) the module's own forward runs as without `processors`.
    """

    name: str = "self-attention"
    text: Literal["first", "last"] | None = None
    text_input: str | None = None
    linear: bool = False
    processors: Mapping[str, ProcessorRule] = field(default_factory=dict)

    @property
    def single(self) -> bool:
        """Whether text and image are one input."""
        return self.text is not None and self.text_input is None


SELF_PROCESSORS: Mapping[str, ProcessorRule] = {
    "AttnProcessor2_0": ProcessorRule(),
    "XLAFlashAttnProcessor2_0": ProcessorRule(),
    "AttnProcessorNPU": ProcessorRule(qk_norm=False),
    "AttnProcessor": ProcessorRule(qk_norm=False, own_scale=True, upcast=True),
    "SlicedAttnProcessor": ProcessorRule(qk_norm=False, spatial_norm=False, own_scale=True, upcast=True),
    "XFormersAttnProcessor": ProcessorRule(qk_norm=False, own_scale=True),
}

SELF = AttentionLayout(processors=SELF_PROCESSORS)
# For families whose processors are not spelled out: the module's own forward runs.
PLAIN = AttentionLayout()
TEXT_FIRST = AttentionLayout("joint attention, text first", "first", "encoder_hidden_states")
IMAGE_FIRST = AttentionLayout("joint attention, image first", "last", "encoder_hidden_states")
SINGLE_TEXT_FIRST = AttentionLayout("single-stream attention", "first")
SINGLE_IMAGE_FIRST = AttentionLayout("single-stream attention, image first", "last")

__all__ = [
    "IMAGE_FIRST",
    "PLAIN",
    "SELF",
    "SELF_PROCESSORS",
    "SINGLE_IMAGE_FIRST",
    "SINGLE_TEXT_FIRST",
    "TEXT_FIRST",
    "AttentionLayout",
    "ProcessorRule",
]
