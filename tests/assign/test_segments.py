"""Masks and boxes that nobody drew: planted regions are found, and written as a data set that training reads."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusers_repr.assign import IdentityAssigner, KMeansAssigner
from diffusers_repr.assign.segment_data import write_segments
from diffusers_repr.assign.segments import PatchFeatures, background_classes, find_boxes, largest_region
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.encoders import Encoder

# Black with a box of one colour, a small spot of another elsewhere.
BOXES = [(2, 1, 6, 7), (0, 3, 5, 6), (3, 2, 8, 8), (1, 0, 4, 5)]
COLOURS = [(255, 0, 0), (0, 255, 0)]


def picture(at):
    array = np.zeros((8, 8, 3), dtype=np.uint8)
    x0, y0, x1, y1 = BOXES[at % 4]
    array[y0:y1, x0:x1] = COLOURS[at % 2]
    return Image.fromarray(array)


def planted(count=8):
    return datasets.Dataset.from_dict({"image": [picture(at) for at in range(count)]}).cast_column(
        "image", datasets.Image()
    )


@pytest.fixture(scope="module")
def features():
    """The colour of every pixel, and a constant."""
    net = nn.Conv2d(3, 4, 1)
    net.weight.data = torch.cat([torch.eye(3), torch.zeros(1, 3)])[:, :, None, None]
    net.bias.data = torch.tensor([1.0, 1.0, 1.0, 0.1])
    return PatchFeatures(Encoder.from_module(net, patch_size=1), (8, 8))


def test_planted_masks_and_boxes(features, tmp_path):
    data = from_dataset(planted(), name="planted", split="train")

    def write(clusters=3):
        kmeans = (KMeansAssigner(4, clusters, backend="sklearn"), KMeansAssigner(4, 2, backend="sklearn"))
        return write_segments(tmp_path / "out", {"train": data, "validation": data.select([1, 2])}, features, *kmeans)

    found = write()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    assert write() == found
    with pytest.raises(FileExistsError, match="num_clusters: 3 -> 2"):
        write(2)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before
    assert len(found.background) == 1
    assert found.boxes == {"train": 1.0, "validation": 1.0}
    config = DataConfig(dataset_name=str(tmp_path / "out"), image_column="image", mask_column="segments")
    read = load_train_data(config, 3, 8)
    boxes = load_train_data(dataclasses.replace(config, mask_column="box"), 3, 8)
    kinds, ids = set(), []
    for at in range(8):
        x0, y0, x1, y1 = BOXES[at % 4]
        inside = np.zeros((8, 8), dtype=bool)
        inside[y0:y1, x0:x1] = True
        mask, box = read[at]["masks"].numpy(), boxes[at]["masks"].numpy()
        assert set(mask[~inside]) == set(found.background)
        assert len(set(mask[inside])) == 1  # purity 1
        kinds.add((at % 2, int(mask[inside][0])))
        assert set(box[~inside]) == {255}
        assert len(set(box[inside])) == 1
        ids.append(int(box[inside][0]))
    assert len(kinds) == 2
    assert ids == [ids[0], ids[1]] * 4
    assert ids[0] != ids[1]
    second = datasets.load_dataset(str(tmp_path / "out"), split="validation")
    assert np.array_equal(np.asarray(second[0]["segments"]), read[1]["masks"].numpy())
    again = KMeansAssigner.from_pretrained(tmp_path / "out" / "segments")
    assert again.assign(features.patches([picture(0)])).view(8, 8).tolist() == read[0]["masks"].tolist()


def test_nothing_half_written(features, tmp_path):
    data = from_dataset(planted(), name="planted", split="train")
    for classes, message in (
        (KMeansAssigner(4, 9, backend="sklearn"), "stay empty"),
        (IdentityAssigner(4), "gives vector"),
        (KMeansAssigner(4, 256), "holds 255 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            write_segments(tmp_path / "out", {"train": data}, features, classes)
        assert list(tmp_path.iterdir()) == []


def test_regions_and_boxes():
    mask = np.zeros((5, 6), dtype=bool)
    mask[0, 0] = mask[1, 1] = mask[2, 2] = True  # three that touch by corners
    mask[4, 4:] = True
    assert np.array_equal(largest_region(mask).nonzero()[0], [0, 1, 2])
    assert not largest_region(np.zeros((2, 2), dtype=bool)).any()
    segments = torch.from_numpy(mask).long()[None]
    pixels = torch.arange(30.0).view(1, 1, 5, 6)
    found = find_boxes(torch.cat([segments, torch.zeros_like(segments)]), torch.tensor([True, False]),
                       pixels.expand(2, 1, 5, 6))  # fmt: skip
    assert found.corners.tolist() == [[0, 0, 3, 3], [0, 0, 0, 0]]
    assert found.found.tolist() == [True, False]
    assert found.features[0, 0] == (0 + 7 + 14) / 3
    masks = found.masks(torch.tensor([5, 1]), (5, 6))
    assert int((masks[0] == 5).sum()) == 9
    assert int((masks == 255).sum()) == 2 * 30 - 9


def test_background_is_what_borders_have_more_of():
    segments = torch.full((1, 4, 4), 2)
    segments[:, 1:3, 1:3] = 0
    segments[:, 0, 0], segments[:, 1, 1] = 1, 1  # half of it on the border, of all three quarters are
    assert background_classes(segments, 4).tolist() == [False, False, True, False]
