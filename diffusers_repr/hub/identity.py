"""What a network is, in hashes: of its config, of all its weights, of some of each weight."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.hub.compiled import plain_module

# Keys of a config that do not change what the network computes.
_FREE = (
    "_name_or_path",
    "_use_default_values",
    "transformers_version",
    "_diffusers_version",
    "torch_dtype",
    "dtype",
    "architectures",
)
_SAMPLED = 64  # values of each weight that enter a fingerprint
_MARKED, _VALUES = 8, 4  # parameters of which a record keeps the first values, and how many


def plain_hash(value: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of plain values.

    Example:
        >>> plain_hash({"a": 1, "b": 2}) == plain_hash({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config, without the keys that tell where and by what version it was saved.

    Example:
        >>> config_hash({"size": 8, "dtype": "float32"}) == config_hash({"size": 8})
        True
    """
    kept = {key: value for key, value in config.items() if key not in _FREE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the tensors in a state dict: of their dtypes, shapes and bytes.

    Neither names nor order count, since new versions of a library rename and reorder them.

    Example:
        >>> one, two = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> weights_hash(one) == weights_hash(two)
        False
        >>> _ = two.load_state_dict(one.state_dict())
        >>> weights_hash(one) == weights_hash(two)
        True
    """
    digests = [bytes.fromhex(tensor_hash(tensor)) for tensor in module.state_dict().values()]
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes.

    Example:
        >>> tensor_hash(torch.zeros(2)) == tensor_hash(torch.zeros(2, 1))
        False
    """
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode())
    digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*modules: nn.Module | None) -> str | None:
    """A hash of weights: names, shapes, dtypes and some values of each, so that a retrained model is noticed.

    None if weights are not in reach (offloaded to disk).
    """
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        if module is None:
            continue
        for name, tensor in plain_module(module).state_dict().items():
            if tensor.is_meta:
                return None
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_some_bytes(tensor))
    return digest.hexdigest()


def weight_marks(model: nn.Module, like: Mapping[str, Sequence[float]] | None = None) -> dict[str, list[float]]:
    """The first values of a few weights, evenly spread over the network, by which other weights are noticed.

    Args:
        model: The network.
        like: Marks of another: the same number of values of the same parameters, of those that can be read here.
    """
    usable = {n: p for n, p in model.named_parameters() if p.is_floating_point() and not p.is_meta}
    if like is not None:
        counts = {name: len(values) for name, values in like.items() if name in usable}
    else:
        names = [name for name, p in usable.items() if p.ndim > 1]
        counts = dict.fromkeys(names[:: max(len(names) // _MARKED, 1)][:_MARKED], _VALUES)
    return {
        name: [round(float(v), 8) for v in usable[name].detach().flatten()[:count]] for name, count in counts.items()
    }


def _some_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
    return some.view(torch.uint8).numpy().tobytes()
