"""Variants as views: which views they are, how often, and that without them all is as before."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.variants import image_key
from diffusers_repr.data.views import ViewConfig, ViewData
from diffusers_repr.store.image_store import ImageKey, write_images

COUNT, EACH = 997, 2
CONFIG = DataConfig("digits", random_flip=False, cache_images=True)


@pytest.fixture(scope="module")
def images():
    return load_train_data(CONFIG, 1, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Variant k of row n is a picture of the one value that no digit is made of, so that it is known again."""
    pictures = load_digits_splits()["train"]["image"][:]
    keys = [
        ImageKey("m", 8, 8, 1, 0, source=f"digits/train/{row}#{image_key(np.asarray(pictures[row]))}", variant=variant)
        for row in range(COUNT)
        for variant in range(EACH)
    ]
    place = tmp_path_factory.mktemp("variants") / "store"
    write_images(
        place, keys, lambda asked: [Image.new("L", (8, 8), 101 + key.variant) for key in asked], progress=False
    )
    return place


def sources(data, rows):
    views = data.on_device({"index": rows})["views"]
    return ((views + 1) * 127.5).round()


def test_which_views_are_variants_and_how_often(images, folder):
    rows, shares = torch.arange(COUNT), {}
    for which, share in (("second", 1.0), ("both", 1.0), ("either", 1.0), ("second", 0.25)):
        config = ViewConfig(variants_dir=str(folder), variant_views=which, variant_probability=share)
        torch.manual_seed(0)
        first, second = sources(ViewData(images, config), rows)
        made = [((view == 101) | (view == 102)).flatten(1).all(1) for view in (first, second)]
        shares[which, share] = [float(one.double().mean()) for one in made]
        plain = 2 * ViewData(images, ViewConfig()).pixels.float() / 255 - 1
        untouched = ((plain + 1) * 127.5).round()
        assert torch.equal(first[~made[0]], untouched[~made[0]])  # what is no variant is the image
        if which == "either":
            assert bool((made[0] ^ made[1]).all())
    assert shares["second", 1.0] == [0, 1]
    assert shares["both", 1.0] == [1, 1]
    assert abs(shares["either", 1.0][0] - 0.5) < 3 * (0.25 / COUNT) ** 0.5
    assert shares["second", 0.25][0] == 0
    assert abs(shares["second", 0.25][1] - 0.25) < 3 * (0.1875 / COUNT) ** 0.5


def test_without_variants_nothing_is_drawn(images, folder):
    rows, found = torch.arange(32), []
    for config in (ViewConfig(), ViewConfig(variants_dir=str(folder), variant_probability=0.0)):
        torch.manual_seed(0)
        moved = dataclasses.replace(config, crop_scale=0.5)
        views = ViewData(images, moved).on_device({"index": rows})["views"]
        found.append((views, torch.get_rng_state()))  # what is drawn after them is the same, too
    assert all(torch.equal(plain, without) for plain, without in zip(*found, strict=True))


def test_variants_that_are_the_images_change_nothing(images, tmp_path):
    pictures = load_digits_splits()["train"]["image"][:]
    keys = [ImageKey("m", 8, 8, 1, 0, source=f"digits/train/{row}#{image_key(np.asarray(picture))}")
            for row, picture in enumerate(pictures)]  # fmt: skip

    def copies(asked):
        return [pictures[int(key.source.split("#")[0].rpartition("/")[2])] for key in asked]

    write_images(tmp_path / "copies", keys, copies, progress=False)
    rows = torch.arange(COUNT)
    plain = ViewData(images, ViewConfig()).on_device({"index": rows})["views"]
    for share in (0.5, 1.0):
        config = ViewConfig(variants_dir=str(tmp_path / "copies"), variant_views="both", variant_probability=share)
        assert torch.equal(ViewData(images, config).on_device({"index": rows})["views"], plain)


def test_variants_of_other_images_are_refused(images, folder, tmp_path):
    other = load_train_data(dataclasses.replace(CONFIG, dataset_split="test"), 1, 8)
    with pytest.raises(ValueError, match="not as many variants"):
        ViewData(other, ViewConfig(variants_dir=str(folder)))
    keys = [ImageKey("m", 8, 8, 1, 0, source=f"digits/train/{row}#0123456789abcdef") for row in range(COUNT)]
    write_images(tmp_path / "other", keys, lambda asked: [Image.new("L", (8, 8))] * len(asked), progress=False)
    with pytest.raises(ValueError, match="not of these images: image 0 was another"):
        ViewData(images, ViewConfig(variants_dir=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="lies in"):
        ViewConfig(variant_probability=1.5)
