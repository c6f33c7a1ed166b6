"""Two real processes over gloo equal one with the same global batch."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.training.loop_cases import assert_same, assert_same_checkpoint, read_lines, run_here
from tests.training.two_processes import CASES, case, first_gradients

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def told(together):
    return together[1]["training"][0]["ddp"]


@pytest.fixture(scope="module")
def folder(together):
    return together[0] / "training" / "ddp"


def test_there_are_two_processes(together, folder):
    assert (together[1]["processes"], together[1]["backend"]) == (2, "gloo")
    state = json.loads((folder / "plain" / "checkpoint-00000003" / "state.json").read_text())
    assert state["identity"]["num_processes"] == 2


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(told, folder, tmp_path, name):
    """Gradients, weights, moving averages, Adam's moments, logged numbers; 13 samples divide by no batch."""
    objective, data, changes = case(name, 4)
    with first_gradients() as gradients:
        run_here(tmp_path, objective, data, **changes)
    assert_same(load_file(folder / name / "gradients.safetensors"), gradients, **CLOSE)
    assert told[f"{name}_alike"]
    for step in (1, 2, 3):
        for kind in ("model", "ema", "optimizer"):
            files = (
                place / f"checkpoint-0000000{step}" / f"{kind}.safetensors" for place in (folder / name, tmp_path)
            )
            assert_same(*map(load_file, files), **CLOSE)
    for ours, theirs in zip(read_lines(folder / name), read_lines(tmp_path), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    start = case(name, 4)[0].trained_state()
    ours = load_file(folder / name / "checkpoint-00000003" / "model.safetensors")
    assert max(float((ours[key] - start[key]).abs().max()) for key in ours) > 1e-3  # it moved by far more


def test_the_moving_average_is_the_closed_form(folder):
    objective = case("plain", 4)[0]
    average = {name: p.detach().double() for name, p in objective.named_parameters()}
    for step in (1, 2, 3):
        place = folder / "plain" / f"checkpoint-0000000{step}"
        weights = load_file(place / "model.safetensors")
        average = {name: 0.5 * old + 0.5 * weights[name].double() for name, old in average.items()}
        assert_same({k: v.double() for k, v in load_file(place / "ema.safetensors").items()}, average, **CLOSE)


def test_the_processes_share_the_data_and_draw_their_own_numbers(told):
    first, second = told["seen"]
    drawn = [number for seen in (first, second) for number, _ in seen]
    assert len(set(drawn)) == len(drawn) == 6
    samples = [index for a, b in zip(first, second, strict=True) for index in (*a[1], *b[1])]
    assert len(set(samples[:12])) == 12


@pytest.mark.parametrize("name", ["", "stream_"])
def test_resume_is_exact(folder, name):
    places = [folder / f"{name}{end}" for end in ("whole", "resumed")]
    assert_same_checkpoint(*(place / "checkpoint-00000003" for place in places))
    streams = [json.loads((place / "checkpoint-00000003" / "state.json").read_text())["streams"] for place in places]
    assert streams[0] == streams[1]
    if name:
        assert [place["rank"] for place in streams[0]] == [0, 1]


def test_nan_in_one_process_skips_the_step_in_all(told, folder):
    (first, calls), (second, same_calls) = told["bad"]
    assert first == second
    assert "losses in a row were not finite" in first
    assert calls == same_calls
    kept = [load_file(path / "model.safetensors") for path in sorted((folder / "bad").glob("checkpoint-*"))]
    assert len(kept) == 2  # of steps 2 and 4, of which the second trained nothing
    assert_same(*kept)
    assert all(torch.isfinite(tensor).all() for tensor in kept[0].values())
