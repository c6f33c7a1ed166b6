"""Classifier guidance: equal to classifier-free guidance where the classifier is exact; the mean of a DDPM step."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from diffusers_repr import PAG, ClassifierGuidance, Denoiser, GenericFamily, guide
from diffusers_repr.models.noisy_classifier import NoisyClassifier, describe_process
from tests.guidance.mixtures import NULL, Classifier, Mixture
from tests.testers.models import build, unet2d

POINTS = torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def vp(scheduler):
    bars = scheduler.alphas_cumprod.double()

    def level_of(timestep):
        bar = bars[int(timestep)]
        return bar.sqrt(), (1 - bar).sqrt(), 0.0, 0.0

    return level_of


def by_step(scheduler, values_of):
    """alpha, sigma and derivatives from the sigma at which the sampler stands."""
    sigmas = {float(t): s.double() for t, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False)}

    def level_of(timestep):
        return values_of(sigmas[float(timestep)])

    return level_of


def table(scheduler):
    """As exact as the library reads it: the product of `1 - beta` in float64."""
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    return scheduler


CASES = {
    "ddim": (lambda: table(DDIMScheduler(clip_sample=False)), "epsilon"),
    "ddim v": (lambda: table(DDIMScheduler(clip_sample=False, prediction_type="v_prediction")), "v_prediction"),
    "ddim x0": (lambda: table(DDIMScheduler(clip_sample=False, prediction_type="sample")), "sample"),
    "euler": (lambda: EulerDiscreteScheduler(), "epsilon"),
    "flow": (lambda: FlowMatchEulerDiscreteScheduler(), "velocity"),
}


def mixture(case):
    make, form = CASES[case]
    scheduler = make()
    scheduler.set_timesteps(8)
    if case == "flow":
        level_of = by_step(scheduler, lambda sigma: (1 - sigma, sigma, -1.0, 1.0))
    elif case == "euler":
        level_of = by_step(scheduler, lambda nsr: ((1 + nsr**2).rsqrt(), nsr * (1 + nsr**2).rsqrt(), 0.0, 0.0))
    else:
        level_of = vp(scheduler)
    denoiser = Denoiser(Mixture(level_of, form), scheduler, family=GenericFamily(channels=2))
    return denoiser, scheduler, Classifier(level_of)


def loop(denoiser, scheduler, predict):
    """All steps; `predict(x, t)` is the guided output."""
    x = POINTS * getattr(scheduler, "init_noise_sigma", 1.0)
    outputs = []
    with torch.no_grad():
        for t in scheduler.timesteps:
            taken = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            output = predict(taken, t)
            outputs.append(output)
            x = scheduler.step(output, t, x).prev_sample.double()
    return x, outputs


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("case", list(CASES))
def test_an_exact_classifier_gives_classifier_free_guidance(case, scale):
    """`eps_null - s sigma grad log p(c | x_t) = eps_null + s (eps_c - eps_null)`, over a whole run."""
    denoiser, scheduler, classifier = mixture(case)
    null = torch.full_like(LABELS, NULL)

    def free(x, t):
        base = denoiser.model(x, t, null)[0]
        if case == "flow" and float(t) == 1000:
            return base  # pure noise: no classifier tells anything
        return base + scale * (denoiser.model(x, t, LABELS)[0] - base)

    expected, wanted = loop(denoiser, scheduler, free)
    denoiser, scheduler, classifier = mixture(case)
    with guide(denoiser, ClassifierGuidance(classifier, LABELS, scale=scale), scheduler=scheduler) as handle:
        found, outputs = loop(denoiser, scheduler, lambda x, t: denoiser.model(x, t, null)[0])
    for one, other in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for step in handle.stats.steps:
        assert (step.lanes, step.passes) == (1, 1)
        assert step.backward_passes == int(float(step.level.alpha) > 0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_what_is_sampled_of_a_gaussian(scale):
    """x of N(0, 1) and `p(c | x) = exp(-(x - 1)^2 / 2)`, so the posterior is N(1/2, 1/2): p(x | c) for scale 1 alone.

    The probability flow is linear: two starting points tell mean and deviation of all samples.
    """
    scheduler = table(DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"))
    scheduler.set_timesteps(200)
    level_of = vp(scheduler)

    class Normal(nn.Module):
        def forward(self, sample, timestep, return_dict=True):
            return (level_of(timestep.reshape(-1)[0])[1] * sample,)

    def classifier(x, timestep):
        alpha, sigma, _, _ = level_of(timestep[0])  # x_0 given x_t is N(alpha x_t, sigma^2)
        found = -0.5 * (1 + sigma**2).log() - (alpha * x[:, :, 0, 0] - 1).square() / (2 * (1 + sigma**2))
        return torch.cat([found, torch.log1p(-found.exp())], dim=1)

    denoiser = Denoiser(Normal(), scheduler, family=GenericFamily(channels=1))
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None, None]
    with torch.no_grad(), guide(denoiser, ClassifierGuidance(classifier, 0, scale=scale), scheduler=scheduler):
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser.model(sample=x, timestep=t.expand(2))[0], t, x).prev_sample.double()
    mean, variance = float(x[0]), float(x[1] - x[0]) ** 2
    assert variance == pytest.approx(0.5**scale, rel=0.1)
    of_the_law = (scale / (1 + scale), 1 / (1 + scale))
    if scale <= 1:
        assert (mean, variance) == pytest.approx(of_the_law, abs=0.03)
    else:
        assert variance < 0.5 * of_the_law[1]
        assert mean > of_the_law[0] + 0.2


def test_moves_the_mean_of_a_ddpm_step_by_the_papers_shift_over_sqrt_one_minus_beta():
    scheduler = table(DDPMScheduler(clip_sample=False))
    scheduler.betas = scheduler.betas.double()
    scheduler.alphas = 1 - scheduler.betas
    level_of = vp(scheduler)
    denoiser = Denoiser(Mixture(level_of, "epsilon"), scheduler, family=GenericFamily(channels=2))
    classifier, null = Classifier(level_of), torch.full_like(LABELS, NULL)
    for t in (999, 500, 20):
        x = POINTS.clone().requires_grad_(True)
        log_p = classifier(x, torch.tensor(t)).log_softmax(1)[torch.arange(6), LABELS].sum()
        (gradient,) = torch.autograd.grad(log_p, x)

        def mean(output, t=t):
            generator = torch.Generator().manual_seed(1)
            return scheduler.step(output, t, POINTS, generator=generator).prev_sample

        with torch.no_grad():
            plain = denoiser.model(POINTS, torch.tensor(t), null)[0]
            with guide(denoiser, ClassifierGuidance(classifier, LABELS, scale=2.5)):
                guided = denoiser.model(POINTS, torch.tensor(t), null)[0]
        beta = float(scheduler.betas[t])
        torch.testing.assert_close(
            mean(guided) - mean(plain), 2.5 * beta / (1 - beta) ** 0.5 * gradient, rtol=1e-7, atol=1e-10
        )
    assert pytest.approx(0.020203, abs=1e-6) == 0.02 / (1 - 0.02) ** 0.5


def small(**changes):
    """A class-conditional U-Net with its denoiser."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = unet2d(3, num_class_embeds=10, **changes).eval()
    return Denoiser(unet, DDIMScheduler(clip_sample=False))


