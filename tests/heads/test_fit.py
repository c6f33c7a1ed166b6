import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from diffusers_repr.heads import PROTOCOLS, LinearHead, MLPHead, fit_head, get_protocol
from diffusers_repr.heads.fitting.closed_form import calibrate, fit_ridge
from diffusers_repr.heads.fitting.logistic import fit_logistic_path
from diffusers_repr.heads.fitting.minibatch import LARS, protocol_rate, train_head


def planted(rows, size=10, classes=4, seed=0, noise=1.0):
    """Features around one centre a class, in unlike units and far from zero."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, size, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(rows) % classes
    x = centres[labels] + noise * torch.randn(rows, size, generator=generator)
    return x * torch.logspace(-2, 2, size) + 5, labels


def standardized(x):
    x = x.double()
    return (x - x.mean(0)) / x.std(0, correction=0)


# Closed form


def test_ridge_equals_the_normal_equations():
    x, y = planted(300)
    x = torch.cat([x, torch.full((300, 1), 3.0)], 1)  # a constant feature
    fits = fit_ridge(x, y, 4, [0.3, 1e-3], rows=70)
    z = np.column_stack([standardized(x[:, :-1]).numpy(), np.ones(300)])
    for l2, fit in zip([0.3, 1e-3], fits, strict=True):
        penalty = np.diag([l2] * 10 + [0.0])
        expected = np.linalg.solve(z.T @ z / 300 + penalty, z.T @ np.eye(4)[y] / 300)
        np.testing.assert_allclose(fit.weight.numpy()[:, :-1], expected[:-1].T, atol=1e-10)
        np.testing.assert_allclose(fit.weight.numpy()[:, -1], 0, atol=1e-10)
        np.testing.assert_allclose(fit.logits(x).numpy(), z @ expected, atol=1e-9)


def test_the_ridge_head_predicts_as_scikit_learn():
    x, y = planted(300)
    result = fit_head(x, y, protocol=PROTOCOLS["ridge"].replace(l2=(0.05,)))
    z = standardized(x).numpy()
    theirs = Ridge(alpha=300 * 0.05, solver="svd").fit(z, np.eye(4)[y]).predict(z)
    ours = result.head(x).detach().double().numpy() / result.protocol["chosen"]["calibration"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_calibration_is_the_best_factor_and_makes_probabilities():
    x, y = planted(400, noise=2.0)
    result = fit_head(x, y, protocol="ridge")
    head = result.head
    logits = head(x).detach()
    assert float(torch.nn.functional.cross_entropy(logits, y)) < 0.6 * math.log(4)
    best = calibrate(logits, y)
    losses = [float(torch.nn.functional.cross_entropy(logits * best * f, y)) for f in (0.9, 1.0, 1.1)]
    assert losses[1] == min(losses)


# Logistic regression


def newton(z, y, classes, l2):
    """Weight and bias at which the gradient is zero, by Newton's method on the whole Hessian in float64."""
    rows, size = len(z), z.shape[1] + 1
    x = torch.cat([z, torch.ones(rows, 1).double()], 1)
    penalty = torch.full((classes, size), l2).double()
    penalty[:, -1] = 1e-12  # the biases' common shift is free
    w = torch.zeros(classes, size).double()
    for _ in range(60):
        p = (x @ w.T).softmax(1)
        gradient = ((p - torch.nn.functional.one_hot(y, classes)).T @ x / rows + penalty * w).flatten()
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        hessian = torch.einsum("nij,na,nb->iajb", curvature, x, x).reshape(classes * size, -1) / rows
        step = torch.linalg.solve(hessian + penalty.flatten().diag(), gradient).view_as(w)
        w = w - step * min(1.0, float(4 / step.norm()))
    return w[:, :-1], w[:, -1]


@pytest.mark.parametrize(("classes", "noise"), [(4, 3.0), (2, 3.0), (4, 30.0)])
def test_the_default_probe_is_at_the_optimum_for_every_penalty_it_tries(classes, noise):
    x, y = planted(80, classes=classes, noise=noise)
    z = standardized(x)
    for l2 in PROTOCOLS["lbfgs"].l2:
        result = fit_head(x, y, protocol=PROTOCOLS["lbfgs"].replace(l2=(l2,)))
        weight, bias = newton(z, y, classes, l2)
        expected = (z @ weight.T + bias).softmax(1).float()
        torch.testing.assert_close(result.head(x).softmax(1), expected, atol=2e-5, rtol=0)
        chosen = result.protocol["chosen"]
        assert chosen["converged"]
        assert chosen["gradient_norm"] < 1e-2 * l2


