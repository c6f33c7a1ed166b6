"""Perturbed-attention guidance on networks: what its lane computes, what stays as it is, faults that it has not."""

import contextlib

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, FluxKontextPipeline, StableDiffusionPAGPipeline
from diffusers.models.attention_processor import (
    AttnProcessor,
    IPAdapterAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from peft import LoraConfig

from diffusers_repr import CFG, PAG, Denoiser, guide
from diffusers_repr.guidance import Blur, Drop, Identity, Mask
from diffusers_repr.guidance.attention.projections import named_arguments
from tests.capture.lane_cases import denoiser_of, inputs_of
from tests.guidance.attention_cases import perturbed
from tests.testers.cases import pairs, some
from tests.testers.models import CONDITIONS, SIZES, WIDTH, build

PERTURBATIONS = {
    "identity": Identity(),
    "drop": Drop(),
    "blur": Blur(),
    "blur of 1 token": Blur(1.0),
    "mask": Mask(),
    "mask of a third": Mask(0.33, seed=4),
}
# Layer -> grid of its tokens (h, w) and text tokens in one stream with them.
GRIDS = {
    ("ddpm", "down_blocks.1.attentions.0"): ((8, 12), 0),
    ("sd", "down_blocks.1.attentions.1.transformer_blocks.0.attn1"): ((8, 12), 0),
    ("sd", "mid_block.attentions.0.transformer_blocks.0.attn1"): ((2, 3), 0),
    ("sdxl", "up_blocks.0.attentions.1.transformer_blocks.1.attn1"): ((4, 6), 0),
    ("dit", "transformer_blocks.2.attn1"): ((8, 8), 0),
    ("pixart", "transformer_blocks.1.attn1"): ((8, 12), 0),
    ("sd3", "transformer_blocks.0.attn"): ((8, 12), 0),
    ("flux", "transformer_blocks.1.attn"): ((8, 12), 0),
    ("flux", "single_transformer_blocks.0.attn"): ((8, 12), 512),
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def forward(model, inputs):
    return model(**inputs)[0]


@contextlib.contextmanager
def replaced(model, path, function):
    """A layer that returns something else: `function(module, arguments by name)`."""
    module = model.get_submodule(path)

    def hook(module, args, kwargs, output):
        return function(module, named_arguments(module, args, kwargs))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


# What the lane computes


# Each perturbation on three places, each place under two.
FAST = [(*place, list(PERTURBATIONS)[(at + more) % 6]) for at, place in enumerate(GRIDS) for more in (0, 3)]


@pytest.mark.parametrize(
    ("name", "layer", "kind"), some([(*place, kind) for place in GRIDS for kind in PERTURBATIONS], *FAST)
)
def test_is_the_difference_from_a_pass_with_that_layer_perturbed(name, layer, kind):
    """Against two passes by hand, with the token grid and the text tokens told."""
    denoiser, perturbation = denoiser_of(name), PERTURBATIONS[kind]
    inputs, (grid, text) = inputs_of(name, 2), GRIDS[name, layer]
    plain = forward(denoiser.model, inputs)
    with replaced(denoiser.model, layer, lambda m, a: perturbed(m, a, perturbation, grid, text)):
        weak = forward(denoiser.model, inputs)
    with guide(denoiser, PAG(2.5, layers=layer, perturbation=kind if " " not in kind else perturbation)):
        found = forward(denoiser.model, inputs)
    change = 2.5 * (plain - weak)
    if name in ("dit", "pixart"):  # the learned variance is left alone
        change[:, 4:] = 0
    assert change.abs().max() > 1e-5
    assert (found - plain - change).abs().max() < 1e-5 * max(1.0, float(plain.abs().max()))


def test_unconditional_unet_against_diffusers_processor_on_its_modules():
    """No stock pipeline perturbs a `UNet2DModel`: it has no `attn_processors`, but its modules have processors."""
    denoiser = denoiser_of("ddpm")
    unet, inputs = build("ddpm").unet, inputs_of("ddpm", 2)
    layers = ["down_blocks.1.attentions.0", "mid_block.attentions.0"]
    plain = forward(unet, inputs)
    for layer in layers:
        unet.get_submodule(layer).processor = PAGIdentitySelfAttnProcessor2_0()
    doubled = {**inputs, "sample": inputs["sample"].repeat(2, 1, 1, 1), "timestep": inputs["timestep"].repeat(2)}
    original, weak = forward(unet, doubled).chunk(2)
    close(original, plain)
    with guide(denoiser, PAG(3.0, layers=layers)) as handle:
        found = forward(denoiser.model, inputs)
    close(found, plain + 3 * (plain - weak))
    assert handle.stats.steps[0].joined == "down_blocks.1"


def test_processors_of_an_unconditional_unet_may_be_others():
    unet, inputs = build("ddpm").unet, inputs_of("ddpm", 2)
    expected = guided(unet, PAG(3.0), inputs)
    processor = AttnProcessor()
    unet.mid_block.attentions[0].set_processor(processor)
    close(guided(unet, PAG(3.0), inputs), expected)
    assert unet.mid_block.attentions[0].processor is processor


def guided(model, config, inputs):
    with guide(Denoiser(model, DDIMScheduler()), config):
        return forward(model, inputs)


def test_one_image_token_attends_to_itself_already():
    unet = build("ddpm").unet
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))  # one token in the middle block
    plain = forward(unet, {"sample": x, "timestep": 500})
    with pytest.warns(UserWarning, match="PAG changed nothing"):
        found = guided(unet, PAG(3.0), {"sample": x, "timestep": 500})
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5)