def noisy_classifier(denoiser, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = {
            "in_channels": 3,
            "num_classes": 10,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "attention_head_dim": 8,
            "dropout": 0.5,
            **describe_process(denoiser.schedule),
        }
        return NoisyClassifier(**{**settings, **changes})


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([3, 1, 4, 1])


def change(denoiser, config, t=300, x=X, ids=IDS):
    with torch.no_grad():
        plain = denoiser.model(x, t, ids).sample
        with guide(denoiser, config):
            return denoiser.model(x, t, ids).sample - plain


@pytest.mark.parametrize("labels", [None, IDS, IDS.tolist(), 7])
def test_a_noisy_classifier_on_a_u_net(labels):
    """Its own gradient by hand, in eval mode; labels of the call, one each, one for all."""
    denoiser = small()
    classifier = noisy_classifier(denoiser)
    classifier.mid_block.train(False)
    modes = [module.training for module in classifier.modules()]
    classifier.conv_in.weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in classifier.parameters()]
    found = change(denoiser, ClassifierGuidance(classifier, labels, scale=3.0))
    assert [module.training for module in classifier.modules()] == modes
    assert [parameter.requires_grad for parameter in classifier.parameters()] == flags
    assert all(parameter.grad is None for parameter in classifier.parameters())
    x = X.clone().requires_grad_(True)
    ids = IDS if labels is None else torch.as_tensor(labels).expand(4)
    picked = classifier.eval()(x, 300).log_softmax(1)[torch.arange(4), ids].sum()
    (gradient,) = torch.autograd.grad(picked, x)
    sigma = float(denoiser.level(300).sigma)
    torch.testing.assert_close(found, -3.0 * sigma * gradient, rtol=1e-4, atol=1e-6)
    assert float(found.abs().max()) > 1e-4


def test_a_step_raises_the_probability_of_the_class():
    denoiser = small()
    classifier = noisy_classifier(denoiser).eval()
    scheduler = denoiser.scheduler
    scheduler.set_timesteps(50)
    t, after = scheduler.timesteps[20], scheduler.timesteps[21]

    def log_p(scale):
        config = ClassifierGuidance(classifier, scale=scale)
        with torch.no_grad(), guide(denoiser, config):
            moved = scheduler.step(denoiser.model(X, t, IDS).sample, t, X).prev_sample
            return classifier(moved, after).log_softmax(1)[torch.arange(4), IDS]

    assert (log_p(20.0) > log_p(0.0)).all()
    assert (log_p(-20.0) < log_p(0.0)).all()


