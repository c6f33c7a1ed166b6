import json
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from digits_metrics import DigitsClassifier, DigitsJudge, augmented_digits, main, random_variants, real_digits

from diffusers_repr.data.digits import load_digits_splits


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def judge() -> DigitsJudge:
    return DigitsJudge.train(seed=0, epochs=8)


def gaussian_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Heusel et al. 2017, eq. 6 in float64, by SciPy's square root of a matrix."""
    (mean1, cov1), (mean2, cov2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (first.numpy(), second.numpy()))
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2 - 2 * np.real(root)))


@pytest.mark.parametrize("reference", ["train", "augmented"])
def test_distance_equals_the_closed_form(judge, reference):
    images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images[:200] = real_digits("test")[0][:200]
    real = real_digits("train")[0] if reference == "train" else augmented_digits("train")
    expected = gaussian_distance(judge.features(images), judge.features(real))
    assert judge.frechet_distance(images, reference) == pytest.approx(expected, rel=1e-6)
    assert judge.frechet_distance(images, reference) == pytest.approx(expected, rel=1e-6)  # nothing is left of a call


def test_features_are_the_input_of_the_last_layer(judge):
    images, labels = real_digits("validation")
    features = judge.features(images)
    assert features.dtype == torch.float64
    assert features.shape == (300, 64)
    logits = features @ judge.network.head.weight.double().T + judge.network.head.bias.double()
    assert torch.equal(logits.argmax(1), judge.predict(images))
    assert judge.accuracy(images, labels) == (judge.predict(images) == labels).double().mean().item()


def test_distances_are_in_order(judge):
    """Nothing to itself, little to unseen digits, more to a shifted share of classes, much to noise."""
    images, labels = real_digits("train")
    itself, floor = judge.frechet_distance(images), judge.floor()
    assert abs(itself) < 1e-6
    lacking = judge.frechet_distance(images[labels != 3])
    noise = judge.frechet_distance(torch.rand(800, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert itself < floor < lacking < noise
    assert noise > 20 * floor
    variants = random_variants(images)
    assert judge.frechet_distance(variants, "augmented") < judge.frechet_distance(variants, "train") / 5
    assert judge.floor("augmented") < judge.frechet_distance(images, "augmented")


def test_classifier_knows_unseen_digits(judge):
    for split in ("validation", "test"):
        images, labels = real_digits(split)
        assert judge.accuracy(images, labels) > 0.95
        assert judge.accuracy(images, (labels + 1) % 10) < 0.03
    assert judge.accuracy(images[:4], judge.predict(images[:4]) + torch.tensor([0, 0, 1, 0])) == 0.75


def test_training_is_a_function_of_its_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (DigitsJudge.train(seed, epochs=1).network.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_save_and_load(judge, tmp_path):
    judge.save(tmp_path / "judge.safetensors")
    images = real_digits("test")[0]
    assert torch.equal(DigitsJudge.load(tmp_path / "judge.safetensors").features(images), judge.features(images))


def test_real_digits_are_the_splits():
    images, labels = real_digits("validation", "test")
    assert images.shape == (800, 1, 8, 8)
    splits = load_digits_splits()
    assert labels.tolist() == [*splits["validation"]["label"], *splits["test"]["label"]]
    assert torch.equal((images[300, 0] * 255).round().byte(), torch.tensor(np.array(splits["test"][0]["image"])))
    assert augmented_digits("validation").shape == (1500, 1, 8, 8)
    assert torch.equal(augmented_digits("validation"), augmented_digits.__wrapped__("validation"))  # drawn anew


def test_command_prints_a_report(monkeypatch, capsys, judge):
    monkeypatch.setattr(DigitsJudge, "train", lambda seed: judge)
    monkeypatch.setattr(sys, "argv", ["digits_metrics.py"])
    main()
    report = json.loads(capsys.readouterr().out)
    assert report["train_accuracy"] >= report["test_accuracy"] - 0.02
    assert report["frechet_distance_floor"] == pytest.approx(judge.floor(), abs=1e-4)
    assert report["frechet_distance_of_augmented_to_train"] > report["frechet_distance_floor"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(100, 8, 8), r"\(N, 1, 8, 8\) and float, got \(100, 8, 8\)"),
        (torch.rand(0, 1, 8, 8), r"got \(0, 1, 8, 8\)"),
        (torch.zeros(100, 1, 8, 8, dtype=torch.uint8), "got .* and torch.uint8"),
        (torch.rand(100, 1, 8, 8).round() * 2 - 1, r"lie in \[0, 1\], got -1 .*images / 2 \+ 0.5"),
        (torch.full((100, 1, 8, 8), torch.nan), r"lie in \[0, 1\], got nan"),
        (torch.rand(64, 1, 8, 8), "more than 64 images, got 64"),
    ],
)
def test_images_that_cannot_be_measured(judge, images, message):
    with pytest.raises(ValueError, match=message):
        judge.frechet_distance(images)


def test_other_bad_input(judge):
    with pytest.raises(ValueError, match=r"4 images need as many labels, got \(3,\)"):
        judge.accuracy(torch.rand(4, 1, 8, 8), torch.zeros(3))
    with pytest.raises(ValueError, match="train or augmented, got 'test'"):
        judge.frechet_distance(torch.rand(100, 1, 8, 8), "test")


def test_missing_extra_is_named(monkeypatch):
    judge = DigitsJudge(DigitsClassifier())
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ImportError, match=r"diffusers-repr\[eval\]"):
        judge.floor()
