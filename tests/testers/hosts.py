"""What differs between the versions of the libraries that the tests run on (`make test-lowest`)."""

import importlib
import importlib.metadata
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers.pipelines import pipeline_utils
from packaging.version import Version
from transformers.modeling_attn_mask_utils import AttentionMaskConverter


def before(package: str, version: str) -> bool:
    """Whether this is a version of the package before that one."""
    return Version(importlib.metadata.version(package)) < Version(version)


def newer(module: str, name: str) -> Any:
    """`module.name`; skips the test where this version has none."""
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        pytest.skip(f"this version of {module.split('.')[0]} has no {name}")
    return found


def close_session() -> None:
    """Let the Hub's client open its next connection anew."""
    close = getattr(huggingface_hub, "close_session", None)
    (close or huggingface_hub.utils.reset_sessions)()


def since(package: str, version: str) -> pytest.MarkDecorator:
    """Mark of a test that holds from this version of a package on, since what it compares with has changed."""
    return pytest.mark.skipif(before(package, version), reason=f"{package} behaves so from {version} on")


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of diffusers' `from_pretrained` that gives the dtype of the weights."""
    new = hasattr(pipeline_utils, "_resolve_dtype")
    return {"dtype" if new else "torch_dtype": dtype}


def text_to_image(blocks: Any) -> Any:
    """A modular pipeline of the blocks that make an image of a text, in older diffusers of those of all tasks."""
    return (blocks.get_workflow("text2image") if hasattr(blocks, "get_workflow") else blocks).init_pipeline()


def mask_in_float64() -> None:
    """Let text encoders of transformers 4 run in float64: their causal mask's lowest number fits no other dtype."""
    if not before("transformers", "5"):
        return
    make = AttentionMaskConverter._make_causal_mask

    def wide(shape: Any, dtype: torch.dtype, *args: Any, **kwargs: Any) -> torch.Tensor:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return make(shape, dtype, *args, **kwargs)
        finally:
            torch.set_default_dtype(default)

    AttentionMaskConverter._make_causal_mask = staticmethod(wide)


def average_over_gloo() -> None:
    """Let gloo average what it reduces and scatters, as FSDP asks it to; torch 2.8's gives the sum."""
    if not before("torch", "2.13"):
        return
    summed, distributed = torch.distributed.reduce_scatter_tensor, torch.distributed

    def reduce_scatter(output: torch.Tensor, input: torch.Tensor, op: Any, group: Any) -> None:
        assert op == distributed.ReduceOp.AVG
        summed(output, input, op=distributed.ReduceOp.SUM, group=group)
        output /= distributed.get_world_size(group)

    distributed.reduce_scatter_tensor = reduce_scatter


def lora_file() -> dict[str, str]:
    """What diffusers' loaders of LoRA must be told without a network; newer ones look into the folder."""
    return {"weight_name": "pytorch_lora_weights.safetensors"} if before("diffusers", "0.42") else {}


def noise_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs in half precision begin at the noise of those in float32: older torch draws other noise of a seed."""
    randn = torch.randn

    def drawn(*size: Any, dtype: torch.dtype | None = None, **more: Any) -> torch.Tensor:
        return randn(*size, **more).to(dtype or torch.float32)

    monkeypatch.setattr(torch, "randn", drawn)
