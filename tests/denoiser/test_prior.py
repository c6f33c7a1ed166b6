"""Priors: what they draw, that they are saved as data, and that pipelines sample by them."""

import json

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from safetensors.torch import save_file

from diffusers_repr.denoiser import GeneratorPrior, HistogramPrior, QueryPrior, StoredPrior, load_prior
from tests.pipelines.sit_cases import CLASSES, pipeline
from tests.testers.models import build


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_histogram_draws_by_frequency():
    labels = torch.tensor([0] * 60 + [2] * 30 + [3] * 10 + [-1] * 50)
    prior = HistogramPrior.of_labels(labels, 4)
    drawn = prior.draw(20_000, seeded())
    shares = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.6, 0, 0.3, 0.1]), rtol=0, atol=0.02)
    assert torch.equal(prior.draw(5, seeded(3)), prior.draw(5, seeded(3)))
    alike = HistogramPrior([2, 2, 2]).draw(50, seeded())
    assert torch.equal(alike, torch.randint(3, (50,), generator=seeded()))
    singly = prior.draw(2, [seeded(1), seeded(2)])
    assert singly.tolist() == [int(prior.draw(1, seeded(seed))) for seed in (1, 2)]
    with pytest.raises(ValueError, match="labels go up to 3; of 3 classes the last is 2"):
        HistogramPrior.of_labels(labels, 3)
    with pytest.raises(ValueError, match=r"labels are whole numbers; got torch\.float32"):
        HistogramPrior.of_labels([0.5], 3)
    with pytest.raises(ValueError, match="a sum above 0"):
        HistogramPrior([0.0, 0.0])
    with pytest.raises(ValueError, match="are 0 or more; got -1"):
        HistogramPrior([2.0, -1.0])


def test_stored_rows_in_order_and_at_random():
    values = torch.arange(10.0).view(5, 2)
    prior = StoredPrior(values, in_order=True)
    assert torch.equal(prior.draw(3), values[:3])
    assert torch.equal(prior.draw(3), values[[3, 4, 0]])
    drawn = StoredPrior(values).draw(400, seeded())
    assert torch.equal(drawn, values[torch.randint(5, (400,), generator=seeded())])
    assert len(drawn.unique(dim=0)) == 5


@pytest.mark.parametrize("prior", [HistogramPrior([1, 0, 3]), StoredPrior(torch.randn(4, 2, 3)),
                                   StoredPrior(torch.tensor([4, 2]), in_order=True)])  # fmt: skip
def test_they_are_saved_as_data(prior, tmp_path):
    prior.save_pretrained(tmp_path / "prior")
    again = load_prior(tmp_path / "prior")
    assert type(again) is type(prior)
    assert torch.equal(again.draw(6, seeded()), prior.draw(6, seeded()))


def test_damaged_files_and_code(tmp_path):
    prior = StoredPrior(torch.ones(2, 1))
    prior.save_pretrained(tmp_path)
    (tmp_path / "prior.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no file of a stored prior"):
        load_prior(tmp_path)
    for told, message in (({"kind": "os.system"}, "kind is one of histogram, stored"),
                          ({"kind": ["stored"]}, "kind is one of histogram, stored"),
                          ({"kind": "histogram", "frequencies": [-1]}, r"frequencies\[0\] is -1"),
                          ({"kind": "histogram", "frequencies": [0]}, r"prior\.json: frequencies .* a sum above 0"),
                          ({"kind": "stored", "in_order": True, "code": "x"}, "does not know")):  # fmt: skip
        (tmp_path / "prior.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match=message):
            load_prior(tmp_path)
    save_file({"values": torch.zeros(0, 3)}, tmp_path / "prior.safetensors")
    (tmp_path / "prior.json").write_text('{"kind": "stored", "in_order": false}')
    with pytest.raises(ValueError, match=r"prior\.safetensors is no file of a stored prior: .* got \(0, 3\)"):
        load_prior(tmp_path)
    with pytest.raises(TypeError, match="A GeneratorPrior is code"):
        GeneratorPrior(lambda count, generator: torch.zeros(count)).save_pretrained(tmp_path)


def test_generators_and_queries():
    learned = GeneratorPrior(lambda count, generator: torch.randn(count, 3, generator=generator))
    assert torch.equal(learned.draw(2, seeded()), torch.randn(2, 3, generator=seeded()))
    with pytest.raises(ValueError, match="gave 1 conditions; 2 were asked for"):
        GeneratorPrior(lambda count, generator: torch.zeros(1, 3)).draw(2)
    lengths = QueryPrior(["a", "bcd"], lambda texts: torch.tensor([[float(len(text))] for text in texts]))
    assert lengths.draw(3, seeded()).tolist() == [[1.0], [3.0], [1.0]]
    assert lengths.draw(2, [seeded(), seeded()]).tolist() == [[1.0], [3.0]]
    with pytest.raises(ValueError, match="2 queries gave 1 conditions"):
        QueryPrior(["a", "b"], lambda texts: torch.zeros(1, 1)).draw(1)
    with pytest.raises(ValueError, match="queries are a list"):
        QueryPrior("a", torch.tensor)


def sampled(pipe, **given):
    return pipe(**{"num_inference_steps": 2, "generator": seeded(), **given})


def test_sit_samples_by_a_prior():
    pipe = pipeline()
    drawn = sampled(pipe, batch_size=3, prior=HistogramPrior([0, 0, 1, 0, 0]), guidance_scale=2.0, output_type="pt")
    assert drawn.class_labels.tolist() == [2, 2, 2]
    assert torch.equal(
        drawn.images, sampled(pipe, class_labels=[2, 2, 2], guidance_scale=2.0, output_type="pt").images
    )
    plain, uniform = (sampled(pipe, batch_size=4, prior=prior) for prior in (None, HistogramPrior.uniform(CLASSES)))
    generator = seeded()
    torch.randn(4, 3, 8, 8, generator=generator)  # the noise
    wanted = torch.randint(CLASSES, (4,), generator=generator)
    assert plain.class_labels.tolist() == uniform.class_labels.tolist() == wanted.tolist()
    with pytest.raises(ValueError, match="prior draws what is not given"):
        sampled(pipe, class_labels=[1], prior=HistogramPrior.uniform(CLASSES))
    vectors = torch.randn(2, 6)
    free = pipeline(num_classes=0, condition_dim=6)
    found = sampled(free, batch_size=2, prior=StoredPrior(vectors, in_order=True), output_type="pt").images
    assert torch.equal(found, sampled(free, condition=vectors, output_type="pt").images)


def test_the_unconditional_pipeline_samples_by_a_prior():
    stock = build("class_unet")
    pipe = GuidedUnconditionalPipeline(stock.unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    prior = StoredPrior(torch.tensor([3, 1]), in_order=True)
    found = sampled(pipe, batch_size=2, prior=prior, guidance_scale=2.0, output_type="pt").images
    assert torch.equal(found, sampled(pipe, class_labels=[3, 1], guidance_scale=2.0, output_type="pt").images)
    with pytest.raises(ValueError, match="prior draws class_labels that are not given"):
        sampled(pipe, class_labels=[1], prior=prior)
