"""Queries, keys and values of every kind of attention, against the modules themselves; what is refused."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from diffusers_repr import Denoiser
from diffusers_repr.guidance.attention import perturbations
from diffusers_repr.guidance.attention.perturbations import Identity, Mask
from diffusers_repr.guidance.attention.projections import check_supported, named_arguments
from diffusers_repr.guidance.attention.received import attention_received
from tests.guidance.attention_cases import (
    CASES,
    GRID,
    PLAIN,
    WIDTH,
    case,
    flux,
    image_of,
    inputs,
    perturbed,
    plain,
    project,
    randomised,
    same,
    supported,
    with_probabilities,
)
from tests.testers.models import CONDITIONS, SIZES, build


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_unperturbed_projections_give_the_modules_own_output(name, dtype, tolerance):
    module, arguments, text = case(name, dtype)
    assert same(with_probabilities(module, arguments, text), module(**arguments), tolerance)


@pytest.mark.parametrize("name", ["self", "joint"])
def test_xformers_processors_with_its_definition_of_attention(name, monkeypatch):
    """xFormers itself runs on GPUs only; its operator gets `(B * heads, S, D)`."""

    def attention(query, key, value, attn_bias=None, op=None, scale=None):
        return (query @ key.mT * scale).softmax(-1) @ value

    operators = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attention))
    monkeypatch.setattr(attention_processor, "xformers", operators)
    module, arguments, _ = case(name)
    module.scale = 0.7
    if name == "self":
        module.norm_q = module.norm_k = randomised(torch.nn.LayerNorm(8)).double()  # which it leaves out
    module.set_processor(XFormersJointAttnProcessor() if name == "joint" else XFormersAttnProcessor())
    supported(module)
    assert same(with_probabilities(module, arguments, 0), module(**arguments), 1e-12)


def test_upcast_attention_is_computed_in_float32():
    module = plain(processor=AttnProcessor(), upcast_attention=True).bfloat16()
    arguments = {"hidden_states": inputs()[0].bfloat16()}
    assert project(module, arguments).query.dtype == torch.float32
    found = with_probabilities(module, arguments, 0)
    assert found.dtype == torch.bfloat16
    assert same(found, module(**arguments), 0.1)
    module.set_processor(AttnProcessor2_0())
    assert project(module, arguments).query.dtype == torch.bfloat16


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
    found = attention_received(module, supported(module), arguments, chunk)
    assert found.dtype == torch.float32
    assert (found - full).abs().max() < 1e-6 * 4  # sums of 16 terms up to 4
    assert (found.mean(1) - 1).abs().max() < 1e-6
    assert found.std() > 0.05


def test_attention_received_in_half_precision_is_float32():
    module, arguments, _ = case("spatial", torch.bfloat16)
    found = attention_received(module, supported(module), arguments)
    assert found.dtype == torch.float32
    assert (found.mean(1) - 1).abs().max() < 1e-6
    module, arguments, _ = case("joint")
    with pytest.raises(ValueError, match="self-attention; this is joint"):
        attention_received(module, supported(module), arguments)


@pytest.mark.parametrize("name", ["ddpm", "sd", "sdxl", "dit", "pixart", "sd3", "flux"])
def test_the_calls_of_whole_networks_are_understood(name):
    """Every attention among image tokens of a network, in a pipeline's own run, with the arguments it gets there."""
    pipe, seen, text, paths = build(name), {}, [], []
    model, family, layouts = Denoiser.from_pipe(pipe).model, Denoiser.from_pipe(pipe).family, {}

    def compare(module, args, kwargs, output):
        calls, layout = named_arguments(module, args, kwargs), layouts[module]
        image = slice(text[0], calls["hidden_states"].shape[1]) if layout.single else None
        seen[module] = same(perturbations.perturbed(module, layout, calls, Mask(0.0), None, image), output, 1e-5)

    def note(module, args, kwargs):
        text.append(kwargs["encoder_hidden_states"].shape[1])

    for path, module in model.named_modules():
        if hasattr(module, "to_q") and not getattr(module, "is_cross_attention", False):
            layouts[module] = check_supported(family, module, path, "queries")
            paths.append(path)
            module.register_forward_hook(compare, with_kwargs=True)
    if name == "flux":
        model.register_forward_pre_hook(note, with_kwargs=True)
    size = {} if name in ("ddpm", "dit") else dict(zip(("height", "width"), SIZES[name], strict=True))
    size |= {"use_resolution_binning": False} if name == "pixart" else {}
    condition = {"class_labels": [207]} if name == "dit" else CONDITIONS[name]
    pipe(**condition, **size, num_inference_steps=1, generator=torch.Generator().manual_seed(0))
    assert len(seen) == len(paths) > 1
    assert all(seen.values())


