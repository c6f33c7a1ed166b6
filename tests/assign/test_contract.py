"""Every assigner by the contract tester of the package; and that it finds what is wrong."""

import copy
import json

import pytest
import torch
from diffusers.configuration_utils import register_to_config

from diffusers_repr.assign import Assigner, IdentityAssigner, assigner_class, list_assigners, register_assigner
from diffusers_repr.assign import base as registry
from diffusers_repr.testing import check_assigner

FEATURES = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7) + 3


LABELS = torch.arange(20) % 4
EACH = {  # settings, each a case, and what else `fit` takes
    "classifier": ([{"num_classes": 4}, {"num_classes": 4, "normalize": False, "center": False}], {"labels": LABELS}),
    "identity": ([{}, {"normalize": True}], {}),
    "kmeans": ([{"num_clusters": 3, "normalize": normalize, "backend": "sklearn"} for normalize in (True, False)]
               + [{"num_clusters": 20, "backend": "sklearn", "init": "random"}], {}),
    "neighbours": ([{"k": 3}, {"k": 20}], {}),
    "sinkhorn": ([{}, {"normalize": True}, {"output": "vector"}], {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(list_assigners()))
def test_contract(kind):
    cases, fitting = EACH[kind]
    for settings in cases:
        check_assigner(assigner_class(kind)(6, **settings), FEATURES, **fitting)


def test_identity_standardises():
    features = FEATURES.clone()
    features[:, 2] = 7.0  # does not vary
    found = IdentityAssigner(6).fit(features).assign(features).double()
    rest = torch.tensor([0, 1, 3, 4, 5])
    torch.testing.assert_close(found.mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, rest].square().mean(0), torch.ones(5, dtype=torch.float64), atol=1e-5, rtol=0)
    assert bool((found[:, 2] == 0).all())


def test_wrong_use():
    assigner = IdentityAssigner(6)
    with pytest.raises(RuntimeError, match="not fitted; call fit"):
        assigner.assign(FEATURES)
    for features, told in ((FEATURES[:, :5], r"\(B, 6\); got \(20, 5\)"), (FEATURES[0], r"got \(6,\)"),
                           (FEATURES[:0], r"got \(0, 6\)"), (FEATURES * torch.nan, "NaN")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            assigner.fit(features)
    with pytest.raises(ValueError, match="in_features"):
        IdentityAssigner(0)
    with pytest.raises(ValueError, match="Unknown assigner 'kmean'; expected one of classifier, identity"):
        assigner_class("kmean")
    with pytest.raises(ValueError, match="'identity' is the assigner .*IdentityAssigner already"):
        register_assigner("identity")(type("Other", (IdentityAssigner,), {}))
    with pytest.raises(TypeError, match="subclass of Assigner; got"):
        register_assigner("other")(dict)
    with pytest.raises(ValueError, match="tells what it gives"):
        register_assigner("other")(type("Other", (Assigner,), {}))


def test_a_config_of_another_class_is_refused(tmp_path):
    IdentityAssigner(6).fit(FEATURES).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for name, told in (
        ("OtherAssigner", "holds a 'OtherAssigner', not a IdentityAssigner"),
        (["x"], "not a Identity"),
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": name}))
        with pytest.raises(ValueError, match=told):
            IdentityAssigner.from_pretrained(tmp_path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "IdentityAssigner"}))
    assert bool(IdentityAssigner.from_pretrained(tmp_path).fitted)


class SignAssigner(Assigner):
    """Cells of the space by the sign of two features."""

    gives = "class"

    @register_to_config
    def __init__(self, in_features, fault=None):
        super().__init__()
        self.make_state(in_features)
        self.register_buffer("middle", torch.zeros(in_features))
        self.fault = fault

    def fit_prepared(self, features, generator):
        self.middle.copy_(features.mean(0))
        if self.fault == "draws":
            torch.rand(1)

    def assign_prepared(self, features):
        middle = features.mean(0) if self.fault == "batch" else self.middle
        cells = ((features > middle)[:, :2] * torch.tensor([1, 2])).sum(1)
        return cells.int() if self.fault == "dtype" else cells

    def fingerprint(self):
        return {"assigner": "sign"} if self.fault == "fingerprint" else super().fingerprint()

    @property
    def null(self):
        return torch.tensor(3 if self.fault == "null" else 4)


def test_faults_are_found(monkeypatch):
    monkeypatch.setattr(registry, "_ASSIGNERS", copy.copy(registry._ASSIGNERS))
    with pytest.raises(AssertionError, match="is not registered"):
        check_assigner(SignAssigner(6), FEATURES)
    register_assigner("sign")(SignAssigner)
    check_assigner(SignAssigner(6), FEATURES)
    for fault, told in {
        "draws": "global random state",
        "batch": "otherwise among others",
        "dtype": "gives torch.int32",
        "null": "beyond all classes",
        "fingerprint": "does not tell a fitted one from a new one",
    }.items():
        with pytest.raises(AssertionError, match=told):
            check_assigner(SignAssigner(6, fault), FEATURES)
