"""What no pipeline of ours takes: refused before the network runs, by an error that names the argument."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers_repr.pipelines.feature_extraction import FeatureExtractionPipeline
from diffusers_repr.pipelines.guided_dit import GuidedDiTPipeline
from diffusers_repr.pipelines.guided_stable_diffusion import GuidedStableDiffusionPipeline
from diffusers_repr.pipelines.guided_stable_diffusion_xl import GuidedStableDiffusionXLPipeline
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from diffusers_repr.heads import JointHead
from diffusers_repr.models import JointViTModel
from tests.pipelines.sit_cases import pipeline as sit_pipeline
from tests.testers.models import build, unet2d

REFUSED = (TypeError, ValueError)
NAN = math.nan


def joint(kind="unet", scheduler=None):
    torch.manual_seed(0)
    if kind == "vit":
        return JointDiffusionPipeline(JointViTModel((16, 8), 4, 1, 2, 16, 2, num_classes=3), DDIMScheduler())
    unet = unet2d(1)
    return JointDiffusionPipeline(unet, scheduler or DDIMScheduler(), JointHead.for_unet(unet, 3))


def unconditional(name="class_unet", scheduler=None):
    return GuidedUnconditionalPipeline(build(name).unet, scheduler or DDIMScheduler())


MAKERS = {
    "sit": sit_pipeline,
    "unconditional": unconditional,
    "joint": joint,
    "joint_vit": lambda: joint("vit"),
    "sd": lambda: GuidedStableDiffusionPipeline(**build("sd").components, requires_safety_checker=False),
    "sdxl": lambda: GuidedStableDiffusionXLPipeline(**build("sdxl").components),
    "dit": lambda: GuidedDiTPipeline(**build("dit").components),
}
GOOD = {"sd": {"prompt": "a cat"}, "sdxl": {"prompt": "a cat"}, "dit": {"class_labels": [1]}}
# Channels and size of the latents.
LATENTS = {"sit": (3, 8, 8), "unconditional": (3, 16, 16), "joint": (1, 16, 16), "joint_vit": (1, 16, 8)}
LATENTS |= {"sd": (4, 16, 16), "sdxl": (4, 16, 16)}
OWN = ("sit", "unconditional", "joint", "joint_vit")


@pytest.fixture(scope="module")
def pipes():
    """Each with a network that must not run."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKERS[name]()
            made[name].set_progress_bar_config(disable=True)
            network = getattr(made[name], "unet", None) or made[name].transformer
            network.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
        return made[name]

    return get


def refuse(pipe, told, error=REFUSED, call=None, **given):
    with pytest.raises(error, match=told):
        (call or pipe)(**given)


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_of_every_call(pipes, name):
    pipe, good = pipes(name), GOOD.get(name, {})
    for steps in (0, -1, 2.5, True, "3", NAN):
        refuse(pipe, "num_inference_steps must be a whole number from 1", num_inference_steps=steps, **good)
    for scale in (NAN, math.inf, "3", True, [1.0]):
        refuse(pipe, "guidance_scale must be (finite|a number)", guidance_scale=scale, **good)
    for kind in ("jpg", None, ["pil"]):
        refuse(pipe, "output_type is 'pil', 'np'.*; got", output_type=kind, **good)
    for generator in (42, [0], "seed"):
        refuse(pipe, "generator is a torch.Generator or one a sample", generator=generator, **good)
    if name not in ("sit", "dit"):
        for eta in (5, -0.1, NAN, "1"):
            refuse(pipe, "eta (lies from 0 to 1|must be)", eta=eta, **good)


