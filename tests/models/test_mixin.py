"""What `ReprModelMixin` does beside the contract: classes of others, arguments by place, warnings that are meant."""

import json
import logging

import pytest
import torch

from diffusers_repr.heads import LinearHead
from diffusers_repr.models import SiTTransformer2DModel
from tests.testers.hosts import since


class OwnHead(LinearHead):
    """A user's class, in a module of theirs."""

    _keep_in_fp32_modules = ["linear"]


def test_a_class_of_another_package_names_no_file_of_ours(tmp_path):
    OwnHead(4, 2).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))
    assert OwnHead.auto_file() is None


def test_modules_that_are_kept_in_float32_are_kept(tmp_path):
    head = OwnHead(4, 2)
    head.save_pretrained(tmp_path)
    loaded = OwnHead.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.linear.weight.dtype == torch.float32
    assert loaded.mean.dtype == torch.bfloat16
    assert torch.equal(loaded(torch.ones(1, 4)), head(torch.ones(1, 4)))


@since("diffusers", "0.39")
def test_casting_modules_that_are_kept_in_float32_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "diffusers"):
        LinearHead(4, 2).to(torch.bfloat16)
        assert caplog.messages == []
        OwnHead(4, 2).to(torch.bfloat16)
    assert "should be kept in float32: ['linear']" in caplog.text


def test_a_file_of_one_import():
    name, content = SiTTransformer2DModel.auto_file()
    assert name == "diffusers_repr_sit.py"
    lines = [line for line in content.splitlines() if line and not line.startswith(('"""', "__all__"))]
    assert lines == ["from diffusers_repr.models import SiTTransformer2DModel"]


@pytest.mark.parametrize("by_place", [True, False])
def test_from_config_keeps_arguments_given_by_place(by_place):
    rest = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_classes": 0}
    one = {"sample_size": 8, "patch_size": 4, "in_channels": 3}
    model = SiTTransformer2DModel(8, 4, 3, **rest) if by_place else SiTTransformer2DModel(**one, **rest)
    again = SiTTransformer2DModel.from_config(model.config)
    assert {name: again.config[name] for name in one} == one
