"""Published weights of Readout Guidance, as their authors name them, to `ReadoutHead`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads.dense.features import readout_layers
from diffusers_repr.heads.dense.parts import NetworkTimeEmbedding, network_time_layers
from diffusers_repr.heads.dense.readout import READOUT_KINDS, ReadoutHead
from diffusers_repr.heads.dense.record import describe_base
from diffusers_repr.hub.schema import integer, listing, number
from diffusers_repr.models.checkpoint import block_numbers, check_tensor_names, check_weights, some_of

STACK = "bottleneck_layers"
# Part of a bottleneck block -> its part here; `conv1` and `shortcut` are one projection.
_PARTS = {
    "conv1.norm": "norm_in",
    "conv2.norm": "norm_mid",
    "conv3.norm": "norm_out",
    "shortcut.norm": "norm_shortcut",
    "conv2": "conv_mid",
    "conv3": "conv_out",
    "emb_layers": "time",
}
_OUTPUT = {"output_head.0": "hidden.0", "output_head.2": "hidden.1", "output_head.4": "output"}
_SPAN, _IDXS = listing(number(-1e6, 1e6), 2, 2), listing(integer(0, 999), 1, 1000)
_UNUSED = ("logit_scale",)  # of the training loss of correspondence heads


def is_published_readout(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is one of Readout Guidance's heads: a training file, or its weights alone.

    Example:
        >>> is_published_readout({"bottleneck_layers.0.conv1.weight": torch.ones(1)}), is_published_readout({})
        (True, False)
    """
    weights = checkpoint.get("aggregation_network", checkpoint)
    return isinstance(weights, Mapping) and any(str(name).startswith(f"{STACK}.0.") for name in weights)


def convert_readout(
    checkpoint: Mapping[str, Any], base: Denoiser, kind: str | None = None
) -> tuple[ReadoutHead, tuple[str, ...]]:
    """A head of Readout Guidance (arXiv 2312.02150) in the form of this package.

    Args:
        checkpoint: `{"aggregation_network": state dict, "config": settings}`, or the state dict alone.
        base: The U-Net it was trained on: Stable Diffusion 1.5 or XL of the published ones. Its time embedding is
            copied into the head, which the checkpoint lacks.
        kind: `spatial`, `appearance` or `correspondence`, where the file does not tell.

    Returns:
        The head, in eval mode, and a sentence on each thing that was left out or assumed.

    Raises:
        ValueError: For names that are unknown or missing, numbers that are not finite, another base, and what cannot
            be told.
    """
    weights, settings, sequential = find_weights(checkpoint)
    check_weights(weights, dict.fromkeys((name for name in weights if name.endswith(("conv1.weight", "conv3.weight",
                  "shortcut.weight"))), 4))  # fmt: skip
    kind = _kind(weights, settings, kind)
    notes: list[str] = []
    timed = _is_timed(weights, kind, sequential=sequential, notes=notes)
    if not timed:
        weights = {name: value for name, value in weights.items() if ".emb_layers." not in name}
    head = _head(weights, settings, base, kind, timed=timed, notes=notes)
    own, found = head.state_dict(), renamed(weights)
    wrong = [name for name, value in found.items() if value.shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"The checkpoint's {wrong[0]} (by our name) is {tuple(found[wrong[0]].shape)}; a head of its other sizes, "
            f"on this base, has {tuple(own[wrong[0]].shape)}."
        )
    head.load_state_dict({**own, **found})  # the time embedding is the base's
    return head.eval(), tuple(notes)


def find_weights(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], Mapping[str, Any], bool]:
    """The state dict in a checkpoint, its settings, and whether a bottleneck was a `Sequential` of one block.

    Raises:
        ValueError: For values that are no tensors.
    """
    given = checkpoint.get("aggregation_network", checkpoint)
    settings = checkpoint.get("config", {}) if "aggregation_network" in checkpoint else {}
    settings = settings if isinstance(settings, Mapping) else {}
    wrong = [name for name, value in given.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"The checkpoint's weights hold {some_of(wrong)}, which are no tensors.")
    weights = {str(name): value for name, value in given.items() if name not in _UNUSED}
    # A `Sequential` of one block is called without the time embedding.
    sequential = any(name.startswith(f"{STACK}.0.0.") for name in weights)
    if sequential:
        weights = {_without_sequence(name): value for name, value in weights.items()}
    return weights, settings, sequential


