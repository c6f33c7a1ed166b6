"""k-means, few-label classifier, neighbours and the prior of neighbours against loops and closed forms."""

import pytest
import torch

from diffusers_repr.assign import (
    ClassifierAssigner,
    FrequencyPrior,
    KMeansAssigner,
    NeighboursAssigner,
    RetrievalIndex,
)
from diffusers_repr.assign.inverted_lists import has_faiss
from diffusers_repr.assign.kmeans import split_largest
from diffusers_repr.denoiser.prior import load_prior
from diffusers_repr.metrics import normalized_mutual_information, purity

needs_faiss = pytest.mark.skipif(not has_faiss(), reason="needs the extra faiss")
BACKENDS = ["sklearn", pytest.param("faiss", marks=needs_faiss)]


def blobs(rows=300, apart=20.0, seed=0):
    """Points of three far-apart Gaussians on the sphere and off it, and which is whose."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, (rows,), generator=generator)
    return torch.eye(5)[ids] * apart + torch.randn(rows, 5, generator=generator), ids


def nearest_by_loop(features, centers):
    features, centers = features.double(), centers.double()
    return torch.tensor([min(range(len(centers)), key=lambda c: float((z - centers[c]).norm())) for z in features])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_apart_clusters_are_found(backend, normalize):
    features, truth = blobs()
    assigner = KMeansAssigner(5, 3, normalize, backend=backend).fit(features)
    ids = assigner.assign(features)
    assert purity(ids, truth) == normalized_mutual_information(ids, truth) == 1
    prepared = torch.nn.functional.normalize(features, dim=1) if normalize else features
    centers = torch.stack([prepared[ids == cluster].mean(0) for cluster in range(3)])  # Lloyd's fixed point
    torch.testing.assert_close(assigner.centers, centers, atol=1e-5, rtol=0)
    assert int(assigner.null) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_of_the_nearest_centre(backend, monkeypatch):
    features = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)).exp()  # of very different lengths
    assigner = KMeansAssigner(4, 12, backend=backend).fit(features)
    ids = assigner.assign(features)
    assert torch.equal(ids, nearest_by_loop(torch.nn.functional.normalize(features, dim=1), assigner.centers))
    assert torch.equal(ids, assigner.assign(features * 7))  # the same transform at fit and assign
    assert len(ids.unique()) == 12
    monkeypatch.setattr("diffusers_repr.assign.kmeans._VALUES", 12 * 7)  # chunks of seven rows
    assert torch.equal(ids, assigner.assign(features))


@needs_faiss
def test_backends_agree():
    features, _ = blobs(apart=3.0)
    found = [KMeansAssigner(5, 7, backend=name).fit(features) for name in ("sklearn", "faiss")]
    assert purity(found[0].assign(features), found[1].assign(features)) > 0.98  # they end at other iterations
    assert found[1].config["backend"] == "faiss"


def test_empty_clusters_take_half_of_the_largest():
    centers, held = torch.tensor([[1.0, 0.0], [5.0, 5.0], [0.0, 2.0]]), torch.tensor([60, 0, 100])
    split = split_largest(centers, held, torch.Generator().manual_seed(0))
    torch.testing.assert_close((split[1] + split[2]) / 2, centers[2])
    assert 0 < float((split[1] - split[2]).norm()) < 0.01
    assert torch.equal(split[0], centers[0])
    rows = torch.cat([torch.zeros(30, 2), torch.ones(30, 2), torch.full((1, 2), 5.0)]) + 1
    ids = KMeansAssigner(2, 3, normalize=False, init="random", backend="sklearn").fit(rows).assign(rows)
    assert [len(ids[part].unique()) for part in (slice(30), slice(30, 60))] == [1, 1]
    assert len(ids.unique()) == 3  # the first centres are equal rows, as the seed draws them


def test_fit_sees_a_sample_of_a_large_set(monkeypatch):
    from sklearn.cluster import KMeans

    seen, fit = [], KMeans.fit
    monkeypatch.setattr(KMeans, "fit", lambda self, rows: seen.append(len(rows)) or fit(self, rows))
    features, truth = blobs()
    assigner = KMeansAssigner(5, 3, rows_per_cluster=10, backend="sklearn").fit(features)
    assert seen == [30]
    assert purity(assigner.assign(features), truth) == 1


def test_wrong_use_of_kmeans():
    features, _ = blobs(rows=10)
    with pytest.raises(ValueError, match="11 clusters of 10 images"):
        KMeansAssigner(5, 11).fit(features)
    with pytest.raises(ValueError, match="of 10 features 2 are different"):
        KMeansAssigner(5, 3, backend="sklearn").fit(torch.cat([features[:1].repeat(5, 1), features[1:2].repeat(5, 1)]))
    with pytest.raises(ValueError, match="NaN"):
        KMeansAssigner(5, 3).fit(features / 0)
    for settings in ({"num_clusters": 0}, {"init": "other"}, {"backend": "other"}, {"iterations": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            KMeansAssigner(**{"in_features": 5, "num_clusters": 3, **settings})


def test_classifier_is_at_its_optimum():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 6, generator=generator) + 2, torch.arange(40) % 3
    some = torch.where(torch.arange(40) < 24, labels, -1)  # the others have no label
    assigner = ClassifierAssigner(6, 3).fit(features, labels=some)
    assert assigner.gradient_norm < 1e-6
    rows = features[:24].double()
    rows = torch.nn.functional.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    weight = assigner.weight.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(rows @ weight.T, labels[:24])
    (gradient,) = torch.autograd.grad(loss + 0.0025 / 24 / 2 * weight.square().sum(), weight)
    assert float(gradient.norm()) < 1e-5  # of the weights as they are kept, in float32
    assert float(assigner.weight.sum(1).abs().max()) < 1e-3  # W 1 = 0, whence raw features get the same classes
    ids = assigner.assign(features)
    raw = features.double() @ assigner.weight.double().T
    assert torch.equal(ids, raw.argmax(1))
    torch.testing.assert_close(assigner.probabilities(features).sum(1), torch.ones(40, dtype=torch.float64))
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    options = {"center": False, "normalize": True}
    plain = ClassifierAssigner(6, 3, **options).fit(features, labels=some)
    rotated = ClassifierAssigner(6, 3, **options).fit(features @ turned, labels=some)
    assert torch.equal(plain.assign(features), rotated.assign(features @ turned))


def test_classifier_with_one_label_a_class():
    features, truth = blobs()
    labels = torch.full((300,), -1)
    for cluster in range(3):
        first = int((truth == cluster).nonzero()[0])
        labels[first] = cluster
    assert torch.equal(ClassifierAssigner(5, 3).fit(features, labels=labels).assign(features), truth)


def test_wrong_use_of_the_classifier():
    features, truth = blobs(rows=10)
    assigner = ClassifierAssigner(5, 3)
    for labels, told in ((None, "learns from labels"), (truth[:5], "10 whole numbers"), (truth.float(), "whole"),
                         (truth + 1, "go from 1 to 3"), (truth.where(truth != 1, -1), "No image has the class 1"),
                         (torch.full((10,), -1), "class 0, 1, 2")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            assigner.fit(features, labels=labels)
    with pytest.raises(RuntimeError, match="not fitted"):
        assigner.probabilities(features)
    for settings in ({"num_classes": 1}, {"l2": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ClassifierAssigner(**{"in_features": 5, "num_classes": 3, **settings})


def test_neighbours_are_those_of_the_index(tmp_path):
    features, _ = blobs(rows=30)
    assigner = NeighboursAssigner(5, k=4).fit(features)
    own = torch.arange(30)
    assert torch.equal(assigner.assign(features)[:, 0], own)
    rows = assigner.assign(features, exclude=own)
    assert torch.equal(rows, RetrievalIndex.build(features).search(features, 4, own)[0])
    assigner.save_pretrained(tmp_path)
    assert torch.equal(NeighboursAssigner.from_pretrained(tmp_path).assign(features, exclude=own), rows)
    assert assigner.null.tolist() == [-1] * 4
    with pytest.raises(ValueError, match="31 neighbours among 30"):
        NeighboursAssigner(5, k=31).fit(features)
    with pytest.raises(RuntimeError, match="not fitted"):
        NeighboursAssigner(5).assign(features, exclude=own)


def test_frequency_prior_draws_of_the_most_frequent_alone(tmp_path):
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    index = RetrievalIndex.build(vectors)
    index.count_retrieved([7] * 9 + [3] * 5 + [21] * 4 + [4])
    prior = FrequencyPrior(index, k=3, share=0.06)
    assert prior.rows.tolist() == [7, 3, 21]
    tokens = prior.draw(200, torch.Generator().manual_seed(0))
    assert tokens.shape == (200, 3, 6)
    queries = tokens[:, 0]  # each is its own nearest
    assert {int((vectors == query).all(1).nonzero()) for query in queries} == {7, 3, 21}
    own = FrequencyPrior(index, k=3, share=0.06, include_query=True)
    found = own.neighbours(torch.tensor([7])).tokens[0]
    rows, _ = index.search(vectors[7:8], 2, torch.tensor([7]))
    assert torch.equal(found, torch.cat([vectors[7:8], vectors[rows[0]]]))
    weighted = FrequencyPrior(index, k=1, share=0.04, weighted=True).draw(4000, torch.Generator().manual_seed(0))
    assert abs(float((weighted[:, 0] == vectors[7]).all(1).float().mean()) - 9 / 14) < 0.03
    prior.stored(5).save_pretrained(tmp_path)
    assert torch.equal(load_prior(tmp_path).values, prior.stored(5).values)
    for settings, told in (({"k": 51}, "k=51 tokens"), ({"share": 0}, "share"), ({"k": 0}, "k")):
        with pytest.raises(ValueError, match=told):
            FrequencyPrior(index, **settings)
    with pytest.raises(ValueError, match="does not know how often"):
        FrequencyPrior(RetrievalIndex.build(vectors))
    assert len(FrequencyPrior(RetrievalIndex.build(vectors), share=1.0).rows) == 50


def test_purity_and_information():
    clusters, labels = [0, 0, 0, 1, 1, 2], [2, 2, 0, 1, 1, 1]
    assert purity(clusters, labels) == pytest.approx(5 / 6)
    assert normalized_mutual_information([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0, abs=1e-12)
    for wrong, told in (([0, 1], "each"), ([0.5] * 6, "whole numbers"), ([-1] * 6, "from 0")):
        with pytest.raises(ValueError, match=told):
            purity(wrong, labels)
