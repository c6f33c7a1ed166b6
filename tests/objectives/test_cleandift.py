"""CleanDIFT: the loss written out, one pass against repeated ones, strata, bounds, what is trained, what is saved."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch.nn import functional

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.denoiser.layers import architecture_key
from diffusers_repr.features import cleandift_extractor, cleandift_layers
from diffusers_repr.features.presets import presets
from diffusers_repr.models import FeatureAdapters
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.objectives import (
    CleanDIFTConfig,
    CleanDIFTObjective,
    DiffusionObjective,
    cleandift,
    noise_robustness,
    strata_timesteps,
)
from diffusers_repr.objectives.reached import reached_parameters
from diffusers_repr.testing import check_objective
from tests.objectives.cases import gradients, shake
from tests.testers.models import build

DIGITS = Path(__file__).parents[2] / "examples" / "models" / "digits-ddpm"


@pytest.fixture(autouse=True, scope="module")
def _reached_once():
    """Which parameters some layers of a network reach is found once for all objectives of it."""
    known, real = {}, cleandift.reached_parameters

    def kept(denoiser, layers):
        key = (architecture_key(denoiser), *layers)
        if key not in known:
            known[key] = real(denoiser, layers)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleandift, "reached_parameters", kept)
        yield


def made(pipe: str = "ddim", **settings) -> CleanDIFTObjective:
    torch.manual_seed(0)
    settings = {"time_width": 8, "levels": 3, **settings}
    return CleanDIFTObjective(Denoiser.from_pipe(build(pipe)), CleanDIFTConfig(pipe, **settings)).train()


def batch(count: int = 2, side: int = 16) -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.rand(count, 3, side, side, generator=generator) * 2 - 1,
        "noise": torch.randn(count, 3, 3, side, side, generator=generator),
        "time": torch.tensor([[5, 400, 900], [320, 341, 700]])[:count],
    }


def hooked(network, layers, *inputs) -> dict[str, torch.Tensor]:
    """Features by torch's own hooks, `(B, C, N)`, each layer's first output."""
    found, handles = {}, []
    for path in layers:
        module = network.get_submodule(path)

        def keep(module, args, out, path=path):
            value = out if isinstance(out, torch.Tensor) else out[0]
            found[path] = value.flatten(2)

        handles.append(module.register_forward_hook(keep))
    network(*inputs)
    for handle in handles:
        handle.remove()
    return found


def test_at_first_the_loss_is_the_cosine_of_two_networks():
    """`-sum cos(U(x0, 261), U(x_t, t))`: the adapters are the identity."""
    objective, data = made(), batch()
    network = copy.deepcopy(objective.network).eval()
    wanted = {path: 0.0 for path in objective.layers}
    with torch.no_grad():
        out = objective(data)
        clean = hooked(network, objective.layers, data["pixel_values"], 261)
        for k in range(3):
            noisy = objective.denoiser.scheduler.add_noise(
                data["pixel_values"], data["noise"][:, k], data["time"][:, k]
            )
            for path, feature in hooked(network, objective.layers, noisy, data["time"][:, k]).items():
                wanted[path] -= functional.cosine_similarity(clean[path], feature, dim=1).mean() / 3
    assert set(out) == {"loss", *objective.layers}
    for path, value in wanted.items():
        assert float(out[path]) == pytest.approx(float(value), abs=2e-5), path
    assert float(out["loss"]) == pytest.approx(float(sum(wanted.values())), abs=1e-4)


def test_one_pass_of_the_student_equals_a_pass_for_each_level():
    """Also with adapters that are no longer the identity; loss and all gradients."""
    objective, data = made(), batch()
    shake(objective.adapters, std=0.3)
    objective.zero_grad()
    calls = []
    handle = objective.network.register_forward_pre_hook(lambda *a: calls.append(1))
    out = objective(data)
    handle.remove()
    assert len(calls) == 1
    out["loss"].backward()
    once, first = gradients(objective), float(out["loss"])
    objective.zero_grad()
    repeated = torch.zeros(())
    targets = objective.noisy_features(data["pixel_values"], data["time"], data["noise"], {})
    for k in range(3):
        features = objective.clean_features(data["pixel_values"], {})
        adapted = objective.adapters(features, data["time"][:, k])
        for path in objective.layers:
            repeated = repeated - functional.cosine_similarity(adapted[path], targets[path][:, k], dim=-1).mean() / 3
    repeated.backward()
    assert first == pytest.approx(float(repeated), abs=1e-5)
    again = gradients(objective)
    assert once.keys() == again.keys()
    for name, value in once.items():
        torch.testing.assert_close(value, again[name], rtol=1e-3, atol=1e-6, msg=name)


def test_strata():
    schedule = Denoiser.from_pipe(build("ddim")).schedule
    draws = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    times = strata_timesteps(draws, schedule)
    assert torch.equal(times, (1 + (draws.double() + torch.arange(3)) / 3 * 998).floor())
    edges = [1, 1 + 998 / 3, 1 + 2 * 998 / 3, 999]
    for k in range(3):
        assert bool((times[:, k] >= math.floor(edges[k])).all())
        assert bool((times[:, k] < edges[k + 1]).all())
    assert times.min() >= 1
    assert times.max() <= 998
    ends = strata_timesteps(torch.tensor([[0.0] * 3, [1 - 1e-9] * 3], dtype=torch.float64), schedule)
    assert ends.tolist() == [[1, 333, 666], [333, 666, 998]]


def test_nothing_can_be_better_than_what_is_read():
    """No noise, and the same timestep: teacher and student see one thing, and each layer gives -1."""
    objective, data = made(), batch()
    objective.denoiser.schedule = objective.teacher.schedule = NoiseSchedule(
        "vp", "epsilon", 1000, torch.zeros(1000, dtype=torch.float64)
    )
    out = objective({**data, "noise": 0 * data["noise"], "time": torch.full((2, 3), 261)})
    assert float(out["loss"]) == pytest.approx(-len(objective.layers), abs=1e-4)


def test_adapters():
    """The identity at first; a block by its formula; of Stable Diffusion 123.8 M parameters, as the paper's."""
    torch.manual_seed(0)
    adapters = FeatureAdapters(["a", "b"], [6, 4], depth=2, time_width=8, time_hidden=5)
    x, t = torch.randn(2, 7, 6), torch.tensor([3.0, 700.0])
    assert torch.equal(adapters({"a": x}, t)["a"], x)
    shake(adapters, std=0.5)
    m, first = adapters.modulation(t), adapters.adapters[0][0]
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = normed * (1 + m @ first.modulate.weight.T)[:, None]
    value, gate = (y @ first.up.weight.T).chunk(2, -1)
    torch.testing.assert_close(first(x, m[:, None]), x + (value * gate * gate.sigmoid()) @ first.down.weight.T)
    angle = 2 * math.pi * (t / 999)[:, None] * adapters.frequencies
    torch.testing.assert_close(  # the mapping network starts from cosines and sines of random frequencies
        adapters.time_in(torch.cat([angle.cos(), angle.sin()], 1)),
        torch.cat([angle.cos(), angle.sin()], 1) @ adapters.time_in.weight.T,
    )
    many = adapters({"b": torch.ones(2, 3, 4)}, torch.tensor([[3.0, 5.0], [5.0, 700.0]]))["b"]
    torch.testing.assert_close(many[0, 1], many[1, 0])
    torch.testing.assert_close(adapters({"b": torch.ones(2, 3, 4)}, t)["b"][1], many[1, 1])
    with torch.device("meta"):
        paper = FeatureAdapters([str(n) for n in range(11)], [1280] * 7 + [640] * 3 + [320])
    assert sum(p.numel() for p in paper.adapters.parameters()) / 1e6 == pytest.approx(123.8, abs=0.05)
    with pytest.raises(ValueError, match=r"No adapter for layer 'c'; there are \['a', 'b'\]"):
        adapters.adapt("c", x, m)


