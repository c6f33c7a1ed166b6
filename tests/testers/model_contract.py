"""What diffusers expects of a model, as one call a class: `check(case, concern, tmp_path)` for each of `CONCERNS`.

A class of ours needs one `ModelCase`; what diffusers' loaders, savers, casts and offloads do to a model is then done
to it. Each concern has an oracle of its own: the same weights, the same inputs, another way.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoModel, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils import BaseOutput, dynamic_modules_utils
from torch import Tensor, nn

from tests.testers.hosts import before

HALVES = (torch.bfloat16, torch.float16)
EIGHT = torch.float8_e4m3fn
LEAVES = (nn.Linear, nn.Conv2d, nn.Embedding)  # what layerwise casting stores in eight bits


@dataclass(frozen=True, eq=False)
class ModelCase:
    """A class of models, tiny.

    Attributes:
        make: A new one; the same weights each time once it is seeded.
        inputs: Its arguments by name, float32.
        shapes: Of its outputs, by their names in the output object.
        plain: Without `return_dict` it gives the tensor itself.
        wide: Its outputs are float32 where its weights are in half precision.
        close: How far bfloat16 may be from float32; float16 has a tenth.
        targets: Layers for LoRA, by the end of their names.
    """

    make: Callable[[], ModelMixin]
    inputs: Callable[[], dict[str, Any]]
    shapes: Mapping[str, tuple[int, ...]]
    plain: bool = False
    wide: bool = False
    close: float = 0.1
    targets: tuple[str, ...] = ()

    def model(self) -> ModelMixin:
        """A model in evaluation mode with drawn weights, the same each time."""
        return copy.deepcopy(_master(self))

    def given(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return cast(self.inputs(), dtype)

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        with torch.no_grad():
            return list(model(**self.given(dtype), return_dict=False))


@functools.cache
def _master(case: ModelCase) -> ModelMixin:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.make().eval()
        with torch.no_grad():  # away from the zeros and ones that layers start at
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Tensors of floating point in `dtype`, at any depth; timesteps stay, as schedulers give them."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: part if key == "timestep" else cast(part, dtype) for key, part in value.items()}
    return [cast(part, dtype) for part in value] if isinstance(value, list) else value


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def slopes(case: ModelCase, model: nn.Module) -> list[Tensor]:
    """Gradients with respect to all inputs of floating point but the timestep."""
    inputs: list[Tensor] = []

    def watch(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            inputs.append(value.clone().requires_grad_())
            return inputs[-1]
        if isinstance(value, Mapping):
            return {key: part if key == "timestep" else watch(part) for key, part in value.items()}
        return [watch(part) for part in value] if isinstance(value, list) else value

    parts = model(**watch(case.given()), return_dict=False)
    return list(torch.autograd.grad(sum(part.square().sum() for part in parts), inputs))


@contextlib.contextmanager
def silent():
    """Nothing is logged by diffusers from warnings on; its progress bars are no log."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert records == []


def config(case: ModelCase, folder: Path) -> None:
    model = case.model()
    with silent():
        model.save_pretrained(folder / "one")
        again = type(model).from_pretrained(folder / "one")
        again.save_pretrained(folder / "two")
    saved = (folder / "one/config.json").read_text()
    assert saved == (folder / "two/config.json").read_text()
    assert str(folder) not in saved
    assert set(inspect.signature(type(model).__init__).parameters) - {"self"} <= set(json.loads(saved))
    assert not {"auto_map", "_auto_class"} & set(again.config)
    with silent():
        made = type(model).from_config(model.config)
    shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (made, model)]
    assert shapes[0] == shapes[1]


def output(case: ModelCase, folder: Path) -> None:
    model = case.model()
    parts = case.run(model)
    with torch.no_grad():
        found = model(**case.given(), return_dict=True)
        default = model(**case.given())
    assert isinstance(found, BaseOutput)
    assert {name: tuple(value.shape) for name, value in found.items()} == case.shapes
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in found.values())
    assert equal(list(found.to_tuple()), parts)
    assert equal([default] if case.plain else list(default.to_tuple()), parts)  # also: it is deterministic
    assert equal(case.run(copy.deepcopy(model)), parts)


