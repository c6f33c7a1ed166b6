"""Tiny objectives, data and runs for the tests of the training loop."""

import json
import os
import signal

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from safetensors.torch import load_file

from diffusers_repr import Denoiser
from diffusers_repr.data import TrainData
from diffusers_repr.models import SiTTransformer2DModel
from diffusers_repr.objectives import DiffusionObjective, ModelArtifact, Objective
from diffusers_repr.training import TrainingConfig, make_accelerator, train

STEPS = 100  # of the noise process


class Toy(Objective):
    """Base of objectives of bare modules: all that they hold is saved, and averaged."""

    def artifacts(self):
        return [ModelArtifact(module, name, folder=name) for name, module in self.named_children()]


def tiny_pipe(classes=0, **changes):
    """A grey 8x8 U-Net of 20 thousand weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        **{
            "sample_size": 8,
            "in_channels": 1,
            "out_channels": 1,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "norm_num_groups": 4,
            "num_class_embeds": classes + 1 if classes else None,
            **changes,
        }
    )
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=STEPS))


def tiny_objective(classes=0, kind=DiffusionObjective, **changes):
    return kind(Denoiser.from_pipe(tiny_pipe(classes, **changes)))


def tiny_sit_objective(kind=DiffusionObjective):
    """A grey 8x8 SiT of 15 thousand weights, none of them zero."""
    torch.manual_seed(0)
    sit = SiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, num_layers=2, hidden_size=16, num_attention_heads=2, num_classes=0
    )
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return kind(Denoiser.from_pipe(SiTPipeline(transformer=sit, scheduler=FlowMatchODEScheduler())))


class Numbers(TrainData):
    """Random images; with `drawn` they bring their noise and time, else `on_device` draws from torch's generator."""

    def __init__(self, count=13, drawn=False, classes=0, name="numbers", times=STEPS):
        generator = torch.Generator().manual_seed(1)
        self.columns = {"pixel_values": torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1}
        if drawn:
            self.columns["noise"] = torch.randn(count, 1, 8, 8, generator=generator)
            self.columns["time"] = torch.randint(1, times, (count,), generator=generator)
        if classes:
            self.columns["class_labels"] = torch.arange(count) % classes
        self.count, self.drawn, self.classes, self.name = count, drawn, classes, name

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"index": torch.tensor(index), **{name: column[index] for name, column in self.columns.items()}}

    def on_device(self, batch):
        pixels = batch["pixel_values"]
        return {**batch, "pixel_values": pixels if self.drawn else pixels + 0.1 * torch.randn_like(pixels)}

    def fingerprint(self):
        return {"rows": self.count, "name": self.name}

    @property
    def class_names(self):
        return [str(i) for i in range(self.classes)] or None


def settings(folder, **changes):
    fast = {
        "output_dir": str(folder),
        "train_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 0.01,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 10,
        "logging_steps": 3,
        "ema_max_decay": 0.5,
        "adam_weight_decay": 0.01,
        "seed": 7,
        "eval_batch_size": 0,
        "num_inference_steps": 2,
    }
    return TrainingConfig(**{**fast, **changes})


def forget_accelerate():
    """So that the next run of this process is as the first."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run_here(folder, objective=None, data=None, *, evaluate=None, recipe=None, **changes):
    """`train` in this process, as by a fresh command; its checkpoint of the last step."""
    forget_accelerate()
    objective = tiny_objective(dropout=0.1) if objective is None else objective
    config = settings(folder, **changes)
    accelerator = make_accelerator(config, len(objective.phases) > 1)  # one of its own: several runs in a process
    data = Numbers() if data is None else data
    train(objective, data, config, evaluate=evaluate, recipe=recipe, accelerator=accelerator)
    return folder / f"checkpoint-{config.max_train_steps:08d}"


def in_a_fork(run, until=None):
    """`run()` in a child process, which `until()` may end early by SIGKILL; how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    if until is not None:
        until()
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return -signal.SIGKILL if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def read_lines(folder, speed=False):
    """Lines of the log, by default without their speed."""
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if speed or k != "images_per_second"} for line in lines]


def assert_same_checkpoint(first, second):
    """Bit for bit: weights, moving average, optimizer, position."""
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names == ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
    for name in names:
        assert_same(load_file(first / name), load_file(second / name))
    states = [json.loads((path / "state.json").read_text()) for path in (first, second)]
    assert states[0]["progress"] == states[1]["progress"]


def assert_same(first, second, **tolerance):
    """Dicts of tensors are equal, or close."""
    assert first.keys() == second.keys()
    assert first
    for name, tensor in first.items():
        if tolerance:
            torch.testing.assert_close(tensor, second[name], **tolerance, msg=lambda text, at=name: f"{at}: {text}")
        else:
            assert torch.equal(tensor, second[name]), name
