"""What the extractor promises about neighbours, batches, seeds, levels, noise and its surroundings."""

import copy

import accelerate
import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler
from PIL import Image

from diffusers_repr import Denoiser, FeatureExtractor, NoiseLevel
from diffusers_repr.denoiser.conditioner import captions
from tests.features.extractor_cases import LAYERS, assert_close, images_for, make
from tests.testers.cases import rotating
from tests.testers.models import CONDITIONS, PIPELINES, build, unet2d

SOME = [n if n in ("ddpm", "dit", "sd") else pytest.param(n, marks=pytest.mark.slow) for n in PIPELINES]


# Neighbours, order, batch size.


@pytest.mark.parametrize("name", SOME)
def test_an_image_does_not_depend_on_neighbours_or_batch_size(name):
    images, condition = images_for(name, 3), CONDITIONS[name]
    alone = make(name, ensemble_size=2, batch_size=4)
    together = alone(images, **condition)
    others = alone(torch.cat([images[:1], images_for(name, 2, seed=9)]), **condition)
    for layer in LAYERS[name]:
        assert torch.equal(others[layer][0], together[layer][0])  # equal batch size: bit-equal
    for size in (None, 1, 5):
        split = alone.replace(batch_size=size)(images, **condition)
        for layer in LAYERS[name]:
            assert_close(split[layer], together[layer])
    single = alone(images[2:], **condition)
    for layer in LAYERS[name]:
        assert_close(single[layer], together[layer][2:])


def test_equal_calls_are_bit_equal_and_seeds_differ():
    images = images_for("sd")
    first, second = make("sd")(images), make("sd")(images)
    other = make("sd", seed=1)(images)
    assert torch.equal(first["up_blocks.1"], second["up_blocks.1"])
    assert not torch.allclose(first["up_blocks.1"], other["up_blocks.1"], atol=1e-3)


def test_ids_take_the_place_of_pixels():
    extractor, images = make("ddpm", "mid_block"), images_for("ddpm", 1).expand(3, -1, -1, -1)
    by_pixels = extractor(images)["mid_block"]
    by_ids = extractor(images, ids=["a", "b", "a"])["mid_block"]
    assert_close(by_pixels[0], by_pixels[1])
    assert_close(by_ids[0], by_ids[2])
    assert not torch.allclose(by_ids[0], by_ids[1], atol=1e-3)
    assert_close(
        extractor(images, ids=np.array([7, 8, 9]))["mid_block"], extractor(images, ids=["7", "8", "9"])["mid_block"]
    )


def test_pil_numpy_and_tensors_are_one_image():
    array = (images_for("ddim", 2).permute(0, 2, 3, 1) * 255).round().byte().numpy()
    extractor = make("ddim")
    reference = extractor(array)
    for same in (
        [Image.fromarray(a) for a in array],
        list(array),
        torch.from_numpy(array).permute(0, 3, 1, 2),
        array.astype(np.float32) / 255,
        (Image.fromarray(a) for a in array),
    ):
        assert torch.equal(extractor(same)["down_blocks.1"], reference["down_blocks.1"])
    assert extractor(Image.fromarray(array[0]))["down_blocks.1"].shape[0] == 1


def test_image_size_resizes():
    extractor = make("ddim", image_size=(16, 24))
    assert extractor(torch.rand(1, 3, 50, 30))["down_blocks.1"].shape[2:] == (4, 6)


def test_the_models_own_size_is_the_default():
    """16 pixels, whatever the photo's size and shape; its own size by one word."""
    photos = images_for("ddim", 2, size=(50, 30))
    own = make("ddim", image_size=None)
    output = own(photos)
    assert (own.image_size, output.image_size) == ((16, 16), (16, 16))
    assert torch.equal(output["down_blocks.1"], make("ddim", image_size=16)(photos)["down_blocks.1"])
    assert own.denoiser.encode(photos).shape == (2, 3, 16, 16)
    assert own.denoiser.encode(photos[..., :48, :24], image_size="keep").shape == (2, 3, 48, 24)
    kept = own.replace(image_size="keep", pooling="mean")
    assert kept.replace(seed=1).image_size == "keep"
    assert kept(photos[..., :48, :24]).image_size == (48, 24)
    with pytest.raises(ValueError, match="one side, or .*'keep' for the images' own size; or None for the model's"):
        own.replace(image_size="own")


