"""The registry of tiny pipelines of further families: what a test needs to know of each."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class FamilyCase:
    """What is to be known of one family's pipeline.

    Attributes:
        make: A new one.
        size: An image size (H, W), H != W; of a video (frames, H, W).
        call: Arguments of the pipeline's call that make its condition.
        null: Those of the null condition, for a guided call.
        off: What switches its own guidance off.
        guided: What switches it on, without what renormalises it.
        stacks: Lists of blocks that carry the image, in order.
    """

    make: Callable[[], DiffusionPipeline]
    size: tuple[int, ...]
    call: dict[str, Any]
    null: dict[str, Any]
    off: dict[str, Any]
    guided: dict[str, Any]
    stacks: tuple[str, ...] = ("transformer_blocks",)


FAMILIES: dict[str, FamilyCase] = {}
SCALE = {"off": {"guidance_scale": 1.0}, "guided": {"guidance_scale": 4.0}}
PROMPT = {"call": {"prompt": "a photo of a cat"}, "null": {"negative_prompt": "a dog"}}


def register_case(name: str, size: tuple[int, ...], **facts):
    """Register a builder: it runs once a process, seeded; each call after gives a copy."""

    def register(function: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
        @functools.cache
        def master() -> DiffusionPipeline:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sum(map(ord, name)))
                pipe = function()
                network = getattr(pipe, "unet", None) or pipe.transformer
                with torch.no_grad():  # away from the zeros that some layers start at
                    for parameter in network.parameters():
                        parameter.add_(0.05 * torch.randn_like(parameter))
            pipe.set_progress_bar_config(disable=True)
            for component in pipe.components.values():
                if isinstance(component, torch.nn.Module):
                    component.eval()
            return pipe

        def build_fresh() -> DiffusionPipeline:
            return copy.deepcopy(master())

        FAMILIES[name] = FamilyCase(build_fresh, size, **{**PROMPT, **SCALE, **facts})
        return build_fresh

    return register


def family_pipeline(name: str) -> DiffusionPipeline:
    """A fresh pipeline by its name in `FAMILIES`."""
    return FAMILIES[name].make()


def embeds(*shape: int, seed: int = 0) -> torch.Tensor:
    """Drawn text embeddings, where no tokenizer can be made on the spot."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
