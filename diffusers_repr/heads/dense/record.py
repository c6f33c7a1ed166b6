"""How a head on maps writes down its base, as arguments of its config, and reads it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.record import base_record, changed_config, config_defaults
from diffusers_repr.hub import base_record as bases
from diffusers_repr.hub.base_record import BaseRecord, Dependent, ProcessRecord
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.hub.schema import anything, listing, mapping, number, optional, record, text

# Arguments of every head on maps that are read as they stand, and those of heads that predict a label.
RECORD = record(
    {
        "layers": listing(text(500), 0, 1000),
        "channels": listing(anything(1), 0, 1000),
        "timestep_range": listing(number(), 2, 2),
        **dict.fromkeys(("base_model", "base_class", "noise_kind"), optional(text(1000))),
        **dict.fromkeys(("base_fingerprint", "noise_fingerprint"), optional(text(200))),
        "base_config": optional(mapping(anything(12, 300_000), 0, 1000)),
    },
    others=True,
)
LABELS = record(
    {**dict.fromkeys(("label_range", "level_range"), listing(number(), 2, 2)), "target": optional(text(1000))},
    others=True,
)


def describe_base(denoiser: Denoiser) -> dict[str, Any]:
    """The arguments by which a head on maps records its base.

    Raises:
        TypeError: If `denoiser` is no `Denoiser`.
    """
    found = base_record(denoiser)
    assert found.process is not None
    return {
        "base_model": found.name,
        "base_class": found.model_class,
        "base_config": changed_config(denoiser),
        "base_fingerprint": found.fingerprint,
        "noise_kind": found.process.kind,
        "noise_fingerprint": found.process.fingerprint,
        "timestep_range": list(denoiser.schedule.timestep_range),
    }


def recorded_base(config: Mapping[str, Any]) -> BaseRecord:
    """The base that a head's config tells."""
    process = None
    if config["noise_fingerprint"] is not None:
        process = ProcessRecord(str(config["noise_kind"]), fingerprint=config["noise_fingerprint"])
    return BaseRecord(
        name=config["base_model"],
        model_class=config["base_class"],
        config=config["base_config"],
        fingerprint=config["base_fingerprint"],
        features=dict(zip(config["layers"], config["channels"], strict=True)),
        process=process,
    )


def refuse_other_base(denoiser: Denoiser, head: str, config: Mapping[str, Any]) -> None:
    """Refuse a network on whose features a head means nothing.

    Args:
        denoiser: The network that came.
        head: Name of the head's class, for the messages.
        config: The head's config, with what `describe_base` recorded.

    Raises:
        TypeError: If `denoiser` is no `Denoiser`.
        ValueError: If its class, config, layers, channels or noise process differ; tells what came and what was
            recorded. A head that recorded no base is checked for layers and channels only.
    """
    was, came = recorded_base(config), base_record(denoiser)
    remedy = "Pass the model it was trained on, or train a head for this one (examples/train_readout.py)."
    dependent = Dependent(head, "head", "trained", remedy)
    modules = dict(plain_module(denoiser.model).named_modules(remove_duplicate=False))
    bases.refuse_other_class(dependent, was, came)
    bases.refuse_other_config(dependent, was, came, config_defaults(denoiser))
    bases.refuse_missing_layers(dependent, was, came, modules)
    channels = {layer: getattr(modules[layer], "out_channels", None) for layer in was.features}
    bases.refuse_other_sizes(dependent, was, came, {layer: n for layer, n in channels.items() if isinstance(n, int)})
    bases.refuse_other_process(dependent, was, came)


__all__ = ["LABELS", "RECORD", "describe_base", "recorded_base", "refuse_other_base"]
