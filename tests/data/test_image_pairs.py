"""Pairs of images with points: one's own, and SPair-71k from a tiny folder of its layout."""

import json

import pytest
import torch
from PIL import Image

from diffusers_repr.data.image_pairs import ImagePairs, PairPoints
from diffusers_repr.data.points import check_points
from diffusers_repr.data.spair import load_spair


def image(width=40, height=30):
    return Image.new("RGB", (width, height))


def test_an_image_in_several_pairs_is_held_once(tmp_path):
    one, two = image(), image(20, 10)
    two.save(tmp_path / "two.png")
    path = str(tmp_path / "two.png")
    held = ImagePairs.from_list([(one, path, [(1, 2)], [[3, 4]]), (path, one, [[19, 9]], [[39, 29]], (0, 0, 5, 6))])
    assert len(held.images) == 2
    assert [(p.source, p.target) for p in held.pairs] == [(0, 1), (1, 0)]
    assert held.size(1) == (10, 20)
    assert held.image(1).size == (20, 10)
    assert held.pairs[1].box == (0, 0, 5, 6)
    assert len(held.select(lambda pair: pair.box is not None)) == len(held.first(1)) == 1
    assert [at for at, _ in held.by_target()] == [1, 0]
    with pytest.raises(ValueError, match="there are no pairs"):
        held.select(lambda pair: False)


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        ((image(), image(), [[1, 2]], [[3, 30]]), ValueError, "target_points of pair 0: number 0 is .*40 x 30"),
        ((image(), image(), [[1, 2]], [[3, 4], [5, 6]]), ValueError, "has 1 points in the source image and 2"),
        ((image(), "photo", [[1, 2]], [[3, 4]]), ValueError, "target image of pair 0"),
        ((image(), 3, [[1, 2]], [[3, 4]]), TypeError, "must be a path or a PIL image; got int"),
        ((image(), image(), [[1, 2]]), TypeError, "got tuple of 3"),
        ((image(), image(), [[1, 2]], [[3, 4]], (1, 2)), ValueError, "left, top, right, bottom"),
    ],
)
def test_pairs_that_are_none(pair, error, message):
    with pytest.raises(error, match=message):
        ImagePairs.from_list([pair])


def test_pairs_of_images_that_are_not_there():
    with pytest.raises(ValueError, match="is of images 0 and 2; there are 1"):
        ImagePairs([image()], (PairPoints(0, 2, torch.zeros(1, 2), torch.zeros(1, 2)),))


def test_points_are_checked_to_the_edge_of_the_pixels():
    assert check_points((39.5, 29.5), (30, 40), "points").tolist() == [[39.5, 29.5]]
    with pytest.raises(ValueError, match=r"points: number 1 is \(x, y\) = \(39.6, 1\)"):
        check_points(torch.tensor([[1, 1], [39.6, 1]]), (30, 40), "points")


def spair(root):
    """Two categories, three test pairs, one of them in the small list."""
    for folder in ("PairAnnotation/test", "JPEGImages/cat", "JPEGImages/dog", "Layout/small"):
        (root / folder).mkdir(parents=True)
    for category, names in (("cat", ("a", "b")), ("dog", ("c", "d"))):
        for at, name in enumerate(names):
            image(40 + at, 30).save(root / "JPEGImages" / category / f"{name}.jpg")
    pairs = [("cat", "a", "b"), ("cat", "b", "a"), ("dog", "c", "d")]
    for number, (category, source, target) in enumerate(pairs):
        sizes = {"a": [40, 30, 3], "b": [41, 30, 3], "c": [40, 30, 3], "d": [41, 30, 3]}
        held = {
            "src_imname": f"{source}.jpg", "trg_imname": f"{target}.jpg", "category": category, "mirror": 0,
            "src_imsize": sizes[source], "trg_imsize": sizes[target], "trg_bndbox": [2, 3, 30, 25],
            "src_kps": [[5, 6], [7, 8]], "trg_kps": [[9, 10], [11, 12]],
        }  # fmt: skip
        file = root / "PairAnnotation" / "test" / f"{number:06d}-{source}-{target}:{category}.json"
        file.write_text(json.dumps(held))
    (root / "Layout" / "small" / "test.txt").write_text("000002-c-d:dog\n")
    return root


def test_spair_from_a_folder(tmp_path):
    spair(tmp_path / "SPair-71k")
    held = load_spair(tmp_path)
    assert len(held) == 3
    assert len(held.images) == 4
    pair = held.pairs[1]
    assert (held.images[pair.source].name, held.images[pair.target].name) == ("b.jpg", "a.jpg")
    assert (pair.category, pair.box, held.size(pair.source)) == ("cat", (2, 3, 30, 25), (30, 41))
    assert pair.source_points.tolist() == [[5, 6], [7, 8]]
    assert held.image(pair.source).size == (41, 30)
    assert [p.category for p in load_spair(tmp_path, category="dog").pairs] == ["dog"]
    assert [p.name for p in load_spair(tmp_path, size="small").pairs] == ["000002-c-d:dog"]
    assert len(load_spair(tmp_path / "SPair-71k", limit=2)) == 2
    with pytest.raises(ValueError, match="holds no pairs of category 'cow'"):
        load_spair(tmp_path, category="cow")
    with pytest.raises(ValueError, match="splits trn, val, test"):
        load_spair(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"PairAnnotation/trn.*Get SPair-71k.tar.gz from https"):
        load_spair(tmp_path, "trn")
    file = next((tmp_path / "SPair-71k" / "PairAnnotation" / "test").glob("*dog.json"))
    file.write_text(file.read_text().replace('"src_kps"', '"points"'))
    with pytest.raises(ValueError, match="src_kps"):
        load_spair(tmp_path)
