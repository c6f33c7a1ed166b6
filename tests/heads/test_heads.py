import pytest
import torch

from diffusers_repr.heads import KNNHead, LinearHead, MLPHead


def features(rows, size=6, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def linear():
    head = LinearHead(6, 3)
    head.reset_parameters(torch.Generator().manual_seed(1))
    return head


def mlp():
    head = MLPHead(6, 3, hidden_features=(8, 5), activation="relu")
    head.reset_parameters(torch.Generator().manual_seed(1))
    return head


def knn():
    head = KNNHead(6, 3, bank_size=30, k=7, temperature=0.1)
    head.set_bank(features(30, seed=2), torch.arange(30) % 3)
    return head


HEADS = {"linear": linear, "mlp": mlp, "knn": knn}


@pytest.fixture(params=HEADS)
def head(request):
    made = HEADS[request.param]()
    made.set_statistics(torch.arange(6.0), torch.tensor([1.0, 2, 3, 4, 5, 6]))
    return made.eval()


def test_a_wrong_size_names_both(head):
    with pytest.raises(ValueError, match=r"takes features \(B, 6\); got \(2, 5\)"):
        head(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="Pool maps"):
        head(torch.zeros(2, 6, 4, 4))


def test_linear_head_is_its_formula():
    head = linear()
    head.set_statistics(torch.full((6,), 2.0), torch.full((6,), 4.0))
    x = features(5)
    expected = (x - 2) / 4 @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(x), expected)


def test_mlp_is_its_formula():
    head, x = mlp(), features(5)
    a, b, c = head.layers
    torch.testing.assert_close(head(x), c(b(a(x).relu()).relu()))


def test_making_a_linear_or_knn_head_draws_nothing():
    state = torch.get_rng_state()
    LinearHead(6, 3)
    KNNHead(6, 3, 5, k=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("temperature", [0.07, 2.0, None])
def test_knn_equals_a_loop(metric, temperature):
    head = KNNHead(6, 3, bank_size=40, k=9, temperature=temperature, metric=metric)
    bank, labels, x = features(40, seed=3), torch.arange(40) % 3, features(11)
    head.set_statistics(bank.mean(0), bank.std(0))
    head.set_bank(bank, labels)
    got = head(x).softmax(1)
    bank, x = ((v - head.mean) / head.std for v in (bank, x))
    for row, query in enumerate(x):
        if metric == "cosine":
            similar = [float(query @ b / query.norm() / b.norm()) for b in bank]
        else:
            similar = [-float((query - b).norm()) for b in bank]
        near = sorted(range(40), key=lambda i: -similar[i])[:9]
        votes = torch.zeros(3, dtype=torch.float64)
        for i in near:
            votes[labels[i]] += 1 if temperature is None else torch.tensor(similar[i] / temperature).double().exp()
        torch.testing.assert_close(got[row].double(), votes / votes.sum(), atol=1e-5, rtol=1e-4)


def test_knn_equals_scikit_learn():
    from sklearn import neighbors

    bank, labels, x = features(200, seed=3), torch.arange(200) % 4, features(50)
    head = KNNHead(6, 4, bank_size=200, k=15, temperature=None, metric="euclidean")
    head.set_bank(bank, labels)
    theirs = neighbors.KNeighborsClassifier(15).fit(bank.numpy(), labels.numpy())
    torch.testing.assert_close(head(x).softmax(1).double(), torch.from_numpy(theirs.predict_proba(x.numpy())))


def test_knn_takes_the_first_of_equal_rows_and_answers_in_parts(monkeypatch):
    head = KNNHead(2, 2, bank_size=4, k=1)
    head.set_bank(torch.ones(4, 2), torch.tensor([1, 0, 0, 0]))
    assert head(torch.ones(3, 2)).argmax(1).tolist() == [1, 1, 1]
    whole = knn()(features(10))
    monkeypatch.setattr(KNNHead, "_ROWS", 3)
    torch.testing.assert_close(knn()(features(10)), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearHead(0, 3), "in_features must be a whole number from 1; got 0"),
        (lambda: LinearHead(3, 2.5), "num_classes must be"),
        (lambda: MLPHead(3, 2, hidden_features=()), "use LinearHead"),
        (lambda: MLPHead(3, 2, activation="tanhh"), "expected one of gelu, relu, silu"),
        (lambda: KNNHead(3, 2, bank_size=5, k=6), "k=6 neighbours of a bank of 5"),
        (lambda: KNNHead(3, 2, bank_size=5, k=1, metric="l1"), "expected one of cosine, euclidean"),
        (lambda: KNNHead(3, 2, bank_size=5, k=1, temperature=0), "temperature must be above 0"),
        (lambda: KNNHead(3, 2, 5, k=1).set_bank(torch.ones(4, 3), torch.zeros(4).long()), "The bank takes"),
        (lambda: KNNHead(3, 2, 2, k=1).set_bank(torch.ones(2, 3), torch.tensor([0, 2])), "Labels run from 0 to 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
