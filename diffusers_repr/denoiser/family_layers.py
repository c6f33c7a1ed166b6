"""What a family knows of the inside of its network: stacks of blocks, attention, default layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffusers_repr.denoiser import default_layers as rules
from diffusers_repr.denoiser.attention_layouts import SELF, AttentionLayout
from diffusers_repr.denoiser.default_layers import METHODS, STACKS, LayerDefault, Method
from diffusers_repr.hub.compiled import plain_module, plain_path


class FamilyLayers:
    """Where the blocks of an architecture are, how its attention is laid out, which layers methods take.

    Attributes:
        stacks: Paths of the lists of transformer blocks in the order in which they run; those that are there count.
        block_outputs: Class of a block that returns several tensors -> index of the image.
        attentions: Pattern of module paths, in which `*` stops at dots -> layout of the attention there; the first
            that fits counts. Others are read by their class: diffusers' `Attention` as self-attention.
        other_attentions: Patterns of paths of attention that is not among image tokens, where the module itself does
            not tell: cross-attention, attention among text tokens.
        layer_defaults: Method (`pag`, `sag`, `repa`, ...) -> its layers and where the choice comes from; rules on the
            module tree serve the others.
    """

    stacks: tuple[str, ...] = STACKS
    block_outputs: Mapping[str, int] = {}
    attentions: Mapping[str, AttentionLayout] = {}
    other_attentions: tuple[str, ...] = ()
    layer_defaults: Mapping[Method, LayerDefault] = {}

    def attention(self, path: str, module: nn.Module) -> AttentionLayout:
        """Where image and text tokens lie in the attention module at `path`.

        Raises:
            ValueError: For cross-attention, attention with added text keys (`added_kv_proj_dim` without own text
                queries) and classes that nobody described; goes on after the words "Layer 'path'".
        """
        known_layout = self.fixed_layout(path)
        if known_layout is not None:
            return known_layout
        if not hasattr(module, "is_cross_attention"):
            raise ValueError(
                f"is a {type(module).__name__}; known are diffusers' Attention and what the `attentions` of "
                f"{type(self).__name__} describe (docs/adding_a_family.md)."
            )
        if module.is_cross_attention:
            raise ValueError(
                "is cross-attention (keys and values come from the condition); only attention among image tokens can "
                "be perturbed."
            )
        if getattr(module, "added_kv_proj_dim", None) is not None:
            raise ValueError(
                "mixes added text keys and values into image attention (added_kv_proj_dim); no perturbation is "
                "defined for it."
            )
        return SELF

    def fixed_layout(self, path: str) -> AttentionLayout | None:
        """The layout that `attentions` tells for a path; None where it tells none."""
        if _fits(path, self.other_attentions):
            return None
        parts = plain_path(path).split(".")
        for pattern, layout in self.attentions.items():
            wanted = pattern.split(".")
            if len(wanted) == len(parts) and all(map(fnmatch.fnmatchcase, parts, wanted)):
                return layout
        return None

    def image_tokens(self, layout: AttentionLayout, inputs: Mapping[str, Any], tokens: int) -> slice | Tensor:
        """Where the image lies in a single-stream sequence, whose text and image are one input.

        Args:
            layout: Of the attention module.
            inputs: Those of the network's call, for the rows that are run.
            tokens: Length of the sequence.

        Returns:
            A slice, or the places `(B, N)` where they differ by row (text of several lengths).
        """
        text = inputs["encoder_hidden_states"].shape[1]
        return slice(text, tokens) if layout.text == "first" else slice(0, tokens - text)

    def self_attentions(self, model: nn.Module) -> list[str]:
        """Paths of the attention modules among image tokens, in module order; joint attention counts."""
        return [path for path, module in model.named_modules() if path and self._attends_to_image(path, module)]

    def image_attentions(self, model: nn.Module) -> list[str]:
        """Those of `self_attentions` that the family tells to be the image's: by `attentions` or its own `stacks`."""
        attentions = self.self_attentions(model)
        told = [path for path in attentions if self.fixed_layout(path) is not None]
        if told or type(self).stacks is FamilyLayers.stacks:
            return told
        return [path for path in attentions if path.startswith(tuple(f"{stack}." for stack in self.stacks))]

    def _attends_to_image(self, path: str, module: nn.Module) -> bool:
        if _fits(path, self.other_attentions):
            return False
        if self.fixed_layout(path) is not None:
            return True
        if not (hasattr(module, "to_q") and hasattr(module, "processor")):
            return False
        # The second attention of a basic block crosses to text; SD3.5's second one (attn2) is over the image.
        widths = (getattr(module, name, None) for name in ("cross_attention_dim", "query_dim"))
        crosses = getattr(module, "is_cross_attention", False) or (path.endswith(".attn2") and len({*widths}) > 1)
        return getattr(module, "add_k_proj", None) is not None or not crosses

    def stack(self, model: nn.Module) -> list[str]:
        """Paths of the transformer blocks that run first, one after the other: those whose number papers name.

        Raises:
            ValueError: If the network has no list of transformer blocks.
        """
        stacks = self._stacks(model)
        if not stacks:
            raise ValueError(
                f"{type(model).__name__} has no stack of transformer blocks; name the layer. "
                "`list_layers(denoiser)` shows all."
            )
        return stacks[0]

    def blocks(self, model: nn.Module) -> list[str]:
        """Paths of the transformer blocks of all stacks, in execution order; none of a U-Net."""
        return [path for stack in self._stacks(model) for path in stack]

    def _stacks(self, model: nn.Module) -> list[list[str]]:
        modules = dict(plain_module(model).named_modules())
        there = {name: stack for name in self.stacks if isinstance(stack := modules.get(name), nn.ModuleList)}
        return [[f"{name}.{at}" for at in range(len(stack))] for name, stack in there.items()]

    def sag_blur(self) -> tuple[float, int, str]:
        """Sigma and width, in pixels of x_0, of the blur that SAG takes, and where they come from."""
        return 1.0, 9, "diffusers' Stable Diffusion SAG pipeline"

    def default_layers(self, method: Method, model: nn.Module) -> LayerDefault:
        """Layers that a method takes in this network unless told otherwise, and where the choice comes from.

        Raises:
            ValueError: For a network that has nothing at the default place, attention of which the family does not
                tell that it is of the image, or an unknown method.
        """
        if method not in METHODS:
            raise ValueError(f"There are default layers for {', '.join(METHODS)}; got {method!r}.")
        attends = method in ("pag", "sag")
        if method in self.layer_defaults:
            preset = self.layer_defaults[method]
            known = self.self_attentions(model) if attends else [path for path, _ in model.named_modules()]
            layers = [path for path in known if _fits(path, preset.layers)]
            found = LayerDefault(tuple(layers[:1] if method in ("sag", "repa") else layers), preset.source)
        elif attends:
            found = self._middle_attention(method, model)
        elif method == "repa":
            found = rules.repa_block(self.stack(model))
        else:
            found = self._head_layers(method, plain_module(model))
        if not found.layers:
            near = self.self_attentions(model)[:3] if attends else []
            what = "self-attention" if attends else "layer"
            rest = "There is none in the whole network." if attends else "Pass layers=."
            raise ValueError(
                f"{type(model).__name__} has no {what} at the default place ({found.source}). "
                f"{f'Pass layers=, of {near}.' if near else rest}"
            )
        return found

    def _middle_attention(self, method: Method, model: nn.Module) -> LayerDefault:
        known, there = self.image_attentions(model), self.self_attentions(model)
        if there and not known:
            shown = there if len(there) < 5 else [*there[:2], "...", *there[-2:]]
            raise ValueError(
                f"{type(self).__name__} does not tell which attention of {type(model).__name__} is among image tokens "
                f"(text has attention of its own in some networks), so {method.upper()} has no default there: pass "
                f"layers=, or describe it in the family's `attentions` (docs/adding_a_family.md). There are {shown}."
            )
        return rules.middle_attention(known)

    def _head_layers(self, method: Method, model: nn.Module) -> LayerDefault:
        resnets, blocks = rules.decoder_resnets(model), self.blocks(model)
        if not resnets and not blocks:
            raise ValueError(
                f"{type(model).__name__} has neither up_blocks with residual blocks nor a list of transformer blocks "
                f"({', '.join(self.stacks)}); name the layers. `list_layers(denoiser)` shows them."
            )
        if method == "readout":
            return rules.readout_default(resnets, blocks)
        if method == "segmentation":
            return rules.segmentation_default(resnets, blocks)
        strong, weak = rules.depth_default(resnets, blocks)
        return strong if method == "depth_strong" else weak


def _fits(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(plain_path(path), pattern) for pattern in patterns)


__all__ = ["FamilyLayers"]
