"""FSDP2 of two processes equals the plain run; on a CPU accelerate's own code is made to shard over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers_repr.pipelines.sit import SiTPipeline
from safetensors.torch import load_file

from diffusers_repr.training.sharding import block_classes
from tests.training.loop_cases import assert_same, assert_same_checkpoint, read_lines, run_here, tiny_sit_objective
from tests.training.two_processes import CASES, case

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CLOSE = {"rtol": 3e-6, "atol": 3e-6}


@pytest.fixture(scope="module")
def told(together):
    return together[1]["training"][0]["fsdp"]


@pytest.fixture(scope="module")
def folder(together):
    return together[0] / "training" / "fsdp"


@pytest.mark.parametrize("name", CASES)
def test_it_really_shards(told, name):
    """The blocks that the network names, and the rest as one unit; each process holds half."""
    assert told[name]["sharded"]
    assert told[name]["units"] == ["", "network.blocks.0", "network.blocks.1"]
    assert told[name]["share"] < 0.55 * told[name]["size"]


@pytest.mark.parametrize("name", CASES)
def test_sharded_equals_plain(folder, tmp_path, name):
    objective, data, changes = case(name, 4)
    run_here(tmp_path, objective, data, **changes)
    for step in (1, 2, 3):
        for kind in ("model", "ema", "optimizer"):
            files = (
                place / f"checkpoint-0000000{step}" / f"{kind}.safetensors" for place in (folder / name, tmp_path)
            )
            assert_same(*map(load_file, files), **CLOSE)
    for ours, theirs in zip(read_lines(folder / name), read_lines(tmp_path), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    pipes = [SiTPipeline.from_pretrained(place) for place in (folder / name, tmp_path)]
    assert_same(*(pipe.transformer.state_dict() for pipe in pipes), **CLOSE)


def test_resume_is_exact(folder):
    assert_same_checkpoint(*(folder / name / "checkpoint-00000003" for name in ("whole", "resumed")))


def test_adapters_are_merged_from_shards(folder, tmp_path):
    objective, data, changes = case("lora", 4, lora_rank=2)
    run_here(tmp_path, objective, data, **changes)
    kept = [load_file(place / "checkpoint-00000003" / "model.safetensors") for place in (folder / "lora", tmp_path)]
    assert all(".lora_" in name for name in kept[0])
    assert_same(*kept, **CLOSE)
    pipes = [SiTPipeline.from_pretrained(place) for place in (folder / "lora", tmp_path)]
    assert_same(*(pipe.transformer.state_dict() for pipe in pipes), **CLOSE)
    assert (folder / "lora" / "samples" / "step-00000002.png").is_file()
    assert (folder / "lora" / "samples.png").is_file()


def test_bfloat16_is_that_of_autocast(folder, tmp_path):
    """The batch is not rounded: the loss differs from the plain one's by what sums in another order do."""
    objective, data, changes = case("bf16", 4, mixed_precision="bf16")
    run_here(tmp_path, objective, data, **changes)
    kept = [load_file(place / "checkpoint-00000003" / "model.safetensors") for place in (folder / "bf16", tmp_path)]
    assert {tensor.dtype for tensor in kept[0].values()} == {torch.float32}
    assert_same(*kept, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(read_lines(folder / "bf16"), read_lines(tmp_path), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_blocks_that_networks_name():
    objective = tiny_sit_objective()
    objective.network._no_split_modules = ["SiTBlock", "NotThere"]
    assert block_classes(objective) == ["SiTBlock"]


@pytest.mark.gpu
def test_fsdp_of_accelerate_on_a_gpu(tmp_path):
    """One process is enough to have every tensor sharded; it equals the run without FSDP."""
    code = """
import sys
from tests.training.two_processes import case
from tests.training.loop_cases import settings
from diffusers_repr.training import train
objective, data, changes = case("partly", 4, mixed_precision=sys.argv[2])
train(objective, data, settings(sys.argv[1], **changes))
print(sorted({type(p).__name__ for p in objective.parameters()}))
"""
    (tmp_path / "child.py").write_text(code)
    said = {}
    sharded = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    for name, how in (("plain", []), ("fsdp", sharded)):
        for precision in ("no", "bf16"):
            command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *how]
            command += ["--num_machines", "1", "--main_process_port", "0", "--dynamo_backend", "no"]
            command += [str(tmp_path / "child.py"), str(tmp_path / f"{name}-{precision}"), precision]
            env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-4000:]
            said[name] = json.loads(done.stdout.strip().splitlines()[-1].replace("'", '"'))
    assert said == {"plain": ["Parameter"], "fsdp": ["DTensor"]}
    for precision, close in (("no", 1e-5), ("bf16", 1e-3)):
        files = (tmp_path / f"{name}-{precision}/checkpoint-00000003/ema.safetensors" for name in ("plain", "fsdp"))
        assert_same(*map(load_file, files), rtol=close, atol=close)
