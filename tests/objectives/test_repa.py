import copy
import math

import pytest
import torch
from torch import nn

from diffusers_repr import Denoiser
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.heads.projector import Projector
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.objectives import DiffusionObjective
from diffusers_repr.objectives.auxiliary.alignment import AlignmentLoss, alignment_loss
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss
from diffusers_repr.objectives.repa.objective import REPAObjective
from diffusers_repr.objectives.teachers import CachedFeatures
from diffusers_repr.objectives.times import TimeSampler
from tests.objectives.cases import COSINE, LINEAR, SMALL, backward, batch, sit, teacher
from tests.testers.models import build


class Summed(AuxiliaryLoss):
    """Mean square of one layer."""

    def __init__(self, layer, weight=1.0, name="summed", **options):
        super().__init__(name, weight, **options)
        self.layers = (layer,)

    def forward(self, step):
        return step.layers[self.layers[0]].values.square().mean()


# The loss itself: D1 checks 2


def looped(projected, target):
    """Sample by sample, as the paper's code does it, in float64."""
    total = 0.0
    for one, other in zip(projected.double(), target.double(), strict=True):
        for h, z in zip(one, other, strict=True):
            total -= float((h / h.norm()) @ (z / z.norm()))
    return total / (projected.shape[0] * projected.shape[1])


def test_the_loss_is_minus_one_where_the_projection_is_the_target():
    z = torch.randn(2, 5, 7)
    assert alignment_loss(z, z).item() == pytest.approx(-1, abs=1e-6)
    assert alignment_loss(-z, z).item() == pytest.approx(1, abs=1e-6)
    assert alignment_loss(z, 37 * z).item() == pytest.approx(-1, abs=1e-6)


