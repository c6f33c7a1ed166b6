"""The feature cache: a teacher's features for both mirrors, and that training from it is training without."""

import json

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from diffusers_repr import Denoiser
from diffusers_repr.data.cache_writer import CacheSettings
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.latents import cache_latents
from diffusers_repr.data.loading import load_train_data
from diffusers_repr.data.teacher_features import encoder_folder, list_features
from diffusers_repr.encoders import Encoder
from diffusers_repr.encoders.feature_cache import cache_features
from diffusers_repr.models import SiTTransformer2DModel
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.objectives.repa.objective import REPAObjective
from diffusers_repr.objectives.teachers import CachedFeatures
from tests.data.data_cases import rows
from tests.data.latent_cases import make_vae

ROWS, SIZE = 7, 16
EXACT = CacheSettings(dtype="float32", shard_size=3, batch_size=2, progress=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def teacher(name="org/teacher", seed=0, dim=6):
    torch.manual_seed(seed)
    return Encoder.from_module(nn.Conv2d(3, dim, 4, stride=4), patch_size=4, name=name)


def load(data=None, size=SIZE, **settings):
    run = {key: settings.pop(key) for key in ("vae", "encoders", "needs_pixels") if key in settings}
    return load_train_data(DataConfig(**settings), 3, size, rows(ROWS) if data is None else data, **run)


class Stored:
    """What stands for an encoder that is not loaded."""

    def __init__(self, cache):
        self.about = cache.manifest["about"]
        self.name = self.about["name"]

    def fingerprint(self):
        return self.about["fingerprint"]


def test_holds_tokens_and_global_features_of_both_mirrors(tmp_path):
    data, encoder = load(random_flip=True), teacher()
    cache = cache_features(encoder, data, tmp_path / "out", EXACT)
    assert cache.folder == tmp_path / "out/org_teacher"
    assert cache.layout.tensors == {"tokens": (2, 16, 6), "global": (2, 6)}
    assert cache.layout.shards == 3
    for i in range(ROWS):
        pixels = data[i]["pixel_values"][None].float() / 127.5 - 1
        for mirror, image in enumerate((pixels, pixels.flip(-1))):
            output = encoder.encode_pixels(image)
            torch.testing.assert_close(cache[i]["tokens"][mirror], output.tokens[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(cache[i]["global"][mirror], output.global_features[0], atol=1e-5, rtol=1e-5)
    about = json.loads((cache.folder / "manifest.json").read_text())["about"]
    assert (about["name"], about["grid"]) == ("org/teacher", [4, 4])
    assert list(list_features(tmp_path / "out")) == ["org/teacher"]


def test_half_precision_and_one_mirror_are_the_default_without_flips(tmp_path):
    cache = cache_features(teacher(), load(), tmp_path / "one")
    assert (cache.layout.dtype, cache.mirrors) == ("float16", 1)
    assert cache_features(teacher(), load(random_flip=True), tmp_path / "two").mirrors == 2


@pytest.mark.parametrize("latents", [False, True])
def test_training_from_the_cache_is_training_without(tmp_path, latents):
    vae, teachers = make_vae(), [teacher("a", 0), teacher("b", 1, dim=3)]
    settings = {"random_flip": True, "features_dir": str(tmp_path / "features")}
    for encoder in teachers:
        cache_features(encoder, load(random_flip=True), tmp_path / "features", EXACT)
    if latents:
        cache_latents(vae, load(), tmp_path / "latents", EXACT)
        settings["latents_dir"] = str(tmp_path / "latents")
    plain, cached = load(random_flip=True), load(vae=vae, encoders=teachers, **settings)
    assert ("pixel_values" in cached[0]) is not latents
    batch, flipped = [6, 0, 3, 5], 0
    for seed in range(3):
        torch.manual_seed(seed)
        images = plain.on_device(default_collate([plain[i] for i in batch]))
        after = torch.rand(1)
        torch.manual_seed(seed)
        read = cached.on_device(default_collate([cached[i] for i in batch]))
        assert torch.equal(torch.rand(1), after)
        for encoder in teachers:
            output = encoder.encode_pixels(images["pixel_values"])
            torch.testing.assert_close(read["features"][encoder.name], output.tokens, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                read["features_global"][encoder.name], output.global_features, atol=1e-5, rtol=1e-5
            )
        if not latents:
            assert torch.equal(read["pixel_values"], images["pixel_values"])
        first = torch.stack([plain[i]["pixel_values"] for i in batch]).float() / 127.5 - 1
        flipped += int((images["pixel_values"] != first).flatten(1).any(1).sum())
    assert 0 < flipped < 12


def test_images_are_loaded_where_a_teacher_is_not_cached(tmp_path):
    vae, seen, live = make_vae(), teacher("a"), teacher("b", 1)
    cache_latents(vae, load(), tmp_path / "latents", EXACT)
    cache_features(seen, load(), tmp_path / "features", EXACT)
    settings = {"latents_dir": str(tmp_path / "latents"), "vae": vae}
    features = {"features_dir": str(tmp_path / "features")}
    assert "pixel_values" not in load(**settings)[0]
    assert "pixel_values" not in load(encoders=[seen], **features, **settings)[0]
    assert "pixel_values" in load(encoders=[live], **settings)[0]
    both = load(encoders=[seen, live], **features, **settings)[0]
    assert "pixel_values" in both
    assert list(both["features"]) == ["a"]
    assert "pixel_values" in load(encoders=[seen], needs_pixels=True, **features, **settings)[0]


def test_an_encoder_need_not_be_loaded(tmp_path):
    cache = cache_features(teacher(), load(), tmp_path / "out", EXACT)
    data = load(encoders=[Stored(cache)], features_dir=str(tmp_path / "out"))
    assert data[0]["features"]["org/teacher"].shape == (2, 16, 6)
    stranger = Stored(cache)
    stranger.name = "c"
    with pytest.raises(FileNotFoundError, match="'c' is not loaded, and .* holds no features of it"):
        load(encoders=[Stored(cache), stranger], features_dir=str(tmp_path / "out"))


def test_a_run_refuses_a_cache_made_otherwise(tmp_path):
    place = str(tmp_path / "out")
    cache_features(teacher("a"), load(), place, CacheSettings(both_mirrors=False, progress=False))
    settings = {"features_dir": place}
    assert load(encoders=[teacher("a")], **settings)[0]["features"]["a"].shape == (1, 16, 6)
    for other, message in (
        ({"encoders": [teacher("a", seed=1)]}, "encoder.weights"),
        ({"encoders": [teacher("a")], "size": 8}, "data.size"),
        ({"encoders": [teacher("a")], "center_crop": "fit"}, "data.center_crop"),
        ({"encoders": [teacher("a")], "data": rows(8)}, "data.rows: 7 -> 8"),
        ({"encoders": [teacher("a")], "random_flip": True}, "no mirrored images.*--random_flip true"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**other, **settings)
    for encoders, told in (([], "none"), ([teacher("b")], "b")):
        with pytest.raises(FileNotFoundError, match=rf"no features of the run's encoders \({told}\)"):
            load(encoders=encoders, **settings)
    with pytest.raises(FileExistsError, match="another recipe.*encoder.weights"):
        cache_features(teacher("a", seed=1), load(), place)
    with pytest.raises(FileNotFoundError, match="No feature cache"):
        list_features(tmp_path / "nowhere")


def test_an_unfinished_cache_is_told(tmp_path):
    cache = cache_features(teacher("a"), load(), tmp_path / "out", EXACT)
    (cache.folder / cache.layout.path(1)).unlink()
    with pytest.raises(ValueError, match="not finished: 4 of 7 rows .2 of 3 shards.*diffusers-repr cache"):
        load(encoders=[teacher("a")], features_dir=str(tmp_path / "out"))
    cache_features(teacher("a"), load(), tmp_path / "out", EXACT).verify()


def test_names_of_encoders_as_folders(tmp_path):
    assert encoder_folder(tmp_path, "up_blocks.1@261").name == "up_blocks.1@261"
    assert encoder_folder(tmp_path, "../other").parent == tmp_path


@pytest.mark.parametrize("stored", [False, True])
def test_the_losses_of_a_run_are_the_same(tmp_path, stored):
    """Loss and gradients of REPA on latents and features from the caches, and on images, from one seed."""
    vae, encoder = make_vae(), teacher("a")
    cache_latents(vae, load(), tmp_path / "latents", EXACT)
    cache = cache_features(encoder, load(random_flip=True), tmp_path / "features", EXACT)
    about = cache.manifest["about"]
    stand_in = CachedFeatures("a", 6, tuple(about["grid"]), about["fingerprint"])
    places = {"latents_dir": str(tmp_path / "latents"), "features_dir": str(tmp_path / "features")}
    seen = []
    for data, teachers in (
        (load(random_flip=True), [encoder]),
        (load(random_flip=True, vae=vae, encoders=[stand_in if stored else encoder], **places),
         [stand_in if stored else encoder]),
    ):  # fmt: skip
        model = SiTTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            hidden_size=16,
            num_attention_heads=2,
            num_classes=3,
        )
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0, 0.2, generator=generator)
        denoiser = Denoiser(model, schedule=NoiseSchedule("flow", "velocity"), vae=vae)
        torch.manual_seed(1)
        objective = REPAObjective(denoiser, teachers, "blocks.0", projector_dim=8)
        torch.manual_seed(2)
        out = objective(data.on_device(default_collate([data[i] for i in (5, 2, 3, 1)])))
        out["loss"].backward()
        seen.append((out, {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-4)