def test_the_maps_of_stable_diffusion_are_those_of_the_preset():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=8, attention_head_dim=4)
    assert tuple(cleandift_layers(unet)) == presets("cleandift", "sd").layers
    with pytest.raises(ValueError, match="has no mid_block and up_blocks; name the layers"):
        cleandift_layers(build("dit").transformer)


def test_what_lies_behind_the_last_layer_stays_that_of_the_base():
    objective = made()
    trained = {name for name, p in objective.network.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("conv_out", "conv_norm_out", "up_blocks.2.resnets.1")) for name in trained)
    assert {name.split(".")[0] for name in trained} == {"conv_in", "time_embedding", "down_blocks", "mid_block",
                                                        "up_blocks"}  # fmt: skip
    objective(batch())["loss"].backward()
    assert trained == {name for name, p in objective.network.named_parameters() if p.grad is not None}
    denoiser = Denoiser.from_pipe(build("sd"))
    few = reached_parameters(denoiser, ["mid_block"])
    assert not any(name.startswith("up_blocks") for name in few)
    assert any(name.startswith("mid_block") for name in few)


@pytest.mark.parametrize(
    "settings", [{"learn_timestep": True}, {"alignment": "mse", "layers": ["up_blocks.1"], "levels": 1}]
)
def test_the_contract(settings):
    check_objective(made(**settings), {key: batch()[key] for key in ("pixel_values",)})