def test_a_class_without_rows_is_never_predicted():
    x, y = planted(80, noise=3.0)
    y[y == 1] = 2
    fit = fit_logistic_path(standardized(x), y, 4, [1e-3])[0]
    weight, bias = newton(standardized(x), torch.where(y > 1, y - 1, y), 3, 1e-3)
    p = (standardized(x) @ fit.weight.T + fit.bias).softmax(1)
    torch.testing.assert_close(p[:, [0, 2, 3]], (standardized(x) @ weight.T + bias).softmax(1), atol=1e-6, rtol=0)
    assert float(p[:, 1].max()) == 0


def test_a_fit_that_stops_early_says_so():
    x, y = planted(80, noise=3.0)
    with pytest.warns(UserWarning, match=r"stopped after 3 iterations, short of its optimum.*max_iter"):
        result = fit_head(x, y, protocol=PROTOCOLS["lbfgs"].replace(l2=(1e-4,), max_iter=3))
    chosen = result.protocol["chosen"]
    assert not chosen["converged"]
    assert chosen["gradient_norm"] > 1e-6


def test_the_penalty_is_chosen_on_the_validation_set():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    x = torch.randn(60, 200, generator=generator)
    x[:, 0] += 3 * y
    held = torch.randn(400, 200, generator=generator)
    target = torch.arange(400) % 2
    held[:, 0] += 3 * target
    result = fit_head(x, y, validation=(held, target))
    by_hand = {
        l2: fit_head(x, y, protocol=PROTOCOLS["lbfgs"].replace(l2=(l2,)), validation=(held, target))
        for l2 in PROTOCOLS["lbfgs"].l2
    }
    assert result.validation_accuracy == max(r.validation_accuracy for r in by_hand.values())
    assert result.protocol["chosen"]["l2"] in PROTOCOLS["lbfgs"].l2
    same = by_hand[result.protocol["chosen"]["l2"]].head
    # One started from a stronger penalty's solution, the other from zero.
    torch.testing.assert_close(result.head(held).softmax(1), same(held).softmax(1), atol=2e-4, rtol=0)


# Stochastic gradients


def test_one_epoch_equals_a_plain_loop():
    x, y = planted(50)
    protocol = PROTOCOLS["adam"].replace(
        optimizer="sgd",
        epochs=1,
        batch_size=16,
        learning_rate=0.1,
        momentum=0.9,
        schedule="constant",
        standardize=False,
    )
    head = LinearHead(10, 4)
    train_head(head, x / 50, y, protocol, torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    weight = (torch.rand(4, 10, generator=generator) * 2 - 1) / 10**0.5
    bias = (torch.rand(4, generator=generator) * 2 - 1) / 10**0.5
    order = torch.randperm(50, generator=generator)
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for start in range(0, 50, 16):
        rows = order[start : start + 16]
        error = (x[rows] / 50 @ weight.T + bias).softmax(1) - torch.eye(4)[y[rows]]
        speed_w = 0.9 * speed_w + error.T @ (x[rows] / 50) / len(rows)
        speed_b = 0.9 * speed_b + error.mean(0)
        weight, bias = weight - 0.1 * speed_w, bias - 0.1 * speed_b
    torch.testing.assert_close(head.linear.weight.detach(), weight)
    torch.testing.assert_close(head.linear.bias.detach(), bias)


def test_lars_by_hand():
    weight, bias = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([weight, bias], lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.01)
    gradients = [(torch.tensor([[1.0, 0.0]]), torch.tensor([2.0])), (torch.tensor([[0.0, 2.0]]), torch.tensor([1.0]))]
    w, b, vw, vb = np.array([[3.0, 4.0]]), np.array([1.0]), 0.0, 0.0
    for gw, gb in gradients:
        weight.grad, bias.grad = gw, gb
        optimizer.step()
        step = gw.numpy() + 0.1 * w
        step = step * 0.01 * np.linalg.norm(w) / np.linalg.norm(step)
        vw, vb = 0.9 * vw + step, 0.9 * vb + gb.numpy()
        w, b = w - 0.5 * vw, b - 0.5 * vb
    np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-6)
    np.testing.assert_allclose(bias.detach().numpy(), b, rtol=1e-6)