# Faults of other implementations, each a test that they are not shared


def test_without_guidance_of_the_pipeline_the_lane_is_neither_the_null_nor_the_condition():
    """diffusers' PAG guider gives its lane the null condition then, so it is classifier-free guidance."""
    denoiser = denoiser_of("sd")
    inputs, null = inputs_of("sd", 2), inputs_of("sd", 2)
    null["encoder_hidden_states"] = null["encoder_hidden_states"].flip(0)
    cond, nulled = forward(denoiser.model, inputs), forward(denoiser.model, null)
    with guide(denoiser, PAG(1.0, layers="*attn1")):
        lane = 2 * cond - forward(denoiser.model, inputs)
    with guide(denoiser, CFG(2.0), null={"encoder_hidden_states": null["encoder_hidden_states"]}):
        guided_by_null = forward(denoiser.model, inputs)
    close(guided_by_null, 2 * cond - nulled)
    assert (lane - cond).abs().max() > 1e-3
    assert (lane - nulled).abs().max() > 1e-3
    layers = [path for path, _ in denoiser.model.named_modules() if path.endswith("attn1")]
    assert len(layers) == 16
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(replaced(denoiser.model, layer, lambda m, a: perturbed(m, a, Identity())))
        close(lane, forward(denoiser.model, inputs), 1e-4)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_smoothed_energy_is_no_idle_term(scale):
    """diffusers' guider of it never counts its lane: nothing happens."""
    pipe = build("sd")
    call = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 2, "output_type": "latent"}

    def run(guidance=None, guidance_scale=4.0):
        generator = torch.Generator().manual_seed(0)
        with guide(pipe, guidance) if guidance else contextlib.nullcontext():
            return pipe(**call, guidance_scale=guidance_scale, generator=generator).images

    for guidance_scale in (1.0, 4.0):
        plain = run(None, guidance_scale)
        moved = run(PAG(scale, layers="down_blocks.*", perturbation="blur"), guidance_scale)
        finite = run(PAG(scale, layers="down_blocks.*", perturbation=Blur(2.0)), guidance_scale)
        assert (moved - plain).abs().max() > 1e-3
        assert (finite - plain).abs().max() > 1e-4
        assert (finite - moved).abs().max() > 1e-4


def test_layers_as_one_string_or_several():
    denoiser, inputs = denoiser_of("sd"), inputs_of("sd", 1)
    mid = "mid_block.attentions.0.transformer_blocks.0.attn1"
    results = [
        guided(denoiser.model, PAG(3.0, layers=layers), inputs)
        for layers in (None, mid, [mid], (mid,), "mid_block.*", ["mid_block.*", mid], "mid_*.attn?")
    ]
    assert all(torch.equal(result, results[0]) for result in results)


# What is in the network stays


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_lora_acts_in_the_perturbed_layer(name):
    """In all lanes, as if it were merged into the weights."""
    pipe = build(name)
    network = pipe.unet if name == "sd" else pipe.transformer
    network.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    draw = torch.Generator().manual_seed(1)
    for path, parameter in network.named_parameters():
        if "lora_" in path:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    with guide(pipe, PAG(3.0)):
        found = latents(pipe, name)
        network.disable_adapters()
        without = latents(pipe, name)
        network.enable_adapters()
        assert torch.equal(latents(pipe, name), found)
        if name == "sd":
            half = latents(pipe, name, cross_attention_kwargs={"scale": 0.5})
    merged = build(name)
    for expected in (found, half) if name == "sd" else (found,):
        for path, layer in network.named_modules():
            if hasattr(layer, "lora_A"):
                change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                plain = (merged.unet if name == "sd" else merged.transformer).get_submodule(path)
                plain.weight.add_(change, alpha=1.0 if expected is found else -0.5)
        with guide(merged, PAG(3.0)):
            close(expected, latents(merged, name), 1e-4)
    assert (found - without).abs().max() > 1e-2


