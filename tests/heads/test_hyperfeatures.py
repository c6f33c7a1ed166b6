"""Hyperfeatures: the head by its formula, maps by hand-made hooks and steps, what is saved, what is refused."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.nn import functional

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.capture import capture
from diffusers_repr.features.source import require_source
from diffusers_repr.heads import Hyperfeatures, HyperfeaturesHead
from diffusers_repr.heads.hyperfeature_maps import paper_reads, walk_maps
from tests.testers.models import build, unet2d

CARS = Path(__file__).parents[2] / "examples" / "models" / "cars-ddpm"
SMALL = {"width": 8, "bottleneck": 4}


@pytest.fixture(scope="module")
def cars() -> tuple[Denoiser, torch.Tensor]:
    denoiser = Denoiser.from_pretrained(CARS)
    denoiser.model.float()
    return denoiser, torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def shaken(head: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return head.eval()


def by_formula(head: HyperfeaturesHead, maps: list[list[torch.Tensor]], size: tuple[int, int]) -> torch.Tensor:
    """`sum softmax(w) B_l(F)` in float64, resized first, with torch's own convolutions; `maps[s][l]`."""
    weights = {name: value.double() for name, value in head.state_dict().items()}
    shares = weights["weights"].flatten().softmax(0)
    narrow, total, count = head.config["bottleneck"], 0.0, len(maps[0])

    def norm(x, name):
        groups = next(g for g in range(32, 0, -1) if 32 % g == 0 and x.shape[1] % g == 0)
        return functional.group_norm(x, groups, weights[f"{name}.weight"], weights[f"{name}.bias"])

    for s, level in enumerate(maps):
        for at, value in enumerate(level):
            x = functional.interpolate(value.double(), size, mode="bilinear", align_corners=False)
            kernel, block = weights[f"project.{at}.weight"], f"blocks.{at}"
            y = norm(functional.conv2d(x, kernel[:narrow]), f"{block}.norm_in").relu()
            y = norm(functional.conv2d(y, weights[f"{block}.conv_mid.weight"], padding=1), f"{block}.norm_mid").relu()
            y = norm(functional.conv2d(y, weights[f"{block}.conv_out.weight"]), f"{block}.norm_out")
            y = y + norm(functional.conv2d(x, kernel[narrow:]), f"{block}.norm_shortcut")
            total = total + shares[s * count + at] * y.relu()
    return total


def test_the_head_by_its_formula():
    """1x1 first at native resolution, then resized, equals resizing first; levels outside, layers inside."""
    head = shaken(HyperfeaturesHead(["a", "b"], [8, 6], steps=10, reads=[0, 3, 9], width=64, bottleneck=16))
    maps = {"a": torch.randn(3, 2, 8, 3, 2), "b": torch.randn(3, 2, 6, 6, 5)}
    found = head(maps)
    wanted = by_formula(head, [[maps["a"][s], maps["b"][s]] for s in range(3)], (6, 5))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert float(found.detach().min()) >= 0
    with torch.no_grad():  # in place, in any order, over maps that come one by one
        total = None
        for layer in ("b", "a"):
            for place in (2, 0, 1):
                total = head.accumulate(total, place, layer, maps[layer][place].double().float(), (6, 5))
    torch.testing.assert_close(total, found.detach(), rtol=1e-5, atol=1e-6)


def test_mixing_weights():
    head = shaken(HyperfeaturesHead(["a", "b"], [8, 6], steps=10, reads=[0, 9], **SMALL))
    maps = {"a": torch.randn(2, 1, 8, 3, 3), "b": torch.randn(2, 1, 6, 6, 6)}
    assert float(head.shares().sum()) == pytest.approx(1)
    before = head(maps)
    with torch.no_grad():
        head.weights += 5.0
    torch.testing.assert_close(head(maps), before)
    with torch.no_grad():
        head.weights.zero_()
        head.weights[1, 0] = 200.0
    alone = head.blocks[0](functional.interpolate(head.project[0](maps["a"][1]), (6, 6), mode="bilinear"), None)
    torch.testing.assert_close(head(maps), alone)


def test_a_residual_branch_is_what_its_second_convolution_gives():
    """Branch + input (or its shortcut) over the scale is the resnet's output; it is what `where="residual"` reads."""
    model = unet2d(3, sample_size=8).eval()
    paths = [name for name, module in model.named_modules() if type(module).__name__ == "ResnetBlock2D"]
    x = torch.randn(2, 3, 8, 8)
    seen = {}
    for where in ("input", "output", "residual"):
        with torch.no_grad(), capture(model, paths, where) as tape:
            model(x, 7)
        seen[where] = tape.features
    assert any(model.get_submodule(path).conv_shortcut is not None for path in paths)
    for path in paths:
        block = model.get_submodule(path)
        skip = seen["input"][path]
        skip = skip if block.conv_shortcut is None else block.conv_shortcut(skip)
        out = (skip + seen["residual"][path]) / block.output_scale_factor
        torch.testing.assert_close(out, seen["output"][path])


