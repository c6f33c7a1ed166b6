"""The latent cache: what it holds, how it resumes, what it refuses, and that training from it is training without."""

import json
import pickle

import datasets
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch.utils.data import DataLoader, default_collate

from diffusers_repr.data.cache_writer import CacheSettings
from diffusers_repr.data.cached import CachedData
from diffusers_repr.data.latents import open_latents
from diffusers_repr.denoiser.vae import draw_latents, encode_latents, encode_moments
from diffusers_repr.store.tensor_cache import TensorCache
from tests.data.data_cases import rows, with_broken
from tests.data.latent_cases import ROWS, SIZE, contents, load, make, make_vae


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# What it holds


def test_holds_the_moments_of_both_mirrors(tmp_path):
    data, vae = load(), make_vae()
    cache = make(tmp_path / "out", data, vae)
    assert len(cache) == ROWS
    for i in (0, 3, 4, 10):
        pixels = data[i]["pixel_values"][None].float() / 127.5 - 1
        with torch.no_grad():
            for mirror, image in enumerate((pixels, pixels.flip(-1))):
                posterior = vae.encode(image).latent_dist
                wanted = torch.cat([posterior.mean, posterior.std], dim=1)[0]
                torch.testing.assert_close(cache[i]["moments"][mirror], wanted, atol=1e-5, rtol=1e-5)
        assert int(cache[i]["index"]) == i
    # a latent cannot be flipped
    assert (cache[0]["moments"][1] - cache[0]["moments"][0].flip(-1)).abs().max() > 1e-3
    files = sorted(p.name for p in (tmp_path / "out/data").iterdir())
    assert files == [f"latents-0000{n}-of-00003.safetensors" for n in range(3)]
    shapes = [tuple(load_file(tmp_path / "out/data" / f)["moments"].shape) for f in files]
    assert shapes == [(4, 2, 8, 8, 8), (4, 2, 8, 8, 8), (3, 2, 8, 8, 8)]
    cache.verify()
    assert repr(cache).startswith("TensorCache(")


def test_manifest(tmp_path):
    make(tmp_path / "out", dtype="float16", both_mirrors=False)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["layout"] == {
        "kind": "latents", "rows": ROWS, "shard_size": 4, "shards": 3, "dtype": "float16",
        "tensors": {"moments": [1, 8, 8, 8]}, "recipe": manifest["layout"]["recipe"],
    }  # fmt: skip
    recipe = manifest["recipe"]
    assert recipe["mirrors"] == 1
    assert (recipe["vae"]["scaling_factor"], recipe["vae"]["shift_factor"]) == (0.5, 0.1)
    assert len(recipe["vae"]["weights"]) == 64
    assert recipe["data"]["center_crop"] == "adm"
    assert recipe["data"]["size"] == [SIZE, SIZE]
    assert recipe["data"]["rows"] == ROWS
    assert set(manifest["versions"]) >= {"torch", "diffusers"}


def test_half_precision(tmp_path):
    full, half = make(tmp_path / "full"), make(tmp_path / "half", dtype="float16")
    assert half[5]["moments"].dtype == torch.float16
    torch.testing.assert_close(half[5]["moments"].float(), full[5]["moments"], atol=1e-3, rtol=1e-3)
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(1e6)
    with pytest.raises(ValueError, match="'moments' reach 1.*e.06, more than float16 holds.*float32"):
        make(tmp_path / "over", vae=vae, dtype="float16")


def test_unreadable_images_are_stood_for_by_the_next(tmp_path):
    broken = with_broken(rows(ROWS), [4, 10])
    with pytest.raises(ValueError, match=r"row 4 \(photo4.png\)"):
        make(tmp_path / "out", load(broken))
    settings = {"bad_images": "skip", "latents_dir": str(tmp_path / "out")}
    cache = make(tmp_path / "out", load(broken, bad_images="skip"))
    assert [int(cache[i]["index"]) for i in range(ROWS)] == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9, 0]
    for needs_pixels in (False, True):
        data = load(broken, vae=make_vae(), needs_pixels=needs_pixels, **settings)
        assert (int(data[4]["index"]), int(data[4]["class_labels"])) == (5, 2)


