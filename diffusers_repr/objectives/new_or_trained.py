"""Settings that name a network of transformers: a new one by its arguments, or a trained one by its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig

from diffusers_repr.config.recipe import check_keys, json_mapping
from diffusers_repr.hub.components import check_config


def new_or_trained(config: Any, name: str, what: str, model_types: Sequence[str]) -> None:
    """Check that exactly one of `<name>` and `<name>_name_or_path` is set, and make the first a mapping.

    Args:
        config: A dataclass of settings with these two fields.
        name: `student`, for example.
        what: The noun of messages.
        model_types: That a new network may have.

    Raises:
        ValueError: Without a network or with two, for another model_type, and arguments that its config does not know.
    """
    arguments = json_mapping(name, getattr(config, name))
    if bool(arguments) == (getattr(config, f"{name}_name_or_path") is not None):
        raise ValueError(
            f"Name one of `{name}`, a new {what}, and `{name}_name_or_path`, one to go on from; got "
            f"{'both' if arguments else 'neither'}."
        )
    if arguments:
        kind = arguments.get("model_type")
        if kind not in model_types:
            raise ValueError(f"`{name}` needs model_type, one of {', '.join(model_types)}; got {kind!r}.")
        check_keys(f"`{name}`", arguments, AutoConfig.for_model(kind).to_dict())
        check_config(arguments, name)
    object.__setattr__(config, name, arguments)


__all__ = ["new_or_trained"]
