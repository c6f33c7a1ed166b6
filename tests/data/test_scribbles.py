"""Palettes are exact, scribbles lie inside of their regions, and which of the real and made images is shown when."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_repr.data import DataConfig, load_images, load_train_data
from diffusers_repr.data.masks import MaskColumn
from diffusers_repr.data.mixing import MixedTrainData, MixingConfig
from diffusers_repr.data.palette import Palette
from diffusers_repr.data.scribbles import draw_scribbles, load_scribbled_scenes
from diffusers_repr.data.variants import image_key
from diffusers_repr.store.image_store import ImageKey, write_images
from diffusers_repr.training.order import batch_indices, epoch_indices

COLOURS = ["#000000", "#ff0000", "#00ff40", "#808080"]
COUNT = 6


def test_colours_of_a_palette_are_exact_also_after_the_nearest_pixel_and_others_are_refused():
    palette = Palette.of(COLOURS)
    ids = np.random.default_rng(0).choice([0, 1, 2, 255], (7, 9))
    shown = Image.fromarray(palette.image(ids))
    assert np.array_equal(palette.ids(shown), ids)
    assert set(np.unique(palette.ids(shown.resize((23, 15), Image.Resampling.NEAREST)))) <= {0, 1, 2, 255}
    with pytest.raises(ValueError, match=r"none of the palette's 3 classes.*nearest pixel"):
        palette.ids(shown.resize((23, 15), Image.Resampling.BICUBIC))
    with pytest.raises(ValueError, match="class 3 has no colour"):
        palette.image(np.array([[3]]))
    for wrong, message in (
        ([*COLOURS[:2], COLOURS[0]], "stands for two"),
        (["red", "#000000"], "#rrggbb"),
        (["#000000"], "got none"),
    ):
        with pytest.raises(ValueError, match=message):
            Palette.of(wrong)


def test_masks_of_colours_are_read_by_their_palette(tmp_path):
    rows = load_scribbled_scenes("train", 2)
    palette = Palette([(10 * at, 255 - at, 3) for at in range(16)])
    lines = [np.array(one) for one in rows["scribble"]]
    coloured = rows.remove_columns("scribble").add_column(
        "scribble", [{"bytes": None, "path": str(tmp_path / f"{at}.png")} for at in range(2)]
    ).cast_column("scribble", rows.features["scribble"])  # fmt: skip
    for at, one in enumerate(lines):
        Image.fromarray(palette.image(one)).save(tmp_path / f"{at}.png")
    coloured.to_parquet(tmp_path / "data.parquet")
    columns = {"image_column": "image", "mask_column": "scribble"}
    data = load_images(str(tmp_path / "data.parquet"), palette=palette, **columns)
    assert all(np.array_equal(data.samples([at])[0].mask, lines[at]) for at in range(2))
    with pytest.raises(ValueError, match="shows colours"):
        load_images(str(tmp_path / "data.parquet"), **columns).samples([0])
    with pytest.raises(ValueError, match="mask of row 0.*none of the palette"):
        load_images(str(tmp_path / "data.parquet"), palette=Palette.of(COLOURS), **columns).samples([0])
    with pytest.raises(ValueError, match="2 classes and 3 colours"):
        MaskColumn(rows.features["mask"], ["a", "b"], palette=Palette.of(COLOURS))


def test_every_region_has_a_line_of_its_class_and_no_other():
    rows = load_scribbled_scenes("train", 8)
    again = load_scribbled_scenes("train", 8)
    for row, same in zip(rows, again, strict=True):
        mask, lines = np.array(row["mask"]), np.array(row["scribble"])
        shown = lines != 255
        assert np.array_equal(lines, np.array(same["scribble"]))
        assert np.array_equal(lines[shown], mask[shown])
        assert set(lines[shown].tolist()) == set(mask.flatten().tolist())
        assert shown.mean() < 0.1
    # A corridor of one pixel: all of its way is the corridor from any point to the farther half.
    regions = np.zeros((3, 20), int)
    regions[1] = 1
    lines = draw_scribbles(regions, regions, np.random.default_rng(0), share=(1, 1))
    (row,) = lines[1:2]
    places = np.flatnonzero(row == 1)
    assert len(places) >= 10
    assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
    assert (lines[0] != 255).any()
    assert (lines[2] != 255).any()
    with pytest.raises(ValueError, match="alike"):
        draw_scribbles(regions, regions[:2], np.random.default_rng(0))
    with pytest.raises(ValueError, match="share lies"):
        draw_scribbles(regions, regions, np.random.default_rng(0), share=(0, 1))


@pytest.fixture(scope="module")
def scenes():
    return load_scribbled_scenes("train", COUNT)


@pytest.fixture(scope="module")
def images(scenes):
    config = DataConfig("scenes", image_column="image", mask_column="scribble", label_column="none", resolution=32,
                        cache_images=True)  # fmt: skip
    return load_train_data(config, 3, 32, dataset=scenes)


@pytest.fixture(scope="module")
def folders(scenes, tmp_path_factory):
    """Of two strengths; variant k of strength s of row n is a picture of one value, 100 s + 10 k + n."""
    found = []
    for strength in (0.8, 0.4):
        keys = [
            ImageKey("m", 32, 32, 1, 0, guidance=f'{{"strength": {strength}}}', variant=variant,
                     source=f"scenes/train/{row}#{image_key(np.asarray(scenes[row]['image']))}")
            for row in range(COUNT) for variant in range(2)
        ]  # fmt: skip
        place = tmp_path_factory.mktemp("variants") / "store"
        start = round(100 * strength)

        def make(asked, start=start):
            values = [start + 10 * key.variant + int(key.source.split("#")[0].split("/")[-1]) for key in asked]
            return [Image.new("RGB", (32, 32), (value,) * 3) for value in values]

        write_images(place, keys, make, progress=False)
        found.append(str(place))
    return found


def values(data, order):
    """What is shown: the value of a variant, -1 for an image itself."""
    shown = [data[at] for at in order]
    return [int(one["pixel_values"][0, 0, 0]) if bool(one["synthetic"]) else -1 for one in shown]


def test_schemes(images, folders):
    real = MixedTrainData(images, MixingConfig())
    assert [torch.equal(real[at]["pixel_values"], images[at]["pixel_values"]) for at in range(COUNT)] == [True] * COUNT
    made = MixedTrainData(images, MixingConfig("synthetic", folders))
    every = [start + 10 * variant + row for start in (40, 80) for variant in (0, 1) for row in range(COUNT)]
    assert made.strengths == [0.4, 0.8]
    assert values(made, range(len(made))) == every
    both = MixedTrainData(images, MixingConfig("append", folders))
    assert values(both, range(len(both))) == [-1] * COUNT + every
    for at in range(len(both)):  # a variant has the scribbles of its image
        assert torch.equal(both[at]["masks"], images[at % COUNT]["masks"])
    # replace: p = 0 is the images alone, p = 1 their variants alone, between a share
    pairs = [(epoch, row) for epoch in range(40) for row in range(COUNT)]
    none = MixedTrainData(images, MixingConfig("replace", folders, 0.0))
    whole = MixedTrainData(images, MixingConfig("replace", folders, 1.0))
    some = MixedTrainData(images, MixingConfig("replace", folders, 0.3))
    assert set(values(none, pairs)) == {-1}
    drawn = values(whole, pairs)
    assert set(drawn) == set(every)
    assert all(value % 10 == row for value, (_, row) in zip(drawn, pairs, strict=True))
    share = np.mean([value >= 0 for value in values(some, pairs)])
    assert abs(share - 0.3) < 3 * (0.3 * 0.7 / len(pairs)) ** 0.5
    assert values(some, pairs) == values(MixedTrainData(images, MixingConfig("replace", folders, 0.3)), pairs)
    assert values(MixedTrainData(images, MixingConfig("replace", folders, 0.3), seed=1), pairs) != values(some, pairs)
    assert none.fingerprint()["variants"] != real.fingerprint()["variants"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_a_curriculum_moves_with_the_epoch_in_whichever_process_reads(images, folders):
    config = MixingConfig("curriculum", folders, 1.0, curriculum_epochs=4)
    data = MixedTrainData(images, config)
    assert [data.stage(epoch) for epoch in range(6)] == [0, 0, 1, 1, 1, 1]
    order = epoch_indices(COUNT, 0, 0, COUNT, COUNT)
    batches = [next(order) for _ in range(4)]
    assert [[at for _, at in batch] for batch in batches] == [
        batch for batch, _ in zip(batch_indices(COUNT, 0, 0, COUNT, COUNT), range(4), strict=False)
    ]
    loader = DataLoader(data, batch_sampler=batches, num_workers=2)
    for epoch, batch in enumerate(loader):
        shown = batch["pixel_values"][:, 0, 0, 0]
        low, high = ((40, 60), (80, 100))[epoch // 2]
        assert bool(((shown >= low) & (shown < high)).all())


def test_mixtures_that_would_do_nothing_are_refused(images, folders):
    for given, message in (
        ({"mixing": "append"}, "needs variants"), ({"synthetic_dirs": ["x"]}, "shows no variants"),
        ({"mixing": "replace", "synthetic_dirs": ["x"], "replace_probability": 1.5}, r"\[0, 1\]"),
        ({"mixing": "curriculum", "synthetic_dirs": ["x"]}, "two or more"),
        ({"curriculum_epochs": 0}, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            MixingConfig(**given)
    fewer = load_train_data(images.config, 3, 32, dataset=load_scribbled_scenes("train", COUNT, seed=1))
    with pytest.raises(ValueError, match="not of these images"):
        MixedTrainData(fewer, MixingConfig("append", folders))
