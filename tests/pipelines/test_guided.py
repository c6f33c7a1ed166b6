"""The published pipelines with `guidance=`: loading, equality with the stock class and with `guide`, errors."""

import importlib
import inspect
import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_repr import CFG, PAG, guide
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub import check_pipeline_file
from tests.pipelines.guided_cases import GUIDED, arguments, run
from tests.testers.hosts import noise_of_float32
from tests.testers.models import CONDITIONS, build

ROOT = Path(__file__).parents[2]
THIN = [folder for folder in GUIDED if folder != "guided_unconditional"]


def make(folder, installed=False):
    """A tiny pipeline of ours, and the stock one with components of its own."""
    name, class_name = GUIDED[folder]
    package = "diffusers_repr.pipelines" if installed else "pipelines"
    cls = getattr(importlib.import_module(f"{package}.{folder}.pipeline"), class_name)
    stock = build(name)
    settings = {"requires_safety_checker": False} if name == "sd" else {}
    return cls(**build(name).components, **settings), stock, arguments(name)


def network(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


@pytest.mark.parametrize("folder", GUIDED)
def test_one_class_a_file(folder):
    assert check_pipeline_file(ROOT / "pipelines" / folder / "pipeline.py") == GUIDED[folder][1]


@pytest.mark.parametrize("folder", ["guided_dit", "guided_unconditional"])
def test_installed_and_in_the_repository(folder):
    ours, _, settings = make(folder, installed=True)
    assert type(ours).__module__ == f"diffusers_repr.pipelines.{folder}.pipeline"
    first = run(ours, **settings, guidance=[PAG(2.0)])
    assert np.array_equal(first, run(make(folder)[0], **settings, guidance=PAG(2.0)))


@pytest.mark.parametrize("folder", THIN)
def test_without_guidance_it_is_the_stock_pipeline(folder):
    ours, stock, settings = make(folder)
    want, calls = run(stock, **settings), []
    network(ours).register_forward_pre_hook(lambda *_: calls.append(1))
    for none in ({}, {"guidance": None}, {"guidance": []}, {"guidance": PAG(0.0)}):
        calls.clear()
        assert np.array_equal(run(ours, **settings, **none), want)
        assert len(calls) == 3
    assert ours.guidance_stats.lanes == 0
    run(ours, **settings)
    assert ours.guidance_stats is None
    # positional arguments, tuples and latents as ever
    first, *rest = settings.values()
    names = list(settings)[1:]
    latents = ours(first, **dict(zip(names, rest, strict=True)), num_inference_steps=1, return_dict=False)
    assert isinstance(latents, tuple)


@pytest.mark.parametrize(
    ("folder", "guidance"),
    [
        ("guided_stable_diffusion", PAG(2.0)),
        ("guided_stable_diffusion_xl", [PAG(1.5, interval=(0, 600)), CFG(5.0)]),
        ("guided_dit", [PAG(1.5, interval=(0, 600)), CFG(5.0)]),
    ],
    ids=["sd", "sdxl", "dit"],
)
def test_guidance_is_that_of_guide(folder, guidance):
    ours, stock, settings = make(folder)
    plain = run(stock, **settings)
    with guide(stock, guidance) as handle:
        want = run(stock, **settings)
    got = run(ours, **settings, guidance=guidance)
    assert np.array_equal(got, want)
    assert np.abs(got - plain).max() > 1e-4
    cost = [(step.lanes, step.passes, step.acted) for step in ours.guidance_stats.steps]
    assert cost == [(step.lanes, step.passes, step.acted) for step in handle.stats.steps]
    assert np.array_equal(run(ours, **settings), plain)  # nothing is left behind
    assert not network(ours)._forward_hooks
    assert not network(ours)._forward_pre_hooks


@pytest.mark.parametrize("folder", GUIDED)
def test_the_call_tells_its_arguments(folder):
    ours, stock, _ = make(folder)
    cls = type(ours)
    names = list(inspect.signature(cls.__call__).parameters)
    guidance = inspect.signature(cls.__call__).parameters["guidance"]
    assert guidance.kind is guidance.KEYWORD_ONLY
    assert guidance.default is None
    assert "PAG(3.0)" in inspect.getdoc(cls.__call__)
    if folder != "guided_unconditional":
        want = list(inspect.signature(type(stock).__call__).parameters)
        assert [name for name in names if name != "guidance"] == want
        assert "num_inference_steps (`int`" in inspect.getdoc(cls.__call__)


@pytest.mark.parametrize("folder", THIN)
def test_conditions_are_made_by_its_call(folder):
    ours, stock, _ = make(folder)
    name = GUIDED[folder][0]
    got, want = (Denoiser.from_pipe(pipe).condition(**CONDITIONS[name]).kwargs() for pipe in (ours, stock))
    assert got.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[key], value)