def test_reprs_of_two_lines():
    extractor = make("ddpm", "mid_block", [100, 261.5], image_size=None, pooling="mean", ensemble_size=2)
    network = extractor.denoiser.model
    size = sum(p.numel() for p in network.parameters())
    assert repr(extractor.denoiser) == (
        f"Denoiser(UNet2DModel, {size:,} parameters, torch.float32, cpu, name=None,\n"
        "    image_size=(16, 16), condition='none', noise='vp', predicts='epsilon')"
    )
    assert repr(extractor) == (
        "FeatureExtractor(UNet2DModel, layers=['mid_block'],\n"
        "    timestep=[100, 261.5], noise='per_image', seed=0, ensemble_size=2, pooling='mean', image_size=(16, 16))"
    )
    assert repr(extractor(torch.rand(1, 1, 8, 8))) == (
        "FeatureOutput({'mid_block': (2, 1, 16)},\n    timestep=[100, 261.5], pooling='mean', image_size=(16, 16))"
    )


# Levels.


def test_one_level_and_a_list_of_levels():
    images = images_for("sd")
    one, many = make("sd")(images), make("sd", timestep=range(61, 262, 100), batch_size=4)(images)
    assert one.level.timestep == 261
    assert [level.timestep for level in many.level] == [61, 161, 261]
    assert many["up_blocks.1"].shape == (3, *one["up_blocks.1"].shape)
    assert_close(many["up_blocks.1"][2], one["up_blocks.1"])
    level, last = list(many.per_level())[2]
    assert level.timestep == 261
    assert_close(last["up_blocks.1"], one["up_blocks.1"])
    assert many.as_map("up_blocks.1").shape == many["up_blocks.1"].shape
    assert [level.nsr for level in many.level] == sorted(level.nsr for level in many.level)


def test_levels_by_nsr_tensor_and_array():
    denoiser = Denoiser.from_pipe(build("sd"))
    nsr = denoiser.level(261).nsr
    images = images_for("sd")
    reference = FeatureExtractor(denoiser, "mid_block", [261, 100], image_size="keep")(images)
    for levels in ([NoiseLevel(nsr=nsr), 100], torch.tensor([261, 100]), np.array([261, 100])):
        assert_close(
            FeatureExtractor(denoiser, "mid_block", levels, image_size="keep")(images)["mid_block"],
            reference["mid_block"],
            1e-4,
        )


def test_several_levels_share_encodes_and_forwards():
    pipe = build("sd")
    calls = {"vae": 0, "text": 0, "unet": []}
    encode = pipe.vae.encode
    pipe.vae.encode = lambda x, *a, **k: (calls.__setitem__("vae", calls["vae"] + len(x)), encode(x, *a, **k))[1]
    pipe.text_encoder.register_forward_pre_hook(lambda m, a: calls.__setitem__("text", calls["text"] + 1))
    pipe.unet.register_forward_pre_hook(lambda m, a, k: calls["unet"].append(len(k["sample"])), with_kwargs=True)
    extractor = FeatureExtractor(
        Denoiser.from_pipe(pipe), "up_blocks.1", [100, 261], ensemble_size=4, batch_size=8, image_size="keep"
    )
    extractor(images_for("sd", 3), prompt="a cat")
    forwards = [n for n in calls["unet"] if n > 1]  # one row: the pipeline's own call, for the condition
    assert (calls["vae"], calls["text"], forwards) == (3, 1, [8, 8, 8])
    extractor(images_for("sd", 3, seed=1), prompt="a cat")
    extractor.replace(ensemble_size=1)(images_for("sd", 2), prompt=["a cat", "a cat"])
    assert (calls["vae"], calls["text"]) == (8, 1)  # an image once; the prompt once an extractor, copies included
    extractor(images_for("sd", 2), prompt=["a dog", "a cat"])
    assert calls["text"] == 2


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_model_may_be_cast_between_calls(name):
    """Moving it to another device is the same case: encoded prompts that are kept must follow."""
    pipe, images = build(name), images_for(name)
    extractor = FeatureExtractor(Denoiser.from_pipe(pipe), LAYERS[name], 261, image_size="keep")
    before = extractor(images, prompt="a cat")
    pipe.to(torch.float64)
    after = extractor(images, prompt="a cat")
    for layer in LAYERS[name]:
        assert_close(after[layer], before[layer], 1e-3)


def test_more_prompts_than_are_kept(monkeypatch):
    monkeypatch.setattr(captions, "_PROMPTS_KEPT", 2)
    images, prompts = images_for("sd", 4), ["a", "b", "c", "d"]
    extractor = make("sd", "mid_block")
    extractor.denoiser.prompts = {}
    together = extractor(images, prompt=prompts)["mid_block"]
    assert len(extractor._prompts) == len(extractor.denoiser.prompts) == 2
    for at, prompt in enumerate(prompts):
        assert_close(extractor(images[at : at + 1], prompt=prompt)["mid_block"], together[at : at + 1])


# Noise policies inside the extractor.


