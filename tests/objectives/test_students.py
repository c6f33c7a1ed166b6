"""Students: transformers' backbones and others, their stages, folders, preprocessing; and tuning them on labels."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageClassification, ConvNextModel, ResNetConfig, ResNetModel

from diffusers_repr.encoders import Encoder
from diffusers_repr.objectives import FinetuneStudentConfig, FinetuneStudentObjective, Student, StudentConfig
from diffusers_repr.testing import check_objective
from tests.encoders.vits import build, save
from tests.objectives.distillation_cases import CONVNEXT, batch, repfusion, student

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
          "layer_type": "basic"}  # fmt: skip
SWIN = {"model_type": "swin", "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
        "window_size": 2}  # fmt: skip
CONVNEXTV2 = {**CONVNEXT, "model_type": "convnextv2"}
del CONVNEXTV2["layer_scale_init_value"]
NAMES = ["a", "b", "c", "d", "e"]


class Plain(nn.Module):
    """A network of no library."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 3, padding=1)
        self.stages = nn.ModuleList([nn.Conv2d(4, 6, 2, 2), nn.Conv2d(6, 8, 2, 2)])
        self.head = nn.Linear(8, 2)

    def forward(self, images):
        x = self.enter(images)
        for stage in self.stages:
            x = stage(x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("shape", [RESNET, CONVNEXT, CONVNEXTV2, SWIN])
def test_stages_are_the_hidden_states_of_transformers(shape):
    torch.manual_seed(0)
    found = StudentConfig(shape).build(3, (16, 24))
    assert found.module.config.num_channels == 3
    found.use(found.stages)
    images = batch(2, (16, 24))["pixel_values"]
    found.module.eval()
    maps = found.maps(images)
    first = {"resnet": 4}.get(shape["model_type"], 2)
    assert [stage.stride for stage in found.stages] == [first, 2 * first]
    wanted = [(2, stage.channels, 16 // stage.stride, 24 // stage.stride) for stage in found.stages]
    assert [tuple(value.shape) for value in maps] == wanted
    given = {"interpolate_pos_encoding": True} if shape is SWIN else {}
    with torch.no_grad():
        out = found.module(images, output_hidden_states=True, **given)
    hidden = out.reshaped_hidden_states if shape is SWIN else out.hidden_states
    torch.testing.assert_close(maps[-1].detach(), hidden[-1])
    if shape is not SWIN:  # whose others are told after merging
        torch.testing.assert_close(maps[0].detach(), hidden[1])


def test_any_network_of_stages():
    net = Plain()
    found = Student(net, size=(16, 8), channels=3)
    assert [(s.path, s.channels, s.stride) for s in found.stages] == [("stages.0", 6, 2), ("stages.1", 8, 4)]
    found.use(found.stages[:1])
    reached = {name for name, p in net.named_parameters() if p.requires_grad}
    assert reached == {"enter.weight", "enter.bias", "stages.0.weight", "stages.0.bias"}
    named = Student(net, size=(16, 8), channels=3, stages=["enter"])
    assert [(s.channels, s.stride) for s in named.stages] == [(4, 1)]
    images = batch(2)["pixel_values"]
    found.module.train()
    torch.testing.assert_close(found.pooled(net, images), net.stages[0](net.enter(images)).mean((2, 3)).detach())
    assert net.training
    objective = repfusion(classes=0, of=Student(Plain(), size=(16, 16)), level="fixed", timestep=5.0)
    assert objective(batch())["loss"].isfinite()
    with pytest.raises(TypeError, match="ModelArtifact of 'student' has a Plain, which has no config"):
        objective.artifacts()[0].check()
    with pytest.raises(TypeError, match="Sequential has no list `stages`"):
        Student(nn.Sequential(nn.Conv2d(3, 4, 2)), size=(8, 8))
    with pytest.raises(ValueError, match=r"'head' of Plain gave \(2, 2\) for images of 8 x 8; a stage gives a map"):
        Student(net, size=(8, 8), stages=["head"])


def test_the_result_is_a_plain_folder_that_loads_as_an_encoder_and_as_a_student(tmp_path):
    objective = repfusion()
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(0.1)
    objective.save_pretrained(tmp_path, objective.state_dict(), torch.float32)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert "projectors" not in str(load_file(tmp_path / "model.safetensors").keys())
    told = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (told["image_mean"], told["size"]) == ([0.5] * 3, {"height": 16, "width": 16})
    plain = ConvNextModel.from_pretrained(tmp_path).eval()
    images = batch(2)["pixel_values"]
    with torch.no_grad():
        out = plain(images)
    encoder = Encoder.from_pretrained(tmp_path)
    found = encoder.encode_pixels(images)
    assert encoder.grid_for((16, 16)) == found.grid == (4, 4)
    torch.testing.assert_close(found.as_map(), out.last_hidden_state)
    torch.testing.assert_close(found.global_features, out.pooler_output)
    pooled = objective.backbone.pooled(objective.student, images)
    torch.testing.assert_close(found.tokens.mean(1), pooled)
    again = StudentConfig(student_name_or_path=str(tmp_path)).build(3, (16, 16))
    again.use(again.stages)
    assert any(p.requires_grad for p in again.module.parameters())
    torch.testing.assert_close(again.maps(images)[-1].mean((2, 3)).detach(), pooled)


def test_bad_students(tmp_path):
    for given, told in (
        ({}, "Name one of `student`.*got neither"),
        ({"student": CONVNEXT, "student_name_or_path": "x"}, "got both"),
        ({"student": {"model_type": "vit"}}, "one of resnet, convnext, convnextv2, swin; got 'vit'"),
        ({"student": {**CONVNEXT, "hiden_sizes": [3]}}, r"'hiden_sizes' in `student`. Closest .* \['hidden_sizes'"),
        ({"student": {**CONVNEXT, "patch_size": 0}}, "patch_size is 0"),
    ):
        with pytest.raises(ValueError, match=told):
            StudentConfig(**given)
    with pytest.raises(ValueError, match="is a ViTModel, which has no stages"):
        StudentConfig(student_name_or_path=str(save(build("vit"), tmp_path / "vit"))).build(3, (8, 8))
    grey = StudentConfig({**CONVNEXT, "num_channels": 1}).build(3, (16, 16))
    grey.use(grey.stages)
    with pytest.raises(ValueError, match="the encoder takes 1: pass grey images"):
        grey.maps(batch(2)["pixel_values"])


# --- tuned on labels


def test_tuning(tmp_path):
    backbone = student()
    backbone.use(backbone.stages[-1:])  # as distillation leaves it: what lies behind is frozen
    objective = FinetuneStudentObjective(backbone, NAMES, FinetuneStudentConfig(backbone_lr_scale=0.5))
    data = batch()
    check_objective(objective, data)
    out = objective.eval()(data)
    with torch.no_grad():
        features = backbone.module.eval()(data["pixel_values"]).pooler_output
        head = objective.classifier.classifier
        wanted = functional.cross_entropy(features @ head.weight.T + head.bias, data["class_labels"])
    assert float(out["loss"].detach()) == pytest.approx(float(wanted), rel=1e-5)
    groups = objective.param_groups()
    assert groups[0]["params"] == list(head.parameters())
    assert groups[1]["lr_scale"] == 0.5
    assert len(groups[1]["params"]) == len(list(backbone.module.parameters()))
    before = {name: value.clone() for name, value in objective.classifier.state_dict().items()}
    optimizer = torch.optim.AdamW([p for group in groups for p in group["params"]], 1e-2)
    objective.train()
    losses = []
    for _ in range(15):
        loss = objective(data)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert any(not torch.equal(v, before[k]) for k, v in objective.classifier.state_dict().items() if "encoder" in k)
    objective.save_pretrained(tmp_path, objective.state_dict(), torch.float32)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.id2label == dict(enumerate(NAMES))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(data["pixel_values"]).logits, objective.eval().logits(objective.classifier, data["pixel_values"])
        )
    pooled = Encoder.from_pretrained(tmp_path).encode_pixels(data["pixel_values"]).global_features
    torch.testing.assert_close(loaded.classifier(pooled), loaded(data["pixel_values"]).logits)


def test_only_the_last_layer_and_what_is_refused():
    frozen = FinetuneStudentObjective(student(), NAMES, FinetuneStudentConfig(backbone_lr_scale=0.0))
    assert len([p for p in frozen.parameters() if p.requires_grad]) == 2
    with pytest.raises(ValueError, match="needs two classes"):
        FinetuneStudentObjective(student(), ["a"])
    with pytest.raises(TypeError, match="Plain is no backbone of transformers"):
        FinetuneStudentObjective(Student(Plain(), size=(8, 8), channels=3), NAMES)
    with pytest.raises(ValueError, match="Labels run from 0 to 9"):
        frozen.check_batch({"class_labels": torch.tensor([0, 9])})
    with pytest.raises(ValueError, match="no class labels"):
        frozen.check_batch({})
    for settings in ({"backbone_lr_scale": -1.0}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            FinetuneStudentConfig(**settings)


def test_encoders_of_stages(tmp_path):
    """Another size, another stage, a chosen pooling, and what they do not have."""
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(**{k: v for k, v in RESNET.items() if k != "model_type"})).eval()
    model.save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path)
    pixels = batch(2, (17, 30))["pixel_values"]
    out = encoder.encode_pixels(pixels)
    assert encoder.grid_for((17, 30)) == out.grid == (2, 4)  # to 16 x 32, the nearest that 8 divides
    torch.testing.assert_close(out.global_features, out.tokens.mean(1))
    first = Encoder.from_pretrained(tmp_path, layer=0, image_size=(16, 24))
    found = first.encode_pixels(batch(2, (16, 24))["pixel_values"])
    assert (first.dim, found.grid) == (8, (4, 6))
    assert first.fingerprint() != encoder.fingerprint()
    assert torch.equal(
        Encoder.from_pretrained(tmp_path, pooling="mean").encode_pixels(pixels).global_features, out.tokens.mean(1)
    )
    for settings, told in (({"layer": 2}, "has stages 0 to 1"), ({"pooling": "cls"}, "class token"),
                           ({"image_size": 12}, "no multiple of the patch, 8"),
                           ({"positions": "repa"}, "has no positions that REPA's code resamples")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            Encoder.from_pretrained(tmp_path, **settings)
    with pytest.raises(TypeError, match="attention of ResNetModel is not known"):
        encoder.encode_with_attention(pixels, [0])
