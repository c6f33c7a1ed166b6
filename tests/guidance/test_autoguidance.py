"""AutoGuidance against the two networks called by hand; which weaker networks it takes."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_repr import PAG, AutoGuidance, Denoiser, GenericFamily, Prediction, guide
from tests.guidance.mixtures import Mixture
from tests.testers.models import PIPELINES, build, unet2d

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([3, 1])


def network(seed, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return unet2d(3, num_class_embeds=10, **changes)


def base(scheduler=None):
    return Denoiser(network(0).eval(), scheduler or DDIMScheduler())


def weaker(**changes):
    return network(1, block_out_channels=(8, 8, 8), dropout=0.5, **changes)


def change(denoiser, configs, t=300):
    with torch.no_grad():
        plain = denoiser.model(X, t, IDS).sample
        with guide(denoiser, configs) as handle:
            return denoiser.model(X, t, IDS).sample - plain, handle


def test_adds_the_difference_of_the_two_networks_once_more():
    """The paper's `eps_weak + w (eps - eps_weak)` with w = 1 + s; the weaker one in eval mode, without gradient."""
    denoiser, small = base(), weaker()
    small.mid_block.eval()
    modes = [module.training for module in small.modules()]
    found, handle = change(denoiser, AutoGuidance(small, scale=0.7))
    assert [module.training for module in small.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in small.parameters())
    assert [(s.lanes, s.passes, s.backward_passes) for s in handle.stats.steps] == [(2, 2, 0)]
    with torch.no_grad():
        eps, weak = denoiser.model(X, 300, IDS).sample, small.eval()(X, 300, IDS).sample
    torch.testing.assert_close(eps + found, weak + 1.7 * (eps - weak), rtol=1e-5, atol=1e-5)
    assert float(found.abs().max()) > 1e-2


def test_takes_no_gradient_where_the_loop_has_it_on():
    denoiser, small = base(), weaker()
    with guide(denoiser, AutoGuidance(small)):
        output = denoiser.model(X, 300, IDS).sample
    output.sum().backward()
    assert denoiser.model.conv_in.weight.grad is not None
    assert all(parameter.grad is None for parameter in small.parameters())


@pytest.mark.parametrize("form", ["epsilon", "sample", "v_prediction", "velocity"])
def test_is_the_same_in_every_form_of_prediction(form):
    """The guided noise estimate: of the mixture's exact denoiser, and of one that takes x_t to be smaller."""
    scheduler = DDIMScheduler(prediction_type=form) if form != "velocity" else FlowMatchEulerDiscreteScheduler()
    x, t, label = X[:, :2, :1, :1].double(), torch.tensor(400), torch.tensor([0, 3])

    def level_of(timestep):
        level = Denoiser(torch.nn.Identity(), scheduler, family=GenericFamily()).level(float(timestep))
        values = (level.alpha, level.sigma, level.alpha_dot, level.sigma_dot)
        return tuple(torch.tensor(float(value), dtype=torch.float64) for value in values)

    class Weak(Mixture):
        def forward(self, sample, timestep, class_labels, return_dict=True):
            return super().forward(0.8 * sample, timestep, class_labels)

    strong, weak = Mixture(level_of, form), Weak(level_of, form)
    denoiser = Denoiser(strong, scheduler, family=GenericFamily(channels=2))
    with guide(denoiser, AutoGuidance(weak, scale=2.0)):
        guided = strong(x, t, label)[0]
    level = denoiser.level(400)
    outputs = (strong(x, t, label)[0], weak(x, t, label)[0], guided)
    eps, low, got = (Prediction(output, x, level, denoiser.schedule).eps for output in outputs)
    torch.testing.assert_close(got, eps + 2.0 * (eps - low), rtol=1e-10, atol=1e-10)


def run(pipe, name, **kwargs):
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    if name == "dit":
        arguments |= {"class_labels": [207, 1], "output_type": "np"}
    else:
        arguments |= {"prompt": ["a cat", "a dog"], "height": 32, "width": 48}
    return torch.as_tensor(pipe(**arguments, **kwargs).images)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "dit", "flux", "pixart"])
