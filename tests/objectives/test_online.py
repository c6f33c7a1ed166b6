"""Online guidance: two stages, what the network is conditioned on in each, what is saved."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from diffusers_repr import Denoiser, load_prior
from diffusers_repr.assign import SinkhornAssigner, sinkhorn_knopp
from diffusers_repr.capture import capture
from diffusers_repr.denoiser import MapConditioner, VectorConditioner
from diffusers_repr.models import UViTTransformer2DModel
from diffusers_repr.objectives import OnlineGuidanceObjective
from diffusers_repr.testing import check_objective
from diffusers_repr.training import TrainingConfig, train
from diffusers_repr.training.ema import EMA
from tests.training.loop_cases import Numbers

K, E = 4, 6
LAYER = "blocks.1"


def uvit(**changes):
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 1, "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2}
    model = UViTTransformer2DModel(**{**sizes, "class_token": True, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return SiTPipeline(model, FlowMatchODEScheduler())


def objective(kind="class", switch=2, norm="batch", **options):
    torch.manual_seed(0)
    if kind == "class":
        denoiser = Denoiser.from_pipe(uvit(num_classes=K))
    elif kind == "vector":
        denoiser = Denoiser.from_pipe(uvit(condition_dim=E))
    else:
        pipe = uvit(in_channels=1 + E, out_channels=1)
        denoiser = Denoiser(pipe.transformer, pipe.scheduler, pipe=pipe, conditioner=MapConditioner(E))
    assigner = SinkhornAssigner(16, K, embed_dim=E, norm=norm, output="class" if kind == "class" else "vector")
    return OnlineGuidanceObjective(denoiser, assigner, switch, **options)


def batch(times=(100.0, 150.0, 600.0, 180.0, 120.0, 900.0)):
    generator = torch.Generator().manual_seed(1)
    shape = (len(times), 1, 8, 8)
    return {
        "pixel_values": torch.rand(shape, generator=generator) * 2 - 1,
        "noise": torch.randn(shape, generator=generator),
        "time": torch.tensor(times),
    }


def in_second_stage(kind="class", **options):
    """With a moving average that is not the weights."""
    made = objective(kind, **options)
    ema = EMA(made)
    made.on_step_end(2, ema)
    with torch.no_grad():
        for value in ema.shadow.values():
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).abs())
    return made, ema


@pytest.mark.parametrize("kind", ["class", "vector", "map"])
def test_first_stage_sees_no_condition(kind):
    made = objective(kind)
    noisy = made.noised(batch())
    wanted = made.conditioner.null(6)
    assert noisy.condition.keys() == wanted.keys()
    assert all(torch.equal(noisy.condition[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("detach", [True, False])
def test_clustering_loss(detach):
    """By hand, at the class token; only noise levels inside the window; the network is left alone by it."""
    made = objective(norm="layer", detach=detach, switch=10)
    made.on_step_end(5, EMA(made))
    data = batch()
    out = made(data)
    with torch.no_grad():
        noisy = made.noised(data)
        inputs = made.denoiser.network_inputs(noisy.x_t, noisy.level, noisy.condition)
        with capture(made.network, LAYER) as tape:
            made.network(**inputs)
        tokens = tape[LAYER][:, 0]
        head, prototypes = made.assigner.head, F.normalize(made.assigner.prototypes, dim=1)
        scores = F.normalize(head(tokens), dim=1) @ prototypes.T
        targets = sinkhorn_knopp(scores)
        each = -(targets * (scores / 0.1).log_softmax(1)).sum(1)
        wanted = each[[1, 3, 4]].sum() / 6  # 150, 180 and 120 of 1000
    torch.testing.assert_close(out["clustering"], wanted)
    torch.testing.assert_close(out["loss"], out["denoising"] + 0.5 * wanted)  # halfway to the switch
    made.zero_grad()
    seen = made.observe(made.noised(data))[1]
    made.clustering(seen).backward()
    left = [p.grad for p in made.network.parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert bool(left) != detach
    assert made.assigner.prototypes.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["class", "vector", "map"])
def test_second_stage_asks_the_moving_average(kind):
    made, ema = in_second_stage(kind)
    data = batch()
    twin = copy.deepcopy(made)  # a network that has the average for weights
    for name, value in ema.shadow.items():
        twin.state_dict()[name].copy_(value)
    twin.eval()
    x0, noise = data["pixel_values"], data["noise"]
    x_t = 0.85 * x0 + 0.15 * noise
    null = twin.conditioner.null(6)
    with torch.no_grad(), capture(twin.network, LAYER) as tape:
        inputs = twin.denoiser.network_inputs(x_t, twin.denoiser.level(150.0).to("cpu"), null)
        twin.network(**inputs)
    found = tape[LAYER]
    rows = found[:, -16:].reshape(-1, 16) if kind == "map" else found[:, 0]
    with torch.no_grad():  # prototypes where samples are, for new ones take all alike
        for prototypes in (ema.shadow["assigner.prototypes"], twin.assigner.prototypes):
            prototypes.copy_(3 * twin.assigner.embed(rows)[1:5])
        ids = twin.assigner.scores(rows).argmax(1)
    ran = []
    handle = made.network.blocks[2].register_forward_hook(lambda *_: ran.append(1))
    noisy = made.noised(data, drop=False)
    handle.remove()
    assert not ran  # stopped at the layer it reads
    prototypes = F.normalize(ema.shadow["assigner.prototypes"], dim=1)
    if kind == "class":
        assert torch.equal(noisy.condition["class_labels"], ids)
    elif kind == "vector":
        torch.testing.assert_close(noisy.condition["condition"], prototypes[ids])
    else:
        maps = noisy.condition["map_channels"]
        assert maps.shape == (6, E, 8, 8)
        torch.testing.assert_close(maps[2, :, 5, 3], prototypes[ids.view(6, 4, 4)[2, 2, 1]])
    assert len(ids.unique()) > 1
    assert made.network.training
    assert all(not torch.equal(p, ema.shadow[f"network.{name}"]) for name, p in made.network.named_parameters())
    # and it trains
    made(data)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in made.network.parameters())


def test_dropped_to_null():
    made, _ = in_second_stage(label_dropout=1.0)
    assert (made.noised(batch()).condition["class_labels"] == K).all()
    assert (made.noised(batch(), drop=False).condition["class_labels"] < K).all()
    vectors, _ = in_second_stage("vector", label_dropout=1.0)
    assert vectors.noised(batch()).condition["drop_mask"].all()


def test_at_the_switch_the_average_becomes_the_weights():
    made = objective()
    ema = EMA(made, decay=0.9, warmup=False)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1.0)
    made.on_step_end(1, ema)
    assert not torch.equal(ema.shadow["network.positions"], made.network.positions)
    assert not made.assigner.fitted
    made.on_step_end(2, ema)
    assert all(torch.equal(ema.shadow[name], value) for name, value in ema.source.items())
    assert made.assigner.fitted
    assert made.conditions_now


@pytest.mark.parametrize("kind", ["class", "vector", "map"])
def test_training_saves_what_sampling_draws_from(kind, tmp_path):
    """The pipeline, the averaged assigner, and a prior of prototypes as often as they were taken."""
    made = objective(kind, switch=2)
    config = TrainingConfig(
        output_dir=str(tmp_path), train_batch_size=8, max_train_steps=5, eval_batch_size=8, num_inference_steps=1,
        mixed_precision="no", learning_rate=1e-3,
    )  # fmt: skip
    train(made, Numbers(24), config)
    assert (tmp_path / "samples.png").is_file() or list(tmp_path.rglob("*.png"))
    pipe = SiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assigner, prior = SinkhornAssigner.from_pretrained(tmp_path / "assigner"), load_prior(tmp_path)
    assert assigner.gives == ("class" if kind == "class" else "vector")
    assert made.usage.sum() > 0
    out = pipe(batch_size=64, num_inference_steps=1, output_type="latent")
    if kind == "class":
        torch.testing.assert_close(prior.frequencies, made.usage.double())
        assert set(out.class_labels.tolist()) <= set(made.usage.nonzero().flatten().tolist())
    elif kind == "map":
        unit = F.normalize(assigner.prototypes.detach(), dim=1)
        maps = prior.values[:3]
        cells = unit[made.recent[:3]].permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(maps, cells)
        start = torch.randn(3, 1, 8, 8)
        one_step = pipe(condition=maps, latents=start, guidance_scale=3.0, num_inference_steps=1, output_type="latent")
        lanes = (pipe.transformer(torch.cat([start, given], 1), 1000.0).sample for given in (0 * maps, maps))
        with torch.no_grad():
            null, cond = lanes
        torch.testing.assert_close(one_step.images, start - null - 3.0 * (cond - null), rtol=1e-4, atol=1e-4)
    else:
        unit = F.normalize(assigner.prototypes.detach(), dim=1)
        nearest = (prior.values @ unit.T).argmax(1)
        torch.testing.assert_close(prior.values, unit[nearest], atol=1e-6, rtol=0)
        share = torch.bincount(nearest, minlength=K) / 512
        torch.testing.assert_close(share, made.usage / made.usage.sum(), atol=2 / 512, rtol=0)


def test_maps_are_kept_for_the_prior():
    made, ema = in_second_stage("map")
    noisy = made.noised(batch(), drop=False)
    prior = made.prior()
    prototypes = F.normalize(made.assigner.prototypes, dim=1)
    assert prior.values.shape == (6, E, 8, 8)
    # the prior has the weights' prototypes, the step the average's; which of them is the same
    kept = torch.einsum("behw,ke->bhwk", prior.values, prototypes).argmax(-1)
    averaged = F.normalize(ema.shadow["assigner.prototypes"], dim=1)
    told = torch.einsum("behw,ke->bhwk", noisy.condition["map_channels"], averaged)
    assert torch.equal(kept, told.argmax(-1))
    assert made.usage.sum() == 6 * 16


def test_a_unet_by_the_mean_of_its_middle():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    unet = UNet2DModel(8, 1, 1, **blocks, **sizes, num_class_embeds=K + 1)
    pipe = GuidedUnconditionalPipeline(unet, DDPMScheduler(num_train_timesteps=100))
    made = OnlineGuidanceObjective(Denoiser.from_pipe(pipe), SinkhornAssigner(16, K), 2)
    assert made.clustering.layers == ("mid_block",)
    assert made.encode_level(3, torch.device("cpu")).timestep.tolist() == [15, 15, 15]
    made.on_step_end(2, EMA(made))
    data = batch((1, 15, 70, 18, 12, 99))
    noisy = made.noised(data, drop=False)
    with torch.no_grad(), capture(unet.eval(), "mid_block") as tape:
        level = made.encode_level(6, torch.device("cpu"))
        alpha, sigma = (value.float().view(-1, 1, 1, 1) for value in (level.alpha, level.sigma))
        unet(alpha * data["pixel_values"] + sigma * data["noise"], torch.tensor(15), torch.full((6,), K))
    with torch.no_grad():
        wanted = made.assigner.eval().scores(tape["mid_block"].mean((2, 3))).argmax(1)
    assert torch.equal(noisy.condition["class_labels"], wanted)


def test_contract():
    check_objective(objective(switch=100), {key: value[:2] for key, value in batch().items() if key == "pixel_values"})


def test_refuses():
    with pytest.raises(ValueError, match="has 4 classes; the assigner's prototypes make 5"):
        OnlineGuidanceObjective(Denoiser.from_pipe(uvit(num_classes=K)), SinkhornAssigner(16, 5), 2)
    with pytest.raises(ValueError, match="has 6 channels of the condition; the assigner's prototypes make 16"):
        OnlineGuidanceObjective(Denoiser.from_pipe(uvit(condition_dim=E)), SinkhornAssigner(16, 5), 2)
    with pytest.raises(ValueError, match="has 16 channels, the assigner takes 8"):
        OnlineGuidanceObjective(Denoiser.from_pipe(uvit(num_classes=K)), SinkhornAssigner(8, K), 2)
    with pytest.raises(ValueError, match="window is"):
        objective(window=(0.3, 0.2))
    made = objective(switch=1)
    made.steps = 1
    with pytest.raises(RuntimeError, match="moving average"):
        made.noised(batch())
    assert isinstance(Denoiser.from_pipe(uvit(condition_dim=E)).conditioner, VectorConditioner)
    made = objective()
    sharded = types.SimpleNamespace(full_tensor=None)  # as torch's DTensor
    with pytest.raises(ValueError, match="FSDP"):
        made.on_step_end(1, types.SimpleNamespace(shadow={"network.positions": sharded}))
    made.network.compile()
    with pytest.raises(ValueError, match="do not compile"):
        made(batch())