def _without_sequence(name: str) -> str:
    pieces = name.split(".")
    return ".".join(pieces[:2] + pieces[3:]) if pieces[0] == STACK and pieces[2] == "0" else name


def _kind(weights: Mapping[str, Tensor], settings: Mapping[str, Any], kind: str | None) -> str:
    if kind is not None and kind not in READOUT_KINDS:
        raise ValueError(f"kind is one of {', '.join(READOUT_KINDS)}; got {kind!r}.")
    has_output = any(name.startswith("output_head.") for name in weights)
    if has_output != (kind == "spatial") and (has_output or kind == "spatial") and kind is not None:
        raise ValueError(f"This head has {'an' if has_output else 'no'} output head, and kind is {kind!r}.")
    data, run = _mapping(settings, "dataset_args"), _mapping(settings, "wandb_kwargs")
    told = "spatial" if has_output else None
    for name, key in (("appearance", "sdedit_root"), ("correspondence", "points_root")):
        if told is None and (key in data or str(run.get("name", "")).endswith(name)):
            told = name
    if (kind or told) is None:
        raise ValueError(
            "The file does not tell whether this head reads appearance or correspondence (its config names no data "
            "set): say which, --kind appearance or --kind correspondence."
        )
    return cast(str, kind or told)


def _is_timed(weights: Mapping[str, Tensor], kind: str, *, sequential: bool, notes: list[str]) -> bool:
    """Whether the head is given the network's time embedding; layers for it are there in any case."""
    if not any(".emb_layers." in name for name in weights):
        return False
    if kind == "correspondence":
        notes.append("The layers for a time embedding were left out: correspondence heads are read without (use_emb).")
        return False
    if sequential:
        notes.append("The layers for a time embedding were left out: this head was trained without.")
    return not sequential


def _head(
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    base: Denoiser,
    kind: str,
    *,
    timed: bool,
    notes: list[str],
) -> ReadoutHead:
    """The head that the shapes and settings describe, with the base's time embedding and own random weights."""
    first = weights.get(f"{STACK}.0.conv1.weight"), weights.get(f"{STACK}.0.conv3.weight")
    if first[0] is None or first[1] is None:
        raise ValueError(f"The checkpoint lacks {STACK}.0.conv1.weight or conv3.weight; it is no readout head.")
    bottleneck, width = first[0].shape[0], first[1].shape[0]
    count = max(block_numbers(weights, STACK)) + 1
    options: dict[str, Any] = {"kind": kind, "width": width, "bottleneck": bottleneck}
    options |= {"time_source": "network", "reversed_time": True} if timed else {}
    options |= {} if timed or kind == "correspondence" else {"time_source": "none"}
    if kind == "spatial":
        options |= _spatial(weights, settings, notes)
    _check_names(weights, count, width, kind, timed=timed)
    record = {**describe_base(base), "level_range": base.schedule.timestep_range}
    channels = [weights[f"{STACK}.{at}.conv1.weight"].shape[1] for at in range(count)]
    if timed:
        options["time_width"] = network_time_layers(base.model)[1].out_features
    head = ReadoutHead(**{**record, "layers": _layers(settings, base, count), "channels": channels, **options})
    head.check_base(base)
    if isinstance(head.time_embedding, NetworkTimeEmbedding):
        head.time_embedding.take(base.model)
    return head


