"""Encoders of denoisers and of any module; fingerprints."""

import contextlib

import pytest
import torch
from torch import nn

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.encoders import Encoder, EncoderOutput
from diffusers_repr.hub.identity import config_hash, weights_hash
from diffusers_repr.testing import check_encoder
from tests.encoders.test_pretrained import PROCESSOR, pixels_of
from tests.encoders.vits import build, save
from tests.testers.models import PIPELINES


class Tokens(nn.Module):
    """A class token (the image's mean colour, widened) and a token a patch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 4, stride=4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        patches = self.conv(x).flatten(2).transpose(1, 2)
        cls = x.mean((2, 3)).repeat(1, 2)[:, None, :5]
        return self.dropout(torch.cat([cls, patches], 1))


# --- any module


def test_tokens_of_a_module():
    net = Tokens().train()
    encoder = Encoder.from_module(net, patch_size=4, prefix_tokens=1)
    pixels = pixels_of(2, 3, 8, 12)
    check_encoder(encoder, pixels)
    out = encoder.encode_pixels(pixels)
    assert (encoder.name, encoder.dim, out.grid, encoder.grid_for((8, 12))) == ("Tokens", 5, (2, 3), (2, 3))
    torch.testing.assert_close(out.as_map(), net.conv(pixels))
    torch.testing.assert_close(out.global_features, pixels.mean((2, 3)).repeat(1, 2)[:, :5])
    assert net.training
    assert net.dropout.training
    assert all(p.requires_grad for p in net.parameters())


def test_maps_methods_and_own_statistics():
    net = Tokens()
    calls = []

    def forward(x):
        calls.append(x)
        return net.conv(x)

    encoder = Encoder.from_module(net, patch_size=4, forward=forward, mean=[0, 0, 0], std=2.0, image_size=(8, 4))
    assert encoder.dim == 5
    out = encoder.encode_pixels(torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(calls[-1], torch.full((1, 3, 8, 4), 0.5))
    assert out.grid == encoder.grid_for((16, 16)) == (2, 1)
    torch.testing.assert_close(out.global_features, out.tokens.mean(1))


def test_modules_that_do_not_fit():
    with pytest.raises(ValueError, match=r"gave \(1, 4, 5\).*\(1, 16, D\) or a map of \(4, 4\)"):
        Encoder.from_module(nn.Sequential(Tokens().conv, nn.Flatten(2)), patch_size=2,
                            forward=lambda x: Tokens().conv(x).flatten(2).transpose(1, 2)).encode_pixels(
            torch.zeros(1, 3, 8, 8)
        )  # fmt: skip
    with pytest.raises(ValueError, match="no multiple of the patch, 4"):
        Encoder.from_module(Tokens(), patch_size=4, prefix_tokens=1).encode_pixels(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="class token"):
        Encoder.from_module(Tokens(), patch_size=4, pooling="cls")
    with pytest.raises(ValueError, match="patch_size"):
        Encoder.from_module(Tokens(), patch_size=0)
    with pytest.raises(ValueError, match="must not hold 0"):
        Encoder.from_module(Tokens(), patch_size=4, std=0.0)
    with pytest.raises(TypeError, match="nn.Module is needed"):
        Encoder.from_module(lambda x: x, patch_size=4)


def test_what_the_tester_finds():
    """One fault at a time, in an encoder that needs no class of ours."""

    class Plain:
        """Mean colours of cells."""

        name, dim, channels, device, grid_for = "plain", 3, 3, torch.device("cpu"), staticmethod(lambda s: (2, 3))
        fault = ""

        def to(self, device=None, dtype=None):
            return self

        def fingerprint(self):
            return {"plain": torch.rand(()).item() if self.fault == "fingerprint" else 1}

        def encode_pixels(self, pixels, batch_size=None):
            if self.fault == "pixels":
                pixels.clamp_(0, 1)
            cells = nn.functional.avg_pool2d(pixels, 4)
            tokens = cells.flatten(2).mT - (pixels.mean() if self.fault == "batch" else 0)
            tokens = tokens * (torch.rand(()) > -1) if self.fault == "draw" else tokens
            tokens = tokens[:, :-1] if self.fault == "tokens" else tokens
            tokens = tokens.double() if self.fault == "dtype" else tokens
            return EncoderOutput(cells.mean((2, 3)), tokens, (3, 2) if self.fault == "grid" else (2, 3))

    faults = {"": None, "pixels": "changes the images", "batch": "alone and among others", "draw": "random state",
              "tokens": r"expected \(2, 6, 3\)", "dtype": "expected torch.float32", "grid": "grid_for says",
              "fingerprint": "from call to call"}  # fmt: skip
    for fault, message in faults.items():
        encoder = Plain()
        encoder.fault = fault
        with pytest.raises(AssertionError, match=message) if message else contextlib.nullcontext():
            check_encoder(encoder, pixels_of(2, 3, 8, 12))

    class Attending(Plain):
        num_blocks = 2

        def encode_with_attention(self, pixels):
            raise NotImplementedError

    with pytest.raises(AssertionError, match="encode_with_attention of Attending cannot be called"):
        check_encoder(Attending(), pixels_of(2, 3, 8, 12))
    with pytest.raises(AssertionError, match="lacks name, dim"):
        check_encoder(nn.Linear(1, 1), pixels_of(2, 3, 8, 12))

    class Attentive(Plain):
        fault, num_blocks = "", 1

        def encode_with_attention(self, pixels):
            return self.encode_pixels(pixels), []

    with pytest.raises(AssertionError, match="encode_with_attention of Attentive cannot be called"):
        check_encoder(Attentive(), pixels_of(2, 3, 8, 12))


# --- layers of denoisers


@pytest.mark.parametrize(
    ("name", "layer", "condition", "kwargs"),
    [
        ("ddpm", "mid_block", None, {}),
        ("dit", "transformer_blocks.0", 1, {"class_labels": 1}),
        ("dit", "transformer_blocks.1", None, {}),
        ("sd", "up_blocks.0", "a cat", {"prompt": "a cat"}),
        pytest.param("flux", "transformer_blocks.0", None, {}, marks=pytest.mark.slow),
    ],
)
def test_a_denoisers_layer(name, layer, condition, kwargs):
    denoiser = Denoiser.from_pipe(PIPELINES[name]())
    size = denoiser.image_size
    pixels = pixels_of(3, denoiser.image_channels, *size)
    encoder = Encoder.from_denoiser(denoiser, layer, 300, condition, noise_seed=5)
    out = encoder.encode_pixels(pixels)
    check_encoder(encoder, pixels)
    expected = FeatureExtractor(denoiser, layer, 300, seed=5).from_pixels(pixels, **kwargs).as_map(layer)
    assert out.grid == encoder.grid_for(size) == tuple(expected.shape[2:])
    assert encoder.dim == expected.shape[1] == out.global_features.shape[1]
    torch.testing.assert_close(out.as_map(), expected)
    torch.testing.assert_close(out.global_features, expected.mean((2, 3)))
    assert encoder.name == f"{layer}@300"
    assert encoder.fingerprint() == Encoder.from_denoiser(denoiser, layer, 300, condition, 5).fingerprint()
    assert encoder.fingerprint() != Encoder.from_denoiser(denoiser, layer, 300, condition, 6).fingerprint()


def test_denoisers_that_do_not_fit():
    denoiser = Denoiser.from_pipe(PIPELINES["ddpm"]())
    with pytest.raises(ValueError, match="Closest"):
        Encoder.from_denoiser(denoiser, "mid", 300)
    with pytest.raises(ValueError, match="one noise level"):
        Encoder.from_denoiser(denoiser, "mid_block", [1, 2])
    with pytest.raises(TypeError, match="prompt, a class id"):
        Encoder.from_denoiser(denoiser, "mid_block", 300, condition=1.5)


# --- fingerprints


def test_fingerprints_tell_unlike_encoders_apart(tmp_path):
    folder = save(build("dinov2"), tmp_path / "one" / "m", **PROCESSOR)
    base = Encoder.from_pretrained(folder).fingerprint()
    assert base == Encoder.from_pretrained(save(build("dinov2"), tmp_path / "two" / "m", **PROCESSOR)).fingerprint()
    for changes in ({"layer": 1}, {"image_size": 4}, {"pooling": "mean"}, {"dtype": torch.bfloat16}, {"name": "b"}):
        assert Encoder.from_pretrained(folder, **changes).fingerprint() != base
    model = build("dinov2")
    with torch.no_grad():
        model.layernorm.weight[0] += 1e-6
    other = Encoder.from_pretrained(save(model, tmp_path / "three" / "m", **PROCESSOR)).fingerprint()
    assert {key for key in base if base[key] != other[key]} == {"weights"}
    plain = Encoder.from_pretrained(save(build("dinov2"), tmp_path / "four" / "m")).fingerprint()
    assert {key for key in base if base[key] != plain[key]} == {"mean", "std"}


def test_hashes_do_not_depend_on_names_versions_or_places():
    one, two = (
        nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)),
        nn.ModuleDict({"z": nn.Linear(3, 1), "a": nn.Linear(2, 3)}),
    )
    two["z"].load_state_dict(one[1].state_dict())
    two["a"].load_state_dict(one[0].state_dict())
    assert weights_hash(one) == weights_hash(two)
    assert weights_hash(one) != weights_hash(one.bfloat16())
    assert config_hash({"a": 1, "transformers_version": "4"}) == config_hash({"_name_or_path": "x", "a": 1})
    assert config_hash({"a": 1, "_use_default_values": ["b"]}) == config_hash({"a": 1})  # in chance order
    assert config_hash({"a": 1}) != config_hash({"a": 2})
