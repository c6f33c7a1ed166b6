"""Perturbed attention against explicit probabilities, diffusers' own PAG processors and the modules themselves."""

import copy
import math

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
    SD3IPAdapterJointAttnProcessor2_0,
)
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from peft import LoraConfig, inject_adapter_in_model

from diffusers_repr.guidance.attention.perturbations import Blur, Drop, Identity, Mask, _blur_matrix
from tests.guidance.attention_cases import (
    CASES,
    GRID,
    PLAIN,
    TEXT,
    TOKENS,
    WIDTH,
    _self,
    _two,
    case,
    flux,
    identity_by_mask,
    inputs,
    joint,
    perturbed,
    plain,
    randomised,
    rotary,
    same,
    supported,
    with_probabilities,
)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_identity_is_the_masked_softmax(name, dtype, tolerance):
    module, arguments, text = case(name, dtype)
    expected = with_probabilities(module, arguments, text, identity_by_mask)
    found, own = perturbed(module, arguments, Identity(), None, text), module(**arguments)
    size = (own if isinstance(own, torch.Tensor) else own[0]).abs().max().item()
    assert same(found, expected, tolerance * size)
    assert not same(found, own, 1e-2 * size)


@pytest.mark.parametrize("name", ["self", "spatial"])
def test_identity_equals_diffusers_pag(name):
    module, arguments, _ = case(name)
    own, hidden = module(**arguments), arguments["hidden_states"]
    module.set_processor(PAGIdentitySelfAttnProcessor2_0())
    clean, expected = module(torch.cat([hidden, hidden])).chunk(2)
    module.set_processor(AttnProcessor2_0())
    assert same(clean, own, 1e-12)
    assert same(perturbed(module, arguments, Identity()), expected, 1e-12)


