"""`SiTTransformer2DModel` against a plain network, and what a diffusers model is expected to do."""

import functools

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.models import SiTTransformer2DModel
from diffusers_repr.models.convert import convert_state_dict
from diffusers_repr.models.sit_blocks import grid_positions
from tests.models.official_sit import OfficialSiT, position_table
from tests.pipelines.sit_cases import SiTPipeline, pipeline

TINY = {
    "sample_size": 8,
    "num_layers": 3,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_classes": 10,
}


def tiny(zero=False, **changes):
    """A small network in evaluation mode; unless `zero`, every weight is drawn, so that every part shows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SiTTransformer2DModel(**{**TINY, **changes}).eval()
        if not zero:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    return model


@functools.cache
def inputs(height=8, width=8, batch=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, height, width, generator=generator)
    return x, torch.linspace(50.0, 950.0, batch), torch.arange(batch) * 5


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).sample


@pytest.mark.parametrize("changes", [{}, {"num_classes": 0}, {"condition_dim": 6}, {"qk_norm": True}])
def test_a_new_network_gives_zero(changes):
    """Check 1 of REPA: so its first loss is the mean square of the velocity; and the blocks are the identity."""
    model, (x, t, y) = tiny(zero=True, **changes), inputs()
    labels = y if model.config.num_classes else None
    out = run(model, x, t, labels)
    assert out.shape == x.shape
    assert not out.any()
    with capture(model, ["blocks.0", "blocks.2"]) as tape:
        run(model, x, t, labels)
    assert torch.equal(tape["blocks.0"], tape["blocks.2"])
    assert tape["blocks.0"].std() > 0.1


def test_initial_scales():
    """Xavier on the joint layer of queries, keys and values: bound sqrt(6 / (D + 3 D)); alone sqrt(6 / 2 D)."""
    model = tiny(zero=True, hidden_size=64).requires_grad_(False)
    block = model.blocks[1]
    for layer, bound in ((block.attn.to_k, (1.5 / 64) ** 0.5), (block.attn.to_out[0], (3 / 64) ** 0.5)):
        assert layer.weight.abs().max() == pytest.approx(bound, rel=0.01)
        assert not layer.bias.any()
    assert model.patch_embed.weight.abs().max() == pytest.approx((6 / (64 + 16)) ** 0.5, rel=0.02)
    assert model.label_embed.weight.std() == pytest.approx(0.02, rel=0.1)
    assert model.time_embed.linear_1.weight.std() == pytest.approx(0.02, rel=0.1)
    assert not model.blocks[0].modulation.weight.any()


@pytest.mark.parametrize("patch", [2, 4])
def test_positions_are_the_formula(patch):
    side, dim = 8 // patch, 16
    table = position_table(side, dim).float()
    model = tiny(patch_size=patch)
    torch.testing.assert_close(model.positions, table, rtol=0, atol=1e-7)
    theirs = get_2d_sincos_pos_embed(dim, side, base_size=side, output_type="pt")
    torch.testing.assert_close(model.positions[0], theirs.float(), rtol=0, atol=1e-7)
    # a larger grid holds the smaller one
    larger = grid_positions(side, 2 * side, dim).reshape(side, 2 * side, dim)
    torch.testing.assert_close(larger[:, :side].reshape(1, side * side, dim), table, rtol=0, atol=1e-7)
    assert "positions" not in model.state_dict()


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (6, 10), (8, 8)])
def test_any_height_and_width(size):
    """A network configured for the size gives what one configured for another size gives."""
    x, t, y = inputs(*size)
    model = tiny()
    other = tiny(sample_size=size)
    other.load_state_dict(model.state_dict())
    out = run(model, x, t, y)
    torch.testing.assert_close(out, run(other, x, t, y), rtol=0, atol=0)
    assert out.shape == x.shape
    # Turned images with a turned network would be equal; the plain one tells rows from columns.
    if size[0] != size[1]:
        assert not torch.allclose(run(model, x.mT, t, y), out.mT)


def test_patches_land_where_they_came_from():
    """With blocks that do nothing and an output that copies the patch, the network is the identity."""
    model = tiny(zero=True, hidden_size=16, in_channels=2, num_classes=0)
    model.norm_out.norm = torch.nn.Identity()
    weight = model.patch_embed.weight.data = torch.eye(16)[:8].new_zeros(16, 2, 2, 2)
    for at in range(8):
        row, column, channel = at // 4, at // 2 % 2, at % 2
        weight[at, channel, row, column] = 1
        model.proj_out.weight.data[at, at] = 1
    model.positions.zero_()
    model.patch_embed.bias.data.zero_()
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(model, x, 3.0), x)


@pytest.mark.parametrize("name", ["class_labels", "condition"])
def test_one_mask_for_the_whole_network(name):
    """Check 11 of REPA: with the label dropped everywhere, nothing of the network's output depends on it."""
    changes = {"class_dropout_prob": 1.0, "condition_dim": 6 if name == "condition" else None}
    model, (x, t, y) = tiny(**changes).train(), inputs()
    if name == "condition":
        one, two, null = torch.ones(3, 6), torch.randn(3, 6), model.null_condition.expand(3, -1)
    else:
        one, two, null = y, y.flip(0) // 2, torch.full_like(y, 10)
    assert torch.equal(run(model, x, t, **{name: one}), run(model, x, t, **{name: two}))
    assert torch.equal(run(model, x, t, **{name: one}), run(model, x, t, **{name: null}))
    model.eval()  # nothing is dropped, unless asked
    kept = run(model, x, t, **{name: one})
    assert not torch.allclose(kept, run(model, x, t, **{name: two}))
    none = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(kept, run(model.train(), x, t, **{name: one}, drop_mask=none))
    mask = torch.tensor([False, True, False])
    mixed = run(model, x, t, **{name: one}, drop_mask=mask)
    missing = run(model.eval(), x, t)
    torch.testing.assert_close(mixed, torch.where(mask[:, None, None, None], missing, kept))


