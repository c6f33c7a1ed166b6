"""Positions as REPA's code resamples them: equal to Pillow's filter, and to a network that was made for the size."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from diffusers_repr.data.cache_writer import CacheSettings
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.loading import load_train_data
from diffusers_repr.encoders import Encoder, load_encoders
from diffusers_repr.encoders.feature_cache import cache_features
from diffusers_repr.encoders.loading import distinct_names, spread_positions
from diffusers_repr.encoders.positions import resample_as_repa
from diffusers_repr.objectives.repa.config import REPAConfig
from tests.data.data_cases import rows
from tests.encoders.test_preprocessing import by_hand
from tests.encoders.test_pretrained import MEAN, PROCESSOR, STD, pixels_of
from tests.encoders.vits import build, save


def by_pillow(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The table on another grid, channel by channel: Pillow's bicubic filter antialiases, as timm's resampling."""
    side = round((table.shape[1] - 1) ** 0.5)
    planes = table[0, 1:].T.reshape(-1, side, side).numpy()
    resized = [Image.fromarray(plane, "F").resize(grid[::-1], Image.Resampling.BICUBIC) for plane in planes]
    places = torch.from_numpy(np.stack([np.asarray(plane) for plane in resized])).flatten(1).T
    return torch.cat([table[:, :1], places[None]], 1)


@pytest.mark.parametrize("grid", [(16, 16), (32, 32), (16, 24), (37, 24), (40, 50)])
def test_the_table_equals_pillows(grid):
    table = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0))
    found = resample_as_repa(table, grid)
    torch.testing.assert_close(found, by_pillow(table, grid), atol=2e-5, rtol=1e-5)
    assert torch.equal(found[:, 0], table[:, 0])
    half = resample_as_repa(table.bfloat16(), grid)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), found, atol=0.05, rtol=0.05)
    assert resample_as_repa(table, (37, 37)) is table


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A DINOv2 of 37 x 37 patches of 14 pixels, as the real ones."""
    return save(build("dinov2", 518, 14), tmp_path_factory.mktemp("encoders") / "dino", **PROCESSOR)


def test_features_are_those_of_a_network_with_the_table_resampled_once(dino):
    """REPA: 224 pixels for 256, and a table of 16 x 16, which the forward then takes as it is."""
    pixels = pixels_of(2, 3, 256, 256)
    state = build("dinov2", 518, 14).state_dict()
    state["embeddings.position_embeddings"] = by_pillow(state["embeddings.position_embeddings"], (16, 16))
    shape = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
    made_for_it = Dinov2Model(Dinov2Config(**shape, image_size=224, patch_size=14)).eval()
    made_for_it.load_state_dict(state)
    with torch.no_grad():
        inputs = torch.from_numpy(by_hand(pixels.numpy(), (224, 224), MEAN, STD)).float()
        wanted = made_for_it(inputs).last_hidden_state
    encoder = Encoder.from_pretrained(dino, positions="repa")
    found, own = encoder.encode_pixels(pixels), Encoder.from_pretrained(dino).encode_pixels(pixels)
    assert found.grid == own.grid == (16, 16)
    torch.testing.assert_close(found.tokens, wanted[:, 1:], atol=5e-4, rtol=1e-3)
    torch.testing.assert_close(found.global_features, wanted[:, 0], atol=5e-4, rtol=1e-3)
    assert (own.tokens - found.tokens).abs().max() > 0.05  # the default is another one, as before
    moved = copy.deepcopy(encoder.module)
    moved.embeddings.position_embeddings.data.zero_()  # a copy reads its own table
    with torch.no_grad():
        assert not torch.equal(moved(inputs).last_hidden_state, encoder.module(inputs).last_hidden_state)
    torch.testing.assert_close(encoder.encode_pixels(pixels).tokens, found.tokens)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "vit", "vit_mae"])
def test_every_family_whose_table_is_resampled(tmp_path, name):
    folder = save(build(name), tmp_path / name, **PROCESSOR)
    encoder, own = Encoder.from_pretrained(folder, positions="repa"), Encoder.from_pretrained(folder)
    at_home, away = pixels_of(2, 3, 8, 8), pixels_of(2, 3, 8, 12)
    assert torch.equal(encoder.encode_pixels(at_home).tokens, own.encode_pixels(at_home).tokens)
    by_table = copy.deepcopy(own)
    embeddings = by_table.module.embeddings
    table = by_pillow(embeddings.position_embeddings, (4, 6))
    embeddings.interpolate_pos_encoding = lambda *args: table
    torch.testing.assert_close(
        encoder.encode_pixels(away).tokens, by_table.encode_pixels(away).tokens, atol=1e-4, rtol=1e-4
    )
    same = torch.equal(encoder.encode_pixels(away).tokens, own.encode_pixels(away).tokens)
    assert same == (name == "dinov2_with_registers")  # transformers itself antialiases these


def test_others_are_refused(tmp_path):
    folder = save(build("siglip_vision_model"), tmp_path / "siglip")
    with pytest.raises(ValueError, match=r"resamples no positions of a SiglipVisionModel: .* dinov2, dinov2_with_reg"):
        Encoder.from_pretrained(folder, positions="repa")
    with pytest.raises(ValueError, match="positions is one of 'transformers', 'repa'; got 'timm'"):
        Encoder.from_pretrained(folder, positions="timm")


def test_positions_are_a_part_of_what_an_encoder_is(dino, tmp_path):
    own, repa = Encoder.from_pretrained(dino), Encoder.from_pretrained(dino, positions="repa")
    assert repa.fingerprint() == {**own.fingerprint(), "positions": "repa"}
    assert "positions" not in own.fingerprint()  # as before there was a choice: older caches stay good

    def load(*encoders):
        settings = DataConfig(features_dir=str(tmp_path / "features") if encoders else None)
        return load_train_data(settings, 3, 16, rows(5), encoders=list(encoders))

    cache_features(own, load(), tmp_path / "features", CacheSettings(both_mirrors=False, progress=False))
    assert load(own)[0]["features"]["dino"].shape[-1] == 8
    with pytest.raises(ValueError, match="positions"):
        load(repa)


def test_encoders_of_a_recipe(tmp_path):
    """Two of one name keep both, each called by the folder above it too."""
    folders = [save(build("vit"), tmp_path / at / "teacher") for at in "ab"] + [
        save(build("ijepa"), tmp_path / "jepa")
    ]
    found = load_encoders([str(folder) for folder in folders], ["repa", "repa", "transformers"])
    assert [encoder.name for encoder in found] == ["a-teacher", "b-teacher", "jepa"]
    assert [encoder.source.positions for encoder in found] == ["repa", "repa", "transformers"]
    assert distinct_names(["org/dinov2-base", "x/y/t", "z/y/t"]) == ["dinov2-base", "x-y-t", "z-y-t"]
    with pytest.raises(ValueError, match="'x/t' is named twice"):
        distinct_names(["x/t", "y", "x/t"])
    assert spread_positions([], 2) == ["transformers"] * 2
    assert REPAConfig(encoder=["none"], encoder_positions=["repa"]).teachers == []  # a baseline by one flag
    with pytest.raises(ValueError, match="2 encoder_positions for 3 encoders; give one for all, or one each"):
        REPAConfig(encoder=["a", "b", "c"], encoder_positions=["repa", "repa"])
    with pytest.raises(ValueError, match="got 'antialias'"):
        REPAConfig(encoder=["a"], encoder_positions=["antialias"])