def test_on_pipelines(name, scale):
    """A copy of the network with other weights, called with the inputs of the conditional rows."""
    pipe = build(name)
    key = "unet" if hasattr(pipe, "unet") else "transformer"
    model = getattr(pipe, key)
    weak, rows = copy.deepcopy(model), []
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(0.9)
    weak.register_forward_pre_hook(lambda m, args, kwargs: rows.append(kwargs), with_kwargs=True)
    given = {"guidance_scale": scale} if name != "flux" else {}
    given |= {"use_resolution_binning": False} if name == "pixart" else {}
    plain = run(pipe, name, **given)
    with guide(pipe, AutoGuidance(weak, scale=1.5)) as handle:
        guided = run(pipe, name, **given)
    assert float((guided - plain).abs().max()) > 1e-4
    lanes = 1 + (scale > 1 and name != "flux")
    assert [(s.lanes, s.passes) for s in handle.stats.steps] == [(lanes + 1, 2)] * 2
    sizes = {value.shape[0] for inputs in rows for key, value in inputs.items() if key in ("sample", "hidden_states")}
    assert sizes == {2}
    if name == "dit":
        assert rows[0]["class_labels"].tolist() == [207, 1]
    assert torch.equal(run(pipe, name, **given), plain)


def test_adds_to_pag_and_is_bit_equal_at_zero_and_outside_its_interval():
    denoiser, config = base(), AutoGuidance(weaker(), scale=0.7)
    parts = [config, PAG(2.0)]
    total, handle = change(denoiser, parts)
    torch.testing.assert_close(total, sum(change(denoiser, part)[0] for part in parts), rtol=1e-4, atol=1e-5)
    assert handle.stats.lanes == 3
    assert not change(denoiser, config.replace(scale=0.0))[0].any()
    with torch.no_grad(), guide(denoiser, config.replace(interval=(500, 900))) as handle:
        outside, inside = denoiser.model(X, 300, IDS).sample, denoiser.model(X, 600, IDS).sample
    assert [step.lanes for step in handle.stats.steps] == [1, 2]
    with torch.no_grad():
        assert torch.equal(outside, denoiser.model(X, 300, IDS).sample)
        assert not torch.equal(inside, denoiser.model(X, 600, IDS).sample)


def test_takes_a_denoiser_or_a_pipeline_and_checks_its_process():
    denoiser, small = base(), weaker()
    expected, _ = change(denoiser, AutoGuidance(small))
    found, _ = change(denoiser, AutoGuidance(Denoiser(small, DDIMScheduler())))
    assert torch.equal(found, expected)
    for scheduler, message in (
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "with other noise levels; both must be the same"),
        (DDIMScheduler(prediction_type="v_prediction"), "predicts v_prediction on a vp process.*the model epsilon"),
    ):
        with pytest.raises(ValueError, match=message):
            guide(denoiser, AutoGuidance(Denoiser(small, scheduler)))
    sd = build("sd")
    with pytest.raises(ValueError, match="is the guided network itself"):
        guide(sd, AutoGuidance(sd))
    other = build("sd")
    handle = guide(sd, AutoGuidance(other))
    # Without CFG both networks take equally many rows, so that equal weights give equal bits.
    guided = run(sd, "sd", guidance_scale=1.0)
    with pytest.warns(UserWarning, match="AutoGuidance changed nothing in a whole run"):  # equal weights
        handle.remove()
    assert torch.equal(guided, run(sd, "sd", guidance_scale=1.0))


def test_weaker_networks_that_do_not_fit_raise():
    denoiser = base()
    with pytest.raises(TypeError, match="is a network, a pipeline or a Denoiser; got str"):
        guide(denoiser, AutoGuidance("small"))
    with pytest.raises(ValueError, match="is the guided network itself"):
        guide(denoiser, AutoGuidance(denoiser.model))
    with pytest.raises(
        ValueError, match=r"in torch.float16.*the model on cpu in torch.float32.*weaker_model.to\('cpu'"
    ):
        guide(denoiser, AutoGuidance(weaker().half()))
    with pytest.raises(ValueError, match="is on meta in"):
        guide(denoiser, AutoGuidance(weaker().to("meta")))
    with pytest.raises(ValueError, match="num_class_embeds=None, the UNet2DModel 10"):
        guide(denoiser, AutoGuidance(unet2d(3)))
    with pytest.raises(ValueError, match="in_channels=4"):
        guide(denoiser, AutoGuidance(unet2d(4, num_class_embeds=10)))
    with pytest.raises(ValueError, match="predicts 2 channels, the UNet2DModel 3"):
        guide(denoiser, AutoGuidance(network(1, out_channels=2)))
    with pytest.raises(ValueError, match="takes no .*encoder_hidden_states"):
        guide(build("sd"), AutoGuidance(weaker()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.model.modules())


def test_every_family_accepts_a_copy_of_itself():
    for name in PIPELINES:
        guide(build(name), AutoGuidance(build(name))).remove()