def test_text_conditions_and_latents():
    objective = made("short_sd", levels=2, layers=["mid_block", "up_blocks.0"])
    side = objective.denoiser.image_size[0]
    data = {"pixel_values": torch.rand(2, 3, side, side) * 2 - 1, "caption": ["a dog", "a red house"]}
    check_objective(objective, data)
    seen = []
    handles = [net.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["encoder_hidden_states"]),
               with_kwargs=True) for net in (objective.teacher.model, objective.network)]  # fmt: skip
    objective(data)
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[0], seen[1].repeat_interleave(2, 0))


@pytest.mark.parametrize("learned", [False, True])
def test_the_timestep_stays_or_moves(learned):
    """Adam's step of 1e-5 is below float32's spacing at 261: with a rate of its own the timestep moves, else never."""
    objective, data = made(learn_timestep=learned), batch()
    groups = [{**group, "lr": 1e-5 * group.get("lr_scale", 1)} for group in objective.param_groups()]
    optimizer = torch.optim.Adam(groups)
    told = []
    objective.network.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(float(kwargs["timestep"].flatten()[0])), with_kwargs=True
    )
    for _ in range(3):
        objective(data)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    if learned:
        assert 0.1 < abs(float(objective.tau.detach()) - 261) < 1
        assert told[0] == 261
        assert told[2] != 261
    else:
        assert told == [261, 261, 261]
        assert not hasattr(objective, "tau")


