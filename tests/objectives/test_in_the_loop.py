"""Objectives that hold state beside their parameters, in the training loop: broken off and resumed, bit for bit."""

import pytest
import torch
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from safetensors.torch import load_file

from diffusers_repr import Denoiser
from diffusers_repr.objectives import AlignmentLoss, REGObjective, REPAEObjective, REPAObjective, SelfAlignmentLoss
from tests.objectives.cases import SMALL, sit, teacher
from tests.objectives.test_reg import class_teacher
from tests.testers.models import autoencoder
from tests.training.conftest import fresh_accelerate
from tests.training.loop_cases import Numbers, assert_same_checkpoint, read_lines, run_here

__all__ = ["fresh_accelerate"]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Coloured(Numbers):
    def __init__(self):
        super().__init__(classes=5)
        self.columns["pixel_values"] = self.columns["pixel_values"].expand(-1, 3, -1, -1)


def repa():
    torch.manual_seed(0)
    pipe = SiTPipeline(sit().model, FlowMatchODEScheduler())
    alignment, own = AlignmentLoss("blocks.1", stop_step=3, **SMALL), SelfAlignmentLoss(projector_dim=8, weight=1.0)
    return REPAObjective(Denoiser.from_pipe(pipe), [teacher()], alignment=alignment, losses=[own])


def reg():
    torch.manual_seed(0)
    pipe = SiTPipeline(sit().model, FlowMatchODEScheduler())
    return REGObjective(Denoiser.from_pipe(pipe), [class_teacher()], "blocks.1", **SMALL)


def repa_e():
    torch.manual_seed(0)
    vae = autoencoder((8,), latent_channels=3, scaling_factor=0.7, sample_size=8)
    pipe = SiTPipeline(sit().model, FlowMatchODEScheduler(), vae)
    return REPAEObjective(Denoiser.from_pipe(pipe), [teacher()], "blocks.1", **SMALL)


CASES = [(repa, 0), (reg, 0), (repa_e, 0), *(pytest.param(make, 2, marks=pytest.mark.slow) for make in (repa, repa_e))]


@pytest.mark.parametrize(("make", "lora_rank"), CASES)
def test_resumed_is_uninterrupted(make, lora_rank, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "lr_scheduler": "constant", "lora_rank": lora_rank}
    whole = run_here(tmp_path / "whole", make(), Coloured(), **settings)
    run_here(tmp_path / "broken", make(), Coloured(), **settings, max_train_steps=2)
    resumed = run_here(tmp_path / "broken", make(), Coloured(), **settings)
    assert_same_checkpoint(whole, resumed)
    if make is repa:
        kept = [name for name in load_file(whole / "model.safetensors") if ".teacher." in name]
        assert len(kept) == len(sit().model.state_dict())
    line = read_lines(tmp_path / "whole")[-1]
    assert line["skipped"] == 0
    heads = sorted(path.name for path in (tmp_path / "whole" / "heads").iterdir())
    assert heads == (["projector-self-alignment", "projector-teacher"] if make is repa else ["projector-teacher"])
    pipe = SiTPipeline.from_pretrained(tmp_path / "whole")
    if make is reg:  # what is sampled with is the average, of the head too
        average = load_file(whole / "ema.safetensors")
        for name, value in pipe.class_token.state_dict().items():
            assert torch.equal(value, average[f"class_token.{name}"])
        assert "`class_tokens`" in (tmp_path / "whole" / "README.md").read_text()
    assert pipe(class_labels=[1, 2], num_inference_steps=2).images[0].size == (8, 8)
