"""Published heads of Readout Guidance and Hyperfeatures as ours: equal output, what is refused, the command."""

import pytest
import torch

from diffusers_repr import Denoiser
from diffusers_repr.cli import main
from diffusers_repr.heads import Hyperfeatures, ReadoutHead, read_features
from diffusers_repr.heads.convert import convert_readout, is_published_readout
from diffusers_repr.heads.convert_hyperfeatures import convert_hyperfeatures, is_published_hyperfeatures
from diffusers_repr.heads.hyperfeature_maps import paper_reads, walk_maps
from tests.heads.published import IDXS, checkpoint, embedded, forward, hyperfeatures
from tests.testers.models import build, saved


@pytest.fixture(scope="module")
def base():
    return Denoiser.from_pipe(build("sd"))


def features(denoiser, head, timestep=300):
    x = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(2))
    maps = read_features(denoiser, x, timestep, denoiser.condition(prompt="", batch=2), head.config["layers"])
    resized = [torch.nn.functional.interpolate(value, (16, 24), mode="bilinear") for value in maps.values()]
    return maps, resized


@pytest.mark.parametrize(
    ("kind", "sequential"),
    [("spatial", False), ("appearance", False), ("appearance", True), ("correspondence", False)],
)
def test_equals_the_published_network(base, kind, sequential):
    held = checkpoint(base, kind, sequential=sequential)
    head, notes = convert_readout(held, base)
    maps, resized = features(base, head)
    # The weights of both forms are equal, their names are not.
    plain = checkpoint(base, kind)["aggregation_network"]
    timed = kind != "correspondence" and not sequential
    # Trained on the embedding of 1000 - t, where the network is told t.
    expected = forward(plain, resized, embedded(base.model, 1000 - 300, 2) if timed else None)
    with torch.no_grad():
        torch.testing.assert_close(head(maps, 300), expected, rtol=1e-4, atol=2e-5)
    assert head.config["kind"] == kind
    assert head.config["time_source"] == ("network" if timed else "own" if kind == "correspondence" else "none")
    assert any("time embedding were left out" in note for note in notes) == (not timed)
    head.check_base(base)


def test_what_the_settings_tell(base):
    held = checkpoint(base)
    head, notes = convert_readout(held, base)
    assert (head.range, head.config["target"], notes) == ((-1.0, 1.0), "depth", ())
    held["config"]["dataset_args"] = {"control_type": "pose"}
    head, notes = convert_readout(held, base)
    assert head.range == (-0.5, 0.5)
    assert "-0.5 to 0.5 was taken" in notes[0]
    every = checkpoint(base, idxs=range(12))
    every["config"].pop("idxs")
    assert len(convert_readout(every, base)[0].config["layers"]) == 12
    bare = checkpoint(base, "appearance", idxs=range(12))["aggregation_network"] | {"logit_scale": torch.ones(())}
    assert is_published_readout(bare)
    with pytest.raises(ValueError, match="does not tell whether.*--kind"):
        convert_readout(bare, base)
    assert convert_readout(bare, base, "appearance")[0].config["kind"] == "appearance"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state, config: state.pop("mixing_weights"), "lacks mixing_weights"),
        (lambda state, config: state.update(extra=torch.ones(1)), "has extra, which are unknown"),
        (lambda state, config: state.update(mixing_weights=torch.ones(4)), "several timesteps"),
        (lambda state, config: state["mixing_weights"].fill_(torch.nan), "not finite"),
        (lambda state, config: config.update(idxs="[0]"), "reads 2 maps.*tiny/model"),
        (lambda state, config: config.update(idxs="[0, 1]"), "values at layer"),
        (lambda state, config: config["aggregation_kwargs"].update(output_head_act=False), "no tanh"),
        (lambda state, config: state.update(mixing_weights="code"), "no tensors"),
        (
            lambda state, config: state.update({"output_head.2.weight": torch.ones(8, 9, 3, 3)}),
            "hidden.1.weight.*9, 3",
        ),
        (lambda state, config: config.update(idxs="__import__('os')"), "idxs"),
        (lambda state, config: config["dataset_args"].update(control_range=[0.0]), "control_range"),
    ],
)
def test_what_is_refused(base, change, what):
    held = checkpoint(base)
    change(held["aggregation_network"], held["config"])
    with pytest.raises(ValueError, match=what):
        convert_readout(held, base)


def test_another_kind_is_refused(base):
    with pytest.raises(ValueError, match="an output head, and kind is 'appearance'"):
        convert_readout(checkpoint(base), base, "appearance")
    with pytest.raises(ValueError, match="no output head, and kind is 'spatial'"):
        convert_readout(checkpoint(base, "appearance"), base, "spatial")


def test_a_base_with_another_time_embedding_is_refused():
    other = Denoiser.from_pipe(build("pixart"))
    with pytest.raises(ValueError, match="no time embedding as Stable Diffusion"):
        ReadoutHead.for_base(other, time_source="network")


def test_a_head_with_the_networks_time_trains_without_it(base):
    head = ReadoutHead.for_base(base, time_source="network", width=8, bottleneck=4, output_widths=(4, 4))
    frozen = {name for name, value in head.named_parameters() if not value.requires_grad}
    assert frozen == {f"time_embedding.layers.{at}.{leaf}" for at in (0, 1) for leaf in ("weight", "bias")}
    got = head.time_embedding(torch.tensor([7.0, 640.0], dtype=torch.float64), torch.float32)
    times = torch.cat([embedded(base.model, 7), embedded(base.model, 640)])
    torch.testing.assert_close(got, times, rtol=1e-5, atol=1e-6)