@pytest.mark.parametrize("what", ["checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_checkpointing_and_compiling_change_nothing(what):
    """A compiled network is read by hooks that were there before, and not broken off."""
    objective, data = made(), batch()
    objective(data)["loss"].backward()
    plain = gradients(objective)
    objective.zero_grad()
    if what == "compiled":
        objective.network.compile(backend="eager")
    else:
        objective.network.enable_gradient_checkpointing()
    objective(data)["loss"].backward()
    found = gradients(objective)
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_a_short_run_makes_features_sturdier_than_noisy_ones(tmp_path):
    """What the adapters make of clean features is then nearer to the mean over noise than one noisy draw is."""
    denoiser = Denoiser.from_pretrained(DIGITS)
    denoiser.model.float()
    torch.manual_seed(0)
    config = CleanDIFTConfig(str(DIGITS), levels=2, time_width=32, layers=["mid_block"])
    objective = CleanDIFTObjective(denoiser, config).train()
    images = denoiser.pixels(load_digits_splits()["train"]["image"][:256])
    held = denoiser.pixels(load_digits_splits()["test"]["image"][:8])
    time, noise = torch.tensor([300.0, 800.0]), torch.randn(6, 8, 1, 8, 8)
    before = noise_robustness(objective, objective.network, held, time, noise)
    assert torch.equal(before["clean"], before["adapted"])
    optimizer = torch.optim.AdamW(objective.param_groups(), lr=1e-3)
    for _ in range(45):
        objective({"pixel_values": images[torch.randint(256, (12,))]})["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = noise_robustness(objective, objective.network, held, time, noise)
    torch.testing.assert_close(after["noisy"], before["noisy"])
    assert float(after["clean"]) > float(before["clean"]) + 0.05
    assert float(after["adapted"]) > float(after["noisy"]) > float(before["adapted"])

    objective.save_pretrained(tmp_path, objective.state_dict(), torch.float32)
    assert json.loads((tmp_path / "cleandift.json").read_text())["timestep"] == 261
    extractor = cleandift_extractor(tmp_path, "mid_block")
    assert (extractor.noise.policy, extractor.levels[0].timestep) == ("clean", 261)
    features = extractor(held / 2 + 0.5)["mid_block"]
    objective.eval()
    with torch.no_grad():
        own = objective.clean_features(held, {})["mid_block"]
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), own, rtol=1e-4, atol=1e-5)
    assert cleandift_extractor(tmp_path).layers == ["mid_block"]
    adapters = FeatureAdapters.from_pretrained(tmp_path / "heads" / "adapters")
    torch.testing.assert_close(adapters.modulation(time), objective.adapters.modulation(time))


def test_robustness_is_of_the_features_that_are_trained():
    """A network of EDM takes the clean image over sigma_data, there as in training."""
    torch.manual_seed(0)
    network = build("ddim").unet
    denoiser = Denoiser(network, EDMEulerScheduler())
    objective = CleanDIFTObjective(denoiser, CleanDIFTConfig("edm", layers=["mid_block"], time_width=8, timestep=0.0))
    images, noise = batch()["pixel_values"], batch()["noise"].transpose(0, 1)
    found = noise_robustness(objective.eval(), network, images, torch.tensor([-0.5]), noise)
    with torch.no_grad():
        clean = objective.clean_features(images, {})["mid_block"]
        draws = [objective.noisy_features(images, torch.full((2, 1), -0.5), one[:, None], {}) for one in noise[:2]]
        mean = torch.stack([draw["mid_block"][:, 0] for draw in draws]).mean(0)
    assert float(found["clean"]) == pytest.approx(float(functional.cosine_similarity(clean, mean, dim=-1).mean()))


def test_a_learned_timestep_is_told_on(tmp_path):
    objective = made(learn_timestep=True)
    with torch.no_grad():
        objective.tau.fill_(200.25)
    objective.save_pretrained(tmp_path, objective.state_dict(), torch.float32)
    extractor = cleandift_extractor(tmp_path)
    assert extractor.levels[0].timestep == 200.25
    assert objective.unsaved() == {}


def test_bad_use(tmp_path):
    with pytest.raises(ValueError, match="No layer 'nothing'"):
        made(layers=["nothing"])
    with pytest.raises(ValueError, match="outside"):
        made(timestep=5000.0)
    with pytest.raises(ValueError, match="`levels` and `adapter_depth` are 1 or more"):
        CleanDIFTConfig("x", levels=0)
    with pytest.raises(ValueError, match="no longer denoises"):
        made().preview(None, 1, None, 1)
    with pytest.raises(FileNotFoundError, match=r"has no cleandift.json: it was not tuned"):
        cleandift_extractor(DIGITS)
    with pytest.raises(TypeError, match="timestep is settled by the tuning"):
        cleandift_extractor(DIGITS, timestep=3)
    plain = cleandift_extractor(Denoiser.from_pipe(build("ddim")))
    assert isinstance(plain, FeatureExtractor)
    assert plain.levels[0].timestep == 261
    assert issubclass(CleanDIFTObjective, DiffusionObjective)
