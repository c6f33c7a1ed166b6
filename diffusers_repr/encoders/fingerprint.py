"""Hashes that tell whether two encoders give the same features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# Keys of a config that do not change what the network computes.
_FREE = ("_name_or_path", "transformers_version", "_diffusers_version", "torch_dtype", "dtype", "architectures")


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
    digests = []
    for tensor in module.state_dict().values():
        data = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
