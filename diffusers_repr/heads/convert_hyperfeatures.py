"""Published weights of Diffusion Hyperfeatures, as their authors name them, to `HyperfeaturesHead`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads.convert import STACK, check_stack, find_weights, renamed
from diffusers_repr.heads.dense.features import readout_layers
from diffusers_repr.heads.hyperfeature_maps import paper_reads
from diffusers_repr.heads.hyperfeatures import HyperfeaturesHead
from diffusers_repr.hub.schema import integer, listing, text
from diffusers_repr.models.checkpoint import block_numbers, check_weights

_SAVED, _STEPS = listing(integer(0, 9999), 1, 1000), integer(1, 10_000)
_IDXS = listing(listing(integer(0, 99), 2, 2), 1, 1000)
_PROMPT = text(10_000)


def is_published_hyperfeatures(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of Diffusion Hyperfeatures: a training file, or its weights alone.

    A readout head has the same names, and layers for a time embedding among them.

    Example:
        >>> import torch
        >>> is_published_hyperfeatures({"bottleneck_layers.0.0.conv1.weight": torch.ones(1)})
        True
    """
    weights = checkpoint.get("aggregation_network", checkpoint)
    names = [str(name) for name in weights] if isinstance(weights, Mapping) else []
    timed = any(".emb_layers." in name or name.startswith("output_head.") for name in names)
    return f"{STACK}.0.0.conv1.weight" in names and not timed


def convert_hyperfeatures(checkpoint: Mapping[str, Any], base: Denoiser) -> tuple[HyperfeaturesHead, tuple[str, ...]]:
    """An aggregation network of Diffusion Hyperfeatures (arXiv 2305.14334) in the form of this package.

    Args:
        checkpoint: `{"aggregation_network": state dict, "config": settings}`, or the state dict alone, of the paper's
            eleven steps of 50 or of one.
        base: The U-Net it was trained on: Stable Diffusion 1.5 or 2.1 of the published ones.

    Returns:
        The head, in eval mode, and a sentence on each thing that was assumed.

    Raises:
        ValueError: For names that are unknown or missing, numbers that are not finite, another base, settings that
            `HyperfeaturesHead` does not have, and what cannot be told.
    """
    weights, settings, sequential = find_weights(checkpoint)
    if not sequential:
        raise ValueError(
            f"The checkpoint lacks {STACK}.0.0.conv1.weight; it is no network of Diffusion Hyperfeatures."
        )
    check_weights(weights, dict.fromkeys((name for name in weights if name.endswith(("conv1.weight", "conv3.weight",
                  "shortcut.weight"))), 4))  # fmt: skip
    count = max(block_numbers(weights, STACK)) + 1
    first = [weights.get(f"{STACK}.0.{name}.weight") for name in ("conv1", "conv3")]
    bottleneck, width = (0 if one is None else one.shape[0] for one in first)
    check_stack("Diffusion Hyperfeatures", weights, count, width)
    notes: list[str] = []
    _refuse_settings(settings)
    steps, reads = _steps(weights["mixing_weights"].numel(), count, settings, notes)
    head = HyperfeaturesHead.for_base(
        base,
        _layers(settings, base, count),
        steps=steps,
        reads=sorted(reads),
        bottleneck=bottleneck,
        width=width,
        prompt=_PROMPT(settings.get("prompt") or "", "The checkpoint's prompt") or None,
    )
    found, own = renamed(weights), head.state_dict()
    shares = found["weights"].unflatten(0, (len(reads), count))
    found["weights"] = shares[sorted(range(len(reads)), key=reads.__getitem__)]
    wrong = [name for name, value in found.items() if value.shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"The checkpoint's {wrong[0]} (by our name) is {tuple(found[wrong[0]].shape)}; a head of its other sizes, "
            f"on this base, has {tuple(own[wrong[0]].shape)}. Give the base it was trained on (its settings name "
            f"{settings.get('model_id', 'none')!r})."
        )
    head.load_state_dict(found)
    return head.eval(), tuple(notes)


def _refuse_settings(settings: Mapping[str, Any]) -> None:
    """What the published code can be told and `HyperfeaturesHead` does not do."""
    if settings.get("diffusion_mode", "inversion") != "inversion":
        raise ValueError(
            f"The checkpoint was trained on maps of a {settings['diffusion_mode']!r}; a `HyperfeaturesHead` reads "
            "those of an inversion."
        )
    if settings.get("guidance_scale", -1) != -1:
        raise ValueError(f"The checkpoint was trained under guidance {settings['guidance_scale']}; only -1, none.")
    if settings.get("flip_timesteps"):
        raise ValueError(
            "The checkpoint says flip_timesteps: the published code turns save_timestep round when it trains and "
            "again when it reads, so the file does not tell which step a weight is of. Write the order it was trained "
            "in as save_timestep, and flip_timesteps: False."
        )


def _steps(numbers: int, layers: int, settings: Mapping[str, Any], notes: list[str]) -> tuple[int, list[int]]:
    """Steps of the inversion, and the step of each row of mixing weights, from the clean image 0."""
    saved = settings.get("save_timestep")
    if saved is None:
        levels, rest = divmod(numbers, layers)
        known = {1: 1, len(paper_reads(50)): 50}
        if rest or levels not in known:
            raise ValueError(
                f"The file tells no steps (save_timestep, num_timesteps), and {numbers} mixing weights of {layers} "
                "layers are neither of the paper's eleven steps nor of one."
            )
        steps = known[levels]
        notes.append(f"The file tells no steps; those of the paper's {levels} at {steps} were taken.")
        return steps, paper_reads(steps)
    steps = _STEPS(settings.get("num_timesteps"), "The checkpoint's num_timesteps")
    # Counted from the noise there: the last number is the clean image.
    reads = [steps - 1 - one for one in _SAVED(saved, "The checkpoint's save_timestep")]
    if min(reads) < 0 or len(set(reads)) != len(reads) or len(reads) * layers != numbers:
        raise ValueError(
            f"The checkpoint's save_timestep {saved} and num_timesteps {steps} do not go with {numbers} mixing "
            f"weights of {layers} layers: each step once, from 0 to {steps - 1}."
        )
    return steps, reads


def _layers(settings: Mapping[str, Any], base: Denoiser, count: int) -> list[str]:
    """The residual branches of all resnets on the way up, or those of `idxs`, (block, resnet) each."""
    every, chosen = readout_layers(base.model), settings.get("idxs")
    if chosen is None:
        layers = every
    else:
        pairs = _IDXS([list(pair) for pair in chosen] if isinstance(chosen, (list, tuple)) else chosen,
                      "The checkpoint's idxs")  # fmt: skip
        named = {f"up_blocks.{block}.resnets.{resnet}.conv2" for block, resnet in pairs}
        layers = [path for path in every if path in named]  # they are collected in the network's order
    if len(layers) != count:
        raise ValueError(
            f"The network mixes {count} layers; this {type(base.model).__name__} has {len(layers)} of them. Give the "
            f"base it was trained on (its settings name {settings.get('model_id', 'none')!r})."
        )
    return layers


__all__ = ["convert_hyperfeatures", "is_published_hyperfeatures"]