@pytest.mark.parametrize("folder", THIN[1:2])
def test_callbacks(folder):
    ours, stock, settings = make(folder)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return {"latents": 0.9 * tensors["latents"]}

    changed = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}
    with guide(stock, PAG(2.0)):
        want = run(stock, **settings, **changed)
    first = list(seen)
    seen.clear()
    assert np.array_equal(run(ours, **settings, **changed, guidance=PAG(2.0)), want)
    assert seen == first
    assert [step for step, _, _ in seen] == [0, 1, 2]

    def broken(*_):
        raise KeyboardInterrupt

    plain = run(stock, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(ours, **settings, callback_on_step_end=broken, guidance=PAG(2.0))
    assert np.array_equal(run(ours, **settings), plain)
    assert "step" not in vars(ours.scheduler)


@pytest.mark.parametrize("folder", ["guided_stable_diffusion_xl", "guided_dit"])
def test_offload_and_dtype(folder, monkeypatch):
    noise_of_float32(monkeypatch)
    ours, _, settings = make(folder)
    want = run(ours, **settings, guidance=PAG(2.0))
    ours.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(run(ours, **settings, guidance=PAG(2.0)), want)
    assert np.array_equal(run(ours, **settings, guidance=PAG(2.0)), want)
    ours.remove_all_hooks()
    ours.to(torch.bfloat16)
    half = run(ours, **settings, guidance=PAG(2.0))
    assert 0 < np.abs(half - want).mean() < 0.05


@pytest.mark.parametrize("folder", ["guided_stable_diffusion_xl", "guided_unconditional"])
def test_bad_guidance(folder):
    ours, _, settings = make(folder)
    want = run(ours, **settings)
    for wrong in (3.0, "PAG", {"PAG": 3.0}, PAG):
        with pytest.raises(TypeError, match="guidance is a config such as PAG.3.0., or a list of them; got"):
            run(ours, **settings, guidance=wrong)
    with pytest.raises(TypeError, match="such as PAG.3.0.; got 3.0"):
        run(ours, **settings, guidance=[PAG(1.0), 3.0])
    with pytest.raises(ValueError, match="nothing"):
        run(ours, **settings, guidance=PAG(1.0, layers=("nothing",)))
    with guide(ours, PAG(2.0)):
        with pytest.raises(ValueError, match="guided already. Give all guidances to one call"):
            run(ours, **settings, guidance=PAG(1.0))
        outside = run(ours, **settings)
    assert np.array_equal(run(ours, **settings, guidance=PAG(2.0)), outside)
    assert np.array_equal(run(ours, **settings), want)
    with pytest.raises(RuntimeError, match="PAG did not act in any of 3 network calls"):
        run(ours, **settings, guidance=PAG(1.0, interval=(400, 401)))
    assert np.array_equal(run(ours, **settings), want)


@pytest.mark.parametrize("folder", THIN[1:])
def test_a_saved_folder_is_the_stock_pipelines(folder, tmp_path):
    ours, stock, settings = make(folder)
    run(ours, **settings, guidance=PAG(2.0))
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == type(stock).__name__
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is getattr(diffusers, type(stock).__name__)
    mine = type(ours).from_pretrained(tmp_path)
    assert np.array_equal(run(mine, **settings, guidance=PAG(2.0)), run(ours, **settings, guidance=PAG(2.0)))
    made = type(ours).from_pipe(again)
    assert type(made) is type(ours)
    assert np.array_equal(run(made, **settings), run(stock, **settings))
