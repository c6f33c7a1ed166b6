"""Heads of one's own: registered, fitted by name, saved with a probe, loaded by name and never by a place of code."""

import importlib
import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from diffusers_repr.heads import (
    Head,
    LinearHead,
    MapHead,
    PooledHead,
    ReadoutHead,
    fit_head,
    head_class,
    list_heads,
    register_head,
    unregister_head,
)
from diffusers_repr.hub.components import MOVED_MODULES, OWN_COMPONENTS, check_index
from diffusers_repr.hub.registry import Registry
from diffusers_repr.models.layers import CastLinear
from diffusers_repr.tasks import Probe
from diffusers_repr.testing.head import check_head
from tests.tasks.planted import NAMES, images, pipeline


class GatedHead(PooledHead):
    """Of the user's own: a linear layer on gated features."""

    @register_to_config
    def __init__(self, in_features, num_classes, gate=2.0):
        super().__init__()
        self.make_statistics(in_features, num_classes)
        self.gates, self.out = CastLinear(in_features, in_features), CastLinear(in_features, num_classes)

    def classify(self, features):
        return self.out(features * torch.sigmoid(self.config["gate"] * self.gates(features)))


@pytest.fixture
def gated():
    register_head("gated")(GatedHead)
    yield GatedHead
    unregister_head("gated")


def test_a_probe_with_a_head_of_ones_own(gated, tmp_path):
    probe = Probe.fit(pipeline(), images(30), layers="mid_block", timestep=50, pooling="adaptive:2", head="gated",
                      head_options={"gate": 1.5}, label_names=NAMES)  # fmt: skip
    assert type(probe.head) is GatedHead
    assert probe.recipe.protocol["name"] == "adam"
    pictures, labels = images(12, seed=4)
    assert probe.evaluate((pictures, labels), record=False)["accuracy"] > 0.9
    probe.save_pretrained(tmp_path / "probe")
    assert not list((tmp_path / "probe").glob("*.py"))
    loaded = Probe.from_pretrained(tmp_path / "probe", base=pipeline())
    assert type(loaded.head) is GatedHead
    assert loaded.head.config["gate"] == 1.5
    assert torch.equal(loaded(pictures).probabilities, probe(pictures).probabilities)
    unregister_head("gated")
    try:
        with pytest.raises(ValueError, match=r"class 'GatedHead'; known are AttentionHead, .*KNNHead.*register_head"):
            Probe.from_pretrained(tmp_path / "probe", base=pipeline())
    finally:
        register_head("gated")(GatedHead)


def test_the_contract(gated):
    head = GatedHead(6, 3)
    check_head(head, {"features": torch.randn(4, 6, generator=torch.Generator().manual_seed(0))})


def test_what_the_tester_finds(gated):
    class Forgetful(GatedHead):
        """Its gate stands in no config."""

        def __init__(self, in_features, num_classes):
            super().__init__(in_features, num_classes)
            self.scale = 3.0

        def classify(self, features):
            return super().classify(features) * self.scale

    inputs = {"features": torch.ones(2, 6)}
    with pytest.raises(AssertionError, match="is not registered"):
        check_head(Forgetful(6, 3), inputs)
    register_head("forgetful")(Forgetful)
    try:
        head = Forgetful(6, 3)
        check_head(head, inputs, fits=False)
        head.scale = 4.0
        with pytest.raises(AssertionError, match="otherwise once it was saved"):
            check_head(head, inputs, fits=False)
        head = Forgetful(6, 3)
        head.classify = lambda features: torch.randn(2, 3)
        with pytest.raises(AssertionError, match="random state"):
            check_head(head, inputs, fits=False)
    finally:
        unregister_head("forgetful")


def test_names_and_classes_are_taken_once(gated):
    with pytest.raises(ValueError, match=r"register_head\('gated'\).*GatedHead already"):
        register_head("gated")(type("OtherHead", (PooledHead,), {}))
    with pytest.raises(ValueError, match=r"'linear' is the head .*LinearHead already"):
        register_head("mine")(type("LinearHead", (PooledHead,), {}))
    with pytest.raises(TypeError, match="register_head takes a subclass of Head"):
        register_head("mine")(nn.Linear)
    assert "mine" not in list_heads()
    with pytest.raises(ValueError, match="Unknown head 'readout'; expected one of gated, knn, linear, mlp"):
        head_class("readout", PooledHead)


def test_gradient_protocols_fit_it_and_closed_forms_do_not(gated):
    x, y = torch.randn(30, 4), torch.arange(30) % 2
    with pytest.raises(ValueError, match="'ridge' fits heads linear, not 'gated'; for 'gated' use adam or ddae"):
        fit_head(x, y, head="gated", protocol="ridge")
    with pytest.raises(ValueError, match="GatedHead has no option 'gates'; it has gate"):
        fit_head(x, y, head="gated", gates=2)
    fitted = fit_head(x + 4 * y[:, None], y, head="gated", protocol="ddae", gate=1.0).head
    assert fitted.config["gate"] == 1.0


def test_ours_are_what_a_pipeline_may_hold():
    """`hub` knows of heads by name alone; its table is that of the registry."""
    ours = {cls.__name__: cls.__module__ for cls in list_heads().values()}
    assert ours.items() <= OWN_COMPONENTS.items()
    assert {name for name, module in OWN_COMPONENTS.items() if ".heads." in module} == set(ours)
    assert all(issubclass(cls, Head) for cls in list_heads().values())
    assert set(list_heads(MapHead)) == {"depth", "readout"}
    assert LinearHead.kind == "linear"


class HeadedPipeline(DiffusionPipeline):
    """Of a user, with a head of ours."""

    def __init__(self, head: Head, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(head=head, scheduler=scheduler)


def test_a_pipeline_folder_from_before_heads_moved_loads(tmp_path):
    head = ReadoutHead(["a"], [4], width=8, bottleneck=4, output_widths=(4, 4), time_width=8)
    HeadedPipeline(head, DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["head"] == ["diffusers_repr.heads.dense.readout", "ReadoutHead"]
    index["head"][0] = "diffusers_repr.heads.readout"  # as it was written then
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = HeadedPipeline.from_pretrained(tmp_path).head
    assert type(loaded) is ReadoutHead
    assert torch.equal(loaded.weights, head.weights)
    assert check_index(index, "index")["head"][0] == "diffusers_repr.heads.dense.readout"
    for former, present in MOVED_MODULES.items():
        assert importlib.import_module(former) is importlib.import_module(present)
        assert present in OWN_COMPONENTS.values()
    index["head"] = ["diffusers_repr.heads.readout", "DepthHead"]  # never lay there
    with pytest.raises(ValueError, match="head is 'DepthHead' of the library"):
        check_index(index, "index")


def test_a_file_names_no_place_of_code(gated, tmp_path):
    probe = Probe.fit(pipeline(), images(12), layers="mid_block", timestep=50, protocol="ridge")
    probe.save_pretrained(tmp_path / "probe")
    path = tmp_path / "probe/config.json"
    for name in ("tests.heads.test_registry.GatedHead", "os.path", "Module"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name}))
        with pytest.raises(ValueError, match="is of class"):
            Probe.from_pretrained(tmp_path / "probe", base=pipeline())


def test_a_cell_that_runs_again_replaces_its_class():
    names = Registry("colour", object, "register_colour", one_name=True)
    for _ in range(2):
        red = names.register("red")(type("Red", (), {"__module__": "__main__"}))
    assert names.find("red") is red
    with pytest.raises(ValueError, match="'red' is the colour __main__.Red already"):
        names.register("red")(type("Red", (), {"__module__": "other"}))