def _spatial(weights: Mapping[str, Tensor], settings: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """What is of a head with an output."""
    data = _mapping(settings, "dataset_args")
    if _mapping(settings, "aggregation_kwargs").get("output_head_act", True) is not True:
        raise ValueError("This head has no tanh at its end (output_head_act: False); `ReadoutHead` has one.")
    sizes = [weights[name].shape[0] for name in (f"{part}.weight" for part in _OUTPUT) if name in weights]
    if len(sizes) != len(_OUTPUT):
        raise ValueError(f"The output head lacks layers: {', '.join(_OUTPUT)} are needed.")
    target, span = data.get("control_type"), data.get("control_range")
    if span is None:
        span = (-0.5, 0.5) if target in ("pose", "edge") else (-1.0, 1.0)  # as its data loader sets them
        notes.append(f"The file tells no range of labels; {span[0]:g} to {span[1]:g} was taken.")
    return {
        "out_channels": sizes[2],
        "output_widths": tuple(sizes[:2]),
        "label_range": tuple(_SPAN(span, "The checkpoint's dataset_args.control_range")),
        "target": None if target is None else str(target),
    }


def _layers(settings: Mapping[str, Any], base: Denoiser, count: int) -> list[str]:
    """The layers that the head reads: all residual branches of the up-blocks, or those of `idxs`."""
    every = readout_layers(base.model)
    chosen = settings.get("idxs")
    if isinstance(chosen, str) and re.fullmatch(r"[\[(][\d, ]*[\])]", chosen):
        chosen = [int(part) for part in re.findall(r"\d+", chosen)]
    if chosen is not None:
        chosen = _IDXS(chosen, "The checkpoint's idxs")
    layers = every if chosen is None else [every[at] for at in chosen if at < len(every)]
    if len(layers) != count:
        raise ValueError(
            f"The head reads {count} maps; this {type(base.model).__name__} has {len(layers)} of them. Give the base "
            f"it was trained on (its settings name {settings.get('model_id', 'none')!r})."
        )
    return layers


def _check_names(weights: Mapping[str, Tensor], count: int, width: int, kind: str, *, timed: bool) -> None:
    further = [f"{name}.{leaf}" for name in _OUTPUT for leaf in ("weight", "bias")] if kind == "spatial" else []
    check_stack("a readout head", weights, count, width, further, timed=timed)
    if weights["mixing_weights"].shape != (count,):
        raise ValueError(
            f"The head mixes {weights['mixing_weights'].numel()} maps of {count} layers: it reads several timesteps "
            "at once, which `ReadoutHead` does not."
        )


def check_stack(
    what: str,
    weights: Mapping[str, Tensor],
    count: int,
    width: int,
    further: Sequence[str] = (),
    *,
    timed: bool = False,
) -> None:
    """Refuse names that are missing or unknown in a stack of bottlenecks with mixing weights.

    Args:
        what: Kind of network, for the message.
        weights: From `find_weights`.
        count: Bottlenecks.
        width: Their outputs.
        further: Names beside those of the stack.
        timed: Whether bottlenecks have a layer for a time embedding.

    Raises:
        ValueError: Names some of them.
    """
    parts = [name for name in _PARTS if timed or name != "emb_layers"]
    pairs = [name for name in parts if "norm" in name or name == "emb_layers"]
    norms = [f"{name}.{leaf}" for name in pairs for leaf in ("weight", "bias")]
    block = [*norms, "conv1.weight", "conv2.weight", "conv3.weight", "shortcut.weight"]
    expected = {f"{STACK}.{at}.{name}" for at in range(count) for name in block} | {"mixing_weights", *further}
    check_tensor_names(
        what,
        {"num_layers": count, "hidden_size": width},
        sorted(expected - set(weights)),
        sorted(set(weights) - expected),
    )


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `find_weights` by the names of `ReadoutHead` and `HyperfeaturesHead`."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        place, leaf = name.rsplit(".", 1) if "." in name else ("", name)
        if place in _OUTPUT:
            found[f"{_OUTPUT[place]}.{leaf}"] = value
        elif place.startswith(f"{STACK}."):
            _, at, part = place.split(".", 2)
            if part == "conv1":
                both = [value, weights[f"{STACK}.{at}.shortcut.weight"]]
                found[f"project.{at}.weight"] = torch.cat(both)
            elif part != "shortcut":
                found[f"blocks.{at}.{_PARTS[part]}.{leaf}"] = value
        elif name == "mixing_weights":
            found["weights"] = value
    return found


def _mapping(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = settings.get(name)
    return value if isinstance(value, Mapping) else {}


__all__ = ["STACK", "check_stack", "convert_readout", "find_weights", "is_published_readout", "renamed"]
