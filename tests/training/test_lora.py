import json

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from safetensors.torch import load_file
from torch import nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.models import JointViTModel
from diffusers_repr.objectives import DiffusionObjective
from diffusers_repr.objectives.joint.hybvit import HybViTObjective
from diffusers_repr.training.lora import add_lora
from tests.testers.hosts import lora_file
from tests.testers.models import saved
from tests.training.loop_cases import (
    Numbers,
    Toy,
    assert_same,
    assert_same_checkpoint,
    read_lines,
    run_here,
    tiny_objective,
    tiny_pipe,
    tiny_sit_objective,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SETTINGS = {"lora_rank": 2, "learning_rate": 0.05, "lr_warmup_steps": 0}


class WithHead(DiffusionObjective):
    """Something else is trained beside the network, and not saved."""

    discarded = ("head",)

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.head = nn.Linear(1, 1)

    def forward(self, batch, phase="main"):
        out = super().forward(batch)
        return {**out, "loss": out["loss"] * (1 + self.head(torch.ones(1)).square().sum())}


def test_only_adapters_and_heads_are_trained_and_the_result_is_plain(tmp_path, capsys):
    objective = tiny_objective(kind=WithHead)
    before = {name: tensor.clone() for name, tensor in objective.network.state_dict().items()}
    last = run_here(tmp_path, objective, Numbers(), **SETTINGS)
    kept = load_file(last / "model.safetensors")
    assert all(".lora_" in name or name.startswith("head.") for name in kept)
    assert sum(tensor.numel() for tensor in kept.values()) < 0.1 * sum(t.numel() for t in before.values())
    frozen = {n: p for n, p in objective.network.named_parameters() if ".lora_" not in n}
    assert_same({n.replace(".base_layer.", "."): p for n, p in frozen.items()},
                {n: before[n] for n in (n.replace(".base_layer.", ".") for n in frozen)})  # fmt: skip
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()
    told = "merged into the weights that are saved, and not saved apart: diffusers loads none into a UNet2DModel"
    assert told in capsys.readouterr().out
    assert told in (tmp_path / "README.md").read_text()
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    assert type(pipe.unet) is UNet2DModel
    changed = {n for n, p in pipe.unet.state_dict().items() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.rsplit(".", 2)[-2] in ("to_q", "to_k", "to_v", "0") and n.endswith(".weight") for n in changed)
    objective.load_state_dict(load_file(last / "ema.safetensors"), strict=False)  # the averaged adapters
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 60])
    with torch.no_grad():
        torch.testing.assert_close(pipe.unet(x, t).sample, objective.network.eval()(x, t).sample)
        assert not torch.allclose(pipe.unet(x, t).sample, tiny_pipe().unet.eval()(x, t).sample, atol=1e-3)


def test_resume_is_exact(tmp_path):
    run_here(tmp_path / "whole", **SETTINGS)
    run_here(tmp_path / "parts", **SETTINGS)
    for path in (tmp_path / "parts").glob("checkpoint-0000000[46]"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    run_here(tmp_path / "parts", **SETTINGS)
    assert_same_checkpoint(*(tmp_path / name / "checkpoint-00000006" for name in ("parts", "whole")))
    assert read_lines(tmp_path / "parts") == read_lines(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"\{'lora_rank': 2\}"):
        run_here(tmp_path / "parts", **{**SETTINGS, "lora_rank": 4})


def test_previews_of_a_tuned_network(tmp_path):
    run_here(tmp_path, **SETTINGS, eval_batch_size=8, validation_steps=3)
    assert (tmp_path / "samples" / "step-00000003.png").is_file()
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert "lora" not in json.dumps(config)


def test_a_joint_vit(tmp_path):
    """Attention alone moves, merged into what is saved; the classifier stays as frozen as the rest."""
    torch.manual_seed(0)
    pipe = JointDiffusionPipeline(JointViTModel(8, 4, 1, 2, 8, 2, num_classes=4), DDPMScheduler())
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    objective = HybViTObjective(Denoiser.from_pipe(pipe))
    run_here(tmp_path, objective, Numbers(classes=4), **SETTINGS, max_train_steps=2)
    again = JointDiffusionPipeline.from_pretrained(tmp_path).unet
    changed = {name for name, tensor in again.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        f"blocks.{at}.attn.{part}.weight" for at in (0, 1) for part in ("to_q", "to_k", "to_v", "to_out.0")
    }
    assert again.config.form == "hybvit"


class Photos(Numbers):
    """In colour, of the size of the tiny Stable Diffusion."""

    def __init__(self):
        super().__init__(4)
        self.columns["pixel_values"] = torch.rand(4, 3, 32, 48) * 2 - 1


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_adapters_apart_load_by_diffusers_onto_the_base_and_give_what_the_merged_weights_give(tmp_path):
    place = saved("sd")
    objective = DiffusionObjective(Denoiser.from_pretrained(place), label_dropout=1.0)
    run_here(tmp_path, objective, Photos(), **SETTINGS, max_train_steps=3)
    base = StableDiffusionPipeline.from_pretrained(place)
    unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    x, t = torch.randn(2, 4, 4, 6), torch.tensor([3, 600])
    text = torch.randn(2, 7, base.unet.config.cross_attention_dim)
    with torch.no_grad():
        plain, wanted = (network(x, t, text).sample for network in (base.unet, unet))
        base.load_lora_weights(str(tmp_path), **lora_file())
        torch.testing.assert_close(base.unet(x, t, text).sample, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    assert f'pipe.load_lora_weights("{tmp_path.name}")' in (tmp_path / "README.md").read_text()
    assert "pytorch_lora_weights.safetensors" in [file.path for file in plan_upload(tmp_path).files]


def test_adapters_of_a_sit_load_onto_its_network(tmp_path):
    before = tiny_sit_objective().network.eval()
    run_here(tmp_path, tiny_sit_objective(), Numbers(times=1000), **SETTINGS, max_train_steps=3)
    merged = SiTPipeline.from_pretrained(tmp_path).transformer
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([30, 600])
    with torch.no_grad():
        plain, wanted = before(x, t).sample, merged(x, t).sample
        before.load_lora_adapter(str(tmp_path), prefix="transformer", use_safetensors=True, **lora_file())
        torch.testing.assert_close(before(x, t).sample, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-3)
    card = (tmp_path / "README.md").read_text()
    assert 'pipe.transformer.load_lora_adapter("' in card
    assert "not saved apart" not in card


def test_no_attention_to_adapt():
    class Bare(Toy):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(ValueError, match=r"--lora_rank found no attention projection .* in Sequential \(network\)"):
        add_lora(Bare(), 2)