def test_the_mask_is_drawn_by_its_share():
    model = tiny(zero=True, class_dropout_prob=0.25).train()
    torch.manual_seed(0)
    share = model.drop_mask(None, 20000, torch.device("cpu")).float().mean()
    assert share == pytest.approx(0.25, abs=0.01)
    assert model.eval().drop_mask(None, 5, torch.device("cpu")) is None


def test_a_tap_is_a_shorter_network():
    """Check 4 of REPA, against the plain network."""
    x, t, y = inputs()
    official = OfficialSiT(depth=3)
    model = SiTTransformer2DModel(**TINY).eval()
    model.load_state_dict(convert_state_dict(official.state_dict(), overrides={"num_attention_heads": 2}).transformer)
    with capture(model, ["blocks.0", "blocks.1"]) as tape, torch.no_grad():
        model(x, t, y)
    for depth in (1, 2):
        wanted, _ = official.hidden(x, t / 1000, y, depth)
        torch.testing.assert_close(tape[f"blocks.{depth - 1}"], wanted, rtol=1e-5, atol=1e-5)


def test_timesteps():
    """One for all, one each, whole, fractional, half precision; divided by time_divisor."""
    model, (x, _, y) = tiny(), inputs()
    whole = run(model, x, 250.0, y)
    for timestep in (torch.tensor(250), torch.tensor([250] * 3), torch.tensor([250.0] * 3, dtype=torch.float64)):
        torch.testing.assert_close(run(model, x, timestep, y), whole)
    other = tiny(time_divisor=1.0)
    torch.testing.assert_close(run(other, x, 0.25, y), whole)
    assert not torch.allclose(run(other, x, 250.0, y), whole)
    assert not torch.equal(run(model, x, 250.4, y), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_every_door(dtype, tmp_path):
    """Loaded as a pipeline, a Denoiser and an extractor: what a pipeline that was cast gives."""
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    pipe.to(dtype=dtype)
    x, call = torch.rand(2, 3, 8, 8), {"class_labels": [1, 4], "num_inference_steps": 2, "output_type": "latent"}

    def sampled(one):
        return one(**call, generator=torch.Generator().manual_seed(0)).images

    wanted = sampled(pipe)
    for way in ({}, {"device_map": "cpu"}, {"device_map": "balanced"}):
        loaded = SiTPipeline.from_pretrained(tmp_path, dtype=dtype, **way)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.transformer.dtype == dtype
        assert torch.equal(sampled(loaded), wanted)
    denoiser = Denoiser.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(denoiser.predict(x.to(dtype), 500).eps, Denoiser.from_pipe(pipe).predict(x.to(dtype), 500).eps)
    features = [FeatureExtractor(one, "blocks.0", 300)(x) for one in (denoiser, Denoiser.from_pipe(pipe))]
    assert torch.equal(features[0]["blocks.0"], features[1]["blocks.0"])
    assert features[0]["blocks.0"].isfinite().all()


@pytest.mark.slow
def test_compiled_gives_the_same():
    model, (x, t, y) = tiny(), inputs()
    compiled = torch.compile(tiny(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x, t, y), run(model, x, t, y))


def test_compiled_blocks_give_the_same():
    model, blocks, wide = tiny(), tiny(), inputs(8, 12)
    blocks.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(blocks, *wide), run(model, *wide))


