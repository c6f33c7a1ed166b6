"""A denoiser as plain data: the record that probes, heads and stores keep of their base."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers_repr.denoiser.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_denoiser
from diffusers_repr.hub.base_record import BaseRecord
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.hub.identity import fingerprint, plain_hash, weight_marks
from diffusers_repr.noise.process_record import process_record


def base_record(
    denoiser: Denoiser, *, marks: Mapping[str, Sequence[float]] | None = None, weights: bool = False
) -> BaseRecord:
    """What there is to remember of a denoiser; `features` is left to who reads it.

    Args:
        denoiser: The base.
        marks: Those of another record, to read the same values of the same parameters; a choice of them if None.
        weights: Whether to hash weights of network and VAE too, which reads some of each.

    Raises:
        TypeError: If `denoiser` is no `Denoiser`.
    """
    require_denoiser(denoiser)
    model = plain_module(denoiser.model)
    return BaseRecord(
        name=denoiser.name,
        revision=denoiser.revision,
        model_class=type(model).__name__,
        config=_told(denoiser),
        marks=weight_marks(model, marks),
        fingerprint=plain_hash({"class": type(model).__name__, "config": changed_config(denoiser)}),
        process=process_record(denoiser.schedule),
        dtype=str(denoiser.dtype).removeprefix("torch."),
        weights=fingerprint(denoiser.model, denoiser.vae) if weights else None,
    )


def config_defaults(denoiser: Denoiser) -> dict[str, Any]:
    """What the network's class takes for arguments that a config leaves out, as JSON gives it back."""
    parameters = inspect.signature(type(plain_module(denoiser.model)).__init__).parameters
    known = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return json.loads(json.dumps(known, default=str))


def changed_config(denoiser: Denoiser) -> dict[str, Any]:
    """The network's config without private keys, and without values that are its defaults.

    A version of diffusers that adds an argument with a default does not change it.
    """
    defaults = config_defaults(denoiser)
    public = _told(denoiser)
    return {key: public[key] for key in sorted(public) if key not in defaults or defaults[key] != public[key]}


def _told(denoiser: Denoiser) -> dict[str, Any]:
    """The network's public config; of one that was trained on masks with the patch, which no level tells."""
    schedule = denoiser.schedule
    masks = {"mask_patch_size": schedule.patch_size} if schedule.kind == "patch_mask" else {}
    return {**_public(denoiser.config), **masks}


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    public = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    return json.loads(json.dumps(public, default=str, sort_keys=True))


__all__ = ["base_record", "changed_config", "config_defaults"]