def latents(pipe, name, **call):
    size = dict(zip(("height", "width"), SIZES[name], strict=True))
    call = {
        **CONDITIONS[name],
        **size,
        "num_inference_steps": 2,
        "output_type": "latent",
        "guidance_scale": 4.0,
        **call,
    }
    return pipe(**call, generator=torch.Generator().manual_seed(0)).images


def with_image_prompt(pipe):
    torch.manual_seed(0)
    unet = pipe.unet
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, WIDTH, 3)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    processors = {}
    for path, processor in unet.attn_processors.items():
        width = unet.get_submodule(path.removesuffix(".processor")).to_q.in_features
        own = path.endswith("attn1.processor")
        processors[path] = processor if own else IPAdapterAttnProcessor2_0(width, WIDTH, num_tokens=[3], scale=1.0)
    unet.set_attn_processor(processors)
    return pipe


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_image_prompts_act_in_all_lanes(guidance_scale):
    pipe = with_image_prompt(build("sd"))
    parts = {**with_image_prompt(build("sd")).components}
    theirs = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["down_blocks.1"])
    theirs.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(2)
    prompt = torch.randn(2 if guidance_scale > 1 else 1, 1, 8, generator=draw)
    call = {"ip_adapter_image_embeds": [prompt], "guidance_scale": guidance_scale}
    expected = latents(theirs, "sd", pag_scale=3.0, **call)
    with guide(pipe, PAG(3.0, layers="down_blocks.1.*")):
        found = latents(pipe, "sd", **call)
        other = latents(pipe, "sd", **{**call, "ip_adapter_image_embeds": [-prompt]})
    close(found, expected)
    assert (found - other).abs().max() > 1e-3
    assert (found - latents(pipe, "sd", **call)).abs().max() > 1e-3


# Restored


@pytest.mark.parametrize("error", some([None, ValueError, KeyboardInterrupt], None, KeyboardInterrupt))
def test_processors_and_random_numbers_are_as_before(error):
    pipe = build("sd")
    processors = dict(pipe.unet.attn_processors)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()]

    def fail(pipe, step, t, kwargs):
        if error is not None and step == 1:
            raise error
        return {}

    state = torch.get_rng_state()
    guidance = [PAG(3.0, perturbation=kind) for kind in ("identity", "drop", "blur", "mask")]
    with pytest.raises(error) if error else contextlib.nullcontext(), guide(pipe, guidance):
        latents(pipe, "sd", callback_on_step_end=fail)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(pipe.unet.attn_processors[key] is value for key, value in processors.items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.unet.modules()] == hooks


# Reference images


@pytest.mark.parametrize("layer", ["transformer_blocks.1.attn", "single_transformer_blocks.1.attn"])
def test_reference_images_are_image_tokens_too(layer):
    """FLUX Kontext hands them to the network behind the latents, here of another size."""
    parts = build("flux").components
    pipe = FluxKontextPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 32, generator=torch.Generator().manual_seed(6))
    call = {"prompt": "a cat", "height": 32, "width": 48, "num_inference_steps": 1, "output_type": "latent"}
    call |= {"image": image, "_auto_resize": False, "max_area": 32 * 48}

    def run():
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    text, sequence = 512, []
    plain = run()
    note = pipe.transformer.register_forward_hook(
        lambda m, a, k, out: sequence.append(k["hidden_states"]), with_kwargs=True
    )
    tokens = 0 if not layer.startswith("single") else text
    with replaced(pipe.transformer, layer, lambda m, a: perturbed(m, a, Identity(), None, tokens)):
        weak = run()
    note.remove()
    assert sequence[0].shape[1] > 96
    with guide(pipe, PAG(2.0, layers=layer)) as handle:
        found = run()
    assert found.shape == (1, 96, 16)
    close(found, plain + 2 * (plain - weak))
    assert (found - plain).abs().max() > 1e-3
    assert handle.stats.steps[0].joined == layer.removesuffix(".attn")


# Weights elsewhere


@pytest.mark.parametrize(
    ("name", "kind"),
    pairs(["sd", "flux"], ["sequential", "leaf_level"], ("sd", "sequential"), ("flux", "leaf_level")),
)
def test_offloaded_weights(name, kind):
    """Projections of the perturbed rows are called when the module's own call is over."""
    guidance, results = [PAG(3.0), PAG(1.0, perturbation="mask")], []
    for offloaded in (False, True):
        pipe = build(name)
        network = pipe.unet if name == "sd" else pipe.transformer
        if offloaded and kind == "sequential":
            cpu_offload(network, execution_device=torch.device("cpu"))
        elif offloaded:
            network.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind)
        with guide(pipe, guidance):
            results.append(latents(pipe, name, guidance_scale=3.5))
    assert torch.equal(*results)
