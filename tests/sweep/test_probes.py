import pytest
import torch

from diffusers_repr.heads import PROTOCOLS, fit_head
from diffusers_repr.sweep import few_shot_probe, knn_probe, linear_probe


def clusters(count, seed=0, classes=3, spread=0.7):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.eye(classes, 5) * 2
    return centres[labels] + spread * torch.randn(count, 5, generator=generator), labels


@pytest.mark.parametrize("name", ["lbfgs", "ridge", "adam", "ddae", "mae", "repa"])
def test_linear_is_the_head_of_the_protocol_and_says_so(name):
    (x, y), (test_x, test_y) = clusters(60), clusters(40, seed=1)
    protocol = PROTOCOLS[name]
    if hasattr(protocol, "epochs"):
        protocol = protocol.replace(epochs=12)
    found = linear_probe(x, y, test_x, test_y, protocol=protocol, seed=4)
    fitted = fit_head(x, y, 3, protocol=protocol, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        right = [int(fitted.head(row[None]).argmax()) == int(label) for row, label in zip(test_x, test_y, strict=True)]
    assert found.accuracy == sum(right) / len(right)
    assert found.protocol["name"] == name
    assert found.protocol["version"] == PROTOCOLS[name].version
    assert found.protocol["changed"] == (["epochs"] if hasattr(protocol, "epochs") else [])
    assert (found.rows, found.test_rows, float(found)) == (60, 40, found.accuracy)


@pytest.mark.parametrize(("metric", "temperature"), [("cosine", 0.07), ("cosine", None), ("euclidean", None)])
@pytest.mark.parametrize("standardize", [True, False])
def test_knn_equals_a_loop(metric, temperature, standardize):
    (x, y), (test_x, test_y) = clusters(30, spread=1.5), clusters(25, seed=1, spread=1.5)
    k, hits = 7, 0
    mean, std = (x.mean(0), x.std(0, correction=0)) if standardize else (0, 1)
    bank, queries = ((values - mean) / std for values in (x.double(), test_x.double()))
    for query, label in zip(queries, test_y, strict=True):
        if metric == "cosine":
            near = [float(query @ row / query.norm() / row.norm()) for row in bank]
        else:
            near = [-float((query - row).norm()) for row in bank]
        votes = [0.0] * 3
        for at in sorted(range(len(bank)), key=lambda i: -near[i])[:k]:
            votes[int(y[at])] += 1.0 if temperature is None else float(torch.tensor(near[at] / temperature).exp())
        hits += votes.index(max(votes)) == int(label)
    found = knn_probe(x, y, test_x, test_y, k=k, metric=metric, temperature=temperature, standardize=standardize)
    assert found.accuracy == hits / 25
    assert 0.4 < found.accuracy < 1
    assert found.protocol["k"] == 7
    assert found.protocol["standardize"] is standardize


def test_few_shots():
    (x, y), (test_x, test_y) = clusters(300), clusters(60, seed=1)
    one, ten = (few_shot_probe(x, y, test_x, test_y, shots, draws=6, seed=2) for shots in (1, 10))
    assert one.mean < ten.mean
    assert one.std > ten.std > 0
    values = torch.tensor(ten.accuracies)
    assert ten.mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert ten.std == pytest.approx(float(values.std()), abs=1e-6)
    assert few_shot_probe(x, y, test_x, test_y, 10, draws=3, seed=2).accuracies == ten.accuracies[:3]
    assert few_shot_probe(x, y, test_x, test_y, 2, draws=1).std == 0


def test_few_shots_take_as_many_of_each_class_and_fewer_are_a_part_of_more(monkeypatch):
    seen = []

    def spy(features, labels, *rest, **settings):
        seen.append((features, labels))
        return linear_probe(features, labels, *rest, **settings)

    monkeypatch.setattr("diffusers_repr.sweep.probes.linear_probe", spy)
    x, y = clusters(60)
    for shots in (2, 5):
        few_shot_probe(x, y, x, y, shots, draws=1)
        assert seen[-1][1].bincount().tolist() == [shots] * 3
    few, more = ({tuple(row) for row in features.tolist()} for features, _ in seen)
    assert few < more


GOOD = (*clusters(12), *clusters(9, seed=1))


@pytest.mark.parametrize("probe", [linear_probe, knn_probe, few_shot_probe])
@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, torch.full((12, 5), torch.nan), "not finite"),
        (0, torch.zeros(12, 5, 2), r"\(N, D\)"),
        (1, torch.arange(11), "12 class ids"),
        (1, torch.zeros(12), "class ids"),
        (2, torch.zeros(9, 4), "4 values a row"),
        (3, torch.full((9,), 7), "run from 7 to 7"),
    ],
)
def test_bad_input(probe, at, value, message):
    data = [*GOOD]
    data[at] = value
    more = {"shots": 1} if probe is few_shot_probe else {"k": 3} if probe is knn_probe else {}
    with pytest.raises(ValueError, match=message):
        probe(*data, **more)


def test_one_class_only_and_classes_that_training_lacks():
    x, _, test_x, test_y = GOOD
    with pytest.raises(ValueError, match="needs two classes"):
        linear_probe(x, torch.zeros(12, dtype=torch.long), test_x, torch.zeros(9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"Classes \[1\] of the test set have no training row"):
        linear_probe(x, torch.arange(12) % 2 * 2, test_x, test_y)
    with pytest.raises(ValueError, match="k must be a whole number from 1 to 12; got 13"):
        knn_probe(*GOOD, k=13)
    with pytest.raises(ValueError, match="fewer than shots=5"):
        few_shot_probe(*GOOD, 5)
    with pytest.raises(ValueError, match="Unknown protocol"):
        linear_probe(*GOOD, protocol="linear")
