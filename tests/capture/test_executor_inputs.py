"""Lanes in U-Nets of unusual build, and in calls with inputs that are added on the way through the network."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models import downsampling, upsampling
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

from diffusers_repr.capture.batching import index_batch
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family import BatchLanes
from tests.capture.lane_cases import (
    LAYERS,
    call_of,
    check,
    close,
    denoiser_of,
    forward,
    inputs_of,
    lane,
    scaled,
    together,
)
from tests.testers.cases import some
from tests.testers.models import WIDTH, build, unet2d

# U-Nets of unusual build


def unconditional(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser(unet2d(3, **changes).eval(), DDPMScheduler())


def random_call(denoiser, rows=2, size=(16, 24), **condition):
    x = torch.randn(rows, 3, *size, generator=torch.Generator().manual_seed(0)).to(denoiser.dtype)
    return call_of(denoiser, denoiser.network_inputs(x, denoiser.level(300), condition), rows)


def test_six_levels_as_adm():
    denoiser = unconditional(
        block_out_channels=(4, 4, 8, 8, 8, 8),
        layers_per_block=2,
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",) * 3,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )
    layers = ["down_blocks.4.attentions.1", "down_blocks.5.attentions.0", "mid_block.attentions.0"]
    call = random_call(denoiser, size=(32, 64))
    check(denoiser, call, {"down": (layers, 0.0), "up": (["up_blocks.0.attentions.2"], 0.0)})
    assert call.joined == "down_blocks.4"
    check(denoiser, call, {"up": (["up_blocks.0.attentions.2"], 0.0)})
    assert call.joined == "up_blocks.0"


@pytest.mark.parametrize("layer", LAYERS["ddpm"])
def test_an_output_divided_by_the_timesteps(layer):
    """Fourier embedding of the time: the forward divides by the timesteps of the batch that came in."""
    denoiser = unconditional(time_embedding_type="fourier")
    for rows in (1, 2):
        call = random_call(denoiser, rows)
        check(denoiser, call, {"a": ([layer], 0.0)})
        assert call.joined == ""


SKIPS = {
    "all": (
        ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    ),
    "first is plain": (
        ("SkipDownBlock2D", "AttnSkipDownBlock2D", "DownBlock2D"),
        ("AttnUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    ),
}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("build_", SKIPS)
def test_a_second_stream_of_skips(build_, rows, monkeypatch):
    """Blocks of score-based models hand an image from block to block that the forward itself adds at the end."""
    filtered = upsampling.upfirdn2d_native  # its kernel is of float32 in diffusers 0.36
    for home in (upsampling, downsampling):
        monkeypatch.setattr(home, "upfirdn2d_native", lambda x, kernel, **how: filtered(x, kernel.to(x.dtype), **how))
    down, up = SKIPS[build_]
    denoiser = unconditional(
        down_block_types=down, up_block_types=up, block_out_channels=(32, 32, 32), norm_num_groups=32
    )
    denoiser.model.double()  # its norms amplify what batches of unequal size round differently
    layers = ["down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0"]
    layers += ["up_blocks.0.attentions.1"] if build_ != "all" else []
    for layer in layers:
        check(denoiser, random_call(denoiser, rows), {"a": ([layer], 0.0)})


def test_class_labels_have_rows():
    denoiser = unconditional(num_class_embeds=10)
    call = random_call(denoiser, 3, class_labels=torch.tensor([1, 5, 9]))
    check(denoiser, call, {"a": (["mid_block.attentions.0"], 0.0)})


# What is added on the way


def residuals(unet, rows, x, draw):
    """As a ControlNet gives them: one for each tensor that the down blocks keep, one for the middle."""
    kept = []
    handle = unet.mid_block.register_forward_hook(lambda m, a, out: kept.append(out))
    up = [block.register_forward_pre_hook(_note(kept), with_kwargs=True) for block in reversed(unet.up_blocks)]
    forward(unet, x)
    for hook in (handle, *up):
        hook.remove()
    mid, *ups = kept
    down = [tensor for group in reversed(ups) for tensor in group]
    down, (mid,) = ([0.3 * torch.randn(t.shape, generator=draw) for t in part] for part in (down, [mid]))
    return down, mid


def _note(kept):
    return lambda m, a, kwargs: kept.append(kwargs["res_hidden_states_tuple"])


# A network, where the lanes part, rows of a half: each pair of two once.
HALVES = list(itertools.product(("sd", "sdxl"), (0, 1, 2), (1, 2)))
PAIRED = [("sd", 0, 1), ("sd", 1, 2), ("sd", 2, 1), ("sdxl", 0, 2), ("sdxl", 1, 1), ("sdxl", 2, 2)]


@pytest.mark.parametrize(("name", "place", "rows"), some(HALVES, *PAIRED))
def test_controlnet_residuals(name, place, rows):
    denoiser = denoiser_of(name)
    inputs = inputs_of(name, 2 * rows)
    down, mid = residuals(denoiser.model, 2 * rows, inputs, torch.Generator().manual_seed(1))
    given = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    call = call_of(denoiser, {**inputs, **given}, 2 * rows, BatchLanes(slice(rows, 2 * rows), slice(0, rows)))
    layer = LAYERS[name][place]
    own = check(denoiser, call, {"a": ([layer], 0.0), "b": ([layer], 0.5)})
    assert call.joined == ("", "mid_block", layer[:11])[place]
    assert (own - forward(denoiser.model, inputs)).abs().max() > 1e-3
    check(denoiser, call, {"first": ([LAYERS[name][1], layer], 0.0), "second": ([LAYERS[name][2]], 0.0)})


@pytest.mark.parametrize(
    ("name", "place", "rows", "deprecated"),
    some(
        [(*case, deprecated) for case in HALVES for deprecated in (False, True)],
        *((*case, at in (0, 4, 5)) for at, case in enumerate(PAIRED)),
    ),
)
@pytest.mark.filterwarnings("ignore:.*T2I:FutureWarning", "ignore:.*intrablock:FutureWarning")
def test_adapter_residuals(name, place, rows, deprecated):
    """T2I-Adapter: the forward takes them out of the list; the list of the call stays whole."""
    denoiser = denoiser_of(name)
    inputs, draw = inputs_of(name, rows), torch.Generator().manual_seed(2)
    shapes = []
    hooks = [b.register_forward_hook(lambda m, a, out: shapes.append(out)) for b in denoiser.model.down_blocks]
    forward(denoiser.model, inputs)
    for hook in hooks:
        hook.remove()
    blocks = zip(denoiser.model.down_blocks, shapes, strict=True)
    added = [torch.randn(_before_down(block, out).shape, generator=draw) for block, out in blocks]
    if name == "sdxl":  # and one more of the middle block's size, which is taken there
        added.append(torch.randn(shapes[-1][0].shape, generator=draw))
    key = "down_block_additional_residuals" if deprecated else "down_intrablock_additional_residuals"
    call = call_of(denoiser, {**inputs, key: added}, rows)
    count, layer = len(added), LAYERS[name][place]
    executor_inputs = {**inputs, key: list(added)}
    plain = forward(denoiser.model, executor_inputs)
    found, lanes = together(denoiser, call, [lane("a", [layer], 0.0)])
    close(found, plain)
    assert len(added) == count
    handle = denoiser.model.get_submodule(layer).register_forward_hook(lambda m, a, out: scaled(out, 0.0))
    expected = forward(denoiser.model, {**inputs, key: list(added)})
    handle.remove()
    close(lanes["a"], expected)
    assert (plain - forward(denoiser.model, inputs)).abs().max() > 1e-3
    assert call.joined == ("" if place < 2 else layer[:11])


def _before_down(block, out):
    """What a residual is added to: in a cross-attention block before its down-sampling, in others its output."""
    has_attention = hasattr(block, "attentions")
    return out[1][len(block.resnets) - 1] if has_attention else out[0]


def test_image_prompts_of_a_unet():
    """IP-Adapter: `encoder_hidden_states` becomes text and a list of image embeddings, masks have no rows."""
    denoiser = Denoiser.from_pipe(build("sd"))
    unet = denoiser.model
    torch.manual_seed(0)
    unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(8, WIDTH, 3)])
    unet.config.encoder_hid_dim_type = "ip_image_proj"
    processors = {}
    for path, processor in unet.attn_processors.items():
        width = unet.get_submodule(path.removesuffix(".processor")).to_q.in_features
        own = path.endswith("attn1.processor")
        processors[path] = processor if own else IPAdapterAttnProcessor2_0(width, WIDTH, num_tokens=[3], scale=1.0)
    unet.set_attn_processor(processors)
    inputs, draw = inputs_of("sd", 2), torch.Generator().manual_seed(3)
    inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 1, 8, generator=draw)]}
    h, w = inputs["sample"].shape[2:]
    for masks in (1, 2):
        mask = torch.rand(1, 1, 2 * h, 2 * w, generator=draw).round()
        kwargs = {"ip_adapter_masks": [mask]}
        if masks == 2:  # rows as many as those of the batch, by chance: one adapter with two images
            kwargs = {"ip_adapter_masks": [torch.cat([mask, 1 - mask], dim=1)]}
            inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(2, 2, 8, generator=draw)]}
            for processor in unet.attn_processors.values():
                if isinstance(processor, IPAdapterAttnProcessor2_0):
                    processor.scale = [[1.0, 0.7]]
        call = call_of(denoiser, {**inputs, "cross_attention_kwargs": kwargs}, 2)
        for layer in LAYERS["sd"]:
            own = check(denoiser, call, {"a": ([layer], 0.0)})
        other = {"image_embeds": [torch.zeros_like(inputs["added_cond_kwargs"]["image_embeds"][0])]}
        assert (own - forward(unet, {**call.inputs, "added_cond_kwargs": other})).abs().max() > 1e-4
        one = call_of(denoiser, index_batch(call.inputs, 2, slice(0, 1)), 1)
        check(denoiser, one, {"a": ([LAYERS["sd"][1]], 0.0)})


def test_skipped_blocks_of_sd3():
    denoiser = denoiser_of("sd3")
    inputs = {**inputs_of("sd3", 2), "skip_layers": [0]}
    check(denoiser, call_of(denoiser, inputs, 2), {"a": (["transformer_blocks.1.attn"], 0.0)})
    call = call_of(denoiser, inputs, 2)
    with pytest.raises(RuntimeError, match=r"None of \['transformer_blocks.0.attn'\] was called"):
        together(denoiser, call, [lane("a", ["transformer_blocks.0.attn"], 0.0)])


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_residuals_between_transformer_blocks(name):
    denoiser = denoiser_of(name)
    inputs, draw = inputs_of(name, 2), torch.Generator().manual_seed(4)
    tokens = 384 // 4 if name == "sd3" else inputs["hidden_states"].shape[1]
    shape = (2, tokens, denoiser.model.inner_dim)
    keys = ["block_controlnet_hidden_states"] if name == "sd3" else ["controlnet_block_samples"]
    keys += ["controlnet_single_block_samples"] if name == "flux" else []
    added = {key: [torch.randn(shape, generator=draw) for _ in range(2)] for key in keys}
    call = call_of(denoiser, {**inputs, **added}, 2)
    for layer in LAYERS[name]:
        own = check(denoiser, call, {"a": ([layer], 0.0)})
        assert call.joined == ""
    assert (own - forward(denoiser.model, inputs)).abs().max() > 1e-3