def saving(case: ModelCase, folder: Path) -> None:
    """Whole, in shards, as a variant; all give the weights that were saved."""
    model, size = case.model(), sum(value.nbytes for value in case.model().state_dict().values())
    wanted = case.run(model)
    model.save_pretrained(folder / "shards", max_shard_size=size // 3)
    assert len(list((folder / "shards").glob("*-of-*.safetensors"))) > 1
    model.save_pretrained(folder / "variant", variant="ema")
    assert [path.name for path in (folder / "variant").glob("*.safetensors")] == [
        "diffusion_pytorch_model.ema.safetensors"
    ]
    with silent():
        assert equal(case.run(type(model).from_pretrained(folder / "shards")), wanted)
        assert equal(case.run(type(model).from_pretrained(folder / "shards", device_map="auto")), wanted)
        assert equal(case.run(type(model).from_pretrained(folder / "variant", variant="ema")), wanted)


def loading_in_half(case: ModelCase, folder: Path) -> None:
    """`dtype`, or `torch_dtype`, gives what casting gives, whatever way the weights come in."""
    case.model().save_pretrained(folder / "single")
    ways = [{}, {"low_cpu_mem_usage": False}, {"device_map": "auto"}]
    for dtype, way in zip([*HALVES, HALVES[0]], ways, strict=True):
        with silent():
            model = type(case.model()).from_pretrained(folder / "single", dtype=dtype, **way)
            cast_model = case.model().to(dtype)
        assert model.dtype == dtype
        assert all(value.dtype == dtype for value in model.state_dict().values() if value.is_floating_point())
        assert equal(case.run(model, dtype), case.run(cast_model, dtype)), way
    for dtype in HALVES:
        half = case.model().to(dtype)
        half.save_pretrained(folder / "half")
        with silent():
            assert equal(
                case.run(type(half).from_pretrained(folder / "half", dtype=dtype), dtype), case.run(half, dtype)
            )
            assert type(half).from_pretrained(folder / "half").dtype == torch.float32


def casting(case: ModelCase, folder: Path) -> None:
    """In silence, close to float32, in the dtype of the weights or in float32."""
    wanted = case.run(case.model())
    with silent():
        models = [case.model().half(), case.model().to(torch.bfloat16), case.model().to("cpu", torch.bfloat16)]
        models.append(case.model().half().float())
        models.append(case.model().double())
    for model in models:
        dtype = model.dtype
        bound = {torch.bfloat16: case.close, torch.float64: 1e-4}.get(dtype, case.close / 10)
        for ours, theirs in zip(case.run(model, dtype), wanted, strict=True):
            assert ours.dtype == dtype or (case.wide and ours.dtype == torch.float32)
            assert not (case.wide and dtype in HALVES) or ours.dtype == torch.float32
            torch.testing.assert_close(
                ours.float(), theirs, rtol=bound, atol=bound / (10 if dtype == torch.float64 else 1)
            )
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(case.run(case.model()), wanted, strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=case.close, atol=case.close)


def stored_as(case: ModelCase, storage: torch.dtype, compute: torch.dtype, offloaded: bool = False) -> None:
    """What weights stored in one dtype give is what weights rounded to it give, bit for bit."""
    model, rounded, cpu = case.model().to(compute), case.model().to(compute), torch.device("cpu")
    if offloaded:
        model.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)
    stored = {name for name, value in model.state_dict().items() if value.dtype == storage}
    assert bool(stored) == any(isinstance(module, LEAVES) for module in model.modules())
    for name, value in rounded.state_dict().items():
        if name in stored:
            value.copy_(value.to(storage).to(compute))
    assert equal(case.run(model, compute), case.run(rounded, compute))
    if compute == torch.float32:
        assert equal(slopes(case, model), slopes(case, rounded))
    assert {name for name, value in model.state_dict().items() if value.dtype == storage} == stored


def layerwise_casting(case: ModelCase, folder: Path) -> None:
    for compute in (torch.float32, torch.bfloat16):
        stored_as(case, EIGHT, compute)
    stored_as(case, torch.float16, torch.float32, offloaded=True)