@pytest.mark.parametrize("name", ["mae", "repa"])
def test_batch_norm_is_folded_exactly(name, monkeypatch):
    x, y = planted(90)
    modules = []
    build = torch.nn.BatchNorm1d
    monkeypatch.setattr(torch.nn, "BatchNorm1d", lambda *a, **k: modules.append(build(*a, **k)) or modules[-1])
    protocol = PROTOCOLS[name].replace(batch_size=32, epochs=12, learning_rate=5.0)
    head = fit_head(x, y, protocol=protocol).head
    (norm,) = modules
    norm.eval()
    if norm.affine:  # undo the fold: the trained layer stands after the norm
        assert not torch.equal(norm.weight, torch.ones(10))
        layer = copy.deepcopy(head.linear)
        with torch.no_grad():
            layer.weight.div_(norm.weight)
            layer.bias.sub_(layer.weight @ norm.bias)
    else:
        layer = head.linear
    torch.testing.assert_close(head(x), layer(norm(x)), atol=1e-4, rtol=1e-4)


def test_rates_follow_their_sources():
    ddae, mae = PROTOCOLS["ddae"], PROTOCOLS["mae"]
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 15)
    for epoch in range(15):
        assert protocol_rate(ddae, epoch + 0.5, 128) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert protocol_rate(mae, 0.0, 16384) == 0
    assert protocol_rate(mae, 10.0, 16384) == pytest.approx(6.4)
    assert protocol_rate(mae, 50.0, 16384) == pytest.approx(3.2)
    assert protocol_rate(mae, 90.0, 16384) == pytest.approx(0)


