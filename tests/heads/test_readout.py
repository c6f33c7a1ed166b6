import dataclasses
import math
import types

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn
from torch.nn import functional

from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import (
    DepthHead,
    ReadoutHead,
    appearance_triplet_loss,
    correspondence_loss,
    depth_layers,
    read_features,
    readout_layers,
    sample_points,
    sobel_edges,
)
from diffusers_repr.heads.dense.parts import resize, resized_projections
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.noise.process_record import process_record
from tests.testers.models import PIPELINES, SIZES, build

SMALL = {"width": 8, "bottleneck": 4, "output_widths": (8, 4), "time_width": 16}
LAYERS, CHANNELS = ["a", "b", "c"], [12, 8, 4]
SHAPES = [(2, 3), (4, 6), (8, 12)]


def maps(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(batch, channels, *shape, generator=generator, dtype=dtype)
        for name, channels, shape in zip(LAYERS, CHANNELS, SHAPES, strict=True)
    }


def readout(**options) -> ReadoutHead:
    torch.manual_seed(0)
    head = ReadoutHead(LAYERS, CHANNELS, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # also what starts at 0 and 1
    return head.eval()


def depth(**options) -> DepthHead:
    torch.manual_seed(0)
    return DepthHead(LAYERS, CHANNELS, **{"hidden": (8, 6), "time_width": 16, **options}).eval()


def resize_first(head: ReadoutHead, features: dict, timestep: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The paper's order with torch's own modules: resize each map, then the whole residual block."""
    total, shares = 0, torch.softmax(head.weights, 0)
    time = head.time_embedding(timestep.double(), torch.float64) if head.time_embedding else None
    for at, name in enumerate(LAYERS):
        x = functional.interpolate(features[name], size, mode="bilinear", align_corners=False)
        block, both = head.blocks[at], head.project[at].weight
        inner = block.widths[0]
        y = torch.relu(block.norm_in(functional.conv2d(x, both[:inner])))
        if time is not None:
            y = y + torch.relu(block.time(time))[..., None, None]
        y = block.norm_out(block.conv_out(torch.relu(block.norm_mid(block.conv_mid(y)))))
        total = total + shares[at] * torch.relu(y + block.norm_shortcut(functional.conv2d(x, both[inner:])))
    if head.config.kind != "spatial":
        return total
    first, second = head.hidden
    silu = functional.silu
    return torch.tanh(head.output(silu(second(silu(first(total))))))


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (16, 16)])
def test_convolution_commutes_with_the_resize(size):
    features = list(maps(dtype=torch.float64).values())
    layers = [nn.Conv2d(c, 5, 1).double() for c in CHANNELS]
    for layer, x, got in zip(layers, features, resized_projections(iter(layers), features, size), strict=True):
        assert (got - layer(resize(x, size))).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["spatial", "appearance", "correspondence"])
def test_readout_equals_resize_first(kind):
    head, features = readout(kind=kind).double(), maps(dtype=torch.float64)
    timestep = torch.tensor([3, 800])
    got = head(features, timestep)
    assert (got - resize_first(head, features, timestep, (8, 12))).abs().max() < 1e-12
    assert got.shape == (2, 1 if kind == "spatial" else 8, 8, 12)
    assert head(features, timestep, (5, 7)).shape[2:] == (5, 7)


def test_depth_equals_an_mlp_on_concatenated_pixels():
    head, features = depth().double(), maps(dtype=torch.float64)
    timestep = torch.tensor([3.0, 500.0])
    pixels = torch.cat([functional.interpolate(x, (8, 12), mode="bilinear") for x in features.values()], 1)
    pixels = pixels.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C)
    time = head.time_embedding(timestep.double(), torch.float64)
    both = torch.cat([pixels, time[:, None].expand(-1, pixels.shape[1], -1)], 2)
    weight = torch.cat([layer.weight[..., 0, 0] for layer in head.project] + [head.time.weight], 1)
    x = both @ weight.T + head.time.bias
    for layer in head.mlp:
        x = functional.silu(x) @ layer.weight[..., 0, 0].T + layer.bias
    assert (head(features, timestep) - x.transpose(1, 2).unflatten(2, (8, 12))).abs().max() < 1e-12


@pytest.mark.parametrize("head", [readout(), readout(kind="appearance"), depth()], ids=["spatial", "F", "depth"])
def test_rows_and_time_are_each_their_own(head):
    features = maps()
    both = head(features, torch.tensor([10, 900]))
    for at, timestep in enumerate((10, 900.0)):
        alone = head({name: x[at : at + 1] for name, x in features.items()}, timestep)
        torch.testing.assert_close(both[at : at + 1], alone, atol=1e-5, rtol=1e-4)
    assert (head(features, 10)[1] - both[1]).abs().max() > 1e-3


def test_correspondence_ignores_time():
    head, features = readout(kind="correspondence"), maps()
    assert torch.equal(head(features, 10), head(features, 900))
    assert head.time_embedding is None


def test_gradient_of_the_features_against_differences():
    head, features = readout().double(), maps(1, torch.float64)
    for name in LAYERS:
        x = features[name].clone().requires_grad_()
        torch.manual_seed(1)
        way = torch.randn_like(x)
        (slope,) = torch.autograd.grad((head({**features, name: x}, 100) ** 2).sum(), x)

        def value(step: float, name: str = name, way: torch.Tensor = way) -> float:
            return (head({**features, name: features[name] + step * way}, 100) ** 2).sum().item()

        numeric = (value(1e-5) - value(-1e-5)) / 2e-5
        assert float((slope * way).sum()) == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_inside(dtype):
    features = {name: x.to(dtype) for name, x in maps().items()}
    head = readout()
    got = head(features, 5)
    assert got.dtype == torch.float32
    assert torch.equal(got, head({name: x.float() for name, x in features.items()}, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(features, 5), got)
    halved = readout().to(dtype)
    assert halved(features, 5).dtype == torch.float32
    torch.testing.assert_close(halved(features, 5), got, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("make", [readout, depth])
def test_saved_and_loaded(make, tmp_path):
    head, features = make(level_range=(0, 799), base_model="user/model", target="edges"), maps()
    head.save_pretrained(tmp_path)
    loaded = type(head).from_pretrained(tmp_path)
    assert torch.equal(loaded(features, 7), head(features, 7))
    assert list(loaded.config.layers) == LAYERS
    assert list(loaded.config.level_range) == [0, 799]
    assert (loaded.config.base_model, loaded.range) == ("user/model", (-1.0, 1.0))
    assert str(tmp_path) not in (tmp_path / "config.json").read_text()


def test_default_widths_are_the_papers():
    head = ReadoutHead(["a"], [1280], out_channels=3)
    assert head.blocks[0].widths == (96, 384)
    assert [tuple(layer.weight.shape[:2]) for layer in head.hidden] == [(128, 384), (32, 128)]
    assert head.blocks[0].norm_in.num_groups == head.blocks[0].norm_out.num_groups == 32
    assert head.project[0].weight.shape == (96 + 384, 1280, 1, 1)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kind": "pose"}, "spatial, appearance"),
        ({"channels": [1]}, "pair up"),
        ({"layers": ["a", "a", "b"]}, "each layer once"),
        ({"width": 0}, "whole number from 1"),
        ({"output_widths": (3,)}, "two whole numbers"),
        ({"label_range": (1, -1)}, "low < high"),
        ({"level_range": (5, 5)}, "low < high"),
    ],
)
def test_bad_arguments(changes, what):
    with pytest.raises(ValueError, match=what):
        ReadoutHead(**{"layers": LAYERS, "channels": CHANNELS, **SMALL, **changes})


def test_bad_features():
    head, features = readout(), maps()
    with pytest.raises(ValueError, match="'b', which is not among"):
        head({"a": features["a"], "c": features["c"]}, 1)
    with pytest.raises(ValueError, match=r"'a' as a map \(B, 12, h, w\); got \(2, 8, 4, 6\)"):
        head({**features, "a": features["b"]}, 1)
    with pytest.raises(ValueError, match=r"`denoiser.feature_map\(...\).as_map\(\)`"):
        head({**features, "a": torch.zeros(2, 6, 12)}, 1)
    with pytest.raises(ValueError, match="rows"):
        head({**features, "a": features["a"][:1]}, 1)
    with pytest.raises(ValueError, match="one number or"):
        head(features, torch.tensor([1, 2, 3]))


# The base.


# Maps, tokens, and tokens beside text; the others are variations.
QUICK = ("ddim", "pixart", "flux")


@pytest.mark.parametrize(
    "name", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in sorted(PIPELINES)]
)
def test_every_family(name):
    denoiser = Denoiser.from_pipe(build(name))
    size = SIZES[name]
    layers = readout_layers(denoiser.model)
    head = ReadoutHead.for_base(denoiser, image_size=size, **SMALL)
    weak = DepthHead.for_base(denoiser, depth_layers(denoiser.model)[1], size, hidden=(4,), time_width=8)
    torch.manual_seed(0)
    x_t = torch.randn(2, denoiser.family.channels(), size[0] // denoiser.stride, size[1] // denoiser.stride)
    null = 9 if name == "class_unet" else None  # its config tells none
    condition = denoiser.condition(batch=2, size=size, class_labels=null)
    features = read_features(denoiser, x_t, 300, condition, layers)
    assert list(features) == layers
    assert all(x.ndim == 4 and not x.requires_grad for x in features.values())
    h, w = size[0] // denoiser.stride, size[1] // denoiser.stride
    for x in features.values():
        assert x.shape[2] * w == x.shape[3] * h  # of the input's own shape
    assert head(features, 300, (h, w)).shape == (2, 1, h, w)
    more = read_features(denoiser, x_t, 300, condition, weak.config.layers)
    assert weak(more, 300, (h, w)).shape == (2, 1, h, w)
    head.check_base(denoiser)
    weak.check_base(denoiser)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.model.modules())


def test_unet_features_are_the_residual_branches():
    denoiser = Denoiser.from_pipe(build("sd"))
    layers = readout_layers(denoiser.model)
    assert len(layers) == 12
    assert layers[0] == "up_blocks.0.resnets.0.conv2"
    blocks = [path.removesuffix(".conv2") for path in layers]
    x_t, condition = torch.randn(1, 4, 16, 16), denoiser.condition(batch=1)
    features = read_features(denoiser, x_t, 261, condition, layers)
    with torch.no_grad(), denoiser.evaluating(), capture(denoiser.model, blocks, where="residual") as tape:
        denoiser.predict(x_t, 261, condition)
    assert all(torch.equal(features[f"{path}.conv2"], tape[path]) for path in blocks)


def test_tokens_become_maps_in_row_order():
    denoiser = Denoiser.from_pipe(build("pixart"))
    layers = readout_layers(denoiser.model)
    assert layers == ["transformer_blocks.1"]
    x_t, condition = torch.randn(1, 4, 16, 24), denoiser.condition(batch=1, size=(32, 48))
    features = read_features(denoiser, x_t, 261, condition, layers)
    with torch.no_grad(), capture(denoiser.model, layers) as tape:
        denoiser.predict(x_t, 261, condition)
    assert torch.equal(features[layers[0]][0, :, 3, 5], tape[layers[0]][0, 3 * 12 + 5])


def test_single_blocks_leave_the_text_out():
    denoiser = Denoiser.from_pipe(build("flux"))
    layers = readout_layers(denoiser.model)
    assert layers == ["single_transformer_blocks.0", "single_transformer_blocks.1"]


def test_depth_layers_follow_the_paper():
    strong, weak = depth_layers(build("sd").unet)
    assert strong == [f"up_blocks.{b // 3}.resnets.{b % 3}" for b in (2, 4, 5, 6, 7)]
    assert weak == ["up_blocks.2.resnets.0"]


def ddpm_denoiser(**kwargs) -> Denoiser:
    pipe = build("ddpm")
    return Denoiser(kwargs.pop("model", pipe.unet), kwargs.pop("scheduler", pipe.scheduler), **kwargs)


def test_another_base_is_refused():
    base = ddpm_denoiser(name="user/base")
    head = ReadoutHead.for_base(base, **SMALL)
    head.check_base(base)
    head.check_base(ddpm_denoiser(name="elsewhere", scheduler=DDIMScheduler()))  # other sampler, same noise process
    with pytest.raises(
        ValueError, match=r"a UNet2DConditionModel; the head was trained on a UNet2DModel \('user/base'\)"
    ):
        head.check_base(Denoiser.from_pipe(build("sd")))
    with pytest.raises(ValueError, match=r"in_channels is 3, was 1.*out_channels"):
        head.check_base(Denoiser.from_pipe(build("ddim")))
    with pytest.raises(ValueError, match="num_class_embeds is 10, was None"):
        head.check_base(Denoiser.from_pipe(build("class_unet")))
    with pytest.raises(ValueError, match="the same timestep means another noise"):
        head.check_base(ddpm_denoiser(scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2")))
    with pytest.raises(TypeError, match="A Denoiser is needed"):
        head.check_base(build("ddpm"))


def test_missing_layers_and_other_channels_are_refused():
    base = ddpm_denoiser()
    with pytest.raises(ValueError, match=r"has no layer 'up_blocks.9' \(closest"):
        ReadoutHead(["up_blocks.9"], [4], **SMALL).check_base(base)
    with pytest.raises(ValueError, match="gives 16 values at layer 'up_blocks.0.res.*; the head was trained on 4"):
        ReadoutHead(["up_blocks.0.resnets.0.conv2"], [4], **SMALL).check_base(base)
    with pytest.raises(ValueError, match="No layer 'up_blocks.9'"):
        ReadoutHead.for_base(base, ["up_blocks.9"], **SMALL)
    with pytest.raises(ValueError, match="give no map"):
        ReadoutHead.for_base(base, ["time_embedding"], **SMALL)


def test_fingerprint_survives_saving_and_new_defaults(tmp_path):
    pipe = build("ddpm")
    head = ReadoutHead.for_base(Denoiser.from_pipe(pipe), **SMALL)
    pipe.save_pretrained(tmp_path)
    head.check_base(Denoiser.from_pretrained(tmp_path))
    kept = {k: v for k, v in pipe.unet.config.items() if k != "dropout"}  # as an older version without it saved
    older = Denoiser.from_pipe(pipe)
    older.model._internal_dict = types.MappingProxyType(kept)
    head.check_base(older)


def test_noise_fingerprint():
    one = NoiseSchedule("flow", "velocity")
    assert process_record(one) == process_record(dataclasses.replace(one, output="sample"))
    other = process_record(dataclasses.replace(one, num_train_timesteps=500))
    assert process_record(one).fingerprint != other.fingerprint


# Losses and labels.


def test_sobel_of_a_step():
    image = torch.full((1, 1, 5, 6), -1.0)
    image[..., 3:] = 0.0  # half the range: the largest label
    edges = sobel_edges(image)
    expected = torch.full((5, 6), -1.0)
    expected[:, 2:4] = 1.0
    assert torch.equal(edges[0, 0], expected)
    torch.testing.assert_close(sobel_edges(image, gain=1.0)[0, 0, :, 2], torch.zeros(5))
    assert torch.equal(sobel_edges(image.transpose(2, 3)), edges.transpose(2, 3))
    assert torch.equal(sobel_edges(torch.cat([image, image * 0], 1)), edges)  # the strongest channel


def test_triplet_loss_by_hand():
    anchor = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 1)
    positive = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).T.reshape(1, 2, 2, 1)  # cosines 1, 0
    negative = torch.tensor([[0.0, 2.0], [1.0, 1.0]]).T.reshape(1, 2, 2, 1)  # cosines 0, 1 / sqrt 2
    expected = (0.0 + 0.5 + math.sqrt(0.5)) / 2
    assert float(appearance_triplet_loss(anchor, positive, negative)) == pytest.approx(expected, rel=1e-6)
    half = [x.bfloat16() for x in (anchor, positive, negative)]
    assert torch.equal(appearance_triplet_loss(*half), appearance_triplet_loss(*(x.float() for x in half)))
    with pytest.raises(ValueError, match="one shape"):
        appearance_triplet_loss(anchor, positive, negative[..., :1, :])


def test_correspondence_loss_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    valid = torch.rand(3, 5, generator=generator) > 0.4
    losses, plain = [], first.detach()
    for b in range(3):
        kept = [p for p in range(5) if valid[b, p]]
        for p in kept:
            for own, others in ((plain, second), (second, plain)):
                scores = [float(functional.cosine_similarity(own[b, p], others[b, q], 0)) / 0.07 for q in kept]
                losses.append(math.log(sum(map(math.exp, scores))) - scores[kept.index(p)])
    loss = correspondence_loss(first, second, valid)
    assert float(loss.detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    (slope,) = torch.autograd.grad(loss, first)
    assert torch.isfinite(slope).all()
    assert not slope[~valid].any()
    assert float(correspondence_loss(plain, second, torch.zeros(3, 5, dtype=torch.bool))) == 0


def test_sample_points():
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[0.0, 0.0], [2.0, 3.0], [1.0, 1.5]]])
    torch.testing.assert_close(sample_points(maps, points, (3, 4))[0, :, 0], torch.tensor([0.0, 11.0, 5.5]))
    # an image of twice the size: cell (1, 2) covers pixels (2..3, 4..5), its centre lies between them
    torch.testing.assert_close(
        sample_points(maps, torch.tensor([[[2.5, 4.5]]]), (6, 8)).flatten(), torch.tensor([6.0])
    )
    with pytest.raises(ValueError, match=r"\(1, P, 2\)"):
        sample_points(maps, points[0], (3, 4))