def test_the_command(base, tmp_path, capsys):
    held, file, out = checkpoint(base), tmp_path / "readout_sdv15_spatial_depth.pt", tmp_path / "head"
    torch.save({**held, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}}, file)
    assert main(["convert", str(file), "--out", str(out)]) == 2
    assert "give --base, a folder or Hub id (it was trained on 'tiny/model')" in capsys.readouterr().err
    assert main(["convert", str(file), "--out", str(out), "--base", str(saved("sd")), "--path", "linear"]) == 2
    assert "drop --path" in capsys.readouterr().err
    assert main(["convert", str(file), "--out", str(out), "--base", str(saved("sd"))]) == 0
    told = capsys.readouterr().out
    assert f"Wrote a spatial head to {out}: it reads depth from {len(IDXS)} maps" in told
    loaded = ReadoutHead.from_pretrained(out)
    loaded.check_base(base)
    maps, resized = features(base, loaded)
    expected = forward(held["aggregation_network"], resized, embedded(base.model, 700, 2))
    with torch.no_grad():
        torch.testing.assert_close(loaded(maps, 300), expected, rtol=1e-4, atol=2e-5)
    card = (out / "README.md").read_text()
    assert "2312.02150" in card
    assert str(tmp_path) not in card
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "diffusers_repr_readout.py",
        "diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "correspondence", "time_source": "network"}, "A correspondence head takes no time"),
        ({"time_source": "none", "reversed_time": True}, "reversed_time would not act"),
        ({"time_source": "base"}, "Unknown time_source 'base'"),
    ],
)
def test_times_that_a_head_does_not_take(options, message):
    with pytest.raises(ValueError, match=message):
        ReadoutHead(["a"], [4], width=8, bottleneck=4, output_widths=(4, 4), time_width=8, **options)


# Diffusion Hyperfeatures


def flat_names(state):
    """Without the number that a `Sequential` of one block puts into names."""
    pieces = {name: name.split(".") for name in state}
    return {".".join(p[:2] + p[3:]) if len(p) > 1 else name: state[name] for name, p in pieces.items()}


def test_hyperfeatures_equal_the_published_network(base, tmp_path, capsys):
    """The clean image is its last number, 3 of 4; weights are level by level, in the order of the file."""
    saved_at = (0, 3, 2)
    held, file, out = hyperfeatures(base, saved_at), tmp_path / "aggregation_network.pt", tmp_path / "head"
    torch.save({**held, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 0.1}]}}, file)
    assert is_published_hyperfeatures(held)
    assert not is_published_hyperfeatures(checkpoint(base, "appearance", sequential=True))
    assert main(["convert", str(file), "--out", str(out), "--base", str(saved("sd"))]) == 0
    assert "12 layers of" in (told := capsys.readouterr().out)
    assert "at 3 of 4 steps" in told
    source = Hyperfeatures.from_pretrained(out)
    assert (source.head.reads, source.head.config["steps"]) == ([0, 1, 3], 4)
    images = torch.rand(2, 3, *source.image_size, generator=torch.Generator().manual_seed(3))
    denoiser, kept = source.denoiser, {}
    size = source.grid(denoiser.image_size)
    walk_maps(denoiser, denoiser.encode(images), denoiser.condition(prompt="", batch=2), source.head.config["layers"],
              4, [0, 1, 3], lambda place, path, maps: kept.update({((3, 2, 0)[place], path): maps}))  # fmt: skip
    maps = [
        torch.nn.functional.interpolate(kept[number, path], size, mode="bilinear")
        for number in saved_at
        for path in source.head.config["layers"]
    ]
    expected = forward(flat_names(held["aggregation_network"]), maps)
    torch.testing.assert_close(source(images)["hyperfeatures"], expected, rtol=1e-4, atol=2e-5)
    card = (out / "README.md").read_text()
    assert "2305.14334" in card
    assert str(tmp_path) not in card


def test_hyperfeatures_that_tell_no_steps(base):
    state = hyperfeatures(base)["aggregation_network"]
    head, (note,) = convert_hyperfeatures({**state, "mixing_weights": torch.ones(12 * 11)}, base)
    assert (head.reads, head.config["steps"]) == (paper_reads(50), 50)
    assert "tells no steps" in note


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda state, config: state.pop("bottleneck_layers.3.0.conv2.weight"), "lacks bottleneck_layers.3.conv2"),
        (
            lambda state, config: state.update({"bottleneck_layers.1.1.conv1.weight": torch.ones(1, 1, 1, 1)}),
            "are unknown",
        ),
        (lambda state, config: state.update(mixing_weights=torch.ones(24)), "do not go with 24 mixing weights of 12"),
        (lambda state, config: config.update(save_timestep=[4, 2, 0]), "do not go with"),
        (lambda state, config: config.update(save_timestep="[0]"), "save_timestep"),
        (lambda state, config: config.pop("save_timestep"), "neither of the paper's eleven"),
        (lambda state, config: config.update(diffusion_mode="generation"), "maps of a 'generation'"),
        (lambda state, config: config.update(guidance_scale=7.5), "guidance 7.5"),
        (lambda state, config: config.update(flip_timesteps=True), "flip_timesteps"),
        (lambda state, config: config.update(idxs=[[0, 0]]), "mixes 12 layers; this .* has 1 of them.*tiny/model"),
        (lambda state, config: state["mixing_weights"].fill_(torch.nan), "not finite"),
        (
            lambda state, config: state.update({"bottleneck_layers.0.0.conv2.weight": torch.ones(32, 9, 3, 3)}),
            "conv_mid.weight.*9, 3",
        ),
    ],
)
def test_hyperfeatures_that_are_refused(base, change, what):
    held = hyperfeatures(base)
    change(held["aggregation_network"], held["config"])
    with pytest.raises(ValueError, match=what):
        convert_hyperfeatures(held, base)