def test_kinds_in_whole_networks():
    networks = {
        "ddpm": ("mid_block.attentions.0", "self-attention"),
        "sd": ("mid_block.attentions.0.transformer_blocks.0.attn1", "self-attention"),
        "sdxl": ("up_blocks.0.attentions.0.transformer_blocks.1.attn1", "self-attention"),
        "dit": ("transformer_blocks.1.attn1", "self-attention"),
        "pixart": ("transformer_blocks.1.attn1", "self-attention"),
        "sd3": ("transformer_blocks.1.attn", "joint attention, image first"),
        "flux": ("transformer_blocks.1.attn", "joint attention, text first"),
        "sana": ("transformer_blocks.0.attn1", "linear self-attention"),
    }
    for name, (path, kind) in networks.items():
        denoiser = Denoiser.from_pipe(build(name))
        found = check_supported(denoiser.family, denoiser.model.get_submodule(path), path, "values")
        assert found.name == kind
    assert supported(flux(single=True)).name == "single-stream attention"


class Hidden:
    """A processor of which nothing is known."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return hidden_states


def test_what_is_refused():
    unet = build("sd").unet
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    with pytest.raises(ValueError, match=rf"Layer '{path}' is cross-attention"):
        supported(unet.get_submodule(path), path)
    with pytest.raises(ValueError, match="'a.conv' is a Conv2d"):
        supported(unet.conv_in, "a.conv")
    with pytest.raises(ValueError, match="added_kv_proj_dim"):
        supported(plain(added_kv_proj_dim=WIDTH))
    with pytest.raises(ValueError, match="PAGIdentitySelfAttnProcessor2_0.*Load the network anew"):
        supported(plain(processor=PAGIdentitySelfAttnProcessor2_0()))
    fused = flux()
    fused.fuse_projections()
    fused.processor = FluxIPAdapterAttnProcessor(WIDTH, 8)
    with pytest.raises(ValueError, match=r"fused projections beside an image prompt.*unfuse_qkv_projections\(\)"):
        supported(fused)
    fused.unfuse_projections()
    assert supported(fused).processors
    hidden = {"hidden_states": torch.ones(1, 4, WIDTH)}
    module = plain(processor=Hidden())
    with pytest.raises(ValueError, match=r"with Hidden made 0 calls .* one can be perturbed\.$"):
        perturbations.perturbed(module, supported(module), hidden, Identity())
    linear = plain(processor=SanaLinearAttnProcessor2_0())
    with pytest.raises(ValueError, match="linear attention.*values only"):
        supported(linear, needs="queries")
    parallel = flux()
    parallel.processor._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"):
        supported(parallel)


@pytest.mark.parametrize("name", ["self", "joint, q and k not normed", "flux", "flux single"])
def test_what_is_not_spelled_out_runs_its_own_forward(name):
    """Fused projections, and a processor that is not known: as the parts put together."""
    module, arguments, text = case(name)
    image = image_of(module, arguments, text)
    wanted = [perturbed(module, arguments, kind, GRID, text) for kind in (Identity(), Mask(0.5))]
    # diffusers' FusedJointAttnProcessor2_0 leaves norms of q and k out, perturbed or not.
    fused = {"AttnProcessor2_0": FusedAttnProcessor2_0, "JointAttnProcessor2_0": FusedJointAttnProcessor2_0}
    processors = [fused.get(type(module.processor).__name__, lambda: module.processor)()]
    processors += [type(f"My{type(module.processor).__name__}", (type(module.processor),), {})()]
    for processor in processors:
        if processor is processors[0]:
            module.fuse_projections()
        module.processor = processor
        layout = supported(module)
        assert not layout.processors
        for kind, expected in zip((Identity(), Mask(0.5)), wanted, strict=True):
            assert same(perturbations.perturbed(module, layout, arguments, kind, GRID, image), expected, 1e-12)


def test_arguments_get_their_names():
    module, hidden = plain(), object()
    named = named_arguments(module, (hidden, None), {"attention_mask": 1, "temb": 2})
    assert named == {"hidden_states": hidden, "encoder_hidden_states": None, "attention_mask": 1, "temb": 2}
    assert named_arguments(flux(), (hidden,), {"image_rotary_emb": 3}) == {
        "hidden_states": hidden,
        "image_rotary_emb": 3,
    }