def test_on_pipelines_with_and_without_guidance_of_their_own():
    """DiT's conditional half is first; the correction reaches both halves."""
    pipe = build("dit")
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(4 * 16 * 16, 1000))

    class Ignoring(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = classifier, []

        def forward(self, x, timestep):
            self.seen.append((x.shape, timestep))
            return self.inner(x)

    def run(scale):
        generator = torch.Generator().manual_seed(0)
        return pipe(
            [207, 5], guidance_scale=scale, generator=generator, num_inference_steps=2, output_type="np"
        ).images

    for scale, lanes in ((1.0, 1), (4.0, 2)):
        plain, model = run(scale), Ignoring()
        with guide(pipe, ClassifierGuidance(model, scale=20.0)) as handle:
            guided = run(scale)
        assert abs(guided - plain).max() > 1e-3
        assert [(s.lanes, s.passes, s.backward_passes) for s in handle.stats.steps] == [(lanes, 1, 1)] * 2
        assert {shape for shape, _ in model.seen} == {(2, 4, 16, 16)}
        assert [timestep.tolist() for _, timestep in model.seen] == [[500, 500], [0, 0]]
        assert {timestep.dtype for _, timestep in model.seen} == {torch.int64}


def test_adds_to_pag_and_is_bit_equal_at_zero():
    denoiser = small()
    config = ClassifierGuidance(noisy_classifier(denoiser), scale=5.0)
    both = change(denoiser, [config, PAG(2.0)])
    torch.testing.assert_close(both, change(denoiser, config) + change(denoiser, PAG(2.0)), rtol=1e-4, atol=1e-5)
    with torch.no_grad(), guide(denoiser, config.replace(scale=0.0)):
        assert torch.equal(denoiser.model(X, 300, IDS).sample, small().model(X, 300, IDS).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_classifier_keeps_its_own_dtype(dtype):
    exact = change(small(), ClassifierGuidance(noisy_classifier(small()), scale=5.0))
    denoiser = small()
    denoiser.model.to(dtype)
    found = change(denoiser, ClassifierGuidance(noisy_classifier(small()), scale=5.0), x=X.to(dtype))
    assert float(nn.functional.cosine_similarity(exact.flatten(), found.float().flatten(), dim=0)) > 0.9
    half = change(small(), ClassifierGuidance(noisy_classifier(small()).to(dtype), scale=5.0))
    assert float(nn.functional.cosine_similarity(exact.flatten(), half.flatten(), dim=0)) > 0.95


def test_bad_labels_and_classifiers_raise():
    denoiser = small()
    classifier = noisy_classifier(denoiser)
    with pytest.raises(TypeError, match="A classifier is a function"):
        ClassifierGuidance("resnet", 3)
    for labels in (1.5, [True], "cat", [[1, 2]]):
        with pytest.raises(TypeError, match="class_labels are whole numbers"):
            ClassifierGuidance(classifier, labels)
    with pytest.raises(ValueError, match="class_labels is empty"):
        ClassifierGuidance(classifier, [])
    for label in (10, -1):
        with pytest.raises(ValueError, match=rf"must lie in 0\.\.9.*got {label}"):
            guide(denoiser, ClassifierGuidance(classifier, [3, label]))
    with pytest.raises(ValueError, match="has 3 class_labels for 4 samples; give one for all, or one each"):
        change(denoiser, ClassifierGuidance(classifier, [1, 2, 3]))
    with pytest.raises(ValueError, match=r"must lie in 0\.\.2.*got 4"):
        change(denoiser, ClassifierGuidance(lambda x, t: x.mean((2, 3))))
    with pytest.raises(ValueError, match=r"logits \(B, K\), here \(4, K\); got shape \(4, 3, 16, 16\)"):
        change(denoiser, ClassifierGuidance(lambda x, t: x, 0))
    with pytest.raises(RuntimeError, match="does not depend on x_t"):
        change(denoiser, ClassifierGuidance(lambda x, t: torch.zeros(4, 3), 0))


def test_a_classifier_of_another_base_or_process_raises():
    denoiser = small()
    other = Denoiser(denoiser.model, DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
    with pytest.raises(ValueError, match="the same timestep means another noise"):
        guide(denoiser, ClassifierGuidance(noisy_classifier(other)))
    with pytest.raises(ValueError, match="takes x_0 of 3 channels; the classifier was trained on x_0 of 4"):
        guide(denoiser, ClassifierGuidance(noisy_classifier(denoiser, in_channels=4)))
    dit = build("dit")
    latents = noisy_classifier(Denoiser.from_pipe(dit), in_channels=4, num_classes=1000)
    with pytest.raises(ValueError, match="works on latents scaled by 0.18215; the classifier was trained on pixels"):
        guide(dit, ClassifierGuidance(latents))
    ready = noisy_classifier(Denoiser.from_pipe(dit), in_channels=4, num_classes=1000, latent_scale=0.18215)
    guide(dit, ClassifierGuidance(ready)).remove()


def test_networks_that_are_called_without_labels_need_some():
    with pytest.raises(ValueError, match="is called without class_labels"):
        guide(build("sd3"), ClassifierGuidance(lambda x, t: x.mean((2, 3))))
    pipe = build("sd")  # its network could take labels
    guided = guide(pipe, ClassifierGuidance(lambda x, t: x.mean((2, 3))))
    with pytest.raises(ValueError, match="called without ids of classes"), guided:
        pipe("a cat", height=32, width=48, num_inference_steps=1, output_type="latent")