def test_the_source_by_hooks_and_steps_written_out(cars):
    """Hooks of torch on `conv2`, DDIM in float64: every layer at every step that is read, joined by the formula."""
    denoiser, images = cars
    head = shaken(HyperfeaturesHead.for_base(denoiser, steps=10, reads=[0, 2, 5], **SMALL))
    assert head.config["layers"] == [f"up_blocks.{i}.resnets.{j}.conv2" for i in range(3) for j in range(2)]
    assert list(head.config["timesteps"]) == [-1, 100, 400]
    source = require_source(Hyperfeatures(denoiser, head))
    output = source(images)
    ab = (1 - denoiser.scheduler.betas.double()).cumprod(0)
    kept, handles, rows = {}, [], []
    for path in head.config["layers"]:
        module = denoiser.model.get_submodule(path)
        handles.append(module.register_forward_hook(lambda *a, path=path: kept.update({path: a[2]})))
    x, one = (2 * images - 1).double(), torch.ones((), dtype=torch.float64)
    denoiser.model.eval()
    with torch.no_grad():
        for step, (t, after) in enumerate(zip([-1, 0, 100, 200, 300, 400], [0, 100, 200, 300, 400, 500], strict=True)):
            v = denoiser.model(x.float(), t).sample.double()
            alpha, sigma = (ab[t].sqrt(), (1 - ab[t]).sqrt()) if t >= 0 else (one, 0 * one)
            if step in head.reads:
                rows.append([kept[path] for path in head.config["layers"]])
            clean, noise = alpha * x - sigma * v, sigma * x + alpha * v
            x = ab[after].sqrt() * clean + (1 - ab[after]).sqrt() * noise
    for handle in handles:
        handle.remove()
    wanted = by_formula(head, rows, (32, 32))
    torch.testing.assert_close(output["hyperfeatures"].double(), wanted, rtol=1e-3, atol=1e-4)
    assert output.as_map("hyperfeatures").shape == (3, 8, 32, 32)
    assert (output.layers, source.layers, source.image_size) == (["hyperfeatures"], ["hyperfeatures"], (32, 32))


def test_features_of_an_image_depend_on_no_other(cars, tmp_path):
    denoiser, images = cars
    head = shaken(HyperfeaturesHead.for_base(denoiser, steps=5, reads=[0, 2], **SMALL))
    before = [hook for module in denoiser.model.modules() for hook in module._forward_hooks]
    source = Hyperfeatures(denoiser, head, batch_size=2)
    together = source(images, ids=["a", "b", "c"])["hyperfeatures"]
    alone = torch.cat([source(image[None])["hyperfeatures"] for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert before == [hook for module in denoiser.model.modules() for hook in module._forward_hooks]
    source.save_pretrained(tmp_path / "head")
    again = Hyperfeatures.from_pretrained(tmp_path / "head")
    assert torch.equal(again(images[:2])["hyperfeatures"], source(images[:2])["hyperfeatures"])
    assert again.denoiser.name == str(CARS)


def test_one_step_is_the_clean_image_at_minus_one(cars):
    denoiser, images = cars
    told, seen = [], {}
    handle = denoiser.model.register_forward_pre_hook(
        lambda module, args, kwargs: told.append((kwargs["timestep"], kwargs["sample"])), with_kwargs=True
    )
    layers = ["up_blocks.1.resnets.0.conv2"]
    walk_maps(denoiser, 2 * images - 1, None, layers, 1, [0], lambda s, path, value: seen.update({path: value}))
    handle.remove()
    ((time, sample),) = told
    assert time.tolist() == [-1, -1, -1]
    assert torch.equal(sample, 2 * images - 1)
    near = FeatureExtractor(denoiser, layers, 0, noise="clean")(images)[layers[0]]
    torch.testing.assert_close(seen[layers[0]], near, rtol=0.2, atol=0.05)  # close to timestep 0, and not it
    assert not torch.equal(seen[layers[0]], near)


@pytest.mark.parametrize("name", ["sd", "dit", "sd3"])
def test_other_families(name):
    """Latents and text; tokens as maps; a flow, whose walk is Euler's."""
    denoiser = Denoiser.from_pipe(build(name))
    head = HyperfeaturesHead.for_base(denoiser, steps=4, reads=[0, 2], prompt="a dog" if name != "dit" else None,
                                      **SMALL)  # fmt: skip
    source = Hyperfeatures(denoiser, head)
    images = torch.rand(2, 3, *denoiser.image_size)
    features = source(images)["hyperfeatures"]
    assert features.shape[:2] == (2, 8)
    assert features.shape[2:] == source.grid(denoiser.image_size)
    if name != "dit":
        assert not torch.equal(source(images, prompt="a house")["hyperfeatures"], features)
        assert torch.equal(source(images, prompt="a dog")["hyperfeatures"], features)


def test_the_steps_of_the_paper():
    assert [49 - s for s in (49, 45, 40, 35, 30, 25, 20, 15, 10, 5, 0)] == paper_reads(50)
    assert paper_reads(1) == [0]


def test_a_picture_of_the_weights():
    head = HyperfeaturesHead(["a", "b"], [8, 6], steps=10, reads=[0, 5, 9], timesteps=[-1, 400, 800], **SMALL)
    with torch.no_grad():
        head.weights[2, 1] = 3.0
    figure = head.plot_weights()
    drawn = next(axis.images[0].get_array() for axis in figure.axes if axis.images)
    assert drawn.shape == (2, 3)
    assert drawn.argmax() == 5
    assert float(drawn.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["a"], "channels": [1, 2]}, "layers and channels must pair up"),
        ({"reads": [3, 1]}, "reads rise from 0, the clean image, to 9"),
        ({"reads": [10]}, "reads must be a whole number from 0 to 9; got 10"),
        ({"reads": []}, "reads rise from 0"),
        ({"width": 0}, "width"),
    ],
)
def test_bad_heads(arguments, message):
    with pytest.raises(ValueError, match=message):
        HyperfeaturesHead(**{"layers": ["a", "b"], "channels": [8, 4], "steps": 10, **SMALL, **arguments})


