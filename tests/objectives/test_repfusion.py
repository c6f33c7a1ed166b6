"""RepFusion: the loss written out, what is trained, frozen and told, what is refused; digits."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import RepFusionConfig, RepFusionObjective, Student
from diffusers_repr.objectives.distillation.teacher import DenoiserTeacher
from diffusers_repr.sweep import few_shot_probe
from diffusers_repr.tasks.held_out_students import every_row
from diffusers_repr.testing import check_objective
from tests.objectives.distillation_cases import Constant, batch, repfusion

DIGITS = str(Path(__file__).parents[2] / "examples" / "models" / "digits-ddpm")


# --- the loss


def hooked(network, paths, *inputs) -> list[torch.Tensor]:
    """By torch's own hooks, in the order of the paths."""
    found = {}
    modules = [(path, network.get_submodule(path)) for path in paths]
    handles = [m.register_forward_hook(lambda m, a, out, path=path: found.update({path: out})) for path, m in modules]
    with torch.no_grad():
        network(*inputs)
    for handle in handles:
        handle.remove()
    return [found[path] for path in paths]


@pytest.mark.parametrize("noise", ["none", "match_t"])
def test_the_loss_is_the_formula(noise):
    objective, data = repfusion(noise=noise), {**batch(), "time": torch.tensor([250.0, 0.0, 750.0, 250.0])}
    assert [layer.path for layer in objective.teacher.layers] == ["mid_block.resnets.1.conv2"]
    out = objective(data)
    base = objective.teacher.denoiser
    x_t = data["pixel_values"]
    if noise == "match_t":
        x_t = base.scheduler.add_noise(x_t, data["noise"], data["time"].long())
    [read] = hooked(base.model, ["mid_block.resnets.1.conv2"], x_t, data["time"].long())
    [stage] = hooked(objective.student.eval(), ["encoder.stages.1"], data["pixel_values"])
    pooled = read.double().mean((2, 3))
    weight, bias = (p.double().detach() for p in objective.projectors[0].parameters())
    projected = (torch.einsum("bchw,dc->bdhw", stage.double(), weight[:, :, 0, 0]) + bias[:, None, None]).mean((2, 3))
    errors = functional.cross_entropy(
        copy.deepcopy(objective.task_head).double()(pooled), data["class_labels"], reduction="none"
    ).detach()
    chances = objective.selector.network(data["pixel_values"]).double().softmax(1).detach()
    own = chances[torch.arange(4), torch.tensor([1, 0, 3, 1])].log()
    wanted = {
        "feature": (projected - pooled).square().mean(),
        "task": errors.mean(),
        "policy": -(own * (errors.mean() - errors)).mean(),
        "entropy": -(chances * chances.log()).sum(1).mean(),
        "reward": -errors.mean(),
        "timestep": torch.tensor(312.5),
    }
    for name, value in wanted.items():
        assert float(out[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    total = wanted["feature"] + wanted["task"] + wanted["policy"] - 0.1 * wanted["entropy"]
    assert float(out["loss"].detach()) == pytest.approx(float(total), rel=1e-5)


def test_gradients_go_where_they_belong():
    """The head's error trains the head alone, the feature's the student and its projector."""
    objective, data = repfusion(feature_weight=0.0), batch()
    objective(data)["loss"].backward()
    assert all(float(p.grad.abs().max()) == 0 for p in objective.student.parameters() if p.grad is not None)
    for part in (objective.task_head, objective.selector):
        assert any(float(p.grad.abs().max()) > 0 for p in part.parameters())
    assert not any(p.requires_grad for p in objective.student.layernorm.parameters())  # behind the map that is read


@pytest.mark.parametrize(
    "settings",
    [{"level": "fixed", "timestep": 261.0, "distance": "relational"}, {"level": "uniform", "distance": "contrastive"},
     {"level": "bounded", "final_max_timestep": 50.0, "bound_steps": 9, "distance": "attention"},
     {"level": "fixed", "timestep": 0.0, "dense": True, "layers": ["down_blocks.1", "mid_block"],
      "student_stages": [0, 1]}],
)  # fmt: skip
def test_other_levels_and_distances_keep_the_contract_without_labels(settings):
    data = batch()
    del data["class_labels"]
    objective = repfusion(classes=0, **settings)
    check_objective(objective, data)
    out = objective(data)
    weight = 1000 if settings.get("distance") == "attention" else 1
    assert float(out["loss"].detach()) == pytest.approx(weight * float(out["feature"]), rel=1e-6)
    assert objective.advice() is None


def test_dense_hints_compare_every_place():
    objective, data = repfusion(classes=0, level="fixed", timestep=100.0, dense=True, layers=["mid_block"]), batch()
    base = objective.teacher.denoiser
    [read] = hooked(base.model, ["mid_block"], data["pixel_values"], 100)
    [stage] = hooked(objective.student, ["encoder.stages.1"], data["pixel_values"])
    wanted = functional.mse_loss(objective.projectors[0](stage), read)
    assert float(objective(data)["feature"]) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_the_teacher_stays_and_stops_early():
    objective, data = repfusion(), batch()
    network = objective.teacher.denoiser.model
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(objective.param_groups(), 0.1)
    ran = []
    network.conv_out.register_forward_hook(lambda *a: ran.append(1))
    for step in range(10):
        objective.train()
        objective(data)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.on_step_end(step + 1, None)
    assert not ran
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    level = objective.teacher.denoiser.level(torch.tensor([5, 400, 900, 10]))
    for noise in ("none", "match_t"):
        teacher = DenoiserTeacher(objective.teacher.denoiser, ["mid_block", "down_blocks.0"], noise)
        early, full = (
            teacher.read(data["pixel_values"], level, noise=data["noise"], stop_early=stop) for stop in (True, False)
        )
        assert all(torch.equal(a, b) for a, b in zip(early, full, strict=True))
    assert ran


def test_the_bonus_for_entropy_ends():
    objective = repfusion(entropy_steps=4, entropy_weight=0.2)
    weights = []
    for step in range(1, 7):
        objective.on_step_end(step, None)
        weights.append(objective.entropy_weight)
    assert weights == pytest.approx([0.15, 0.1, 0.05, 0.0, 0.0, 0.0])
    assert weights[3] == 0.0
    out = objective(batch())
    assert float(out["loss"].detach()) == pytest.approx(float(out["feature"] + out["task"] + out["policy"]), rel=1e-6)


def test_advice():
    """A policy that takes one level for all is told so; one that depends on the image is not."""
    objective, data = repfusion(), batch()
    assert objective.advice() is None
    for bias, told in (([0.0, 9, 0, 0], r"0.00\d nats. The policy takes timestep 250 for nearly every image \(100%\)"),
                       ([0.0, 0, 0, 0], "0.000 nats. The policy draws levels alike for every image")):  # fmt: skip
        objective.selector.network = Constant(torch.tensor(bias))
        objective.seen.zero_()
        objective.information.zero_()
        objective(data)
        assert objective.metrics()["mutual_information"] < 0.01
        assert re.search(told, objective.advice())
        assert objective.advice() in objective.card["text"]

    class Split(nn.Module):
        def forward(self, pixels):
            one = (torch.arange(len(pixels)) % 2)[:, None]
            return 20.0 * torch.cat([one, 1 - one, -1 + 0 * one, -1 + 0 * one], 1)

    objective.selector.network = Split()
    objective.information.zero_()
    objective(data)
    assert objective.metrics()["mutual_information"] == pytest.approx(math.log(2), abs=1e-4)
    assert objective.advice() == "Mutual information between image and level: 0.693 nats."


# --- what is refused


def test_bad_settings():
    for settings, told in (
        ({"timestep": 3.0}, "`timestep` goes with `level: fixed`"),
        ({"level": "bounded"}, "go with `level: bounded`"),
        ({"bound_steps": 3}, "go with `level: bounded`"),
        ({"max_timestep": 3.0}, "`max_timestep` goes with `level: uniform`"),
        ({"distance": "attention", "dense": True}, "`dense` goes with `distance: hint`"),
        ({"policy_levels": 1}, "2 or more levels"),
        ({"entropy_weight": -1.0}, "`entropy_weight` and `entropy_steps` are 0 or more"),
    ):
        with pytest.raises(ValueError, match=told):
            RepFusionConfig("base", **settings)
    for settings, told in (
        ({"classes": 0}, "needs labels of two or more classes"),
        ({"layers": ["mid_blok"]}, "mid_block"),
        ({"student_stages": [2]}, r"a stage of the student, -2 to 1, for each of the 1 teacher layers; got \[2\]"),
        ({"policy_timesteps": [5.0, 5.0]}, "two or more timesteps, which rise"),
        ({"policy_timesteps": [5.0, 2000.0]}, "timestep"),
        ({"level": "uniform", "max_timestep": 0.0}, "`max_timestep` lies from 1 to 1000"),
        ({"level": "fixed", "timestep": 1000.0}, "timestep"),
    ):
        with pytest.raises(ValueError, match=told):
            repfusion(**settings)
    objective, data = repfusion(), batch()
    with pytest.raises(ValueError, match="A policy needs class labels"):
        objective.check_batch({"pixel_values": data["pixel_values"]})
    with pytest.raises(ValueError, match="Labels run from -1 to 7; class ids run from 0 to 4"):
        objective.check_batch({**data, "class_labels": torch.tensor([-1, 7])})


# --- on digits


class Small(nn.Module):
    """Three convolutions, of which the last two are stages."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=s, padding=1), nn.ReLU()) for a, b, s in ((32, 64, 2), (64, 64, 1))
        )

    def forward(self, images):
        x = self.enter(images)
        for stage in self.stages:
            x = stage(x)
        return x


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    return every_row(load_train_data(DataConfig("digits", dataset_split=split, cache_images=True), 1, 8))


@pytest.mark.slow
def test_a_student_of_digits_learns_what_the_teacher_knows():
    torch.manual_seed(0)
    (images, labels), (test, truth) = digits("train"), digits("test")
    config = RepFusionConfig(DIGITS, level="fixed", timestep=100.0, layers=["mid_block"])
    objective = RepFusionObjective(config.load_base(), Student(Small(), size=(8, 8), channels=1), config).train()

    def score():
        bank, rows = (objective.backbone.pooled(objective.student, part) for part in (images, test))
        return few_shot_probe(bank, labels, rows, truth, shots=5).mean

    before, optimizer, losses = score(), torch.optim.AdamW(objective.param_groups(), 1e-3), []
    for _ in range(400):
        out = objective({"pixel_values": images[torch.randint(len(images), (128,))]})
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out["feature"]))
    assert score() > before + 0.064
    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])


@pytest.mark.slow
def test_a_policy_on_digits_beats_random_levels_and_needs_no_image():
    torch.manual_seed(0)
    images, labels = digits("train")
    errors = {}
    for level in ("policy", "uniform"):
        config = RepFusionConfig(DIGITS, noise="match_t", policy_levels=10, entropy_steps=150)
        small = Student(Small(), size=(8, 8), channels=1)
        objective = RepFusionObjective(config.load_base(), small, config, 10).train()
        optimizer, tail = torch.optim.AdamW(objective.param_groups(), 1e-3), []
        for step in range(300):
            rows = torch.randint(len(images), (64,))
            data = {"pixel_values": images[rows], "class_labels": labels[rows]}
            if level == "uniform":
                data["time"] = objective.selector.timesteps[torch.randint(10, (64,))]
            out = objective(data)
            out["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            objective.on_step_end(step + 1, None)
            tail = [*tail[-19:], float(out["task"])]
        errors[level] = sum(tail) / len(tail)
        if level == "policy":
            assert objective.metrics()["mutual_information"] < 0.05
            assert objective.metrics()["level_share"] > 0.7
    assert errors["policy"] < 0.3
    assert errors["uniform"] > 7 * errors["policy"]  # the method's own numbers: nine times, of another teacher
