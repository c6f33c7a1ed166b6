"""Patch PCA by numpy and by loops; the encoder half of a SiT as a plain vision transformer."""

import numpy as np
import pytest
import torch

from diffusers_repr.capture import capture
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.encoders import Encoder
from diffusers_repr.models import PatchPCA, SiTTransformer2DModel, plain_vit
from tests.objectives.cases import shake


def digits():
    images = load_digits_splits()["train"]["image"]
    pixels = np.stack([np.asarray(image, dtype=np.float64) for image in images])
    return torch.from_numpy(pixels / 127.5 - 1).float()[:, None]


def patches_by_loops(images, p):
    """Each patch as a list, channel by channel and row by row."""
    rows = []
    for image in images.tolist():
        for i in range(0, len(image[0]), p):
            for j in range(0, len(image[0][0]), p):
                row = [channel[i + y][j + x] for channel in image for y in range(p) for x in range(p)]
                rows += [row]
    return np.array(rows)


def test_directions_are_those_of_numpy_whatever_the_batches():
    x = torch.randn(40, 2, 4, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 5
    rows = patches_by_loops(x, 2)
    pca = PatchPCA.fit(x.split([7, 20, 13]), 2, 3)
    np.testing.assert_array_equal(pca.patches(x).flatten(0, 1).double().numpy(), rows)
    _, sizes, vt = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(pca.variances.numpy(), sizes**2 / len(rows), rtol=1e-5)
    np.testing.assert_allclose(pca.mean.numpy(), rows.mean(0), atol=1e-5)
    cosines = np.abs((pca.directions.double().numpy() * vt).sum(1))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    assert bool((pca.directions.gather(1, pca.directions.abs().argmax(1, keepdim=True)) > 0).all())
    assert torch.equal(pca.images(pca.patches(x), (4, 6)), x)
    kept = pca.project(pca.patches(x))[..., :3]
    expected = (rows - rows.mean(0)) @ vt[:3].T @ vt[:3] + rows.mean(0)
    np.testing.assert_allclose(pca.patches(pca(x)).flatten(0, 1).numpy(), expected, atol=1e-4)
    assert torch.equal(pca.images(pca.unproject(kept), (4, 6)), pca(x))


def test_digits():
    """Orthonormal to float32's rounding; what d directions leave is the sum of the variances beyond them."""
    x = digits()
    pca = PatchPCA.fit([x], 2, 4)
    assert (pca.directions @ pca.directions.T - torch.eye(4)).abs().max() < 1e-6
    errors = []
    for d in range(1, 5):
        coordinates = pca.project(pca.patches(x))[..., :d]
        errors.append(float((pca.images(pca.unproject(coordinates), (8, 8)) - x).square().mean()))
        assert errors[-1] == pytest.approx(float(pca.variances[d:].sum()) / 4, abs=1e-6)
    assert errors[:3] == pytest.approx([0.199, 0.0855, 0.0372], rel=0.2)
    assert errors[3] < 1e-12


def test_saved_and_loaded(tmp_path):
    pca = PatchPCA.fit([digits()[:50]], 4, 5)
    pca.save_pretrained(tmp_path)
    again = PatchPCA.from_pretrained(tmp_path)
    for name in ("directions", "mean", "variances"):
        assert torch.equal(getattr(again, name), getattr(pca, name))
    assert again.config["num_directions"] == 5


@pytest.mark.parametrize(("channels", "count"), [(1, 4), (3, 12), (3, 48), (1, 1)])
def test_pixels_of_a_lower_resolution(channels, count):
    pca = PatchPCA.of_pixels(4, channels, count)
    size = len(pca.directions)
    assert (pca.directions @ pca.directions.T - torch.eye(size)).abs().max() < 1e-5
    x = torch.randn(2, channels, 8, 12, generator=torch.Generator().manual_seed(0))
    cell = 4 // int((count / channels) ** 0.5)
    means = torch.nn.functional.avg_pool2d(x, cell)
    expected = means.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    torch.testing.assert_close(pca(x), expected, atol=1e-5, rtol=1e-5)


def test_bad_input():
    x = torch.randn(3, 1, 4, 4)
    with pytest.raises(ValueError, match="12 patches tell at most 11 directions; 12 were asked for. Give more images"):
        PatchPCA.fit([torch.randn(3, 3, 4, 4)], 2, 12)
    with pytest.raises(ValueError, match="0 patches"):
        PatchPCA.fit([], 2, 1)
    with pytest.raises(ValueError, match=r"have 4 directions; got num_directions=5"):
        PatchPCA.fit([x], 2, 5)
    with pytest.raises(ValueError, match=r"multiples of the patch, 3; got \(3, 1, 4, 4\)"):
        PatchPCA.fit([x], 3, 2)
    with pytest.raises(ValueError, match=r"no whole pixels .* take one of 3, 12, 48"):
        PatchPCA.of_pixels(4, 3, 16)


# The encoder half


def sit(**changes):
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "num_layers": 3, "hidden_size": 16}
    settings = {"num_attention_heads": 2, "num_classes": 0, "time_divisor": 1.0, "mlp_ratio": 1.5}
    return shake(SiTTransformer2DModel(**{**sizes, **settings, **changes}))


@pytest.mark.parametrize("modulation", [None, 4])
def test_a_plain_vit_gives_what_the_block_gives(tmp_path, modulation):
    network, x = sit(modulation_size=modulation), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    if modulation:
        assert network.time_embed.linear_2.out_features == 4
    plain_vit(network, 2, 10).save_pretrained(tmp_path)
    with torch.no_grad(), capture(network, "blocks.1") as tape:
        network(x, 10.0)
    encoder = Encoder.from_pretrained(tmp_path, layer=-1, mean=0.5, std=0.5)
    found = encoder.encode_pixels(x)
    torch.testing.assert_close(found["tokens"], tape["blocks.1"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["global"], tape["blocks.1"].mean(1), atol=1e-5, rtol=1e-4)
    normed = torch.nn.functional.layer_norm(tape["blocks.1"], (16,), eps=1e-6)
    whole = Encoder.from_pretrained(tmp_path, mean=0.5, std=0.5)
    torch.testing.assert_close(whole.encode_pixels(x)["tokens"], normed, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), capture(network, "blocks.1") as other:
        network(x, 900.0)
    assert (other["blocks.1"] - tape["blocks.1"]).abs().max() > 0.01, "the level counts"


def test_what_is_no_plain_vit_is_refused():
    for changes, told in (
        ({"num_classes": 2}, "classes"),
        ({"condition_dim": 2}, "vector condition"),
        ({"qk_norm": True}, "qk_norm"),
        ({"sample_size": (8, 4)}, "square images"),
    ):
        with pytest.raises(ValueError, match=told):
            plain_vit(sit(**changes), 2, 10)
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        plain_vit(sit(), 4, 10)
