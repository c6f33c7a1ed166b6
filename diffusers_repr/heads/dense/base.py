"""The base of a head on maps: what is recorded of a network, and how another one is refused."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.denoiser import require_denoiser
from diffusers_repr.hub.schema import anything, listing, mapping, number, optional, printable, record, text
from diffusers_repr.noise import NoiseSchedule

# Arguments of every head on maps that are read as they stand.
RECORD = record(
    {
        "layers": listing(text(500), 0, 1000),
        "channels": listing(anything(1), 0, 1000),
        **dict.fromkeys(("label_range", "timestep_range", "level_range"), listing(number(), 2, 2)),
        **dict.fromkeys(("base_model", "base_class", "noise_kind", "target"), optional(text(1000))),
        **dict.fromkeys(("base_fingerprint", "noise_fingerprint"), optional(text(200))),
        "base_config": optional(mapping(anything(12, 300_000), 0, 1000)),
    },
    others=True,
)


def base_config(denoiser: Denoiser) -> dict[str, Any]:
    """The network's config as JSON gives it back: without private keys, and without values that are its defaults.

    A version of diffusers that adds an argument with a default does not change it.
    """
    model = _plain(denoiser)
    defaults = {name: p.default for name, p in inspect.signature(type(model).__init__).parameters.items()}
    public = {
        key: value
        for key, value in json.loads(json.dumps(dict(denoiser.config), default=str)).items()
        if not key.startswith("_") and key != "quantization_config"
    }
    plain = json.loads(json.dumps(defaults, default=str))
    return {key: public[key] for key in sorted(public) if key not in plain or plain[key] != public[key]}


def base_fingerprint(denoiser: Denoiser) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of the network's class and `base_config`; weights do not enter."""
    return _digest({"class": type(_plain(denoiser)).__name__, "config": base_config(denoiser)})


def noise_fingerprint(schedule: NoiseSchedule) -> str:
    """As `base_fingerprint`, of the noise process: what a timestep means, to six digits of log alpha-bar."""
    table = [] if schedule.log_alpha_bar is None else [f"{v:.5e}" for v in schedule.log_alpha_bar.tolist()]
    ends = (schedule.sigma_min, schedule.sigma_max, schedule.sigma_data)
    return _digest([schedule.kind, schedule.num_train_timesteps, [float(v) for v in ends], table])


def describe_base(denoiser: Denoiser) -> dict[str, Any]:
    """The arguments by which a head on maps records its base.

    Raises:
        TypeError: If `denoiser` is no `Denoiser`.
    """
    require_denoiser(denoiser)
    return {
        "base_model": denoiser.name,
        "base_class": type(_plain(denoiser)).__name__,
        "base_config": base_config(denoiser),
        "base_fingerprint": base_fingerprint(denoiser),
        "noise_kind": denoiser.schedule.kind,
        "noise_fingerprint": noise_fingerprint(denoiser.schedule),
        "timestep_range": list(denoiser.schedule.timestep_range),
    }


def check_base(
    denoiser: Denoiser, head: str, config: Mapping[str, Any], layers: Sequence[str], channels: Sequence[int]
) -> None:
    """Refuse a network on whose features a head means nothing.

    Args:
        denoiser: The network that came.
        head: Name of the head's class, for the messages.
        config: The head's config, with what `describe_base` recorded.
        layers: Layers the head reads.
        channels: Their channels.

    Raises:
        TypeError: If `denoiser` is no `Denoiser`.
        ValueError: If its class, config, layers, channels or noise process differ; tells what came and what was
            recorded. A head that recorded no base is checked for layers and channels only.
    """
    require_denoiser(denoiser)
    model = _plain(denoiser)
    came, was = _called(denoiser.name), _called(config["base_model"])
    start = f"Wrong base for this {head}: {came} is a {type(model).__name__}"
    remedy = "Pass the model it was trained on, or train a head for this one (examples/train_readout.py)."
    if config["base_class"] is not None and type(model).__name__ != config["base_class"]:
        raise ValueError(f"{start}; the head was trained on a {config['base_class']} ({was}). {remedy}")
    if config["base_fingerprint"] is not None and base_fingerprint(denoiser) != config["base_fingerprint"]:
        recorded, found = dict(config["base_config"] or {}), base_config(denoiser)
        keys = [key for key in sorted({*recorded, *found}) if recorded.get(key) != found.get(key)]
        shown = "; ".join(f"{key} is {_value(found, key)}, was {_value(recorded, key)}" for key in keys)
        raise ValueError(
            f"{start} of another config than the head's base ({was}; fingerprint {base_fingerprint(denoiser)}, was "
            f"{config['base_fingerprint']}): {shown}. {remedy}"
        )
    _check_layers(model, came, start, was, layers, channels, remedy)
    noise = config["noise_fingerprint"]
    if noise is not None and noise_fingerprint(denoiser.schedule) != noise:
        raise ValueError(
            f"{start} with a {denoiser.schedule.kind} noise process (fingerprint "
            f"{noise_fingerprint(denoiser.schedule)}); the head was trained under another, {config['noise_kind']} "
            f"({noise}) of {was}: the same timestep means another noise. Give the base its own scheduler, or train a "
            "head for this one (examples/train_readout.py)."
        )


def _check_layers(
    model: nn.Module,
    came: str,
    start: str,
    was: str,
    layers: Sequence[str],
    channels: Sequence[int],
    remedy: str,
) -> None:
    known = dict(model.named_modules(remove_duplicate=False))
    missing = [layer for layer in layers if layer not in known]
    if missing:
        near = difflib.get_close_matches(missing[0], known, n=3, cutoff=0.4)
        raise ValueError(
            f"{start} without layer {', '.join(map(repr, missing))} (closest: {near}); the head reads it of {was}. "
            f"{remedy}"
        )
    for layer, size in zip(layers, channels, strict=True):
        found = getattr(known[layer], "out_channels", None)
        if isinstance(found, int) and found != size:
            raise ValueError(f"{start} whose {layer!r} has {found} channels; the head takes {size} ({was}). {remedy}")


def _plain(denoiser: Denoiser) -> nn.Module:
    model = getattr(denoiser.model, "_orig_mod", denoiser.model)
    assert isinstance(model, nn.Module)
    return model


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _called(name: str | None) -> str:
    return "a model without a name" if name is None else repr(name)


def _value(config: Mapping[str, Any], key: str) -> str:
    return printable(repr(config[key]))[:200] if key in config else "its default"


def timestep_vector(timestep: torch.Tensor | float, batch: int, device: torch.device) -> torch.Tensor:
    """Timesteps as float64 `(batch,)`.

    Raises:
        ValueError: If there are several and not `batch`.
    """
    values = torch.as_tensor(timestep, dtype=torch.float64, device=device)
    if values.ndim > 1 or (values.numel() not in (1, batch)):
        raise ValueError(f"timestep must be one number or ({batch},), one a sample; got {tuple(values.shape)}.")
    return values.reshape(-1).expand(batch)


__all__ = ["base_config", "base_fingerprint", "check_base", "describe_base", "noise_fingerprint", "timestep_vector"]