@pytest.mark.parametrize("name", ["joint, q and k not normed", "joint, last"])
def test_joint_identity_equals_diffusers_pag(name):
    """Their processor leaves out the norms of q and k."""
    module, arguments, _ = case(name)
    module.norm_q = module.norm_k = module.norm_added_q = module.norm_added_k = None
    module.set_processor(PAGJointAttnProcessor2_0())
    outputs = module(**{key: torch.cat([value, value]) for key, value in arguments.items()})
    module.set_processor(JointAttnProcessor2_0())
    assert same(perturbed(module, arguments, Identity()), [x.chunk(2)[1] for x in outputs], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_sana_identity_equals_diffusers_pag(dtype):
    module = plain(processor=SanaLinearAttnProcessor2_0()).to(dtype)
    hidden = inputs()[0].to(dtype)
    if dtype == torch.float16:  # finite values, an output that is not
        hidden = hidden * 1000
        module.to_out[0].weight.data *= 40
    expected = PAGIdentitySanaLinearAttnProcessor2_0()(module, torch.cat([hidden, hidden])).chunk(2)[1]
    found = perturbed(module, {"hidden_states": hidden}, Identity())
    assert supported(module, needs="values").linear
    assert torch.equal(found, expected)
    if dtype == torch.float16:
        assert found.abs().max() == 65504
    assert torch.equal(perturbed(module, {"hidden_states": hidden}, Drop()), module.to_out[0].bias.expand_as(hidden))


def test_one_token_already_sees_itself_only():
    for name in PLAIN:
        module, arguments, _ = case(name)
        arguments.pop("attention_mask", None)
        hidden = arguments["hidden_states"]
        arguments["hidden_states"] = hidden[..., :1, :1] if hidden.ndim == 4 else hidden[:, :1]
        for perturbation in (Identity(), Blur(), Blur(1.0), Mask(1.0)):
            assert same(perturbed(module, arguments, perturbation, (1, 1)), module(**arguments), 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_drop_leaves_the_bias_the_residual_and_the_text(name):
    module, arguments, text_tokens = case(name)
    found, own = perturbed(module, arguments, Drop(), None, text_tokens), module(**arguments)
    hidden = arguments["hidden_states"]
    if "single" in name:
        assert same(found[:, :TEXT], own[:, :TEXT], 1e-12)
        assert not found[:, TEXT:].any()
        return
    image = found if isinstance(found, torch.Tensor) else found[0]
    bias = module.to_out[0].bias
    expected = (hidden + bias[:, None, None]) / 1.7 if hidden.ndim == 4 else bias.expand_as(hidden)
    assert same(image, expected, 1e-12)
    if not isinstance(found, torch.Tensor):
        assert same(found[1], own[1], 1e-12)


def gaussian(size, sigma):
    """Blur of a line with mirrored ends, by a loop over many images of each place."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for row in range(size):
        for offset in range(-60, 61):
            place = (row + offset) % (2 * size)
            matrix[row, min(place, 2 * size - 1 - place)] += math.exp(-((offset / sigma) ** 2) / 2)
    return matrix / matrix.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sigma", [0.8, 3.0])
def test_blur_smooths_the_scores_over_the_queries(name, sigma):
    module, arguments, text = case(name)
    blur = torch.kron(gaussian(GRID[0], sigma), gaussian(GRID[1], sigma))

    def change(scores, image):
        return torch.cat(
            [scores[..., : image.start, :], blur @ scores[..., image, :], scores[..., image.stop :, :]], dim=-2
        )

    expected = with_probabilities(module, arguments, text, change)
    assert same(perturbed(module, arguments, Blur(sigma), GRID, text), expected, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_limits_of_the_blur(name):
    module, arguments, text = case(name)

    def mean(scores, image):
        scores = scores.clone()
        scores[..., image, :] = scores[..., image, :].mean(-2, keepdim=True)
        return scores

    far = with_probabilities(module, arguments, text, mean)
    assert same(perturbed(module, arguments, Blur(1e-3), GRID, text), module(**arguments), 1e-12)
    assert same(perturbed(module, arguments, Blur(math.inf), None, text), far, 1e-12)
    assert same(perturbed(module, arguments, Blur(1e4), GRID, text), far, 1e-12)
    assert same(perturbed(module, arguments, Blur(31.9), GRID, text), far, 1e-12)
    assert not same(far, module(**arguments), 1e-2)


@pytest.mark.parametrize("sigma", [0.7, 2.0, math.inf])
def test_constant_queries_are_not_changed_by_the_blur(sigma):
    module, arguments, _ = case("self")
    with torch.no_grad():
        module.to_q.weight.zero_()
    assert same(perturbed(module, arguments, Blur(sigma), GRID), module(**arguments), 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_mask_lies_between_plain_and_identity(name):
    module, arguments, text = case(name)
    assert same(perturbed(module, arguments, Mask(0.0), None, text), module(**arguments), 1e-12)
    identity = perturbed(module, arguments, Identity(), None, text)
    assert same(perturbed(module, arguments, Mask(1.0), None, text), identity, 1e-12)
    kept = Mask(0.5, seed=3).kept(TOKENS)

    def change(scores, image):
        scores = scores.clone()
        scores[..., image, image] = scores[..., image, image].masked_fill(~kept, -math.inf)
        return scores

    expected = with_probabilities(module, arguments, text, change)
    assert same(perturbed(module, arguments, Mask(0.5, seed=3), None, text), expected, 1e-12)


def test_the_masks_share_and_seed():
    kept = Mask(0.3).kept(300)
    share = 1 - (kept.sum().item() - 300) / (300 * 299)
    assert kept.diagonal().all()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 89700)
    assert torch.equal(kept, Mask(0.3, seed=0).kept(300))
    assert not torch.equal(kept, Mask(0.3, seed=1).kept(300))


@pytest.mark.parametrize("perturbation", [Identity(), Drop(), Blur(), Blur(1.0), Mask()])
def test_nothing_is_drawn_and_twice_is_equal(perturbation):
    module, arguments, text = case("flux single")
    weights, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    one = perturbed(module, arguments, perturbation, GRID, text)
    assert torch.equal(one, perturbed(module, arguments, perturbation, GRID, text))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("perturbation", [Identity(), Blur(1.0), Mask()])
def test_gradients_flow_even_if_first_run_in_inference_mode(perturbation):
    module, arguments, _ = case("joint, q and k not normed")
    with torch.inference_mode():
        perturbed(module, arguments, perturbation, GRID)
    hidden = arguments["hidden_states"][:1].requires_grad_()
    arguments = {"hidden_states": hidden, "encoder_hidden_states": arguments["encoder_hidden_states"][:1]}
    assert torch.autograd.gradcheck(
        lambda x: perturbed(module, {**arguments, "hidden_states": x}, perturbation, GRID), hidden, fast_mode=True
    )


def test_what_is_kept_between_calls_is_no_inference_tensor():
    with torch.inference_mode():
        assert not Mask(0.6, seed=37).kept(TOKENS).is_inference()
        assert not _blur_matrix(5, 1.37, torch.device("cpu"), torch.float32).is_inference()


@pytest.mark.parametrize("name", ["self", "flux"])
def test_lora_in_the_value_projection_is_seen(name):
    module, arguments, _ = case(name)
    before = perturbed(module, arguments, Identity())
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False), module)
    module.to(torch.float64)
    assert not same(perturbed(module, arguments, Identity()), before, 1e-3)
    assert same(with_probabilities(module, arguments, 0), module(**arguments), 1e-12)
    layer = module.to_v
    merged = copy.deepcopy(layer.base_layer)
    merged.weight.data += layer.get_delta_weight("default")
    module.to_v = merged
    expected = perturbed(module, arguments, Identity())
    module.to_v = layer
    assert same(perturbed(module, arguments, Identity()), expected, 1e-12)


def with_image_prompt(kind):
    draw = torch.Generator().manual_seed(7)
    if kind == "flux":
        module, arguments = _two(flux(), image_rotary_emb=rotary())
        module.set_processor(randomised(FluxIPAdapterAttnProcessor(WIDTH, 12, num_tokens=(4, 3), scale=[0.6, 0.9])))
        prompts = [torch.randn(3, 1, count, 12, generator=draw).double() for count in (4, 3)]
        arguments["ip_hidden_states"] = prompts
    else:
        module, arguments = _two(joint()) if kind == "joint" else _self(plain(qk_norm="rms_norm"))
        module.set_processor(randomised(SD3IPAdapterJointAttnProcessor2_0(WIDTH, 12, 8, timesteps_emb_dim=6)))
        arguments["ip_hidden_states"] = torch.randn(3, 4, 12, generator=draw)
        arguments["temb"] = torch.randn(3, 6, generator=draw)
    cast = {key: value.double() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    return module.double(), cast


@pytest.mark.parametrize("kind", ["joint", "self", "flux"])
def test_an_image_prompt_stays(kind):
    module, arguments = with_image_prompt(kind)
    assert not supported(module).linear
    own = module(**arguments)
    for nearly_none in (Mask(0.0), Blur(1e-3)):
        assert same(perturbed(module, arguments, nearly_none, GRID), own, 1e-12)
    identity = perturbed(module, arguments, Identity())
    assert same(perturbed(module, arguments, Mask(1.0)), identity, 1e-12)
    assert not same(identity, own, 1e-2)
    if kind == "flux":
        assert same(identity[2], own[2], 1e-12)
        module.set_processor(FluxAttnProcessor())
        assert same(perturbed(module, arguments, Identity()), identity[:2], 1e-12)
        return
    module.processor.scale = 0
    without = perturbed(module, arguments, Identity())
    module.set_processor(JointAttnProcessor2_0())
    assert same(perturbed(module, arguments, Identity()), without, 1e-12)
    assert not same(without, identity, 1e-2)


def test_the_image_prompts_own_attention_is_perturbed_too():
    """SD3's adapter attends to image tokens a second time; one image token is its own whole image."""
    module, arguments = with_image_prompt("self")
    module.processor.scale = 1.3
    whole = perturbed(module, arguments, Identity())
    for at in range(3):
        token = {**arguments, "hidden_states": arguments["hidden_states"][:, at : at + 1]}
        assert same(whole[:, at : at + 1], module(**token), 1e-12)


def test_bad_calls():
    module, arguments, _ = case("flux single")
    for text in (0, -1, TOKENS + TEXT):
        with pytest.raises(ValueError, match="21 tokens.*the image's must be told"):
            perturbed(module, arguments, Identity(), None, text)
    with pytest.raises(ValueError, match="needs the token grid.*16 image tokens"):
        perturbed(module, arguments, Blur(1.0), (3, 5), TEXT)
    with pytest.raises(ValueError, match="got None.*Blur"):
        perturbed(module, arguments, Blur(1.0), None, TEXT)
    module, arguments, _ = case("self")
    for perturbation in (Identity(), Mask()):
        with pytest.raises(ValueError, match="cross-attention"):
            perturbed(module, {**arguments, "encoder_hidden_states": arguments["hidden_states"]}, perturbation)
    module, arguments, _ = case("flux")
    with pytest.raises(ValueError, match="Attention masks"):
        perturbed(module, {**arguments, "attention_mask": torch.zeros(3, 1, 21)}, Identity())
    for bad in (0, -1.0, math.nan, "1", True):
        with pytest.raises(ValueError, match="sigma"):
            Blur(bad)
    for bad in (-0.1, 1.1, math.nan, None, True):
        with pytest.raises(ValueError, match="ratio"):
            Mask(bad)
    with pytest.raises(ValueError, match="seed"):
        Mask(0.5, seed=1.5)