def test_attention_backends_and_processors():
    model, (x, t, y) = tiny(qk_norm=True), inputs()
    wanted = run(model, x, t, y)
    assert len(model.attn_processors) == 3
    with attention_backend("_native_math"):
        torch.testing.assert_close(run(model, x, t, y), wanted)
    model.set_attention_backend("native")
    torch.testing.assert_close(run(model, x, t, y), wanted)
    model.reset_attention_backend()
    model.set_attn_processor(AttnProcessor2_0())
    torch.testing.assert_close(run(model, x, t, y), wanted)
    plain = tiny()
    wanted = run(plain, x, t, y)
    plain.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(run(plain, x, t, y), wanted)
    plain.set_default_attn_processor()
    plain.fuse_qkv_projections()
    assert plain.blocks[0].attn.fused_projections
    torch.testing.assert_close(run(plain, x, t, y), wanted)
    plain.blocks[0].attn.to_q.weight.data.zero_()  # not read any more
    torch.testing.assert_close(run(plain, x, t, y), wanted)
    plain.unfuse_qkv_projections()
    assert not torch.allclose(run(plain, x, t, y), wanted)


@pytest.mark.parametrize("size", ["S/2", "B/4", "L/8", "XL/2"])
def test_named_sizes(size):
    """Parameter counts of the papers' tables, to the nearest million: 33, 130, 458 and 675 at patch 2, with labels."""
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_size(size)
    count = sum(parameter.numel() for parameter in model.parameters())
    letter, patch = size.split("/")
    assert model.config.patch_size == int(patch)
    assert round(count / 1e6) == pytest.approx({"S": 33, "B": 130, "L": 458, "XL": 675}[letter], abs=1)


def test_sizes_may_be_changed():
    model = SiTTransformer2DModel.from_size("S/2", num_layers=1, num_classes=0, sample_size=16)
    assert (len(model.blocks), model.config.num_classes, model.config.sample_size) == (1, 0, 16)
    with pytest.raises(ValueError, match=r"No size 'M/2'; known: S/2, S/4"):
        SiTTransformer2DModel.from_size("M/2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 18}, "multiple of 4"),
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        ({"sample_size": 7}, "multiple of patch_size=2"),
        ({"sample_size": (8, 9)}, "8 x 9"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob from 0 to 1"),
        ({"time_divisor": 0}, "time_divisor above 0"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        SiTTransformer2DModel(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        ({}, {"hidden_states": torch.zeros(3, 3, 8, 8)}, r"takes x_t \(B, 4, H, W\)"),
        ({}, {"hidden_states": torch.zeros(3, 4, 8, 7)}, "multiples of 2"),
        ({}, {"timestep": torch.zeros(2)}, "2 timesteps for 3 samples"),
        ({}, {"class_labels": torch.tensor([1, 2, 11])}, r"0..10 \(10 is the null class\)"),
        ({}, {"class_labels": torch.tensor([1, 2])}, r"class_labels must be \(3,\)"),
        ({}, {"condition": torch.zeros(3, 6)}, "takes no vector"),
        ({}, {"drop_mask": torch.zeros(3)}, "drop_mask must be boolean"),
        ({"num_classes": 0}, {"class_labels": torch.tensor([1, 2, 3])}, "has no classes"),
        ({"condition_dim": 6}, {"condition": torch.zeros(3, 5)}, r"condition must be \(3, 6\)"),
    ],
)
def test_bad_inputs(changes, given, message):
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=message):
        tiny(zero=True, **changes)(**{"hidden_states": x, "timestep": t, **given})
