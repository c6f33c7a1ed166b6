"""RCG's network of vectors: its formula, and the authors' checkpoints."""

import pytest
import torch

from diffusers_repr.cli import main
from diffusers_repr.models import RepresentationMLPModel, VectorEmbedding
from diffusers_repr.models.convert_representation import convert_representation
from tests.models.official_rdm import OfficialRDM

X, T = torch.randn(3, 6, generator=torch.Generator().manual_seed(5)), torch.tensor([1, 400, 997])


def test_it_predicts_zero_at_first_and_every_class_and_time_then():
    model = RepresentationMLPModel(6, 16, 2, num_classes=3)
    assert model(X, T, torch.tensor([0, 1, 3])).sample.abs().max() == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    out = model(X[:1].expand(4, 6), torch.tensor([5.0, 5.0, 5.0, 5.5]), torch.tensor([0, 0, 1, 0])).sample
    assert torch.equal(out[0], out[1])
    assert (out[2:] - out[0]).abs().amax(1).min() > 1e-3
    assert torch.equal(model(X, T).sample, model(X, T, torch.full((3,), 3)).sample)  # null for all


@pytest.mark.parametrize("classes", [0, 3])
def test_authors_checkpoints(classes, tmp_path, capsys):
    from diffusers_repr.pipelines.rcg import RCGPipeline

    official = OfficialRDM(classes=classes)
    torch.save(official.checkpoint(), tmp_path / "rdm.pth")
    assert main(["convert", str(tmp_path / "rdm.pth"), "--out", str(tmp_path / "out")]) == 0
    assert "6 channels, 2 blocks of width 16" in capsys.readouterr().out
    pipe = RCGPipeline.from_pretrained(tmp_path / "out")
    labels = torch.tensor([0, 2, 1]) if classes else None
    with torch.no_grad():
        found = pipe.prior(X, T, labels).sample
    torch.testing.assert_close(found.double(), official(X, T, labels), rtol=1e-4, atol=1e-5)
    assert pipe.null_label is None
    alpha_bar = torch.cumprod(1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2, 0)
    torch.testing.assert_close(pipe.prior_scheduler.alphas_cumprod.double(), alpha_bar, rtol=1e-4, atol=1e-7)
    pipe.prior_scheduler.set_timesteps(250)
    assert pipe.prior_scheduler.timesteps.tolist() == list(range(997, 0, -4))
    assert float(pipe.prior_scheduler.final_alpha_cumprod) == float(pipe.prior_scheduler.alphas_cumprod[0])
    if classes:
        with pytest.raises(ValueError, match="no null class; give class_labels"):
            pipe.sample_representations(2, num_inference_steps=2)
        with pytest.raises(ValueError, match="a prior with a null class"):
            pipe.sample_representations(2, class_labels=[0, 1], guidance_scale=2.0, num_inference_steps=2)


def test_bad_checkpoints():
    official = OfficialRDM()
    state = official.checkpoint(average=False)["model"]
    converted = convert_representation(state)
    assert converted.notes[0] == "It holds no moving average; the trained weights were taken."
    assert torch.equal(converted.weights["proj_in.weight"], official.trained["input_proj.weight"])
    with pytest.raises(ValueError, match=r"it lacks res_blocks.1.emb_layers.1.bias"):
        convert_representation({k: v for k, v in state.items() if not k.endswith("1.emb_layers.1.bias")})
    with pytest.raises(ValueError, match=r"it has res_blocks.0.more, which are unknown"):
        convert_representation({**state, "model.diffusion_model.res_blocks.0.more": torch.ones(1)})
    whole = official.checkpoint()["model"]
    with pytest.raises(ValueError, match=r"average in this checkpoint of RCG lacks out.2.bias"):
        convert_representation({k: v for k, v in whole.items() if k != "model_ema.diffusion_modelout2bias"})


@pytest.mark.parametrize(("call", "message"), [
    (lambda: RepresentationMLPModel(6, num_layers=0), "num_layers must be a whole number from 1"),
    (lambda: RepresentationMLPModel(6, num_classes=-1), "num_classes is 0 or more"),
    (lambda: RepresentationMLPModel(6, 16, 1)(X[:, :5], 3), r"takes x_t \(B, 6\); got \(3, 5\)"),
    (lambda: RepresentationMLPModel(6, 16, 1)(X, T[:2]), "2 timesteps for 3 samples"),
    (lambda: RepresentationMLPModel(6, 16, 1)(X, T, T), "has no classes"),
    (lambda: RepresentationMLPModel(6, 16, 1, num_classes=2)(X, T, torch.tensor([0, 1, 3])), r"must lie in 0..2"),
    (lambda: RepresentationMLPModel(6, 16, 1, num_classes=2, null_class=False)(X, T), "has no null class"),
    (lambda: VectorEmbedding(6, 4)(X[:, :5]), r"takes vectors \(B, 6\)"),
])  # fmt: skip
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_vector_embedding_is_zero_where_asked_and_its_null_is_learned():
    zero, plain = VectorEmbedding(6, 4, zero_init=True), VectorEmbedding(6, 4)
    assert zero(X).abs().max() == 0
    mask = torch.tensor([False, True, False])
    optimizer = torch.optim.SGD(plain.parameters(), 1.0)
    before = plain.null.detach().clone()
    plain(X, mask).square().sum().backward()
    optimizer.step()
    assert not torch.equal(plain.null, before)
    assert plain.null.abs().max() > 0
    out = plain(X, mask)
    torch.testing.assert_close(out[1], plain.proj(plain.null))
    torch.testing.assert_close(out[::2], plain.proj(X)[::2])
