"""`train` from outside: kills, bad losses, damage, and settings that must not change the result."""

import json
import math
import os
import signal
import time
import warnings

import pytest
import torch
from accelerate.tracking import get_available_trackers
from diffusers import DDPMScheduler
from safetensors.torch import load_file

import diffusers_repr.training.checkpoints as checkpoints
from diffusers_repr import Denoiser
from diffusers_repr.objectives import DiffusionObjective
from diffusers_repr.training import CheckpointError
from diffusers_repr.training.checks import check_place
from diffusers_repr.training.run import Run
from tests.testers.cases import slow
from tests.training.loop_cases import (
    STEPS,
    Numbers,
    assert_same,
    assert_same_checkpoint,
    in_a_fork,
    read_lines,
    run_here,
    tiny_objective,
    tiny_pipe,
    tiny_sit_objective,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six steps undisturbed, a checkpoint every two, a line of the log every four."""
    folder = tmp_path_factory.mktemp("whole")
    run_here(folder, logging_steps=4, gradient_accumulation_steps=2)
    return folder


def assert_like(folder, whole, step=6):
    assert_same_checkpoint(folder / f"checkpoint-{step:08d}", whole / f"checkpoint-{step:08d}")
    assert read_lines(folder) == read_lines(whole)
    assert not list(folder.glob(".*"))


# Kills


def killed_at(name, nth, target):
    """A change of `target.name` that kills the process at its nth call: before it acts, or after."""
    before = getattr(target, name)
    calls = []

    def deadly(*given, **named):
        calls.append(None)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(*given, **named)

    return deadly


@pytest.mark.parametrize(
    ("name", "nth", "target"),
    [
        slow("step", 1, Run),  # before anything
        ("step", 4, Run),  # inside a window of the log, after a checkpoint
        ("save_file", 5, checkpoints),  # in the middle of the second checkpoint
        slow("write_json", 2, checkpoints),  # before its state
        slow("step_of", 1, checkpoints),  # it has its name, nothing was dropped yet
        ("save_pretrained", 1, DiffusionObjective),  # all steps are done, the result is not written
    ],
)
def test_a_kill_loses_nothing(whole, tmp_path, name, nth, target, monkeypatch):
    def run():
        run_here(tmp_path, logging_steps=4, gradient_accumulation_steps=2)

    with monkeypatch.context() as deadly:
        deadly.setattr(target, name, killed_at(name, nth, target))
        assert in_a_fork(run) == -signal.SIGKILL
    if (tmp_path / "loss.jsonl").is_file():  # the log may be ahead, and its last line cut
        with (tmp_path / "loss.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
    run()
    assert_like(tmp_path, whole)
    assert_same(*(load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (tmp_path, whole)))


def until_a_new_checkpoint(folder, seconds):
    seen = len(checkpoints.list_checkpoints(folder))
    deadline = time.monotonic() + 120
    while len(checkpoints.list_checkpoints(folder)) == seen and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(seconds)


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(tmp_path):
    settings = {"max_train_steps": 250, "checkpointing_steps": 7, "logging_steps": 5, "checkpoints_total_limit": 40}
    run_here(tmp_path / "whole", **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        wait = float(torch.rand((), generator=generator)) * 0.3
        ended = in_a_fork(
            lambda: run_here(tmp_path / "killed", **settings),
            lambda wait=wait: until_a_new_checkpoint(tmp_path / "killed", wait),
        )
        assert ended == -signal.SIGKILL
    run_here(tmp_path / "killed", **settings)
    assert_like(tmp_path / "killed", tmp_path / "whole", 250)


def test_a_finished_run_is_left_as_it_is(whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    steps = []
    run_here(
        whole, logging_steps=4, gradient_accumulation_steps=2, evaluate=lambda pipe, step: steps.append(step) or {}
    )
    assert {path.name: path.read_bytes() for path in whole.iterdir() if path.name in before} == before
    assert steps == [6]
    (whole / "evaluation.jsonl").unlink()


def test_a_longer_run_goes_on(tmp_path):
    """Of a constant learning rate; the step at which a run ends is no part of it."""
    for steps in (3, 6):
        run_here(tmp_path / "parts", lr_scheduler="constant", max_train_steps=steps)
    run_here(tmp_path / "whole", lr_scheduler="constant")
    assert_same_checkpoint(*(tmp_path / name / "checkpoint-00000006" for name in ("parts", "whole")))
    with pytest.raises(ValueError, match="checkpoint-00000006 is past --max_train_steps 5. Raise that"):
        run_here(tmp_path / "whole", lr_scheduler="constant", max_train_steps=5)


# Checkpoints that do not fit


def test_a_damaged_checkpoint(whole, tmp_path):
    run_here(tmp_path, logging_steps=4, gradient_accumulation_steps=2)
    file = tmp_path / "checkpoint-00000006" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning, match="checkpoint-00000006 is damaged.*Going on from checkpoint-00000004"):
        run_here(tmp_path, logging_steps=4, gradient_accumulation_steps=2)
    assert_like(tmp_path, whole)
    for path in tmp_path.glob("checkpoint-*"):
        (path / "ema.safetensors").unlink()
    with pytest.raises(CheckpointError, match="No checkpoint in .* is whole"):
        run_here(tmp_path, logging_steps=4, gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 8}, r"of a run with \{'seed': 7\}"),
        ({"data": Numbers(14)}, r"'data': \{'rows': 13"),
        ({"recipe": {"repa_layer": "other"}}, r"\{'repa_layer': None\}"),
        ({"mixed_precision": "bf16"}, r"'mixed_precision': "),
        ({"resume_from_checkpoint": "none"}, "another --output_dir"),
        ({"resume_from_checkpoint": "checkpoint-1"}, "No checkpoint 'checkpoint-1'"),
    ],
)
def test_checkpoints_of_another_run(whole, changes, message):
    before = sorted(path.name for path in whole.iterdir())
    with pytest.raises(ValueError, match=message):
        run_here(whole, **{"logging_steps": 4, "gradient_accumulation_steps": 2, **changes})
    assert sorted(path.name for path in whole.iterdir()) == before


# Losses that are not finite


class Broken(DiffusionObjective):
    """Multiplies the loss of chosen calls."""

    calls = 0
    factors: dict = {}

    def forward(self, batch, phase="main"):
        self.calls += 1
        out = super().forward(batch, phase)
        return {**out, "loss": out["loss"] * self.factors.get(self.calls, 1.0), "calls": torch.tensor(self.calls)}


def broken(factors):
    objective = tiny_objective(kind=Broken)
    objective.factors = factors
    return objective


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path, bad):
    run_here(tmp_path, broken({2: bad}), max_train_steps=3, checkpointing_steps=1, logging_steps=2)
    for name in ("model", "ema", "optimizer"):
        assert_same(*(load_file(tmp_path / f"checkpoint-0000000{n}" / f"{name}.safetensors") for n in (1, 2)))
    last = load_file(tmp_path / "checkpoint-00000003" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in last.values())
    assert [(line["step"], line["skipped"]) for line in read_lines(tmp_path)] == [(2, 1), (3, 1)]
    assert read_lines(tmp_path)[0]["calls"] == 1  # the mean of the one step that took place
    assert "1 skipped" in (tmp_path / "README.md").read_text()


def test_losses_that_are_nan_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_repr.training.run.MAX_SKIPPED_IN_A_ROW", 3)
    with pytest.raises(
        FloatingPointError, match="3 losses in a row were not finite from the first step on.*--learning"
    ):
        run_here(tmp_path, broken({n: math.nan for n in range(1, 99)}), checkpointing_steps=1)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 2
    assert not (tmp_path / "model_index.json").exists()


def test_a_short_run_without_any_finite_loss_is_no_result(tmp_path):
    with pytest.raises(FloatingPointError, match="2 losses in a row were not finite from the first step on"):
        run_here(tmp_path, broken({1: math.nan, 2: math.nan}), max_train_steps=2, checkpointing_steps=5)
    assert not (tmp_path / "model_index.json").exists()


def test_losses_that_become_nan_leave_the_last_good_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_repr.training.run.MAX_SKIPPED_IN_A_ROW", 3)
    with pytest.raises(FloatingPointError, match="3 losses in a row were not finite; the weights are those before"):
        run_here(tmp_path, broken({n: math.nan for n in range(3, 99)}), max_train_steps=9, checkpointing_steps=2)
    kept = load_file(checkpoints.list_checkpoints(tmp_path)[-1] / "model.safetensors")
    assert_same(kept, load_file(tmp_path / "checkpoint-00000002" / "model.safetensors"))


# Settings that leave the result as it is


def test_accumulation_equals_a_larger_batch(tmp_path):
    for name, batch, parts in (("parts", 2, 4), ("whole", 8, 1)):
        run_here(tmp_path / name, tiny_objective(), Numbers(drawn=True), train_batch_size=batch,
                 gradient_accumulation_steps=parts, learning_rate=1e-3, adam_epsilon=1e-3)  # fmt: skip
    for name in ("model", "ema"):
        files = (tmp_path / run / "checkpoint-00000006" / f"{name}.safetensors" for run in ("parts", "whole"))
        assert_same(*map(load_file, files), rtol=1e-5, atol=2e-6)
    parts, whole = (read_lines(tmp_path / name) for name in ("parts", "whole"))
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_workers_change_nothing(whole, tmp_path):
    run_here(tmp_path, logging_steps=4, gradient_accumulation_steps=2, dataloader_num_workers=2)
    assert_like(tmp_path, whole)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    for name, on in (("with", True), ("without", False)):
        run_here(tmp_path / name, gradient_checkpointing=on, max_train_steps=3)
    files = (tmp_path / name / "checkpoint-00000003" / "model.safetensors" for name in ("with", "without"))
    assert_same(*map(load_file, files), rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_that_is_not_there(tmp_path):
    objective = tiny_objective()
    objective.network._supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="UNet2DModel has no gradient checkpointing; drop --gradient_checkpointing"):
        run_here(tmp_path, objective, gradient_checkpointing=True)


@pytest.mark.slow
def test_compiling_changes_nothing(tmp_path):
    smooth = {"adam_epsilon": 1e-3, "learning_rate": 1e-3, "max_train_steps": 3, "checkpointing_steps": 3}
    for name, on in (("with", True), ("without", False)):
        run_here(tmp_path / name, tiny_sit_objective(), torch_compile=on, **smooth)
    for file in ("checkpoint-00000003/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        files = (tmp_path / name / file for name in ("with", "without"))
        assert_same(*map(load_file, files), rtol=1e-5, atol=1e-6)


def test_bfloat16(tmp_path):
    def dtypes(pipe, step):
        return {"float32": all(p.dtype == torch.float32 for p in pipe.unet.parameters())}

    run_here(tmp_path, mixed_precision="bf16", evaluate=dtypes, save_dtype="bfloat16")
    assert json.loads((tmp_path / "evaluation.jsonl").read_text()) == {"step": 6, "float32": 1.0}
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    kept = load_file(tmp_path / "checkpoint-00000006" / "model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert all(math.isfinite(line["loss"]) for line in read_lines(tmp_path))
    run_here(tmp_path / "exact", max_train_steps=3, lr_scheduler="constant")
    run_here(tmp_path / "rounded", max_train_steps=3, lr_scheduler="constant", mixed_precision="bf16")
    exact, rounded = (read_lines(tmp_path / name)[0]["loss"] for name in ("exact", "rounded"))
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.05)


def test_no_warning_of_ours(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="diffusers_repr")
        run_here(tmp_path, max_train_steps=1)


def test_what_a_run_refuses_before_its_first_step(tmp_path):
    if "wandb" not in [str(tracker) for tracker in get_available_trackers()]:
        with pytest.raises(ImportError, match=r"--report_to wandb: it is not installed .*train"):
            run_here(tmp_path / "run", report_to="wandb")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file; name a folder"):
        run_here(tmp_path / "file")
    bare = DiffusionObjective(Denoiser(tiny_pipe().unet, DDPMScheduler(num_train_timesteps=STEPS)))
    with pytest.raises(TypeError, match=r"Denoiser.from_pipe\(pipe\)"):
        run_here(tmp_path / "run", objective=bare)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "run").exists()


def test_a_run_that_ends_in_bad_steps_says_so(tmp_path):
    with pytest.warns(UserWarning, match="The last [1-5] steps were skipped"):
        run_here(tmp_path, learning_rate=1e30, lr_warmup_steps=0, lr_scheduler="constant")


def test_processes_that_found_different_checkpoints():
    class Two:
        num_processes, device = 2, torch.device("cpu")

        def __init__(self, other):
            self.other = other

        def gather(self, mine):
            return torch.cat([mine, torch.tensor([self.other])])

    check_place(Two(3), 3, "out")
    with pytest.raises(RuntimeError, match=r"from the steps \[3, 0\]. All machines must see the same"):
        check_place(Two(0), 3, "out")