def test_bad_use(cars, tmp_path):
    denoiser, _ = cars
    head = HyperfeaturesHead.for_base(denoiser, steps=4, reads=[0, 2], **SMALL)
    with pytest.raises(ValueError, match="Wrong base for this HyperfeaturesHead"):
        Hyperfeatures(Denoiser.from_pipe(build("ddim")), head)
    with pytest.raises(ValueError, match=r"reads 'up_blocks.0.resnets.0.conv2' at 2 levels; got nothing"):
        head({})
    with pytest.raises(ValueError, match="reads no layer 'x'"):
        head.accumulate(None, 0, "x", torch.zeros(1, 1, 2, 2), (2, 2))
    with pytest.raises(ValueError, match=r"is read as maps \(B, 96, h, w\)"):
        head.accumulate(None, 0, "up_blocks.0.resnets.0.conv2", torch.zeros(1, 1, 2, 2), (2, 2))
    with pytest.raises(ValueError, match="No layer 'nothing'"):
        HyperfeaturesHead.for_base(denoiser, ["nothing"], **SMALL)
    HyperfeaturesHead(["a"], [4], steps=2, **SMALL).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="without a name. Pass the model: base="):
        Hyperfeatures.from_pretrained(tmp_path / "bare")
    HyperfeaturesHead(["a"], [4], steps=2, base_model="gone/away/far", **SMALL).save_pretrained(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="base 'gone/away/far' cannot be opened"):
        Hyperfeatures.from_pretrained(tmp_path / "gone")


def test_the_head_goes_where_its_base_is(monkeypatch):
    denoiser = Denoiser(unet2d(1), DDPMScheduler())
    head = HyperfeaturesHead.for_base(denoiser, steps=4, reads=[0, 2], **SMALL)
    found = []

    def keep(total, place, layer, maps, size):
        found.append((maps.device.type, head.weights.device.type))
        return maps

    monkeypatch.setattr(head, "accumulate", keep)
    source, size = Hyperfeatures(denoiser, head), denoiser.image_size
    source.grid(size)
    denoiser.model.to("meta")  # another device that every machine has
    source.descriptors(torch.empty(1, denoiser.image_channels, *size, device="meta"), {}, size)
    assert set(found) == {("meta", "meta")}


def test_a_base_on_the_hub_is_loaded_with_its_revision_and_the_token(monkeypatch, tmp_path):
    HyperfeaturesHead(["a"], [4], steps=2, base_model="someone/private", **SMALL).save_pretrained(tmp_path)
    asked = []

    def load(name, **place):
        asked.append((name, place))
        raise ValueError("no such repository.")

    monkeypatch.setattr(Denoiser, "from_pretrained", load)
    with pytest.raises(FileNotFoundError, match="base 'someone/private' cannot be opened"):
        Hyperfeatures.from_pretrained(tmp_path, base_revision="v2", token="secret")
    assert asked == [("someone/private", {"revision": "v2", "token": "secret"})]