@pytest.mark.parametrize("name", LATENTS)
def test_latents(pipes, name):
    pipe, good, (channels, h, w) = pipes(name), GOOD.get(name, {}), LATENTS[name]
    right = torch.zeros(1, channels, h, w)
    for value in (NAN, math.inf):
        wrong = right.clone()
        wrong[0, 0, 0, 0] = value
        refuse(pipe, "latents have NaN or infinite values", ValueError, latents=wrong, **good)
    for wrong in (right[0], right.repeat(1, 5, 1, 1), right[:, :, 0], right.long(), right[:0]):
        refuse(pipe, rf"(latents are \(B, {channels}, |How many samples)", ValueError, latents=wrong, **good)
    refuse(pipe, "latents are a tensor", TypeError, latents=right.tolist(), **good)
    if name == "joint_vit":
        refuse(pipe, r"latents are \(B, 1, 16, 8\)", latents=torch.zeros(1, 1, 16, 16))
    if name in ("unconditional", "joint"):
        refuse(pipe, "with H and W multiples of", ValueError, latents=torch.zeros(1, channels, h + 1, w), **good)


@pytest.mark.parametrize("name", OWN)
def test_samples_labels_and_callbacks(pipes, name):
    pipe = pipes(name)
    guided = {"guidance_scale": 2.0}
    for count in (0, -1, 2.0, True):
        refuse(pipe, "How many samples. batch_size must be a whole number from 1", batch_size=count)
        refuse(pipe, "num_images_per_label must be a whole number", num_images_per_label=count)
    refuse(pipe, "nothing is: pass it, or batch_size", num_images_per_label=2)
    for labels in (99, [0, -1]):
        refuse(pipe, r"class_labels.*got \[?(99|.*-1)", ValueError, class_labels=labels, **guided)
    for labels in (0.5, True, [[1]], object(), torch.tensor([1.0]), [None]):
        refuse(pipe, "class_labels are", TypeError, class_labels=labels, **guided)
    refuse(pipe, "(How many samples|class_labels)", class_labels=[], **guided)
    refuse(pipe, "How many samples. batch_size: 3, class_labels: 2", class_labels=[0, 1], batch_size=3, **guided)
    one = [torch.Generator()]
    refuse(pipe, "class_labels: 2, generator: 1", class_labels=[0, 1], generator=one, **guided)
    refuse(pipe, "class_labels: 4, generator: 1", class_labels=[0, 1], generator=one, num_images_per_label=2, **guided)
    refuse(pipe, "is called after each step; got 3", callback_on_step_end=3)
    refuse(pipe, r"asked for \['noise'\]", callback_on_step_end_tensor_inputs=["noise"])


def test_what_a_callback_returns():
    pipe = sit_pipeline()
    told = r"A callback may return tensors of \['class_labels'.*; it returned \['noise'\]"
    refuse(pipe, told, callback_on_step_end=lambda *_: {"noise": None})


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("sit", {"class_labels": [0, 6]}, r"from 0 to 4, or 5 for the null class; got \[6\]"),
        ("sit", {"guidance_scale": 2.0, "class_labels": 5}, "there is none: pass class_labels below 5"),
        ("sit", {"guidance_interval": (0.7, 0.3)}, "the wrong way round"),
        ("sit", {"guidance_interval": 0.5}, r"\(low, high\) in t"),
        ("sit", {"guidance_scale": 2.0, "guidance_interval": (0.505, 0.515)}, "holds none of the 50 steps, t = 1 to"),
        ("sit", {"guidance_channels": 4}, "from 1 to 3"),
        ("sit", {"guidance_channels": 1.5}, "guidance_channels must be a whole number"),
        ("sit", {"latents": torch.ones(1, 3, 8, 7)}, "width=7 is no multiple of 2"),
        ("sit", {"latents": torch.ones(1, 3, 8, 8), "height": 16}, "the latents are for 8"),
        ("sit", {"height": 7}, "height=7 is no multiple of 2"),
        ("sit", {"width": 0}, "width must be a whole number from 1; got 0"),
        ("sit", {"width": 8.0}, "width must be a whole number"),
        ("sit", {"class_labels": "cod"}, "has no id2label"),
        ("unconditional", {"guidance_scale": 2.0}, "guides towards classes: pass class_labels"),
        ("joint", {"guidance_scale": 2.0}, "guides towards classes: pass class_labels"),
        ("joint", {"class_labels": 1}, "pass guidance_scale="),
        ("joint", {"class_labels": "fox", "guidance_scale": 2.0}, r"No class has the names \['fox'\]"),
        ("joint", {"class_labels": 1, "guidance_scale": 2.0, "guidance_normalization": "unit"}, "one of none, relat"),
        ("joint_vit", {"class_labels": 1, "guidance_scale": 2.0, "guidance_normalization": "sigma"}, "has none"),
        ("dit", {"class_labels": [1001]}, "A class label must be a whole number from 0 to 1000; got 1001"),
        ("dit", {"class_labels": 1}, "class_labels is a list of class ids"),
        ("dit", {"class_labels": [0.5]}, "A class label must be a whole number"),
        ("dit", {"class_labels": [1], "output_type": "latent"}, "'pil', 'np' or 'pt'; got 'latent'"),
        ("sd", {"prompt": "a", "height": 0}, "height must be a whole number from 1"),
        ("sd", {"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number"),
        ("sd", {"prompt": "a", "guidance_rescale": 2.0}, "guidance_rescale lies from 0 to 1"),
        ("sdxl", {"prompt": "a", "denoising_end": 1.5}, "denoising_end lies from 0 to 1"),
    ],
)
def test_one_pipelines_own(pipes, name, given, told):
    refuse(pipes(name), told, **given)


