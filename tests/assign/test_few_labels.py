"""Few labels: which are seen, and the classifier that is fitted anew on generated images."""

import numpy as np
import pytest
import torch

from diffusers_repr.assign import ClassifierAssigner
from diffusers_repr.assign.few_labels import few_labels, refit_classifier


class Data:
    """What `few_labels` asks of images."""

    name, num_classes, class_names = "pets", 3, ["cat", "dog", "cow"]

    def __init__(self, labels):
        self.labels = None if labels is None else np.array(labels)


def blobs(count, seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return 20 * torch.eye(6)[labels] + spread * torch.randn(count, 6, generator=generator), labels


def test_labels_are_drawn_by_class_and_seed():
    data = Data([0, 1, 2, -1] * 6)
    few = few_labels(data, 2, 0)
    assert torch.bincount(few[few >= 0]).tolist() == [2, 2, 2]
    seen = few >= 0
    assert torch.equal(few[seen], torch.from_numpy(data.labels)[seen])
    assert torch.equal(few_labels(data, 2, 0), few)
    assert not torch.equal(few_labels(data, 2, 1), few)
    assert few_labels(data, None, 0).tolist() == [0, 1, 2, -1] * 6
    with pytest.raises(ValueError, match="7 labels a class, but 6 images have the class 'cat'"):
        few_labels(data, 7, 0)
    with pytest.raises(ValueError, match="pets has no column of class ids"):
        few_labels(Data(None), 1, 0)


def test_one_label_a_class_of_separate_blobs_labels_all():
    features, truth = blobs(90, 0)
    known = few_labels(Data(truth.tolist()), 1, 0)
    assert torch.equal(ClassifierAssigner(6, 3).fit(features, labels=known).assign(features), truth)


def test_the_last_fit_is_that_of_labelled_and_generated_rows_together():
    """On as many rows as there are labels and generated images; those whose label is not seen take no part."""
    features, truth = blobs(30, 0, spread=6.0)
    known = torch.where(torch.arange(30) < 6, truth, -1)
    generated, classes = blobs(12, 1, spread=6.0)
    found = refit_classifier(features, known, generated, classes, 3)
    rows, labels = torch.cat([features[:6], generated]), torch.cat([truth[:6], classes])
    rows = torch.nn.functional.normalize(rows - rows.mean(1, keepdim=True), dim=1).double()
    weight = found.weight.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(rows @ weight.T, labels) + 0.0025 / 18 / 2 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert float(gradient.norm()) < 1e-6
    others = features.clone()
    others[6:] = 3.0
    assert torch.equal(refit_classifier(others, known, generated, classes, 3).weight, found.weight)
    with pytest.raises(ValueError, match=r"as many generated images as any other; of 3 classes there are \[4, 4, 3\]"):
        refit_classifier(features, known, generated[:-1], classes[:-1], 3)
    with pytest.raises(ValueError, match=r"\[8, 4, 0\]"):
        refit_classifier(features, known, generated, classes % 2, 3)
