"""DreamTeacher: targets, losses written out, shapes of the pyramid, label distillation, what is matched."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn import functional

from diffusers_repr import Denoiser
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.denoiser import LabelConditioner
from diffusers_repr.models import FeatureInterpreter
from diffusers_repr.objectives import (
    DreamTeacherConfig,
    DreamTeacherObjective,
    InterpreterConfig,
    InterpreterObjective,
    StudentConfig,
)
from diffusers_repr.objectives.distillation.distances import (
    attention_map,
    attention_transfer,
    normalized,
    soft_cross_entropy,
)
from diffusers_repr.objectives.distillation.dreamteacher import matched_levels
from diffusers_repr.objectives.distillation.interpreter import dice_loss
from diffusers_repr.objectives.distillation.pyramid import PyramidPooling, PyramidRegressor
from diffusers_repr.objectives.distillation.teacher import decoder_layers
from diffusers_repr.sweep import few_shot_probe
from diffusers_repr.tasks.held_out_students import every_row
from diffusers_repr.testing import check_objective
from tests.objectives.distillation_cases import CONVNEXT, batch, denoiser, dreamteacher, student
from tests.objectives.test_repfusion import hooked
from tests.testers.models import build, unet2d

DIGITS = str(Path(__file__).parents[2] / "examples" / "models" / "digits-ddpm")
TAPS = ["up_blocks.1.attentions.1", "up_blocks.0.resnets.1"]  # of strides 2 and 4


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- pieces


def test_attention_tells_where_and_not_what():
    x = maps(2, 6, 4, 5)
    for same in (7.5 * x, x[:, torch.randperm(6)], -x):
        assert float((attention_map(same) - attention_map(x)).abs().max()) < 1e-6
    assert float(attention_transfer(x, x)) == 0
    assert float(attention_transfer(x, x.flip(3))) > 0.01
    leaf = x.clone().requires_grad_()
    attention_transfer(leaf, x).backward()
    assert bool(leaf.grad.isfinite().all())


def test_targets_are_normed():
    x = maps(3, 6, 4, 5) * 4 + 2
    whole, each = normalized(x).double(), normalized(x, channels_only=True).double()
    values = x.double().flatten(1)
    wanted = (values - values.mean(1, keepdim=True)) / values.var(1, keepdim=True, unbiased=False).sqrt()
    torch.testing.assert_close(whole.flatten(1), wanted, atol=1e-5, rtol=1e-5)
    wanted = (x.double() - x.double().mean(1, keepdim=True)) / x.double().var(1, keepdim=True, unbiased=False).sqrt()
    torch.testing.assert_close(each, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(normalized(3 * x + 7), normalized(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(normalized(-x), normalized(x), atol=0.1)
    assert float(functional.mse_loss(torch.zeros_like(x), normalized(x))) == pytest.approx(1, abs=1e-4)


def test_soft_labels():
    a, b = 3 * maps(2, 5, 4, 4), 3 * maps(2, 5, 4, 4, seed=1)
    assert float(soft_cross_entropy(a, b, 1e6)) == pytest.approx(math.log(5), abs=1e-4)
    p = (b.double() / 4).softmax(1)
    assert float(soft_cross_entropy(b, b, 4.0)) == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    q = (a.double() / 4).softmax(1).log()
    assert float(soft_cross_entropy(a, b, 4.0)) == pytest.approx(float(-(p * q).sum(1).mean()), rel=1e-5)
    assert float(soft_cross_entropy(a, b, 4.0)) > float(soft_cross_entropy(b, b, 4.0))


def test_dice_against_a_loop():
    logits, masks = maps(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    masks[0, 0, :2] = 255
    p = logits.double().softmax(1)
    total = 0.0
    for k in range(3):
        both = sums = 0.0
        for b, y, x in np.ndindex(2, 4, 4):
            if masks[b, y, x] != 255:
                q, there = float(p[b, k, y, x]), float(masks[b, y, x] == k)
                both, sums = both + q * there, sums + q + there
        total += (2 * both + 1) / (sums + 1)
    assert float(dice_loss(logits, masks)) == pytest.approx(1 - total / 3, rel=1e-5)
    right = 40 * functional.one_hot(masks.clamp(max=2), 3).movedim(-1, 1).float()
    assert float(dice_loss(right, masks)) == pytest.approx(0, abs=1e-5)


def test_the_pyramid_keeps_sizes_and_pooling_takes_one_cell():
    regressor = PyramidRegressor([4, 6, 8], [5, 7, 9], width=8)
    given = [maps(2, 4, 12, 20), maps(2, 6, 6, 10), maps(2, 8, 3, 5)]
    assert [tuple(m.shape) for m in regressor(given)] == [(2, 5, 12, 20), (2, 7, 6, 10), (2, 9, 3, 5)]
    pooling = PyramidPooling(6, 8)
    assert pooling(maps(2, 6, 1, 1)).shape == (2, 8, 1, 1)
    one = pooling.eval()(maps(1, 6, 1, 1))
    assert bool(one.isfinite().all())
    x = maps(1, 6, 3, 3)
    parts = [x] + [
        functional.interpolate(reduce(functional.adaptive_avg_pool2d(x, n)), (3, 3), mode="bilinear")
        for n, reduce in zip((1, 2, 3, 6), pooling.reduce, strict=True)
    ]
    torch.testing.assert_close(pooling(x), pooling.leave(torch.cat(parts, 1)))
    leaf = [value.clone().requires_grad_() for value in given]
    regressor.eval()(leaf)[1].sum().backward()  # a level hears of the coarser ones alone
    assert [value.grad is None for value in leaf] == [True, False, False]


# --- the loss


def test_the_loss_is_the_formula():
    objective, data = dreamteacher(), batch()
    assert [layer.path for layer, _ in objective.levels] == TAPS
    base = objective.teacher.denoiser
    x_t = base.scheduler.add_noise(data["pixel_values"], data["noise"], torch.full((4,), 150))
    read = hooked(base.model, TAPS, x_t, 150)
    stages = hooked(objective.student, ["encoder.stages.0", "encoder.stages.1"], data["pixel_values"])
    buffers = {name: value.clone() for name, value in objective.state_dict().items()}
    with torch.no_grad():
        found = objective.regressor(stages)
    objective.load_state_dict(buffers)  # running statistics
    out = objective(data)
    errors, attention = [], []
    for ours, theirs in zip(found, read, strict=True):
        ours, theirs = ours.double(), theirs.double()
        mean, std = theirs.mean((1, 2, 3), keepdim=True), theirs.std((1, 2, 3), unbiased=False, keepdim=True)
        errors.append(float((ours - (theirs - mean) / std).square().mean()))
        q = [part.square().sum(1).flatten(1) for part in (ours, theirs)]
        q = [part / part.norm(dim=1, keepdim=True) for part in q]
        attention.append(float((q[0] - q[1]).norm(dim=1).mean()))
    assert [float(out[f"mse_{s}"]) for s in (2, 4)] == pytest.approx(errors, rel=1e-4)
    assert [float(out[f"attention_{s}"]) for s in (2, 4)] == pytest.approx(attention, rel=1e-4)
    assert float(out["loss"].detach()) == pytest.approx(sum(errors) / 2 + 10 * sum(attention) / 2, rel=1e-4)
    targets = [normalized(value) for value in read]
    assert float(objective.losses(targets, read, targets)["mse"]) == 0


def test_without_weights_the_loss_is_the_squared_error():
    objective = dreamteacher(attention_weight=0.0, label_weight=0.0, interpreter="nowhere", target_norm="channels")
    assert objective.interpreter is None
    out = objective(batch())
    assert torch.equal(out["loss"].detach(), out["mse"])
    assert torch.equal(out["mse"], torch.stack([out["mse_2"], out["mse_4"]]).mean())
    assert set(out) == {"loss", "mse", "mse_2", "mse_4"}


def test_noise_is_fresh_and_the_teacher_is_left_alone():
    objective, data = dreamteacher(), batch()
    del data["noise"]
    before = {name: value.clone() for name, value in objective.teacher.denoiser.model.state_dict().items()}
    losses = [float(objective(data)["mse"]) for _ in range(2)]
    assert losses[0] != losses[1]
    objective(data)["loss"].backward()
    check_objective(objective, data)
    after = objective.teacher.denoiser.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_wide_images_and_a_conditional_teacher():
    """H and W differ; a class-conditional teacher gets the null class, whatever the labels."""
    objective = dreamteacher(student((16, 24)))
    out = objective(batch(size=(16, 24)))
    assert out["loss"].isfinite()
    torch.manual_seed(0)
    base = Denoiser(unet2d(3, num_class_embeds=6), DDIMScheduler(), conditioner=LabelConditioner(5))
    objective, told = dreamteacher(base=base), []
    base.model.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    objective(batch())
    assert told == [[5, 5, 5, 5]]


# --- label distillation


def test_labels_of_an_interpreter(tmp_path):
    settings = {"width": 8, "groups": 4, "dropout": 0.0, "layers": TAPS}
    base = denoiser()
    objective = InterpreterObjective(base, InterpreterConfig("base", **settings), 3).train()
    data = {**batch(), "masks": torch.randint(0, 3, (4, 16, 16), generator=torch.Generator().manual_seed(0)).int()}
    data["masks"][0, :3] = 255
    check_objective(objective, data)
    out = objective(data)
    logits = functional.interpolate(
        objective.logits(data["pixel_values"], noise=data["noise"]).double(), (16, 16), mode="bilinear"
    )
    chances, total, count = logits.log_softmax(1), 0.0, 0
    for b, y, x in np.ndindex(4, 16, 16):
        if data["masks"][b, y, x] != 255:
            total, count = total - float(chances[b, int(data["masks"][b, y, x]), y, x].detach()), count + 1
    assert float(out["cross_entropy"]) == pytest.approx(total / count, rel=1e-5)
    assert float(out["loss"].detach()) == pytest.approx(total / count + 3 * float(out["dice"]), rel=1e-5)
    objective.save_pretrained(tmp_path, objective.state_dict(), torch.float32)

    told = dreamteacher(base=base, interpreter=str(tmp_path), layers=TAPS, label_temperature=2.0)
    check_objective(told, batch())
    assert told.discarded == ("regressor", "label_head")
    assert told.unsaved() == {}
    saved = FeatureInterpreter.from_pretrained(tmp_path).eval()
    x_t = base.scheduler.add_noise(data["pixel_values"], data["noise"], torch.full((4,), 150))
    found = [maps(4, 16, 8, 8), maps(4, 16, 4, 4, seed=1)]
    read = hooked(base.model, TAPS, x_t, 150)
    targets = [functional.layer_norm(value, value.shape[1:]) for value in read]
    out = told.losses(found, read, targets)
    with torch.no_grad():
        p = (saved(targets).double() / 2).softmax(1)
        q = (saved(found).double() / 2).softmax(1).log()  # the head starts from the interpreter's weights
    assert float(out["labels"]) == pytest.approx(float(-(p * q).sum(1).mean()), rel=1e-4)
    parts = out["mse"] + 10 * out["attention"] + out["labels"]
    assert float(out["loss"].detach()) == pytest.approx(float(parts), rel=1e-5)
    with pytest.raises(ValueError, match=r"was trained on features read with \{'timestep': 150.0\}"):
        dreamteacher(interpreter=str(tmp_path), layers=TAPS, timestep=100.0)
    with pytest.raises(ValueError, match=r"reads \{'up_blocks.1.attentions.1': 16, .*\}, and distilled are"):
        dreamteacher(interpreter=str(tmp_path), layers=TAPS[:1])


def test_interpreter_refuses():
    base = denoiser()
    with pytest.raises(ValueError, match="two or more classes; got 1"):
        InterpreterObjective(base, InterpreterConfig("base"), 1)
    with pytest.raises(ValueError, match="name one a stride"):
        InterpreterObjective(base, InterpreterConfig("base", layers=["mid_block", "up_blocks.0.resnets.1"]), 2)
    with pytest.raises(ValueError, match="`dice_weight` is 0 or more"):
        InterpreterConfig("base", dice_weight=-1.0)
    with pytest.raises(ValueError, match="`groups` divides `width`"):
        FeatureInterpreter(["a"], [4], 2, width=9, groups=4)
    objective = InterpreterObjective(base, InterpreterConfig("base", width=8, groups=4), 2)
    with pytest.raises(ValueError, match="The data have no masks"):
        objective.check_batch({})
    with pytest.raises(ValueError, match="Masks hold classes 0 to 3; there are 0 to 1"):
        objective.check_batch({"masks": torch.tensor([[[0, 3, 255]]])})


# --- which level goes to which stage


def test_teacher_and_student_meet_by_stride():
    base = denoiser()
    assert decoder_layers(base) == ["up_blocks.0.resnets.1", "up_blocks.1.attentions.1", "up_blocks.2.resnets.1"]
    fine = dreamteacher(student(patch_size=1, depths=[1, 1, 1], hidden_sizes=[4, 8, 8]), base)
    assert [(layer.stride, stage.stride) for layer, stage in fine.levels] == [(1, 1), (2, 2), (4, 4)]
    named = dreamteacher(base=base, layers=["down_blocks.1.attentions.0"])
    assert [stage.stride for _, stage in named.levels] == [2]
    coarse = student(patch_size=8, depths=[1, 1])
    with pytest.raises(
        ValueError, match=r"strides \['4', '2', '1'\] and the student's stages \[8, 16\]; one at least"
    ):
        dreamteacher(coarse, base)
    with pytest.raises(ValueError, match=r"strides \['1'\] and the student's stages \[2, 4\]; each layer needs"):
        dreamteacher(base=base, layers=["up_blocks.2"])
    with pytest.raises(ValueError, match="Two of the teacher's layers have the stride 4; name one a stride"):
        matched_levels([layer for layer in fine.teacher.layers if layer.stride == 4] * 2, student().stages)
    with pytest.raises(ValueError, match="Images are 16 x 20, and the student's last stage has a stride of 8"):
        student((16, 20), patch_size=4)


def test_bad_settings():
    for settings, told in (
        ({"attention_weight": -1.0}, "Weights are 0 or more"),
        ({"label_temperature": 0.0}, "`label_temperature` is positive"),
        ({"width": 0}, "`width` and `attention_power` are 1 or more"),
    ):
        with pytest.raises(ValueError, match=told):
            DreamTeacherConfig("base", **settings)
    with pytest.raises(ValueError, match="timestep"):
        dreamteacher(timestep=1000.0)
    transformer = Denoiser.from_pipe(build("dit"))
    with pytest.raises(ValueError, match="has no up_blocks; name the layers"):
        decoder_layers(transformer)


@pytest.mark.slow
def test_a_student_of_digits_learns_the_decoder():
    torch.manual_seed(0)
    sets = [
        every_row(load_train_data(DataConfig("digits", dataset_split=split, cache_images=True), 1, 8))
        for split in ("train", "test")
    ]
    shape = {**CONVNEXT, "patch_size": 1, "hidden_sizes": [32, 64]}
    config = DreamTeacherConfig(DIGITS, timestep=100.0, width=64)
    objective = DreamTeacherObjective(config.load_base(), StudentConfig(shape).build(1, (8, 8)), config).train()

    def score():
        features = [objective.backbone.pooled(objective.student, images) for images, _ in sets]
        return few_shot_probe(features[0], sets[0][1], features[1], sets[1][1], shots=5).mean

    before, optimizer, errors = score(), torch.optim.AdamW(objective.param_groups(), 2e-3), []
    for _ in range(400):
        out = objective({"pixel_values": sets[0][0][torch.randint(len(sets[0][0]), (64,))]})
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(float(out["mse"]))
    assert sum(errors[-10:]) / 10 < 0.6  # 1: nothing but zeros
    assert score() > before + 0.064
