"""`RCGPipeline`: the vectors' sampler against closed forms, guidance in one space, both halves, files, errors."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.rcg import RCGPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from torch import nn

from diffusers_repr import CFG, PAG, Denoiser, DiffusionObjective, StoredPrior, VectorConditioner, guide
from diffusers_repr.models import RepresentationMLPModel
from diffusers_repr.models.convert_representation import SCHEDULER
from diffusers_repr.testing import check_conditioner, check_objective
from tests.objectives.cases import shake
from tests.pipelines.rcg_cases import D, embedding, make, pixels, prior, quiet, seed, unet
from tests.pipelines.sit_cases import network as sit
from tests.testers.hosts import in_dtype

CALL = {"num_inference_steps": 3, "output_type": "np", "prior_num_inference_steps": 4}


# The vectors' sampler


class Exact(RepresentationMLPModel):
    """The x_0-predictor of Gaussian data, `E[z | z_t]`; of a mixture of two by its classes, of both for the null."""

    MEANS, STD = torch.tensor([[0.5, -1.0], [-2.0, 1.5]], dtype=torch.float64), torch.tensor([0.7, 1.3]).double()
    kept = torch.cumprod(1 - torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2, 0)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        a, s = self.kept[timestep].sqrt()[:, None], (1 - self.kept[timestep]).sqrt()[:, None]
        spread, x = a**2 * self.STD**2 + s**2, sample.double()
        each = [mean + a * self.STD**2 * (x - a * mean) / spread for mean in self.MEANS]
        logs = [-((x - a * mean) ** 2 / (2 * spread)).sum(1) for mean in self.MEANS]
        shares = torch.stack(logs, 1).softmax(1)
        parts = [*each, shares[:, :1] * each[0] + shares[:, 1:] * each[1]]
        labels = torch.zeros(len(x), dtype=torch.long) if class_labels is None else class_labels
        return (torch.stack(parts, 1)[torch.arange(len(x)), labels].to(sample.dtype),)


def exact(classes=0):
    return quiet(RCGPipeline(Exact(2, 8, 1, num_classes=classes), DDIMScheduler(**SCHEDULER)))


def test_gaussian_vectors_have_their_moments():
    # With eta = 1 the noise of a step is that of a known x_0: at 250 steps deviations are 3 % short, at 500 half that.
    drawn = exact().sample_representations(20_000, num_inference_steps=500, generator=seed()).double()
    assert (drawn.mean(0) - Exact.MEANS[0]).abs().max() < 0.02 * Exact.STD.max()
    assert (drawn.std(0) / Exact.STD - 1).abs().max() < 0.02


def by_hand(count, steps, eta, guess):
    """DDIM as RCG's paper has it, in float64, from the same noise; `guess(z, t)` is eps."""
    generator, kept = seed(3), Exact.kept
    z = torch.randn(count, 2, generator=generator).double()
    grid = list(range(1, 1000, 1000 // steps))
    for at in reversed(range(len(grid))):
        now, before = kept[grid[at]], kept[grid[at - 1]] if at else kept[0]
        eps = guess(z, grid[at])
        x0 = (z - (1 - now).sqrt() * eps) / now.sqrt()
        sd = eta * ((1 - before) / (1 - now) * (1 - now / before)).sqrt()
        noise = torch.randn(count, 2, generator=generator).double() if eta else 0.0
        z = before.sqrt() * x0 + (1 - before - sd**2).sqrt() * eps + sd * noise
    return z


def eps_of(z, t, label):
    a, s = Exact.kept[t].sqrt(), (1 - Exact.kept[t]).sqrt()
    times, labels = torch.full((len(z),), t), torch.full((len(z),), label)
    return (z - a * Exact(2, 8, 1, num_classes=2)(z, times, labels)[0]) / s


@pytest.mark.parametrize("eta", [0.0, 0.5, None])
def test_ddim_by_hand(eta):
    found = exact().sample_representations(5, generator=seed(3), num_inference_steps=20, eta=eta)
    wanted = by_hand(5, 20, 1.0 if eta is None else eta, lambda z, t: eps_of(z, t, 0))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_guidance_to_classes_is_that_of_eps():
    """The network predicts x_0; both lanes go to eps before they are put together, or neither."""
    settings = {"class_labels": [1], "num_inference_steps": 20}
    found = exact(2).sample_representations(5, guidance_scale=2.5, generator=seed(3), **settings)

    def guess(z, t):
        null, cond = eps_of(z, t, 2), eps_of(z, t, 1)
        return null + 2.5 * (cond - null)

    torch.testing.assert_close(found.double(), by_hand(5, 20, 1.0, guess), rtol=1e-3, atol=1e-3)
    plain = exact(2).sample_representations(5, generator=seed(3), **settings)
    wanted = by_hand(5, 20, 1.0, lambda z, t: eps_of(z, t, 1))
    torch.testing.assert_close(plain.double(), wanted, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 0.1


def test_a_vector_depends_on_its_seed_alone():
    pipe = make(num_classes=3)
    settings = {"num_inference_steps": 5, "guidance_scale": 2.0}
    both = pipe.sample_representations(class_labels=[0, 2], generator=[seed(1), seed(2)], **settings)
    alone = pipe.sample_representations(class_labels=2, generator=[seed(2)], **settings)
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-5)
    other = pipe.sample_representations(class_labels=1, generator=[seed(2)], **settings)
    assert (other - alone).abs().max() > 1e-3
    pipe.prior_scheduler = DPMSolverMultistepScheduler.from_config(pipe.prior_scheduler.config)
    assert pipe.sample_representations(2, num_inference_steps=5).isfinite().all()  # a sampler without eta


# Both halves


def test_it_is_the_sit_pipeline_with_its_prior():
    pipe = make()
    found = pipe(batch_size=3, guidance_scale=2.0, generator=seed(), **CALL)
    stock = quiet(SiTPipeline(pipe.transformer, pipe.scheduler))
    settings = {"guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np"}
    wanted = stock(batch_size=3, prior=pipe.as_prior(num_inference_steps=4), generator=seed(), **settings)
    assert np.array_equal(found.images, wanted.images)
    again = pipe(condition=found.condition, guidance_scale=2.0, generator=seed(), **CALL)
    assert np.array_equal(found.images, again.images)
    kept = StoredPrior(found.condition, in_order=True)
    assert np.array_equal(
        pipe(batch_size=3, prior=kept, guidance_scale=2.0, generator=seed(), **CALL).images, again.images
    )
    other = pipe(condition=found.condition.flip(0), guidance_scale=2.0, generator=seed(), **CALL)
    assert np.abs(found.images - other.images).max() > 1e-2


def test_a_unet_without_embedding_is_the_stock_loop():
    network, scheduler = RepresentationMLPModel(32, 16, 1), DDIMScheduler(**SCHEDULER)
    pipe = quiet(RCGPipeline(shake(network).eval(), scheduler, unet=unet(), scheduler=DDIMScheduler()))
    found = pipe(batch_size=2, generator=seed(), **CALL)
    stock = quiet(GuidedUnconditionalPipeline(pipe.unet, DDIMScheduler()))
    wanted = stock(class_labels=found.condition, generator=seed(), num_inference_steps=3, output_type="np").images
    assert np.array_equal(found.images, wanted)
    drawn = stock(
        batch_size=2,
        prior=pipe.as_prior(num_inference_steps=4),
        generator=seed(),
        num_inference_steps=3,
        output_type="np",
    )
    assert np.array_equal(found.images, drawn.images)
    with pytest.raises(ValueError, match="trained without"):
        pipe(batch_size=2, guidance_scale=2.0, **CALL)


@pytest.mark.parametrize("kind", ["sit", "unet", "latent"])
def test_guidance_of_images_by_hand(kind):
    """One step, both lanes written out; scale 1 is the conditional lane, and the null is the learned vector's."""
    pipe, z = make(kind), torch.randn(2, D, generator=seed(4))
    network = pipe.transformer if kind == "sit" else pipe.unet
    seen = []
    handle = network.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    noise = torch.randn(2, network.config.in_channels, 8, 8, generator=seed(5))
    pipe(condition=z, guidance_scale=3.0, latents=noise, num_inference_steps=1, output_type="latent")
    plain = pipe(condition=z, latents=noise, num_inference_steps=1, output_type="latent").images
    handle.remove()
    t = pipe.scheduler.timesteps.float()[0].expand(2)

    def lane(vectors):
        if kind == "sit":
            keep = torch.zeros(2, dtype=torch.bool)
            return network(noise, t, condition=vectors, drop_mask=keep).sample
        vectors = pipe.condition_embedding.proj(vectors)
        if kind == "unet":
            return network(noise, t.long(), class_labels=vectors).sample
        return network(noise, t.long(), encoder_hidden_states=vectors[:, None]).sample

    with torch.no_grad():
        null = network.null_condition if kind == "sit" else pipe.condition_embedding.null
        lanes = lane(null.expand(2, D)), lane(z)
        torch.testing.assert_close(seen[0], torch.cat(lanes), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[1], lanes[1], rtol=1e-4, atol=1e-5)
        assert (lanes[0] - lanes[1]).abs().max() > 1e-4
        wanted = (
            pipe.scheduler.step(lanes[1], pipe.scheduler.timesteps[0], noise).prev_sample if kind != "sit" else None
        )
    if wanted is not None:
        torch.testing.assert_close(plain, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "latent"])
def test_the_embedding_is_trained_with_the_network_and_saved_in_the_pipeline(kind):
    parts = pixels(kind)
    base = quiet(RCGPipeline(**parts))
    denoiser = Denoiser.from_pipe(base)
    assert isinstance(denoiser.conditioner, VectorConditioner)
    objective = DiffusionObjective(denoiser, label_dropout=0.5)
    size = 8 if kind == "unet" else 16
    batch = {"pixel_values": torch.rand(4, 3, size, size, generator=seed()) * 2 - 1, "condition": torch.randn(4, D)}
    check_objective(objective, batch)
    assert any(name.startswith("condition_embedding.") for name, p in objective.named_parameters() if p.requires_grad)
    assert {name for name in objective.frozen} == ({"vae"} if kind == "latent" else set())
    state = objective.state_dict()
    state["condition_embedding.null"] = state["condition_embedding.null"] + 1
    made = objective.result(state)
    torch.testing.assert_close(made.condition_embedding.null, parts["condition_embedding"].null + 1)
    assert made(condition=torch.zeros(1, D), guidance_scale=2.0, num_inference_steps=1, output_type="np").images.size


def test_the_conditioner_keeps_its_contract():
    net = unet()
    conditioner = VectorConditioner(embedding=embedding(32))
    denoiser = Denoiser(net, DDIMScheduler(), conditioner=conditioner)
    check_conditioner(denoiser, {"condition": torch.randn(3, D, generator=seed())})
    with pytest.raises(ValueError, match="has a null and a width of its own"):
        VectorConditioner(embedding=embedding(32), null=0.0)


def test_other_guidance_works_on_it():
    pipe, call = make("sit"), {**CALL, "batch_size": 2}
    plain = pipe(**call, generator=seed()).images
    with guide(pipe, PAG(2.0)):
        perturbed = pipe(**call, generator=seed()).images
    with guide(pipe, CFG(3.0)):
        replaced = pipe(**call, guidance_scale=1.5, generator=seed()).images
    assert np.abs(perturbed - plain).max() > 1e-3
    wanted = pipe(**call, guidance_scale=3.0, generator=seed()).images
    np.testing.assert_allclose(replaced, wanted, atol=1e-5)
    assert np.array_equal(pipe(**call, generator=seed()).images, plain)


# Files


def test_a_half_is_loaded_and_the_other_put_in(tmp_path):
    whole = make("latent", num_classes=3)
    wanted = whole(class_labels=[0, 2], generator=seed(), guidance_scale=2.0, prior_guidance_scale=2.0, **CALL).images
    RCGPipeline(whole.prior, whole.prior_scheduler, id2label={0: "one, uno", 1: "two", 2: "three"}).save_pretrained(
        tmp_path / "vectors"
    )
    RCGPipeline(**{name: getattr(whole, name) for name in pixels("latent")}).save_pretrained(tmp_path / "images")
    first = RCGPipeline.from_pretrained(tmp_path / "vectors")
    assert first.labels == {"one": 0, "uno": 0, "two": 1, "three": 2}
    parts = {"prior": first.prior, "prior_scheduler": first.prior_scheduler, "id2label": first.config.id2label}
    pipe = quiet(RCGPipeline.from_pretrained(tmp_path / "images", **parts))
    call = {**CALL, "guidance_scale": 2.0, "prior_guidance_scale": 2.0}
    assert np.array_equal(pipe(class_labels=["uno", "three"], generator=seed(), **call).images, wanted)
    pipe.save_pretrained(tmp_path / "whole")
    again = quiet(RCGPipeline.from_pretrained(tmp_path / "whole"))
    assert np.array_equal(again(class_labels=[0, 2], generator=seed(), **call).images, wanted)
    again.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(again(class_labels=[0, 2], generator=seed(), **call).images, wanted, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        half = quiet(RCGPipeline.from_pretrained(tmp_path / "whole", **in_dtype(dtype)))
        assert half.prior.dtype == half.unet.dtype == half.condition_embedding.dtype == dtype
        out = half(class_labels=[0, 2], generator=seed(), **call)
        assert out.condition.dtype == torch.float32
        assert np.abs(out.images - wanted).mean() < 0.05


# Errors


@pytest.mark.parametrize(("call", "message"), [
    (lambda: RCGPipeline(prior()[0]), "prior is there without its prior_scheduler"),
    (lambda: RCGPipeline(unet=unet(), transformer=sit(), scheduler=DDIMScheduler()), "Both unet and transformer"),
    (lambda: RCGPipeline(transformer=sit(), scheduler=DDIMScheduler()), "takes no vectors"),
    (lambda: RCGPipeline(*prior(), unet=unet(), scheduler=DDIMScheduler()), "vectors of 6 channels, and UNet2DM"),
    (lambda: RCGPipeline(*prior())(), "has no network of images"),
    (lambda: RCGPipeline(**pixels("sit"))(), "has no prior to draw vectors"),
    (lambda: RCGPipeline(**pixels("sit")).as_prior(), "has no prior"),
    (lambda: make()(class_labels=[1], **CALL), "no classes"),
    (lambda: make(num_classes=3)(class_labels=[4], **CALL), "from 0 to 2, or 3 for the null class"),
    (lambda: make(num_classes=3)(class_labels="cat", **CALL), "No class has the names"),
    (lambda: make(num_classes=3)(prior_guidance_scale=2.0, **CALL), "it takes class_labels"),
    (lambda: make()(condition=torch.zeros(2, 5), **CALL), r"condition is \(B, 6\)"),
    (lambda: make()(condition=torch.full((2, 6), math.nan), **CALL), "NaN"),
    (lambda: make()(condition=torch.zeros(2, 6), prior=StoredPrior(torch.zeros(2, 6)), **CALL), "give one"),
    (lambda: make()(batch_size=3, condition=torch.zeros(2, 6), **CALL), "How many samples"),
    (lambda: make()(prior_eta=2.0, **CALL), "eta lies"),
    (lambda: make()(**{**CALL, "prior_num_inference_steps": 0}), "num_inference_steps must be a whole number"),
    (lambda: make().sample_representations(2, latents=torch.zeros(2, 5)), r"\(2, 6\); got \(2, 5\)"),
])  # fmt: skip
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_of_it_touches_the_global_generator():
    pipe, state = make(), torch.get_rng_state()
    pipe(batch_size=2, generator=seed(), **CALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(pipe.prior, nn.Module)
