"""Networks of transformers: features equal the plain call of transformers with preprocessing done by hand."""

import json
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel, ViTConfig, ViTModel

from diffusers_repr.encoders import Encoder, EncoderFamily, list_encoder_families, register_encoder_family
from diffusers_repr.encoders.family import _FAMILIES
from diffusers_repr.testing import check_encoder
from tests.encoders.test_preprocessing import by_hand
from tests.encoders.vits import MLP, MODELS, PREFIX, SIZE, build, clip_with_text, save, shape

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
PROCESSOR = {"image_mean": MEAN, "image_std": STD}
NAMES = sorted(MODELS)


def pixels_of(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model saved once, 8 x 8 pixels with patch 2."""
    root = tmp_path_factory.mktemp("encoders")
    return {name: save(build(name), root / name, **PROCESSOR) for name in NAMES}


@contextmanager
def last_block_of(model: nn.Module):
    """A list that holds what the last of the model's blocks gave."""
    [blocks] = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == 3]
    found = []
    hook = blocks[-1].register_forward_hook(
        lambda block, inputs, output: found.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    yield found
    hook.remove()


def hidden_states(model: nn.Module, inputs: dict) -> tuple[Any, list[torch.Tensor]]:
    """The forward's output, and the states before any block and after each, none of them normed.

    Some versions of transformers give the last state after the final norm.
    """
    with torch.no_grad(), last_block_of(model) as last:
        out = model(**inputs, output_hidden_states=True)
        *hidden, given = out.hidden_states
        normed = [part(last[0]) for part in model.modules() if isinstance(part, nn.LayerNorm)]
    assert any(torch.allclose(given, state, atol=1e-5) for state in (last[0], *normed))
    return out, [*hidden, *last]


def plain_call(name: str, model: nn.Module, pixels: torch.Tensor, size: tuple[int, int], patch: int = 2):
    """(global, tokens, hidden states) by transformers alone; MAE unmasked by sorting its patches back."""
    inputs = torch.from_numpy(by_hand(pixels.numpy(), size, MEAN, STD)).float()
    grid = (size[0] // patch, size[1] // patch)
    extra = {}
    if name in ("clip_vision_model", "siglip_vision_model", "vit", "vit_mae", "ijepa"):
        extra["interpolate_pos_encoding"] = True
    if name == "siglip2_vision_model":
        rows = [
            torch.stack([
                image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].permute(1, 2, 0).flatten()
                for i in range(grid[0])
                for j in range(grid[1])
            ])
            for image in inputs
        ]  # fmt: skip
        inputs = torch.stack(rows)
        extra["spatial_shapes"] = torch.tensor([grid] * len(inputs))
        extra["pixel_attention_mask"] = torch.ones(inputs.shape[:2])
    if name == "vit_mae":
        model.config.mask_ratio = 0.0
    out, hidden = hidden_states(model, {"pixel_values": inputs, **extra})
    if name == "vit_mae":  # the first state stands before any block; sort all back
        hidden = [torch.cat([h[:, :1], h[:, 1:].gather(1, out.ids_restore[..., None].expand_as(h[:, 1:]))], 1)
                  for h in hidden]  # fmt: skip
    last = hidden[-1] if name in ("vit_mae", "clip_vision_model") else out.last_hidden_state
    tokens = last[:, PREFIX.get(name, 1) :]
    pooled = last[:, 0] if PREFIX.get(name, 1) else tokens.mean(1)
    if name.startswith(("clip", "siglip")):
        pooled = out.pooler_output
    return pooled, tokens, hidden


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_call(folders, name, size):
    pixels = pixels_of(3, 3, *size)
    encoder = Encoder.from_pretrained(folders[name])
    out = encoder.encode_pixels(pixels)
    pooled, tokens, _ = plain_call(name, build(name), pixels, size)
    assert encoder.dim == 8
    assert out.grid == encoder.grid_for(size) == (size[0] // 2, size[1] // 2)
    assert out.tokens.shape == (3, out.grid[0] * out.grid[1], 8)
    torch.testing.assert_close(out["tokens"], tokens, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(out["global"], pooled, atol=2e-4, rtol=1e-4)
    assert tokens.std() > 0.05
    assert torch.equal(out.as_map()[:, :, 1, 2], out.tokens[:, out.grid[1] + 2])


@pytest.mark.parametrize("name", NAMES)
def test_keeps_the_contract(folders, name):
    check_encoder(Encoder.from_pretrained(folders[name]), pixels_of(3, 3, 8, 12))


@pytest.mark.parametrize("name", ["dinov2", "vit_mae", "siglip_vision_model"])
def test_other_sizes_are_resized_as_by_hand(folders, name):
    pixels = pixels_of(2, 3, 11, 7)
    encoder = Encoder.from_pretrained(folders[name], image_size=(10, 6))
    out = encoder.encode_pixels(pixels)
    _, tokens, _ = plain_call(name, build(name), pixels, (10, 6))
    assert out.grid == (5, 3)
    torch.testing.assert_close(out.tokens, tokens, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_the_hidden_states_of_transformers(folders, name):
    pixels = pixels_of(2, 3, 8, 8)
    _, _, hidden = plain_call(name, build(name), pixels, (8, 8))
    prefix = PREFIX.get(name, 1)
    for layer in (0, 1, -1):
        out = Encoder.from_pretrained(folders[name], layer=layer).encode_pixels(pixels)
        state = hidden[layer % 3 + 1]
        pooled = state[:, 0] if prefix else state.mean(1)
        torch.testing.assert_close(out.tokens, state[:, prefix:], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(out.global_features, pooled, atol=2e-4, rtol=1e-4)


def test_tokens_of_mae_stand_in_the_order_of_the_patches(folders):
    encoder = Encoder.from_pretrained(folders["vit_mae"])
    pixels = pixels_of(1, 3, 8, 8)
    changed = pixels.clone()
    changed[:, :, 4:6, 2:4] += 1  # patch (2, 1) of a 4 x 4 grid
    difference = (encoder.encode_pixels(changed).tokens - encoder.encode_pixels(pixels).tokens).norm(dim=-1)[0]
    assert len(difference) == 16
    assert difference.argmax() == 9
    assert torch.equal(encoder.encode_pixels(pixels).tokens, encoder.encode_pixels(pixels).tokens)


def test_pooling(folders):
    pixels = pixels_of(2, 3, 8, 8)
    mean = Encoder.from_pretrained(folders["dinov2"], pooling="mean").encode_pixels(pixels)
    torch.testing.assert_close(mean.global_features, mean.tokens.mean(1))
    raw = Encoder.from_pretrained(folders["clip_vision_model"], pooling="cls").encode_pixels(pixels)
    normed = Encoder.from_pretrained(folders["clip_vision_model"]).encode_pixels(pixels)
    clip = build("clip_vision_model")
    norm = getattr(clip, "vision_model", clip).post_layernorm
    torch.testing.assert_close(norm(raw.global_features), normed.global_features)
    with pytest.raises(ValueError, match="asks for a class token"):
        Encoder.from_pretrained(folders["ijepa"], pooling="cls")
    with pytest.raises(ValueError, match="Unknown pooling 'max'"):
        Encoder.from_pretrained(folders["dinov2"], pooling="max")


@pytest.mark.parametrize("name", NAMES)
def test_an_image_does_not_depend_on_its_batch(folders, name):
    pixels = pixels_of(5, 3, 8, 10)
    encoder = Encoder.from_pretrained(folders[name])
    whole = encoder.encode_pixels(pixels)
    parts = encoder.encode_pixels(pixels, batch_size=2)
    assert parts.grid == whole.grid
    torch.testing.assert_close(parts.tokens, whole.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parts.global_features, whole.global_features, atol=1e-5, rtol=1e-5)


# --- sizes


@pytest.mark.parametrize(
    ("patch", "side", "image", "grid", "size"),
    [
        (14, 224, (256, 256), (16, 16), (224, 224)),
        (14, 224, (512, 512), (32, 32), (448, 448)),
        (14, 518, (256, 512), (16, 32), (224, 448)),
        (16, 224, (256, 256), (16, 16), (256, 256)),
        (16, 224, (512, 512), (32, 32), (512, 512)),
        (14, 224, (32, 32), (16, 16), (224, 224)),
        (14, 224, (32, 48), (16, 24), (224, 336)),
        (2, 8, (256, 256), (4, 4), (8, 8)),
        (16, 64, (256, 256), (4, 4), (64, 64)),
    ],
)
def test_default_sizes(tmp_path, patch, side, image, grid, size):
    folder = save(build("vit", side, patch), tmp_path / "vit")
    encoder = Encoder.from_pretrained(folder)
    assert encoder.grid_for(image) == grid
    assert encoder.source.size(image) == size


def test_the_image_processor_tells_the_size_of_small_images(tmp_path):
    folder = save(build("dinov2", 518, 14), tmp_path / "m", crop_size={"height": 224, "width": 224})
    assert Encoder.from_pretrained(folder).grid_for((64, 64)) == (16, 16)


def test_a_512_pixel_image_has_a_token_for_each_of_the_denoiser(tmp_path):
    folder = save(build("dinov2", 224, 14), tmp_path / "m", **PROCESSOR)
    pixels = pixels_of(1, 3, 512, 512)
    out = Encoder.from_pretrained(folder).encode_pixels(pixels)
    _, tokens, _ = plain_call("dinov2", build("dinov2", 224, 14), pixels, (448, 448), patch=14)
    assert out.tokens.shape == (1, 1024, 8)
    torch.testing.assert_close(out.tokens, tokens, atol=1e-3, rtol=1e-4)


def test_siglip2_without_a_square_needs_a_size(tmp_path):
    config = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = Siglip2VisionModel(Siglip2VisionConfig(**config, patch_size=2, num_patches=16))
    folder = save(model, tmp_path / "m")
    encoder = Encoder.from_pretrained(folder)
    assert encoder.grid_for((6, 6)) == (4, 4)
    encoder.source.side = None
    with pytest.raises(ValueError, match="no size of its own"):
        encoder.grid_for((6, 6))


# --- what it leaves alone


@pytest.mark.parametrize("name", ["dinov2", "vit_mae"])
def test_random_state_modes_and_gradients_are_untouched(folders, name):
    state = torch.get_rng_state()
    encoder = Encoder.from_pretrained(folders[name])
    pixels = pixels_of(2, 3, 8, 8).requires_grad_()
    out = encoder.encode_pixels(pixels)
    assert torch.equal(torch.get_rng_state(), state)
    assert not out.tokens.requires_grad
    assert not out.tokens.is_inference()
    assert not any(p.requires_grad for p in encoder.module.parameters())
    assert not any(m.training for m in encoder.module.modules())
    weight = torch.ones(8, requires_grad=True)
    (out.tokens * weight).sum().backward()  # a student's loss can hold its features
    assert weight.grad is not None
    assert pixels.grad is None
    encoder.module.train()  # someone else's train() is neither used nor undone
    again = encoder.encode_pixels(pixels)
    assert torch.equal(again.tokens, out.tokens)
    assert encoder.module.training


def test_it_is_no_part_of_a_module_that_holds_it(folders):
    holder = nn.Linear(2, 2)
    holder.teacher = Encoder.from_pretrained(folders["vit"])
    assert set(holder.state_dict()) == {"weight", "bias"}
    assert holder.train().teacher.module.training is False


def test_autocast_and_dtype(folders):
    pixels = pixels_of(2, 3, 8, 8)
    encoder = Encoder.from_pretrained(folders["dinov2"])
    plain = encoder.encode_pixels(pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.encode_pixels(pixels).tokens, plain.tokens)
    half = Encoder.from_pretrained(folders["dinov2"], dtype=torch.bfloat16)
    out = half.encode_pixels(pixels)
    assert half.dtype == torch.bfloat16
    assert out.tokens.dtype == out.global_features.dtype == torch.float32
    assert 0 < (out.tokens - plain.tokens).abs().max() < 0.2
    assert half.to(dtype=torch.float32).dtype == torch.float32


# --- images, files, errors


def test_images_of_all_kinds(folders):
    encoder = Encoder.from_pretrained(folders["vit"])
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = encoder.encode_pixels(tensor[None].float() / 127.5 - 1).tokens
    for images in (Image.fromarray(array), array, tensor):
        torch.testing.assert_close(encoder(images).tokens, expected)
    grey = pixels_of(1, 1, 8, 8)
    assert torch.equal(encoder.encode_pixels(grey).tokens, encoder.encode_pixels(grey.expand(1, 3, 8, 8)).tokens)


def test_all_of_clip_gives_its_image_half(tmp_path):
    model, folder = clip_with_text(tmp_path / "clip")
    encoder = Encoder.from_pretrained(folder)
    pixels = pixels_of(2, 3, 8, 8)
    mean, std = encoder.source.mean, encoder.source.std
    inputs = torch.from_numpy(by_hand(pixels.numpy(), (8, 8), mean, std)).float()
    with torch.no_grad():
        expected = model.vision_model(pixel_values=inputs)
    out = encoder.encode_pixels(pixels)
    torch.testing.assert_close(out.tokens, expected.last_hidden_state[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(out.global_features, expected.pooler_output, atol=1e-5, rtol=1e-4)
    assert mean[0] == pytest.approx(0.48145466)


def test_loading_is_silent(folders, tmp_path, capfd):
    _, folder = clip_with_text(tmp_path / "clip")
    capfd.readouterr()
    Encoder.from_pretrained(folder)
    assert capfd.readouterr() == ("", "")


def test_unknown_model_type_lists_the_known(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "regnet"}')
    with pytest.raises(TypeError, match=r"(?s)'regnet'. Known: clip, .*dinov2.*vit_mae.*register_encoder_family"):
        Encoder.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError):
        Encoder.from_pretrained(tmp_path / "absent")


def test_missing_weights_are_an_error(folders, tmp_path):
    folder = save(build("vit"), tmp_path / "vit")
    weights = load_file(folder / "model.safetensors")
    dropped = next(key for key in weights if "q_proj.weight" in key or "query.weight" in key)
    save_file({k: v for k, v in weights.items() if k != dropped}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of ViTModel"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("layer", [3, -4, 1.0, True, "encoder.layer.0"])
def test_layers_that_are_not_there(folders, layer):
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        Encoder.from_pretrained(folders["dinov2"], layer=layer)


def test_sizes_that_do_not_fit(folders):
    with pytest.raises(ValueError, match=r"no multiple of the patch, 2; the nearest is \(8, 12\)"):
        Encoder.from_pretrained(folders["dinov2"], image_size=(7, 11))
    with pytest.raises(ValueError, match="one side or"):
        Encoder.from_pretrained(folders["dinov2"], image_size=0)


@pytest.mark.parametrize(
    ("pixels", "error"),
    [
        (torch.zeros(3, 8, 8), ValueError),
        (torch.zeros(0, 3, 8, 8), ValueError),
        ([torch.zeros(3, 8, 8)], ValueError),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError),
        (torch.zeros(1, 2, 8, 8), ValueError),
    ],
)
def test_pixels_that_are_none(folders, pixels, error):
    with pytest.raises(error):
        Encoder.from_pretrained(folders["vit"]).encode_pixels(pixels)


def test_a_family_of_ones_own(tmp_path):
    try:

        @register_encoder_family("my_vit")
        class MyFamily(EncoderFamily):
            model_class = type(build("vit"))

            def loading(self, config):
                return {"add_pooling_layer": False}

        folder = save(build("vit"), tmp_path / "vit")
        before = Encoder.from_pretrained(folder).encode_pixels(pixels_of(1, 3, 8, 8))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "my_vit"}))
        assert "my_vit" in list_encoder_families()
        after = Encoder.from_pretrained(folder).encode_pixels(pixels_of(1, 3, 8, 8))
        assert torch.equal(before.tokens, after.tokens)
        with pytest.raises(ValueError, match="'my_vit' is the encoder family .*MyFamily already"):
            register_encoder_family("my_vit")(MyFamily)
    finally:
        _FAMILIES.pop("my_vit", None)
    with pytest.raises(ValueError, match="'dinov2' is the encoder family .*Dinov2Family already"):
        register_encoder_family("dinov2")(EncoderFamily)


@pytest.mark.gpu
def test_on_a_gpu_features_are_those_of_the_cpu(folders):
    pixels = pixels_of(2, 3, 8, 8)
    here = Encoder.from_pretrained(folders["dinov2"]).encode_pixels(pixels)
    there = Encoder.from_pretrained(folders["dinov2"], device="cuda").encode_pixels(pixels.cuda())
    assert there.tokens.is_cuda
    torch.testing.assert_close(there.tokens.cpu(), here.tokens, atol=1e-3, rtol=1e-3)


def test_a_network_of_one_channel_without_a_preprocessor_config(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = ViTModel(ViTConfig(**SIZE, **MLP, **shape(8, 2), num_channels=1), add_pooling_layer=False).eval()
    save(model, tmp_path)
    with pytest.raises(ValueError, match="takes 1 channels, .* have 3 means .*; pass mean= and std="):
        Encoder.from_pretrained(tmp_path)
    encoder, pixels = Encoder.from_pretrained(tmp_path, mean=0.25, std=[0.5]), pixels_of(2, 1, 8, 8)
    with torch.no_grad():
        wanted = model((pixels / 2 + 0.5 - 0.25) / 0.5).last_hidden_state[:, 1:]
    torch.testing.assert_close(encoder.encode_pixels(pixels)["tokens"], wanted)
    assert encoder.fingerprint()["mean"] == [0.25]
    with pytest.raises(ValueError, match="std must be above 0; got 0"):
        Encoder.from_pretrained(tmp_path, mean=0.5, std=0)
