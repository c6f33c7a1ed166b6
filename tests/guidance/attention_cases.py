"""Attention modules of every kind with their call arguments, and the full matrix of scores as an oracle."""

import math

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxPosEmbed,
)

from diffusers_repr.denoiser import Family
from diffusers_repr.denoiser.families.flux import FluxFamily
from diffusers_repr.denoiser.families.sana import SanaFamily
from diffusers_repr.denoiser.families.sd3 import SD3Family
from diffusers_repr.denoiser.families.sit import SiTFamily
from diffusers_repr.guidance.attention import perturbations, projections
from diffusers_repr.guidance.attention.projections import finish, merge_heads

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
    "self, sliced": lambda: _self(plain(qk_norm="layer_norm", scale_qk=False, processor=SlicedAttnProcessor(1))),
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


def supported(module, path=None, needs="queries"):
    """The layout of a module that stands alone, as the family has it whose network holds such modules."""
    family, where = Family(), "x"
    name = type(module.processor).__name__ if hasattr(module, "processor") else ""
    if isinstance(module, FluxAttention):
        stack = "single_transformer_blocks" if module.added_kv_proj_dim is None else "transformer_blocks"
        family, where = FluxFamily(), f"{stack}.0.attn"
    elif "Joint" in name and "PAG" not in name:
        joined = getattr(module, "add_q_proj", None) is not None
        family, where = SD3Family(), f"transformer_blocks.0.{'attn' if joined else 'attn2'}"
    elif "SanaLinear" in name:
        family, where = SanaFamily(), "transformer_blocks.0.attn1"
    elif name.startswith("SiT"):
        family, where = SiTFamily(), "blocks.0.attn"
    return projections.check_supported(family, module, path or where, needs)


def project(module, arguments, text_tokens=0):
    """`projections.project` of a module that stands alone."""
    return projections.project(module, supported(module), arguments, image_of(module, arguments, text_tokens))


def perturbed(module, arguments, perturbation, grid=None, text_tokens=0):
    """`perturbations.perturbed` of a module that stands alone."""
    layout = supported(module, needs="values")
    image = image_of(module, arguments, text_tokens) if layout.single else None
    return perturbations.perturbed(module, layout, arguments, perturbation, grid, image)


def image_of(module, arguments, text_tokens):
    """The image tokens of a single stream that begins with text; None of others."""
    single = isinstance(module, FluxAttention) and module.added_kv_proj_dim is None
    return slice(text_tokens, arguments["hidden_states"].shape[1]) if single else None


def with_probabilities(module, arguments, text_tokens, change=lambda scores, image: scores):
    """The module's output by the full matrix of scores, changed by `change(scores, image)`."""
    calls = project(module, arguments, text_tokens)
    scores = calls.query @ calls.key.transpose(-1, -2) * calls.scale
    scores = scores if calls.mask is None else scores + calls.mask
    weights = change(scores, calls.image).softmax(-1)
    return finish(module, supported(module), arguments, merge_heads(weights @ calls.value), calls.image)


def identity_by_mask(scores, image):
    scores, tokens = scores.clone(), image.stop - image.start
    block = scores[..., image, image]
    block[..., ~torch.eye(tokens, dtype=torch.bool)] = -math.inf
    return scores


def same(one, other, tolerance):
    one, other = ([x] if isinstance(x, torch.Tensor) else list(x) for x in (one, other))
    assert [x.shape for x in one] == [x.shape for x in other]
    return all((a - b).abs().max() <= tolerance for a, b in zip(one, other, strict=True))
