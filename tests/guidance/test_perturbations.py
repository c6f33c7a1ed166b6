"""Perturbed attention against explicit probabilities, diffusers' own PAG processors and the modules themselves."""

import copy
import math

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    JointAttnProcessor2_0,
    PAGIdentitySanaLinearAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    PAGJointAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxPosEmbed
from peft import LoraConfig, inject_adapter_in_model

from diffusers_repr.guidance.perturbations import Blur, Drop, Identity, Mask, perturbed
from diffusers_repr.guidance.projections import (
    Kind,
    attention_received,
    check_supported,
    finish,
    kind_of,
    merge_heads,
    named_arguments,
    project,
)
from tests.testers.models import build

GRID, TEXT, WIDTH = (2, 8), 5, 16
TOKENS = GRID[0] * GRID[1]


def randomised(module):
    """Every parameter drawn anew, so that no norm, scale or bias is neutral."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(std=0.4).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module.eval()


def plain(**changes):
    return randomised(Attention(WIDTH, heads=2, dim_head=8, bias=True, **changes))


def spatial(**changes):
    settings = {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 1.7}
    return plain(**{**settings, **changes})


def joint(**changes):
    settings = {"added_kv_proj_dim": WIDTH, "context_pre_only": False, "processor": JointAttnProcessor2_0()}
    return plain(**{**settings, "qk_norm": "rms_norm", **changes})


def flux(single=False):
    changes = {"pre_only": True} if single else {"added_kv_proj_dim": WIDTH, "context_pre_only": False}
    return randomised(FluxAttention(WIDTH, heads=2, dim_head=8, bias=True, out_dim=WIDTH, **changes))


def rotary():
    rows, columns = torch.meshgrid(*map(torch.arange, GRID), indexing="ij")
    ids = torch.stack([torch.zeros(TOKENS), rows.flatten(), columns.flatten()], dim=1)
    return FluxPosEmbed(theta=100, axes_dim=[2, 2, 4])(torch.cat([torch.zeros(TEXT, 3), ids]))


def inputs(seed=0):
    draw = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(3, count, WIDTH, generator=draw) for count in (TOKENS, TEXT))
    return image, text


def _self(module):
    return module, {"hidden_states": inputs()[0]}


def _spatial(module):
    return module, {"hidden_states": inputs()[0].transpose(1, 2).unflatten(2, GRID)}


def _two(module, **more):
    image, text = inputs()
    return module, {"hidden_states": image, "encoder_hidden_states": text, **more}


def _single(module):
    image, text = inputs()
    return module, {"hidden_states": torch.cat([text, image], dim=1), "image_rotary_emb": rotary()}


def _masked(module):
    mask = torch.zeros(3, 1, TOKENS)
    mask[0, 0, 3:7] = -10000.0
    return module, {"hidden_states": inputs()[0], "attention_mask": mask}


# Name -> (module, arguments), every way an attention is built whose probabilities exist.
CASES = {
    "self": lambda: _self(plain()),
    "self, q and k normed": lambda: _self(plain(qk_norm="layer_norm")),
    "self, first processor": lambda: _self(plain(qk_norm="layer_norm", processor=AttnProcessor())),
    "self, sliced": lambda: _self(plain(processor=SlicedAttnProcessor(1))),
    "self, own scale": lambda: _self(plain(processor=AttnProcessor(), scale_qk=False)),
    "self, masked": lambda: _masked(plain()),
    "self, 2 of SD3.5": lambda: _self(plain(qk_norm="rms_norm", processor=JointAttnProcessor2_0())),
    "spatial": lambda: _spatial(spatial()),
    "spatial, first processor": lambda: _spatial(spatial(processor=AttnProcessor())),
    "joint": lambda: _two(joint()),
    "joint, q and k not normed": lambda: _two(joint(qk_norm=None)),
    "joint, last": lambda: _two(joint(context_pre_only=True)),
    "flux": lambda: _two(flux(), image_rotary_emb=rotary()),
    "flux, not rotated": lambda: _two(flux()),
    "flux single": lambda: _single(flux(single=True)),
}
PLAIN = [name for name in CASES if name.startswith(("self", "spatial"))]


def case(name, dtype=torch.float64):
    module, arguments = CASES[name]()
    cast = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    return module.to(dtype), cast, TEXT if "single" in name else 0


def with_probabilities(module, arguments, text_tokens, change=lambda scores, image: scores):
    """The module's output by the full matrix of scores, changed by `change(scores, image)`."""
    calls = project(module, arguments, text_tokens)
    scores = calls.query @ calls.key.transpose(-1, -2) * calls.scale
    scores = scores if calls.mask is None else scores + calls.mask
    weights = change(scores, calls.image).softmax(-1)
    return finish(module, arguments, merge_heads(weights @ calls.value), calls.image)


def identity_by_mask(scores, image):
    scores, tokens = scores.clone(), image.stop - image.start
    block = scores[..., image, image]
    block[..., ~torch.eye(tokens, dtype=torch.bool)] = -math.inf
    return scores


