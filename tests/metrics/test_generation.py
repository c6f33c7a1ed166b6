import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageColumn
from PIL import Image

from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.encoders import Encoder
from diffusers_repr.metrics import (
    MetricRecord,
    UnlikeRecordsError,
    encode_images,
    frechet_distance,
    measure_generation,
    precision_recall,
)
from tests.metrics.models import images, rows_encoder, vit


def pictures(x):
    return [Image.fromarray((255 * image[0].numpy()).round().astype(np.uint8)) for image in x]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder.from_pretrained(vit(tmp_path_factory.mktemp("vit")))


def test_records_hold_the_numbers_and_what_they_depend_on(encoder, tmp_path):
    real, made = images(40), images(30, seed=1) * 0.7
    found = measure_generation(encoder, real, made, batch_size=7, seed=5, subject="model A")
    x, y = encoder(real)["global"], encoder(made)["global"]
    assert found["frechet_distance"].value == pytest.approx(frechet_distance(x, y), rel=1e-4)
    assert (found["precision"].value, found["recall"].value) == precision_recall(x, y)
    record = found["frechet_distance"]
    assert record.counts == {"real": 40, "generated": 30}
    assert record.backend["name"] == "torchmetrics"
    assert record.encoder == encoder.fingerprint()
    assert record.weights == encoder.fingerprint()["weights"]
    assert record.seed == 5
    assert found["recall"].k == 3
    saved = json.loads(record.save(tmp_path / "fd.json").read_text())
    assert saved["encoder"]["name"] == encoder.name
    assert MetricRecord.load(tmp_path / "fd.json") - record == 0


def test_the_real_images_are_encoded_once_for_many_generators(encoder):
    real = images(40)
    encoded = encode_images(encoder, real)
    a = measure_generation(encoder, encoded, images(30, seed=1), subject="a")
    b = measure_generation(encoder, real, images(30, seed=2), subject="b")
    assert a["frechet_distance"] - b["frechet_distance"] != 0


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"real": images(40, seed=9)}, {"reference"}),
        ({"real": images(41)}, {"reference", "counts"}),
        ({"generated": images(29, seed=1)}, {"counts"}),
        ({"features": "tokens"}, {"features"}),
        ({"image_size": 4}, {"resize", "reference"}),
        ({"encoder": rows_encoder()}, {"encoder", "weights"}),
    ],
)
def test_unlike_measurements_do_not_compare(encoder, changes, fields):
    settings = {"encoder": encoder, "real": images(40), "generated": images(30, seed=1)}
    one = measure_generation(**settings)["frechet_distance"]
    if "encoder" in changes:
        one = measure_generation(
            **settings | {"encoder": Encoder.from_module(torch.nn.Conv2d(1, 4, 4, 4), patch_size=4, channels=1)}
        )["frechet_distance"]
    with pytest.raises(UnlikeRecordsError) as caught:
        _ = one - measure_generation(**settings | changes)["frechet_distance"]
    assert set(caught.value.fields) == fields


def test_real_and_generated_images_of_two_sizes_are_refused(encoder):
    real, generated = images(40), images(30, seed=1, side=16)
    told = r"generated images are 16 x 16 \(H x W\), those to compare with are 8 x 8: .*image_size"
    for first in (real, encode_images(encoder, real)):
        with pytest.raises(ValueError, match=told):
            measure_generation(encoder, first, generated)
    found = measure_generation(encoder, real, generated, image_size=8)
    assert found["frechet_distance"].resize.count("8x8") == 2


def test_every_form_of_images_gives_the_same(encoder):
    x = (images(10) * 255).round() / 255
    data = Dataset.from_dict({"image": pictures(x)}, features=Features({"image": ImageColumn()}))
    forms = [x, (x * 255).round().to(torch.uint8), pictures(x), data, from_dataset(data), list(x)]
    found = [encode_images(encoder, form, batch_size=3) for form in forms]
    for other in found[1:]:
        assert torch.allclose(other.features, found[0].features, atol=1e-5)
    assert found[0].features.shape == (10, encoder.dim)
    assert torch.allclose(found[0].features, encoder(x)["global"], atol=1e-5)
    assert torch.allclose(encode_images(encoder, x, "tokens").features, encoder(x)["tokens"].mean(1), atol=1e-5)


def test_the_hash_is_of_the_set_not_of_its_order(encoder):
    x = images(6)
    one = encode_images(encoder, x).images_hash
    assert encode_images(encoder, x.flip(0), batch_size=4).images_hash == one
    assert encode_images(encoder, x[:5]).images_hash != one


@pytest.mark.parametrize(
    ("generated", "error", "message"),
    [
        ([], ValueError, "generated images has no images"),
        ("folder", TypeError, "generated images must be ImageData"),
        ({"train": 1}, TypeError, "got dict"),
        ([images(1)[0], images(1, side=16)[0]], ValueError, "mixed sizes"),
        (images(3), ValueError, "k must be a whole number from 1 to 2"),
        (images(9) * 300, ValueError, "floats must lie"),
    ],
)
def test_bad_input(encoder, generated, error, message):
    with pytest.raises(error, match=message):
        measure_generation(encoder, images(10), generated)


def test_bad_settings(encoder):
    with pytest.raises(ValueError, match="'global' features"):
        measure_generation(encoder, images(10), images(10), features="cls")