def test_the_loss_equals_the_double_loop():
    h, z = torch.randn(4, 6, 9), torch.randn(4, 6, 9)
    assert alignment_loss(h, z).item() == pytest.approx(looped(h, z), abs=1e-6)
    assert alignment_loss(h.double(), z.double()).item() == pytest.approx(looped(h, z), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_stay_finite(dtype):
    h = (torch.randn(2, 5, 768) * 2000).to(dtype).requires_grad_()  # squares overflow in float16
    z = (torch.randn(2, 5, 768) * 1e-4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(h, z)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(looped(h.detach(), z), abs=1e-3)
    assert bool(torch.isfinite(h.grad).all())


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        alignment_loss(torch.ones(1, 2, 3), torch.ones(1, 2, 4))


# The objective: D1 check 3


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_without_encoders_it_is_the_plain_objective_bit_by_bit(schedule):
    plain, none = (kind(sit(schedule)) for kind in (DiffusionObjective, REPAObjective))
    (one, a), (two, b) = backward(plain, batch()), backward(none, batch())
    assert torch.equal(one["loss"], two["loss"])
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_coefficient_of_0_gives_the_plain_gradients_bit_by_bit():
    plain = DiffusionObjective(sit())
    aligned = REPAObjective(sit(), [teacher()], "blocks.1", 0.0, **SMALL)
    (_, a), (out, b) = backward(plain, batch()), backward(aligned, batch())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert out["alignment"].item() != 0


def test_blocks_after_the_layer_get_no_gradient_from_the_alignment():
    objective = REPAObjective(sit(), [teacher()], "blocks.1", **SMALL)
    noisy = objective.noised(batch())
    losses, step = objective.observe(noisy)
    objective.losses["alignment"](step).backward()
    for name, parameter in objective.network.named_parameters():
        late = name.startswith(("blocks.2", "blocks.3", "norm_out", "proj_out"))
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert bool((grad == 0).all()) == late, name


def test_the_loss_is_the_weighted_sum_of_what_is_logged():
    objective = REPAObjective(sit(), [teacher()], "blocks.1", 0.5, losses=[Summed("blocks.2", 0.25)], **SMALL)
    out = objective(batch())
    total = out["denoising"] + 0.5 * out["alignment"] + 0.25 * out["summed"]
    assert sorted(out) == ["alignment", "denoising", "loss", "summed"]
    assert out["loss"].item() == pytest.approx(total.item(), abs=1e-7)
    assert not any(out[name].requires_grad for name in out if name != "loss")


def test_the_loss_by_hand_with_two_encoders():
    encoders = [teacher(name="one"), teacher(dim=4, name="two", seed=5)]
    objective = REPAObjective(sit(), encoders, "blocks.2", **SMALL)
    data = {**batch(), "noise": torch.randn(3, 3, 8, 8), "time": torch.tensor([100.0, 500.0, 900.0])}
    objective.label_dropout = 0.0
    out = objective(data)
    # the tapped layer is the state of a network cut off behind it
    cut = copy.deepcopy(objective.network)
    cut.blocks = cut.blocks[:3]
    kept = []
    cut.norm_out.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    t = (data["time"] / 1000).view(-1, 1, 1, 1)
    x_t = (1 - t) * data["pixel_values"] + t * data["noise"]
    none = torch.zeros(3, dtype=torch.bool)
    cut(x_t, data["time"], data["class_labels"], drop_mask=none)
    losses = []
    for encoder, projector in zip(encoders, objective.losses["alignment"].projectors, strict=True):
        losses.append(looped(projector(kept[0], (4, 4)).detach(), encoder.encode_pixels(data["pixel_values"]).tokens))
    assert out["alignment"].item() == pytest.approx(sum(losses) / 2, abs=1e-5)
    predicted = objective.network(x_t, data["time"], data["class_labels"], drop_mask=none).sample
    wanted = (predicted - (data["noise"] - data["pixel_values"])).square().mean()
    assert out["denoising"].item() == pytest.approx(wanted.item(), abs=1e-5)


def test_the_default_layer_is_that_of_the_paper():
    assert REPAObjective(sit(layers=12), [teacher()], **SMALL).losses["alignment"].layer == "blocks.3"


def test_the_alignment_can_be_learnt():
    torch.manual_seed(0)
    objective = REPAObjective(sit(), [teacher()], "blocks.2", 1.0, **SMALL)
    optimizer = torch.optim.AdamW(objective.parameters(), 1e-2)
    data = {**batch(4), "time": torch.full((4,), 100.0)}
    first = objective(data)["alignment"].item()
    for _ in range(25):
        optimizer.zero_grad()
        out = objective(data)
        out["loss"].backward()
        optimizer.step()
    assert out["alignment"].item() < first - 0.4


# Any denoiser


def objective_of(name, layer, **options):
    pipe = build(name)
    denoiser = Denoiser.from_pipe(pipe)
    size = denoiser.image_size
    return REPAObjective(denoiser, [teacher(2, image_size=size)], layer, **{**SMALL, **options}), size


@pytest.mark.parametrize(
    ("name", "layer", "match"),
    [
        ("class_unet", "mid_block", "pool_student"),
        ("class_unet", "down_blocks.1", "interpolate_teacher"),
        ("ddim", "up_blocks.0", "resize_image"),
        ("dit", "transformer_blocks.1", "interpolate_teacher"),
        ("pixart", "transformer_blocks.0", "interpolate_teacher"),
        ("sd3", "transformer_blocks.0", "interpolate_teacher"),
    ],
)
def test_any_denoiser(name, layer, match):
    if match == "pool_student":
        pipe = build(name)
        objective = REPAObjective(Denoiser.from_pipe(pipe), [teacher(8)], layer, match_grid=match, **SMALL)
        size = objective.denoiser.image_size
    else:
        objective, size = objective_of(name, layer, match_grid=match)
    data = batch(2, size[0], classes=10)
    data["caption"] = ["a cat", "a dog"]
    out, grads = backward(objective, data)
    assert -1 <= out["alignment"].item() <= 1
    assert all(bool(torch.isfinite(grad).all()) for grad in grads.values())
    assert grads["terms.alignment.projectors.0.layers.0.weight"].abs().max() > 0
    assert not any(key.startswith(("vae", "encoder", "text")) for key in objective.state_dict())


@pytest.mark.parametrize(
    ("kind", "output"), [("flow", "velocity"), ("cosine_flow", "velocity"), ("flow", "sample"), ("flow", "epsilon")]
)
def test_every_form_of_prediction(kind, output):
    objective = REPAObjective(sit(NoiseSchedule(kind, output)), [teacher()], "blocks.1", **SMALL)
    out, _ = backward(objective, batch())
    assert math.isfinite(out["loss"].item())


# Teachers


def test_teachers_are_no_part_of_the_objective():
    encoder = teacher()
    before = copy.deepcopy(encoder.module.state_dict())
    objective = REPAObjective(sit(), [encoder], "blocks.1", **SMALL)
    assert not [key for key in objective.state_dict() if "encoder" in key]
    assert {id(p) for p in encoder.module.parameters()}.isdisjoint(id(p) for p in objective.parameters())
    mode = encoder.module.training
    objective.train()
    backward(objective, batch())
    assert encoder.module.training == mode
    assert all(torch.equal(before[key], value) for key, value in encoder.module.state_dict().items())


def test_cached_features_give_the_same_loss():
    encoder = teacher()
    data = {**batch(), "time": torch.tensor([100.0, 500.0, 900.0])}
    features = {"teacher": encoder.encode_pixels(data["pixel_values"]).tokens}
    objective = REPAObjective(sit(), [encoder], "blocks.1", **SMALL)
    (one, a), (two, b) = backward(objective, data), backward(objective, {**data, "features": features})
    assert torch.equal(one["loss"], two["loss"])
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_encoder_that_is_not_loaded():
    stand_in = CachedFeatures("teacher", 6, (4, 4))
    objective = REPAObjective(sit(), [stand_in], "blocks.1", **SMALL)
    data = {**batch(), "features": {"teacher": torch.randn(3, 16, 6)}}
    objective.check_batch(data)
    assert math.isfinite(objective(data)["loss"].item())
    with pytest.raises(ValueError, match=r"no cached features 'teacher'"):
        objective.check_batch(batch())


def test_the_features_of_an_encoder_do_not_depend_on_autocast():
    objective = REPAObjective(sit(), [teacher()], "blocks.1", **SMALL)
    seen = []
    objective.losses["alignment"].matched = lambda student, target, name: (
        seen.append(target.values) or (student, target.values)
    )
    objective(batch())
    with torch.autocast("cpu", torch.bfloat16):
        objective(batch())
    assert torch.equal(*seen)


# Randomness, state, saving


def test_a_generator_decides_everything():
    objective = REPAObjective(sit(), [teacher()], "blocks.1", **SMALL)
    state = torch.get_rng_state()
    one, two, other = (
        objective({**batch(), "generator": torch.Generator().manual_seed(seed)})["loss"].item() for seed in (7, 7, 8)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert one == two != other


def test_projectors_are_saved_apart(tmp_path):
    objective = REPAObjective(sit(), {"dino/v2": teacher(), "b@3.5": teacher(dim=4)}, "blocks.1", **SMALL)
    state = {name: value + 1 for name, value in objective.trained_state().items()}
    heads = {head.name: head.build(state) for head in objective.artifacts()[1:]}
    assert list(heads) == ["projector-dino-v2", "projector-b-3.5"]
    heads["projector-b-3.5"].save_pretrained(tmp_path)
    again = Projector.from_pretrained(tmp_path)
    own = objective.losses["alignment"].projectors[1]
    assert all(torch.equal(value + 1, again.state_dict()[key]) for key, value in own.state_dict().items())
    assert not any("projector" in name for name, _ in objective.network.named_modules())
    assert list(objective.ema_modules()) == ["network"]


def test_identity_tells_settings_and_encoders_apart():
    def identity(**options):
        return REPAObjective(sit(), [teacher(seed=options.pop("seed", 1))], "blocks.1", **SMALL, **options).identity()

    assert identity() == identity()
    assert identity() != identity(coefficient=0.3)
    assert identity() != identity(seed=3)


# Times: D1 check 6


def test_lognormal_times():
    count = 20000
    level = TimeSampler("lognormal").draw(LINEAR, count, torch.Generator().manual_seed(0))
    t = level.timestep.double() / 1000
    assert t.median().item() == pytest.approx(0.5, abs=0.01)
    logit = torch.log(t / (1 - t))
    bound = 3 / math.sqrt(count)
    assert abs(logit.mean().item()) < bound
    assert abs(logit.std().item() - 1) < bound
    cosine = TimeSampler("lognormal").draw(COSINE, count, torch.Generator().manual_seed(0))
    ratio = torch.exp(torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    t = cosine.timestep.double() / 1000
    assert torch.allclose(t, torch.atan(ratio) * 2 / math.pi, atol=1e-5)


# Under compile and checkpointing


def test_gradient_checkpointing_changes_nothing():
    plain, saved = (REPAObjective(sit(), [teacher()], "blocks.1", **SMALL) for _ in range(2))
    saved.load_state_dict(plain.state_dict())
    saved.network.enable_gradient_checkpointing()
    (one, a), (two, b) = backward(plain.train(), batch()), backward(saved.train(), batch())
    assert torch.equal(one["loss"], two["loss"])
    assert all(torch.allclose(a[name], b[name], atol=1e-7) for name in a)


# Bad input


def test_grids_that_differ_are_named():
    with pytest.raises(ValueError, match=r"4 x 4.*2 x 2.*resize_image.*pool_student.*interpolate_teacher"):
        REPAObjective(sit(), [teacher(4)], "blocks.1", **SMALL)


def test_a_layer_that_does_not_exist():
    with pytest.raises(ValueError, match=r"No layer 'blocks.11'.*Closest: \['blocks.1'"):
        REPAObjective(sit(), [teacher()], "blocks.11", **SMALL)


def test_a_layer_that_is_no_image():
    with pytest.raises(ValueError, match="'time_embed' gives no image"):
        REPAObjective(sit(), [teacher()], "time_embed", **SMALL)


def test_a_unet_has_no_default_layer():
    with pytest.raises(ValueError, match="name the layer"):
        REPAObjective(Denoiser.from_pipe(build("ddim")), [teacher()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": -1.0}, "must be finite and not negative"),
        ({"match_grid": "nearest"}, "match_grid='nearest'; expected None or one of"),
        ({"losses": [AlignmentLoss("blocks.0")]}, "Two losses are called 'alignment'"),
        ({"label_dropout": 2.0}, "label_dropout is a probability"),
        ({"alignment": AlignmentLoss()}, "has its own settings; give it layer, projector_dim"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        REPAObjective(sit(), [teacher()], "blocks.1", **{**SMALL, **options})


def test_two_encoders_of_one_name():
    with pytest.raises(ValueError, match="Two encoders are called 'teacher'"):
        REPAObjective(sit(), [teacher(), teacher()], "blocks.1", **SMALL)
    with pytest.raises(TypeError, match="Expected an Encoder, got Linear"):
        REPAObjective(sit(), [nn.Linear(2, 2)], "blocks.1", **SMALL)


def test_a_cache_of_another_encoder():
    objective = REPAObjective(sit(), [teacher()], "blocks.1", **SMALL)
    with pytest.raises(ValueError, match=r"cached features 'teacher' are \(3, 9, 6\); expected \(B, 4 \* 4, 6\)"):
        objective({**batch(), "features": {"teacher": torch.zeros(3, 9, 6)}})


def test_latents_without_images_or_features():
    objective = REPAObjective(sit(), [teacher()], "blocks.1", **SMALL)
    with pytest.raises(ValueError, match="neither pixel_values for encoder 'teacher' nor its cached features"):
        objective.check_batch({"class_labels": torch.tensor([1])})


def test_pixels_are_what_the_encoder_gets():
    image = to_pixels(torch.rand(1, 3, 8, 8), 3)
    encoder = teacher()
    objective = REPAObjective(sit(), [encoder], "blocks.1", **SMALL)
    seen = []
    objective.encoders["teacher"].encode_pixels = lambda pixels: (
        seen.append(pixels) or type(encoder).encode_pixels(encoder, pixels)
    )
    objective({"pixel_values": image, "class_labels": torch.tensor([1])})
    assert len(seen) == 1
    assert torch.equal(seen[0], image)