def same(one, other, tolerance):
    one, other = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (one, other))
    assert [x.shape for x in one] == [x.shape for x in other]
    return all((a - b).abs().max() <= tolerance for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_unperturbed_projections_give_the_modules_own_output(name, dtype, tolerance):
    module, arguments, text = case(name, dtype)
    assert same(with_probabilities(module, arguments, text), module(**arguments), tolerance)


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
    assert kind_of(module) is Kind.LINEAR
    assert torch.equal(found, expected)
    if dtype == torch.float16:
        assert found.abs().max() == 65504
    assert torch.equal(perturbed(module, {"hidden_states": hidden}, Drop()), module.to_out[0].bias.expand_as(hidden))


def test_upcast_attention_is_computed_in_float32():
    module = plain(processor=AttnProcessor(), upcast_attention=True).bfloat16()
    arguments = {"hidden_states": inputs()[0].bfloat16()}
    assert project(module, arguments).query.dtype == torch.float32
    found = with_probabilities(module, arguments, 0)
    assert found.dtype == torch.bfloat16
    assert same(found, module(**arguments), 0.1)
    module.set_processor(AttnProcessor2_0())
    assert project(module, arguments).query.dtype == torch.bfloat16


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


def test_spatial_norm_takes_its_condition():
    module = randomised(Attention(32, heads=2, dim_head=8, spatial_norm_dim=4, residual_connection=True)).double()
    hidden, condition = torch.randn(2, 32, 4, 6).double(), torch.randn(2, 4, 2, 3).double()
    arguments = named_arguments(module, (hidden,), {"temb": condition})
    assert same(with_probabilities(module, arguments, 0), module(hidden, temb=condition), 1e-12)
    tokens = module.spatial_norm(hidden, condition).flatten(2).mT
    expected = module.to_out[0](module.to_v(tokens)).mT.unflatten(2, (4, 6)) + hidden
    assert same(perturbed(module, arguments, Identity()), expected, 1e-12)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_attention_received_is_the_column_sum(name, chunk):
    module, arguments, _ = case(name, torch.float32)
    calls = project(module, arguments)
    scores = calls.query.double() @ calls.key.double().mT * calls.scale
    full = (scores if calls.mask is None else scores + calls.mask).softmax(-1).mean(1).sum(1)
    found = attention_received(module, arguments, chunk)
    assert found.dtype == torch.float32
    assert (found - full).abs().max() < 1e-6 * 4  # sums of 16 terms up to 4
    assert (found.mean(1) - 1).abs().max() < 1e-6
    assert found.std() > 0.05


def test_attention_received_in_half_precision_is_float32():
    module, arguments, _ = case("spatial", torch.bfloat16)
    found = attention_received(module, arguments)
    assert found.dtype == torch.float32
    assert (found.mean(1) - 1).abs().max() < 1e-6
    with pytest.raises(ValueError, match="self-attention; this is joint"):
        attention_received(*case("joint")[:2])


def test_kinds_in_whole_networks():
    networks = {
        "ddpm": ("mid_block.attentions.0", Kind.SELF),
        "sd": ("mid_block.attentions.0.transformer_blocks.0.attn1", Kind.SELF),
        "sdxl": ("up_blocks.0.attentions.0.transformer_blocks.1.attn1", Kind.SELF),
        "dit": ("transformer_blocks.1.attn1", Kind.SELF),
        "pixart": ("transformer_blocks.1.attn1", Kind.SELF),
        "sd3": ("transformer_blocks.1.attn", Kind.JOINT),
        "flux": ("transformer_blocks.1.attn", Kind.DUAL),
        "sana": ("transformer_blocks.0.attn1", Kind.LINEAR),
    }
    for name, (path, kind) in networks.items():
        pipe = build(name)
        model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        assert check_supported(model.get_submodule(path), path, "values") is kind
    assert check_supported(flux(single=True), "single", "queries") is Kind.SINGLE


class Hidden:
    """A processor of which nothing is known."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states


def test_what_is_refused():
    unet = build("sd").unet
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    with pytest.raises(ValueError, match=rf"Layer '{path}' is cross-attention.*attn1"):
        check_supported(unet.get_submodule(path), path)
    with pytest.raises(ValueError, match="'a.conv' is a Conv2d"):
        check_supported(unet.conv_in, "a.conv")
    with pytest.raises(ValueError, match="added_kv_proj_dim"):
        check_supported(plain(added_kv_proj_dim=WIDTH), "x")
    with pytest.raises(ValueError, match=r"processor Hidden, which hides q and k.*set_default_attn_processor\(\)"):
        check_supported(plain(processor=Hidden()), "x", "values")
    with pytest.raises(ValueError, match="PAGIdentitySelfAttnProcessor2_0"):
        check_supported(plain(processor=PAGIdentitySelfAttnProcessor2_0()), "x")
    with pytest.raises(ValueError, match="FusedAttnProcessor2_0.*unfuse_qkv_projections"):
        check_supported(plain(processor=FusedAttnProcessor2_0()), "x")
    fused = flux()
    fused.fuse_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        check_supported(fused, "x")
    fused.unfuse_projections()
    assert check_supported(fused, "x") is Kind.DUAL
    linear = plain(processor=SanaLinearAttnProcessor2_0())
    with pytest.raises(ValueError, match="linear attention.*values only"):
        check_supported(linear, "x", "queries")
    parallel = flux()
    parallel.processor._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"):
        check_supported(parallel, "x")


def test_unfused_unet_is_accepted_again():
    unet = build("sd").unet
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        check_supported(unet.get_submodule(path), path)
    unet.unfuse_qkv_projections()
    module = unet.get_submodule(path)
    assert check_supported(module, path) is Kind.SELF
    hidden = torch.randn(2, 12, 16)
    assert same(with_probabilities(module, {"hidden_states": hidden}, 0), module(hidden), 1e-5)


def test_bad_calls():
    module, arguments, _ = case("flux single")
    for text in (0, -1, TOKENS + TEXT):
        with pytest.raises(ValueError, match="21 tokens.*text_tokens"):
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


def test_arguments_get_their_names():
    module, hidden = plain(), object()
    named = named_arguments(module, (hidden, None), {"attention_mask": 1, "temb": 2})
    assert named == {"hidden_states": hidden, "encoder_hidden_states": None, "attention_mask": 1, "temb": 2}
    assert named_arguments(flux(), (hidden,), {"image_rotary_emb": 3}) == {
        "hidden_states": hidden,
        "image_rotary_emb": 3,
    }