def offload(case: ModelCase, folder: Path) -> None:
    """Weights that are on disk or on no device outside of the layer's own call."""
    wanted, cpu = case.run(case.model()), torch.device("cpu")
    for kind in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        model = case.model()
        model.enable_group_offload(cpu, cpu, offload_to_disk_path=str(folder / kind["offload_type"]), **kind)
        for _ in range(2):  # the second finds what the first has put away
            assert equal(case.run(model), wanted), kind
    model = case.model()
    cpu_offload(model, cpu)
    assert equal(case.run(model), wanted)
    assert all(value.device.type == "meta" for value in model.parameters())
    case.model().save_pretrained(folder / "model")
    on_disk = {"device_map": {"": "disk"}, "offload_folder": str(folder / "weights")}
    if before("accelerate", "1.15"):
        with pytest.raises(ValueError, match="offload the whole model to the disk"):
            type(model).from_pretrained(folder / "model", **on_disk)
    elif any(name in model.state_dict() for name, _ in model.named_buffers()):
        with pytest.raises(ValueError, match="on disk, where its buffers"):
            type(model).from_pretrained(folder / "model", **on_disk)
    else:
        assert equal(case.run(type(model).from_pretrained(folder / "model", **on_disk)), wanted)


def training(case: ModelCase, folder: Path) -> None:
    """A gradient for every parameter, the same with gradient checkpointing."""
    found = []
    for on in (False, True):
        model = case.model().train()
        if on and not model._supports_gradient_checkpointing:
            continue
        if on:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            parts = list(model(**case.given(), return_dict=False))
            if any(True for _ in model.parameters()):
                sum(part.square().mean() for part in parts).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert all(grad is not None and grad.isfinite().all() for grad in found[-1].values())
    assert all(torch.equal(found[0][name], found[-1][name]) for name in found[0])


def lora(case: ModelCase, folder: Path) -> None:
    """An adapter is nothing at first, trained alone, saved alone, and acts in half precision and over eight bits."""
    peft = pytest.importorskip("peft")
    model = case.model()
    assert isinstance(model, PeftAdapterMixin) == bool(case.targets)
    if not case.targets:
        return
    wanted = case.run(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=list(case.targets)))
    assert equal(case.run(model), wanted)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    with torch.no_grad():
        for value in trained.values():
            value.normal_(std=0.3)
    adapted = case.run(model)
    assert not torch.equal(adapted[0], wanted[0])
    model.save_lora_adapter(folder)
    for dtype in (torch.float32, torch.bfloat16):
        again = case.model().to(dtype)
        again.load_lora_adapter(folder, prefix=None, weight_name="pytorch_lora_weights.safetensors")
        found = case.run(again.to(dtype), dtype)
        torch.testing.assert_close(found[0].float(), adapted[0], rtol=2 * case.close, atol=2 * case.close)
        assert dtype != torch.float32 or equal(found, adapted)
    model.enable_layerwise_casting(storage_dtype=EIGHT, compute_dtype=torch.float32)
    assert case.run(model)[0].isfinite().all()


def auto_model(case: ModelCase, folder: Path) -> None:
    """`AutoModel` finds the class with consent; without it, and by the class itself, no code of the folder runs."""
    model = case.model()
    model.save_pretrained(folder / "model")
    (file,) = (folder / "model").glob("*.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(folder / "modules"))
        patch.syspath_prepend(str(folder / "modules"))
        again = AutoModel.from_pretrained(str(folder / "model"), trust_remote_code=True)
        assert type(again) is type(model)
        assert equal(case.run(again), case.run(model))
        sys.modules.pop(f"diffusers_modules.local.{file.stem}")
        file.write_text(f"open({str(folder / 'ran')!r}, 'w')")
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoModel.from_pretrained(str(folder / "model"))
        type(model).from_pretrained(folder / "model")
    assert not (folder / "ran").exists()


CONCERNS: dict[str, Callable[[ModelCase, Path], None]] = {
    one.__name__: one
    for one in (
        config,
        output,
        saving,
        loading_in_half,
        casting,
        layerwise_casting,
        offload,
        training,
        lora,
        auto_model,
    )
}


def check(case: ModelCase, concern: str, folder: Path) -> None:
    """Hold a class to one of `CONCERNS`; `folder` is an empty one."""
    CONCERNS[concern](case, folder)