def test_settings_that_the_scheduler_does_not_act_on():
    for make in (lambda s: unconditional("ddpm", s), lambda s: joint(scheduler=s)):
        for scheduler in (DDPMScheduler(), EulerDiscreteScheduler(), FlowMatchODEScheduler()):
            name = type(scheduler).__name__
            refuse(make(scheduler), f"{name} does not take eta, got 0.5", eta=0.5)
            refuse(make(scheduler), f"{name} does not take use_clipped_model_output", use_clipped_model_output=True)
    plain = unconditional("ddpm")
    refuse(plain, "unconditional .*drop class_labels", class_labels=1)
    refuse(plain, r"needs a null class, .*num_class_embeds=None", guidance_scale=2.0)
    refuse(unconditional("ddpm", FlowMatchODEScheduler(use_dynamic_shifting=True)), "this network has none")


def test_a_scheduler_made_from_the_config_of_another_process():
    flow, cosine = FlowMatchODEScheduler(), FlowMatchODEScheduler(path="cosine")
    diffusion = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    for scheduler, told in (
        (DDIMScheduler.from_config(flow.config), "This DDIMScheduler was made from the config of a flow"),
        (EulerDiscreteScheduler.from_config(flow.config), "EulerDiscreteScheduler was made from the config of a flow"),
        (DDIMScheduler.from_config(FlowMatchEulerDiscreteScheduler(base_image_seq_len=64).config), "of a flow"),
        (FlowMatchEulerDiscreteScheduler.from_config(diffusion.config), "made from the config of a diffusion process"),
        (FlowMatchEulerDiscreteScheduler.from_config(cosine.config), "path 'cosine', which it does not know"),
    ):
        refuse(sit_pipeline(scheduler), told, ValueError)
        refuse(unconditional("ddpm", scheduler), told, ValueError)
        refuse(joint(scheduler=scheduler), told, ValueError)


# Joint diffusion


def test_parts_of_joint_diffusion():
    unet, vit, head = joint().unet, joint("vit").unet, joint().classifier
    for parts, error, told in (
        ((unet, DDIMScheduler()), ValueError, "classifier is missing: .* needs the JointHead"),
        ((vit, DDIMScheduler(), head), ValueError, "brings its own classifier; leave classifier out"),
        ((unet, DDIMScheduler(), unet), TypeError, "is a JointHead; got UNet2DModel"),
        ((build("dit").transformer, DDIMScheduler(), head), TypeError, "unet is a UNet2DModel or a JointViTModel"),
        ((unet2d(1, num_class_embeds=4), DDIMScheduler(), head), ValueError, "takes class labels itself"),
    ):
        with pytest.raises(error, match=told):
            JointDiffusionPipeline(*parts)


