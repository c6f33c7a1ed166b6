"""Diffusion of vectors: the loss by hand, what is standardised, classes and their null, what is saved and refused."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_repr import Denoiser, DiffusionObjective, RepresentationMLPModel, RepresentationObjective
from diffusers_repr.assign import IdentityAssigner, standardize_vectors
from diffusers_repr.data.vectors import VectorData
from diffusers_repr.models.convert_representation import SCHEDULER
from diffusers_repr.testing import check_assigner, check_objective
from tests.objectives.cases import shake, sit

D = 6


def denoiser(prediction="sample", **changes):
    network = shake(RepresentationMLPModel(D, 16, 2, time_embed_dim=8, class_embed_dim=4, **changes))
    return Denoiser(network, DDIMScheduler(**{**SCHEDULER, "prediction_type": prediction}))


def vectors(count=4, seed=0):
    return 3 * torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) + 2


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v_prediction"])
def test_the_loss_by_hand(prediction):
    objective = RepresentationObjective(denoiser(prediction)).eval()
    z, noise = vectors(), vectors(seed=1)
    t = torch.tensor([0, 40, 500, 999])
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    kept = torch.from_numpy(np.cumprod(1 - betas))[t, None]
    a, s = kept.sqrt(), (1 - kept).sqrt()
    target = {"sample": z, "epsilon": noise, "v_prediction": a * noise - s * z}[prediction]
    with torch.no_grad():
        out = objective.network((a * z + s * noise).float(), t).sample
        got = objective({"condition": z, "noise": noise, "time": t})["loss"]
    assert float(got) == pytest.approx(float((out - target).square().mean()), rel=1e-4)


def test_vectors_are_standardised_by_themselves_as_rcg_has_it():
    z = vectors(5).double() * torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0])[:, None]
    found = standardize_vectors(z)
    assert found.double().mean(1).abs().max() < 1e-6
    assert (found.double().std(1, correction=1) - 1).abs().max() < 1e-6
    torch.testing.assert_close(standardize_vectors(found), found, rtol=0, atol=1e-6)
    by_hand = [[(x - np.mean(row)) / np.std(row, ddof=1) for x in row] for row in z.numpy()]
    torch.testing.assert_close(found.double(), torch.tensor(by_hand), rtol=1e-5, atol=1e-6)
    assigner = IdentityAssigner(D, over="vector").fit(z)
    assert torch.equal(assigner.assign(z), standardize_vectors(z.float()))
    check_assigner(IdentityAssigner(D, over="vector"), vectors(20))
    with pytest.raises(ValueError, match=r"Vectors \[1\] have entries that are all the same"):
        assigner.assign(torch.stack([z[0], torch.full((D,), 0.1)]))
    with pytest.raises(ValueError, match="over is one of column, vector"):
        IdentityAssigner(D, over="rows")
    with pytest.raises(ValueError, match="two entries or more"):
        IdentityAssigner(1, over="vector")


@pytest.mark.parametrize("over", ["column", "vector"])
def test_what_is_learned_is_what_the_assigner_gives(over):
    """Raw vectors through an assigner, ready ones, and those of an encoder give one loss."""
    z, settings = vectors(8), {"time": torch.arange(8) * 100, "noise": vectors(8, seed=1)}
    assigner, base = IdentityAssigner(D, over=over).fit(z), denoiser()
    with torch.no_grad():
        wanted = RepresentationObjective(base)({"condition": assigner.assign(z), **settings})["loss"]
        raw = RepresentationObjective(base, assigner=assigner)({"condition": z, **settings})["loss"]
        read = RepresentationObjective(base, assigner=assigner, encoder="dino")
        stored = read({"features_global": {"dino": z}, **settings})["loss"]
        plain = RepresentationObjective(base)({"condition": z, **settings})["loss"]
    assert torch.equal(wanted, raw)
    assert torch.equal(wanted, stored)
    assert not torch.equal(wanted, plain)


def test_classes_are_dropped_to_the_null_class():
    base = denoiser(num_classes=3)
    batch = {"condition": vectors(), "class_labels": torch.tensor([0, 1, 2, 0])}
    batch |= {"time": torch.tensor([5, 50, 500, 900]), "noise": vectors(seed=1)}
    kept, gone = (RepresentationObjective(base, label_dropout=chance) for chance in (0.0, 1.0))
    with torch.no_grad():
        null = {**batch, "class_labels": torch.full((4,), 3)}
        assert torch.equal(gone(batch)["loss"], kept(null)["loss"])
        assert not torch.equal(gone(batch)["loss"], kept(batch)["loss"])


@pytest.mark.parametrize("classes", [0, 3])
def test_keeps_the_contract(classes):
    assigner = IdentityAssigner(D).fit(vectors(20))
    names = dict(enumerate("abc")) if classes else None
    objective = RepresentationObjective(denoiser(num_classes=classes), assigner=assigner, id2label=names)
    check_objective(objective, {"condition": vectors(), "class_labels": torch.tensor([0, 1, 2, 0])})
    pipe = objective.result(objective.state_dict())
    assert type(pipe).__name__ == "RCGPipeline"
    assert pipe.labels == ({"a": 0, "b": 1, "c": 2} if classes else {})


def test_vector_data():
    z, labels = vectors(5), torch.tensor([0, 1, 1, 0, -1])
    data = VectorData(z, labels, ["a", "b"])
    assert torch.equal(data.batch([3, 1])["condition"], z[[3, 1]])
    assert torch.equal(data[3]["condition"], z[3])
    assert data[1]["class_labels"] == 1
    assert data.num_classes == 2
    assert data.fingerprint() == VectorData(z.clone(), labels, ["a", "b"]).fingerprint()
    for other in (VectorData(z + 1e-3, labels, ["a", "b"]), VectorData(z), VectorData(z, labels.abs(), ["a", "b"])):
        assert other.fingerprint() != data.fingerprint()
    for given, message in (
        ((z[0],), r"vectors are floats \(N, D\)"),
        ((z * torch.nan,), "NaN or infinite"),
        ((z, labels), r"labels are \(5,\), and come with class_names"),
        ((z, labels, ["a"]), r"labels lie in 0..0; got -1 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            VectorData(*given)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: RepresentationObjective(sit()), ValueError, "trains networks of vectors; SiT"),
    (lambda: DiffusionObjective(denoiser()), ValueError, "for networks of images; RepresentationMLPModel denoises"),
    (lambda: RepresentationObjective(denoiser(), assigner=torch.nn.Linear(1, 1)), TypeError, "is an Assigner"),
    (lambda: RepresentationObjective(denoiser(), assigner=IdentityAssigner(D)), ValueError, "fitted: False"),
    (lambda: RepresentationObjective(denoiser(), assigner=IdentityAssigner(5).fit(torch.eye(5))), ValueError, "of 6"),
    (lambda: RepresentationObjective(denoiser(num_classes=2, null_class=False)), ValueError, "no null class to drop"),
    (lambda: RepresentationObjective(denoiser()).check_batch({"vectors": vectors()}), ValueError, "no column 'condit"),
    (lambda: RepresentationObjective(denoiser()).check_batch({"condition": vectors()[:, :5]}), ValueError, r"B, 6"),
    (lambda: RepresentationObjective(denoiser()).check_batch({"condition": vectors() / 0}), ValueError, "infinite"),
    (lambda: RepresentationObjective(denoiser(), encoder="x").check_batch({}), ValueError, "of an encoder 'x'"),
])  # fmt: skip
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
