"""A run that goes on from a saved one has the heads of that one, or says that they start anew."""

import warnings

import pytest
import torch
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from safetensors.torch import load_file, save_file

from diffusers_repr import Denoiser, Projector
from diffusers_repr.objectives import REPAObjective, SelfAlignmentLoss, SpatialAlignmentLoss, load_heads
from tests.objectives.cases import SMALL, batch, shake, sit, teacher


def repa(encoders=None, **options):
    pipe = SiTPipeline(sit().model, FlowMatchODEScheduler())
    terms = [SelfAlignmentLoss(projector_dim=8)]
    given = [teacher()] if encoders is None else encoders
    own = {} if "alignment" in options else {"layer": "blocks.1", **SMALL}
    return REPAObjective(Denoiser.from_pipe(pipe), given, losses=terms, **{**own, **options})


def losses(objective):
    return objective({**batch(), "time": torch.tensor([100.0, 500.0, 900.0]),
                      "generator": torch.Generator().manual_seed(0)})  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder, and its losses."""
    folder, objective = tmp_path_factory.mktemp("run"), repa()
    for term in objective.losses.values():
        shake(term, 5)
    objective.save_pretrained(folder, objective.trained_state(), torch.float32)
    return folder, losses(objective)


def test_all_heads_go_on(saved):
    folder, wanted = saved
    objective = repa()
    assert not torch.equal(losses(objective)["alignment"], wanted["alignment"])  # how far apart is chance
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_heads(objective, folder) == {}
    got = losses(objective)
    assert all(torch.equal(got[name], wanted[name]) for name in ("alignment", "self_alignment", "loss"))


@pytest.mark.parametrize(
    ("encoders", "options", "name", "why"),
    [
        (None, {"projector_dim": 8}, "projector-teacher", "hidden_dim=16, this run 8"),
        (
            None,
            {"alignment": SpatialAlignmentLoss("blocks.1", projector_dim=16)},
            "projector-teacher",
            "kind='mlp', this run 'conv'",
        ),
        ([teacher(dim=5)], {}, "projector-teacher", "out_dim=6, this run 5"),
        ([teacher(seed=9)], {}, "projector-teacher", "another encoder of this name"),
        ([teacher(name="other")], {}, "projector-other", "none was saved"),
    ],
)
def test_heads_that_do_not_fit_start_anew_and_are_named(saved, encoders, options, name, why):
    objective = repa(encoders, **options)
    before = {key: value.clone() for key, value in objective.losses["alignment"].state_dict().items()}
    with pytest.warns(UserWarning, match=rf"start anew \({name}: .*{why}"):
        assert list(load_heads(objective, saved[0])) == [name]
    after = objective.losses["alignment"].state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_numbered_projectors_of_a_converted_checkpoint(tmp_path):
    for at, dim in enumerate((6, 4)):
        shake(Projector(16, dim, hidden_dim=16), at).save_pretrained(tmp_path / "heads" / f"projector-{at}")
    objective = repa({"dino": teacher(), "clip": teacher(dim=4)})
    with pytest.warns(UserWarning, match=r"start anew \(projector-self-alignment: none was saved\)"):
        load_heads(objective, tmp_path)
    for at, projector in enumerate(objective.losses["alignment"].projectors):
        wanted = Projector.from_pretrained(tmp_path / "heads" / f"projector-{at}").state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in projector.state_dict().items())
    with pytest.warns(UserWarning, match="projector-dino: none was saved"):  # one encoder, two projectors: whose?
        load_heads(repa({"dino": teacher()}), tmp_path)


def test_damaged_heads(tmp_path, saved):
    folder = tmp_path / "heads" / "projector-teacher"
    Projector.from_pretrained(saved[0] / "heads" / "projector-teacher").save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["layers.0.weight"][0, 0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"projector-teacher' cannot be read: .*'layers\.0\.weight' has 1 of 256"):
        load_heads(repa(), tmp_path)
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read"):
        load_heads(repa(), tmp_path)


def test_nothing_to_load(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_heads(REPAObjective(sit()), tmp_path / "not even there") == {}