@pytest.mark.parametrize("name", ["lbfgs", "ridge", "adam", "ddae", "knn"])
def test_protocols_learn_planted_classes_and_leave_the_global_state(name):
    head = "knn" if name == "knn" else "linear"
    x, y = planted(400)
    if name == "ddae":  # no feature normalisation there
        x = (x - x.mean(0)) / x.std(0)
    held = (x[300:], y[300:])
    state = torch.get_rng_state()
    shorter = {"adam": {"epochs": 25}, "ddae": {"learning_rate": 1e-2, "epochs": 60}}
    protocol = PROTOCOLS[name].replace(**shorter[name]) if name in shorter else name
    first, second = (fit_head(x[:300], y[:300], head=head, protocol=protocol, validation=held) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.validation_accuracy > 0.9
    assert torch.equal(first.head(held[0]), second.head(held[0]))
    assert not first.head.training
    assert first.protocol["name"] == name


def test_an_mlp_learns_what_a_linear_head_cannot():
    x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] * x[:, 1] > 0).long()
    state = torch.get_rng_state()
    protocol = PROTOCOLS["adam"].replace(epochs=40)
    mlp = fit_head(
        x[:400], y[:400], head="mlp", protocol=protocol, validation=(x[400:], y[400:]), hidden_features=(32,)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(mlp.head, MLPHead)
    assert mlp.validation_accuracy > 0.9
    assert fit_head(x[:400], y[:400], validation=(x[400:], y[400:])).validation_accuracy < 0.7


def test_another_generator_gives_other_weights():
    x, y = planted(100)
    protocol = PROTOCOLS["adam"].replace(epochs=2)
    a, b = (fit_head(x, y, protocol=protocol, generator=torch.Generator().manual_seed(s)).head(x) for s in (0, 1))
    assert not torch.equal(a, b)


def test_few_labels_and_no_validation():
    x, y = planted(8)
    assert fit_head(x, y).protocol["chosen"]["l2"] == PROTOCOLS["lbfgs"].default_l2  # nothing can be held out
    x, y = planted(40)
    assert fit_head(x, y).validation_accuracy is None
    assert fit_head(x, y, head="knn", protocol=PROTOCOLS["knn"].replace(k=100)).protocol["chosen"] == {"k": 40}


# Protocols are promises


PINNED = {
    "lbfgs": {
        "version": 2,
        "standardize": True,
        "l2": (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
        "default_l2": 1e-2,
        "max_iter": 10_000,
        "tolerance": 1e-10,
    },
    "ridge": {"version": 1, "standardize": True, "l2": (1e-4, 1e-3, 1e-2, 1e-1, 1.0), "default_l2": 1e-2},
    "knn": {"version": 1, "standardize": True, "k": 20, "temperature": 0.07, "metric": "cosine"},
    "adam": {
        "version": 1,
        "standardize": True,
        "optimizer": "adam",
        "learning_rate": 3e-3,
        "rate_per_256": False,
        "weight_decay": 0.0,
        "momentum": 0.9,
        "trust_coefficient": 0.001,
        "batch_size": 64,
        "drop_last": False,
        "epochs": 100,
        "warmup_epochs": 0,
        "schedule": "cosine_epoch",
        "step_epochs": 7,
        "step_factor": 0.1,
        "batch_norm": None,
        "norm_eps": 1e-5,
        "norm_momentum": 0.1,
        "init_std": None,
    },
}
PINNED["ddae"] = {**PINNED["adam"], "standardize": False, "learning_rate": 1e-3, "batch_size": 128, "epochs": 15}
PINNED["mae"] = {
    **PINNED["ddae"],
    "optimizer": "lars",
    "learning_rate": 0.1,
    "rate_per_256": True,
    "batch_size": 16384,
    "drop_last": True,
    "epochs": 90,
    "warmup_epochs": 10,
    "schedule": "cosine_step",
    "batch_norm": "plain",
    "norm_eps": 1e-6,
    "init_std": 0.01,
}
PINNED["repa"] = {**PINNED["mae"], "batch_norm": "affine", "norm_eps": 1e-5, "init_std": None}
PINNED["adam-maps"] = {
    **PINNED["adam"],
    "standardize": False,
    "learning_rate": 1e-3,
    "epochs": 30,
    "warmup_epochs": 2,
    "schedule": "cosine_step",
}
PINNED["gdc"] = {
    **PINNED["ddae"],
    "optimizer": "sgd",
    "learning_rate": 1e-2,
    "momentum": 0.0,
    "epochs": 28,
    "schedule": "step_epoch",
}
PINNED["difformer"] = {**PINNED["gdc"], "learning_rate": 5e-2}
PINNED["diffeed"] = {**PINNED["gdc"], "batch_size": 16}


def test_every_field_of_every_protocol_is_pinned():
    found = {}
    for name, protocol in PROTOCOLS.items():
        fields = dataclasses.asdict(protocol)
        assert fields.pop("name") == name
        assert fields.pop("source")
        found[name] = fields
    assert found == PINNED


def test_a_changed_protocol_says_so():
    assert PROTOCOLS["ddae"].describe()["changed"] == []
    assert PROTOCOLS["ddae"].replace(epochs=30, batch_size=64).describe()["changed"] == ["batch_size", "epochs"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROTOCOLS["ddae"].epochs = 3


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "sgd"}, "Unknown protocol 'sgd'; expected one of lbfgs, ridge"),
        ({"head": "conv"}, "Unknown head 'conv'; expected one of knn, linear, mlp"),
        ({"head": "mlp", "protocol": "ridge"}, "fits heads linear, not 'mlp'; for 'mlp' use adam or ddae"),
        ({"depth": 3}, "LinearHead has no option 'depth'; it has bias"),
        ({"bias": False}, "bias=False is for minibatch protocols"),
        ({"num_classes": 2}, "training labels run from 0 to 3; class ids run from 0 to 1"),
        ({"validation": (torch.zeros(3, 9), torch.zeros(3).long())}, "validation features have 9 values a row"),
        ({"labels": torch.zeros(40).long()}, "All 40 training labels are 0"),
        ({"labels": torch.zeros(39).long()}, "must be 40 class ids"),
        ({"labels": torch.rand(40)}, "must be 40 class ids"),
        ({"features": torch.zeros(40, 2, 2)}, r"must be a tensor \(N, D\) with rows"),
        ({"features": torch.zeros(0, 2), "labels": torch.zeros(0).long()}, "with rows"),
        ({"features": torch.full((40, 10), float("nan"))}, "40 of 40 rows of the training features are not finite"),
    ],
)
def test_bad_input(arguments, message):
    x, y = planted(40)
    given = {"features": x, "labels": y, **arguments}
    with pytest.raises(ValueError, match=message):
        fit_head(given.pop("features"), given.pop("labels"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer='adamw'; allowed"),
        ({"epochs": 0}, "epochs must be"),
        ({"learning_rate": -1.0}, "above 0"),
        ({"warmup_epochs": 15}, "below epochs"),
        ({"standardize": True, "batch_norm": "plain"}, "normalise twice"),
    ],
)
def test_bad_protocols(changes, message):
    with pytest.raises(ValueError, match=message):
        PROTOCOLS["ddae"].replace(**changes)


def test_protocol_of_another_type():
    with pytest.raises(TypeError, match="a name or a Protocol; got dict"):
        get_protocol({"name": "ddae"}, "linear")


def test_ridge_without_standardisation():
    with pytest.raises(ValueError, match="standardises features always"):
        PROTOCOLS["ridge"].replace(standardize=False)


def test_divergence_is_told():
    x, y = planted(40)
    protocol = PROTOCOLS["ddae"].replace(optimizer="sgd", learning_rate=1e38)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        fit_head(x, y, protocol=protocol)
