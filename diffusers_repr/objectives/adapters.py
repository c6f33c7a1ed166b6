"""Low-rank adapters of peft in the state of an objective: merged into the weights, and apart as diffusers has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ADAPTERS = "pytorch_lora_weights.safetensors"  # as diffusers calls it, and looks for it in a folder


def merge_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with peft's adapters of factor 1 added in, under the names they had without adapters."""
    merged = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    for key, down in state.items():
        if key.endswith(".lora_A.default.weight"):
            layer = key.removesuffix(".lora_A.default.weight")
            up = state[f"{layer}.lora_B.default.weight"]
            merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + (up @ down).to(merged[f"{layer}.weight"].dtype)
    return merged


def adapter_state(state: Mapping[str, Tensor], path: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The adapters of one network under peft's names; empty for a network without.

    Args:
        state: Of the objective.
        path: Of the network in it.
        dtype: Of the result.
    """
    inside = ((key.removeprefix(f"{path}."), value) for key, value in state.items() if key.startswith(f"{path}."))
    return {
        key.replace(".default.", "."): value.detach().to("cpu", dtype).contiguous()
        for key, value in inside
        if ".lora_" in key
    }


def save_adapters(pipe: Any, adapters: Mapping[str, Mapping[str, Tensor]], folder: Path) -> None:
    """Write the adapters of a pipeline's networks into one file, where something of diffusers can load it again.

    Args:
        pipe: A pipeline, for its class and its networks.
        adapters: Name of a network in it -> `adapter_state`.
        folder: Where to.
    """
    (folder / ADAPTERS).unlink(missing_ok=True)  # of an earlier run
    if not any(adapters.values()) or not any(loading(pipe, name, "") for name in adapters):
        return
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(pipe, "load_lora_weights"):
        type(pipe).save_lora_weights(
            folder, **{f"{name}_lora_layers": dict(state) for name, state in adapters.items()}
        )
        return
    whole = {f"{name}.{key}": value for name, state in adapters.items() for key, value in state.items()}
    save_file(whole, folder / ADAPTERS, metadata={"format": "pt"})


def loading(pipe: Any, name: str, folder: str) -> str | None:
    """The line of code that loads the adapters of a network onto the model they were trained on; None: there is none.

    Args:
        pipe: A pipeline.
        name: Of the network in it.
        folder: Where the adapters lie.
    """
    if hasattr(pipe, "load_lora_weights"):
        return f'pipe.load_lora_weights("{folder}")'
    if hasattr(getattr(pipe, name, None), "load_lora_adapter"):
        return f'pipe.{name}.load_lora_adapter("{folder}", prefix="{name}", use_safetensors=True)'
    return None


__all__ = ["ADAPTERS", "adapter_state", "loading", "merge_lora", "save_adapters"]