@pytest.mark.parametrize("name", ["joint", "joint_vit"])
def test_images_of_joint_diffusion(pipes, name):
    """Another size than the classifier has learned is taken by consent only."""
    pipe, (_, h, w) = pipes(name), LATENTS[name]
    double = torch.rand(1, 1, 2 * h, 2 * w)
    for call in (pipe.classify, lambda images: pipe.counterfactual(images, 1, guidance_scale=1.0)):
        refuse(pipe, rf"The images are {2 * h} x {2 * w} \(H x W\).*image_size=\({h}, {w}\)", call=call, images=double)
        refuse(pipe, "NaN or infinite", call=call, images=double * NAN)
        refuse(pipe, "No images", call=call, images=[])
        refuse(pipe, "expected uint8|Cannot read images", call=call, images=np.zeros((h, w), dtype=np.int64))
    torch.manual_seed(0)
    again = MAKERS[name]()
    assert again.classify(double, image_size=(h, w)).logits.shape == (1, 3)
    if name == "joint":
        assert again.classify(double, image_size=(2 * h, 2 * w)).logits.shape == (1, 3)


def test_a_vit_without_classes():
    vit = JointViTModel(8, 2, 1, num_layers=1, hidden_size=16, num_attention_heads=2, num_classes=0)
    pipe = JointDiffusionPipeline(vit, DDIMScheduler())
    refuse(pipe, "no classes .num_classes=0.: it samples only", call=pipe.classify, images=torch.rand(1, 1, 8, 8))
    refuse(pipe, "no classes .num_classes=0.; leave class_labels out", class_labels=0, guidance_scale=1.0)


@pytest.mark.parametrize("strength", [0, -1, 2, 1.001, NAN, "half", True])
def test_strength(pipes, strength):
    pipe = pipes("joint")
    settings = {"images": torch.rand(1, 1, 16, 16), "class_labels": 1, "guidance_scale": 1.0}
    told = "strength (lies above 0 and up to 1|must be)"
    refuse(pipe, told, call=pipe.counterfactual, strength=strength, **settings)


def test_counterfactual(pipes):
    pipe = pipes("joint")
    settings = {"images": torch.rand(2, 1, 16, 16), "class_labels": 1, "guidance_scale": 1.0}
    told = "takes none; here it lies from 0.1 to 1"
    refuse(pipe, told, call=pipe.counterfactual, strength=0.05, num_inference_steps=10, **settings)
    refuse(pipe, "num_inference_steps must be", call=pipe.counterfactual, num_inference_steps=0, **settings)
    refuse(pipe, "batch_size: 2, class_labels: 3", call=pipe.counterfactual, **{**settings, "class_labels": [0, 1, 2]})
    refuse(pipe, "eta lies", call=pipe.counterfactual, eta=5, **settings)


# Vectors, features


def test_vectors():
    pipe = sit_pipeline(num_classes=0, condition_dim=6)
    refuse(pipe, r"condition is \(B, 6\), or one vector for all; got \(2, 5\)", condition=torch.ones(2, 5))
    refuse(pipe, "condition has NaN", condition=torch.full((2, 6), NAN))
    refuse(pipe, "How many samples", condition=torch.ones(2, 6), batch_size=3)
    refuse(pipe, "there is none", guidance_scale=2.0)
    refuse(sit_pipeline(), "takes no vectors", condition=torch.ones(6))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"images": []}, "list is empty"),
        ({"images": torch.full((1, 1, 16, 16), NAN)}, "NaN or infinite"),
        ({"images": "cat.png"}, "Open files first"),
        ({"layers": "mid"}, "No layer 'mid'"),
        ({"layers": []}, "layer"),
        ({"timestep": -1}, "outside"),
        ({"timestep": NAN}, "timestep"),
        ({"timestep": 1e9}, "outside"),
        ({"ensemble_size": 0}, "ensemble_size"),
        ({"ensemble_size": 1.5}, "ensemble_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"pooling": "median"}, "pooling"),
        ({"seed": 0.5}, "seed"),
        ({"ids": ["a", "b"]}, "ids"),
        ({"class_labels": 1}, "class_labels"),
    ],
)
def test_features(given, told):
    pipe = FeatureExtractionPipeline.from_pipe(build("ddpm"))
    good = {"images": torch.rand(1, 1, 16, 16), "layers": "mid_block", "timestep": 100}
    refuse(pipe, told, **{**good, **given})