def test_clean_is_the_image_itself():
    pipe, images = build("ddpm"), images_for("ddpm")
    clean = FeatureExtractor(Denoiser.from_pipe(pipe), "mid_block", 200, noise="clean", image_size="keep")(images)
    seen = []
    handle = pipe.unet.mid_block.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        pipe.unet(2 * images - 1, 200)
    handle.remove()
    assert_close(clean["mid_block"], seen[0])


def test_clean_input_of_an_edm_network_has_its_scale():
    unet, images = unet2d(3), torch.rand(2, 3, 16, 16)
    denoiser = Denoiser(unet.eval(), EDMEulerScheduler(sigma_data=0.5))
    level = NoiseLevel(nsr=0.5)
    clean = FeatureExtractor(denoiser, "mid_block", level, noise="clean", image_size="keep")(images)
    seen = []
    handle = unet.mid_block.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        unet((2 * images - 1) / 0.5, torch.tensor(denoiser.level(level).timestep))
    handle.remove()
    assert_close(clean["mid_block"], seen[0])


def test_shared_noise_is_one_draw_for_all_and_at_pure_noise_hides_the_image():
    pipe = build("ddim")  # zero terminal SNR: no signal is left at 999
    extractor = FeatureExtractor(Denoiser.from_pipe(pipe), "mid_block", [999, 200], noise="shared", image_size="keep")
    output = extractor(images_for("ddim", 2))["mid_block"]
    assert_close(output[0, 0], output[0, 1])
    assert not torch.allclose(output[1, 0], output[1, 1], atol=1e-3)
    assert torch.equal(extractor(images_for("ddim", 2))["mid_block"], output)


def test_fresh_noise_differs_between_calls_and_starts_from_the_seed():
    images, layer = images_for("ddpm", 3), "mid_block"
    one, two = make("ddpm", layer, noise="fresh", seed=3), make("ddpm", layer, noise="fresh", seed=3, batch_size=2)
    first, second = one(images)[layer], one(images)[layer]
    assert not torch.allclose(first, second, atol=1e-3)
    assert_close(two(images)[layer], first)
    assert_close(two(images)[layer], second)


def test_small_noise_moves_a_feature_in_proportion():
    """Under one draw and one timestep embedding, twice the (small) noise moves a feature twice as far."""
    denoiser = Denoiser.from_pipe(build("ddpm"))
    images = images_for("ddpm", 2)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    moved = {}
    for sigma in (0.0, 1e-3, 2e-3):
        level = NoiseLevel(
            timestep=200, nsr=sigma, half_log_snr=0.0, alpha=1.0, sigma=sigma, alpha_dot=0.0, sigma_dot=0.0
        )
        moved[sigma] = _read(denoiser, denoiser.add_noise(2 * images - 1, level, noise), 200)
    ratio = (moved[2e-3] - moved[0.0]).norm() / (moved[1e-3] - moved[0.0]).norm()
    assert ratio == pytest.approx(2, abs=0.2)


@torch.no_grad()
def _read(denoiser, x_t, t):
    from diffusers_repr.capture import capture

    with capture(denoiser.model.double(), "mid_block") as tape:
        denoiser.model(x_t.double(), t)
    return tape["mid_block"]


def test_variance_of_an_ensemble_falls_with_its_size():
    image = images_for("ddpm", 1)
    denoiser = Denoiser.from_pipe(build("ddpm"))
    repeated, ids = image.expand(96, -1, -1, -1), range(96)

    def variance(members):
        extractor = FeatureExtractor(
            denoiser, "mid_block", 261, ensemble_size=members, pooling="mean", batch_size=64, image_size="keep"
        )
        return extractor(repeated, ids=ids)["mid_block"].var(0).sum()

    assert variance(1) / variance(4) == pytest.approx(4, rel=0.3)


def test_posterior_sample_is_seeded_per_image():
    images = images_for("sd", 2)
    extractor = make("sd", "mid_block", noise="clean", sample_posterior=True)
    first = extractor(images)["mid_block"]
    assert torch.equal(extractor(images)["mid_block"], first)
    assert_close(extractor(images[1:])["mid_block"], first[1:])
    assert not torch.allclose(make("sd", "mid_block", noise="clean")(images)["mid_block"], first, atol=1e-5)


# Pooling and where.


@pytest.mark.parametrize(("pooling", "name"), rotating(["mean", "max", "adaptive:2"], ["sd", "flux"]))
def test_pooling_on_the_fly_equals_pooling_after(name, pooling):
    images, condition = images_for(name), CONDITIONS[name]
    maps = make(name, ensemble_size=2)(images, **condition)
    pooled = make(name, ensemble_size=2, pooling=pooling, batch_size=3)(images, **condition)
    for layer in LAYERS[name]:
        grid = maps.as_map(layer)
        expected = {
            "mean": lambda g: g.mean((2, 3)),
            "max": lambda g: g.flatten(2).max(2).values,
            "adaptive:2": lambda g: torch.nn.functional.adaptive_avg_pool2d(g, 2).flatten(1),
        }[pooling](grid)
        assert_close(pooled[layer], expected)