# What it refuses


def test_another_recipe_in_the_folder(tmp_path):
    make(tmp_path / "out")
    before = contents(tmp_path / "out")
    for other, message in (
        ({"vae": make_vae(1)}, "vae.weights"),
        ({"data": load(center_crop="fit")}, 'data.center_crop: "adm" -> "fit"'),
        ({"data": load(rows(10))}, "data.rows: 11 -> 10"),
        ({"dtype": "float16"}, 'dtype: "float32" -> "float16"'),
        ({"both_mirrors": False}, "mirrors: 2 -> 1"),
        ({"shard_size": 5}, "shard_size: 4 -> 5"),
    ):
        with pytest.raises(FileExistsError, match=f"another recipe; nothing was changed.*{message}"):
            make(tmp_path / "out", **other)
    assert contents(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="is no cache with this recipe .it holds thesis.txt."):
        make(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="is a file"):
        make(tmp_path / "mine/thesis.txt")


@pytest.mark.parametrize("setting", [{"dtype": "bfloat16"}, {"batch_size": 0}, {"shard_size": 0}])
def test_bad_settings(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        CacheSettings(**setting)


def test_a_run_refuses_a_cache_made_otherwise(tmp_path):
    vae, place = make_vae(), str(tmp_path / "out")
    make(place, vae=vae, both_mirrors=False)
    settings = {"latents_dir": place}
    assert load(vae=vae, **settings)[0]["moments"].shape == (1, 8, 8, 8)
    assert load(vae=vae, label_column="none", **settings).num_classes == 0  # labels decide no latent
    for other, message in (
        ({"vae": make_vae(1)}, "vae.weights"),
        ({"vae": make_vae(scaling_factor=0.18215)}, "vae.scaling_factor: 0.5 -> 0.18215"),
        ({"vae": make_vae().half()}, 'vae.dtype: "float32" -> "float16"'),
        ({"vae": vae, "size": 8}, "data.size"),
        ({"vae": vae, "center_crop": "fit"}, "data.center_crop"),
        ({"vae": vae, "data": rows(10)}, "data.rows: 11 -> 10"),
        ({"vae": vae, "data": rows(11, ((9, 9),))}, "data.images"),
        ({"vae": vae, "random_flip": True}, "no mirrored images.*--both_mirrors true"),
        ({}, "no VAE to check"),
    ):
        with pytest.raises(ValueError, match=message):
            load(**other, **settings)
    with pytest.raises(FileNotFoundError, match="no cache of latents.*no such folder"):
        load(vae=vae, latents_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds latents, not features"):
        TensorCache.open(place, "features")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    del manifest["layout"]["rows"]
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        load(vae=vae, **settings)


def test_nothing_cached(tmp_path):
    with pytest.raises(ValueError, match="needs latents or features"):
        CachedData(load())
    cache = make(tmp_path / "out")
    with pytest.raises(IndexError):
        cache[ROWS]
    assert CachedData(load(), cache).fingerprint() != load().fingerprint()


# Training from it


@pytest.mark.parametrize("random_flip", [False, True])
def test_training_from_the_cache_is_training_without(tmp_path, random_flip):
    vae = make_vae()
    make(tmp_path / "out", vae=vae)
    plain = load(random_flip=random_flip)
    cached = load(random_flip=random_flip, vae=vae, latents_dir=str(tmp_path / "out"))
    flipped = 0
    for seed in range(3):
        batch = [3, 1, 10, 4, 0, 7]
        torch.manual_seed(seed)
        images = plain.on_device(default_collate([plain[i] for i in batch]))
        latents = encode_latents(vae, images["pixel_values"], sample=True)
        after = torch.rand(1)
        torch.manual_seed(seed)
        moments = cached.on_device(default_collate([cached[i] for i in batch]))
        assert "pixel_values" not in moments
        torch.testing.assert_close(moments["moments"], encode_moments(vae, images["pixel_values"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(draw_latents(moments["moments"], vae), latents, atol=1e-5, rtol=0)
        assert torch.equal(torch.rand(1), after)  # as many numbers were drawn
        assert torch.equal(moments["class_labels"], images["class_labels"])
        assert torch.equal(moments["index"], images["index"])
        first = torch.stack([plain[i]["pixel_values"] for i in batch]).float() / 127.5 - 1
        flipped += int((images["pixel_values"] != first).flatten(1).any(1).sum())
    assert flipped > 0 if random_flip else flipped == 0


def test_pixels_beside_latents_are_flipped_alike(tmp_path):
    vae = make_vae()
    make(tmp_path / "out", vae=vae)
    data = load(random_flip=True, vae=vae, latents_dir=str(tmp_path / "out"), needs_pixels=True)
    torch.manual_seed(0)
    batch = data.on_device(default_collate([data[i] for i in range(ROWS)]))
    torch.testing.assert_close(batch["moments"], encode_moments(vae, batch["pixel_values"]), atol=1e-5, rtol=0)


def test_read_by_workers(tmp_path):
    vae = make_vae()
    cache = make(tmp_path / "out", vae=vae, num_workers=1)
    data = CachedData(load(), cache)
    cache[0]  # an open shard goes along
    alone = [batch["moments"] for batch in DataLoader(data, batch_size=4)]
    again = [batch["moments"] for batch in DataLoader(data, batch_size=4, num_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    assert torch.equal(pickle.loads(pickle.dumps(cache))[3]["moments"], cache[3]["moments"])
    assert torch.equal(open_latents(tmp_path / "out", load(), vae, flip=True)[3]["moments"], cache[3]["moments"])


# Moments


def test_drawn_latents_are_those_of_the_vae():
    vae = make_vae()
    pixels = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    wanted = encode_latents(vae, pixels, sample=True, generator=torch.Generator().manual_seed(1))
    moments = encode_moments(vae, pixels)
    torch.testing.assert_close(draw_latents(moments, vae, torch.Generator().manual_seed(1)), wanted)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    by_hand = (moments[:, :4] + moments[:, 4:] * noise - 0.1) * 0.5
    torch.testing.assert_close(wanted, by_hand, atol=1e-6, rtol=1e-6)


def test_an_autoencoder_without_posterior_has_no_spread():
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    pixels = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    moments = encode_moments(vae, pixels)
    assert (moments[:, 4:] == 0).all()
    torch.testing.assert_close(draw_latents(moments, vae), encode_latents(vae, pixels))


def test_a_vae_that_gives_nan(tmp_path):
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="AutoencoderKL.*NaN"):
        make(tmp_path / "out", vae=vae)


def test_masks_and_points_beside_latents_are_flipped_alike(tmp_path):
    """A run from the cache carries what a run without it carries."""
    plain = rows(ROWS, ((24, 31), (17, 16), (40, 40)))
    ids = [(torch.arange(h * w).view(h, w) % 7).tolist() for h, w in (image.size[::-1] for image in plain["image"])]
    points = datasets.List(datasets.List(datasets.Value("float32")))
    data = plain.add_column("mask", ids).add_column("points", [[[3.0, 5.0]]] * ROWS, feature=points)
    make(tmp_path / "out", load(data))
    kept = {"mask_column": "mask", "points_column": "points", "random_flip": True}
    cached = load(data, vae=make_vae(), latents_dir=str(tmp_path / "out"), **kept)
    found = {}
    for name, source in (("images", load(data, **kept)), ("cache", cached)):
        torch.manual_seed(0)
        found[name] = source.on_device(default_collate([source[i] for i in range(ROWS)]))
    assert "pixel_values" not in found["cache"]
    for key in ("masks", "points", "visible", "class_labels"):
        assert torch.equal(found["cache"][key], found["images"][key])
    gap = data.remove_columns("mask").add_column("mask", [None, *ids[1:]])
    run = load(gap, vae=make_vae(), latents_dir=str(tmp_path / "out"), bad_images="skip", **kept)
    assert torch.equal(run[1]["masks"], cached[1]["masks"])
    with pytest.raises(ValueError, match="image 0 the cache holds row 0, and the run reads row 1"):
        run[0]  # the latent of one image and the mask of another