def test_pooling_of_a_layer_of_text_is_refused():
    """Flux's text has more tokens than a small image: its tail must not pass for the image."""
    with pytest.raises(ValueError, match="none is known for this layer"):
        make("flux", "transformer_blocks.0.ff_context", pooling="mean")(images_for("flux"), prompt="a")


def test_input_and_residual_of_a_resnet():
    images, path = images_for("sd"), "up_blocks.1.resnets.2"
    pipe = build("sd")
    output, taken, branch = (
        FeatureExtractor(Denoiser.from_pipe(pipe), path, 261, where=where, image_size="keep")(images)[path]
        for where in ("output", "input", "residual")
    )
    shortcut = pipe.unet.get_submodule(path).conv_shortcut
    with torch.no_grad():
        assert_close(branch + shortcut(taken), output)
    assert taken.shape[1] > output.shape[1]  # the skip is concatenated
    with pytest.raises(ValueError, match="ResnetBlock2D"):
        make("sd", "mid_block", where="residual")(images)


# What the user passed in stays as it was.


def test_no_graph_no_state_left_behind():
    pipe, images = build("sd"), images_for("sd").requires_grad_()
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    modes = [m.training for m in pipe.unet.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    scheduler = copy.deepcopy(dict(pipe.scheduler.config))
    extractor = FeatureExtractor(
        Denoiser.from_pipe(pipe), ["mid_block"], 261, ensemble_size=2, noise="fresh", image_size="keep"
    )
    feature = extractor(images, prompt="a cat")["mid_block"]
    with pytest.raises(ValueError, match="3 prompts"):
        extractor(images, prompt=["a", "b", "c"])
    assert not feature.requires_grad
    assert feature.grad_fn is None
    assert torch.is_grad_enabled()
    assert images.grad is None
    assert [m.training for m in pipe.unet.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(pipe.scheduler.config) == scheduler
    assert all(p.requires_grad and p.grad is None for p in pipe.unet.parameters())


def test_features_hold_only_their_own_memory():
    feature = make("ddpm", "mid_block", ensemble_size=4)(images_for("ddpm", 2))["mid_block"]
    assert feature.untyped_storage().nbytes() == feature.numel() * 4


@pytest.mark.parametrize("kind", ["model", "sequential", "leaf_level"])
def test_offloaded_pipelines(kind):
    images, cpu = images_for("sd"), torch.device("cpu")
    plain = make("sd")(images, prompt="a cat")
    pipe = build("sd")
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":  # as enable_sequential_cpu_offload, whose "cpu:0" accelerate cannot handle
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            accelerate.cpu_offload(module, cpu, offload_buffers=len(module._parameters) > 0)
    else:
        pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind)
    extractor = FeatureExtractor(Denoiser.from_pipe(pipe), LAYERS["sd"], 261, image_size="keep")
    for _ in range(2):
        assert torch.equal(extractor(images, prompt="a cat")["up_blocks.1"], plain["up_blocks.1"])


def test_output_device_and_dtype():
    pipe = build("ddpm").to(dtype=torch.bfloat16)
    extractor = FeatureExtractor(
        Denoiser.from_pipe(pipe), "mid_block", 261, output_device="cpu", ensemble_size=3, image_size="keep"
    )
    feature = extractor(images_for("ddpm"))["mid_block"]
    assert feature.dtype is torch.float32  # means of half-precision networks are taken in float32
    assert feature.device.type == "cpu"
    assert not torch.equal(feature, feature.bfloat16().float())


def test_progress_bar():
    seen = []

    class Bar:
        def __init__(self, total):
            seen.append(total)

        def update(self, n):
            seen.append(n)

        def close(self):
            seen.append("closed")

    make("ddpm", "mid_block", timestep=[10, 20], ensemble_size=2, batch_size=3, progress_bar=Bar)(images_for("ddpm"))
    assert seen == [3, 1, 1, 1, "closed"]


def test_replace_keeps_the_rest():
    extractor = make("sd", ensemble_size=2, seed=4, pooling="mean", image_size=32, noise="shared")
    other = extractor.replace(seed=5)
    assert (other.seed, other.ensemble_size, other.pooling, other.noise.policy) == (5, 2, "mean", "shared")
    assert other.image_size == (32, 32)
    assert other.levels[0] is extractor.levels[0]
