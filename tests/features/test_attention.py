"""`attention_maps`: images to averaged maps that can be laid on the image."""

import pytest
import torch

from diffusers_repr.capture import attention_memory, capture_attention
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.attention import attention_maps
from tests.testers.models import CONDITIONS, SIZES, build

LAYERS = {
    "ddpm": ["up_blocks.1.attentions.0", "mid_block.attentions.0"],
    "sd": [
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    ],
    "dit": ["transformer_blocks.1.attn1"],
    "pixart": ["transformer_blocks.0.attn1", "transformer_blocks.0.attn2"],
    "sd3": ["transformer_blocks.0.attn"],
    "flux": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
    "sana": ["transformer_blocks.0.attn2"],
}
# Text tokens in front of the image's, and keys that are image (None: text only)
FRONT = {"flux": [512, 512]}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(name):
    denoiser = Denoiser.from_pipe(build(name))
    images = torch.rand(2, denoiser.image_channels, *SIZES[name], generator=torch.Generator().manual_seed(0))
    return denoiser, images


@pytest.mark.parametrize("name", LAYERS)
def test_maps_of_every_family(name):
    denoiser, images = made(name)
    out = attention_maps(denoiser, images, LAYERS[name], 261, **CONDITIONS[name], image_size="keep")
    assert list(out.maps) == LAYERS[name]
    for at, layer in enumerate(LAYERS[name]):
        found, tokens = out[layer], out.tokens[layer]
        assert found.shape == (2, tokens.queries, tokens.keys)
        torch.testing.assert_close(found.sum(-1), torch.ones(2, tokens.queries))
        height, width = out.grids[layer]
        assert width / height == SIZES[name][1] / SIZES[name][0]
        front = FRONT.get(name, [0, 0])[at]
        assert out.image_queries[layer] == slice(front, front + height * width)
        assert (out.image_keys[layer] is None) == (tokens.order == "cross")
        as_map = out.as_map(layer)
        assert as_map.shape == (2, tokens.keys, height, width)
        # row 1, column 2 of the grid, for key 3
        assert torch.equal(as_map[:, 3, 1, 2], found[:, front + width + 2, 3])


def test_the_image_tokens_are_those_that_see_the_image():
    """A change in one corner of the image moves that corner's rows first: which rows are image is right."""
    for name, layer in (("sd3", "transformer_blocks.0.attn"), ("flux", "transformer_blocks.0.attn")):
        denoiser, images = made(name)
        changed = images.clone()
        changed[:, :, :8, :8] = 1 - changed[:, :, :8, :8]
        settings = {"noise": "clean", **CONDITIONS[name]}
        one = attention_maps(denoiser, images, layer, 261, **settings, image_size="keep")
        two = attention_maps(denoiser, changed, layer, 261, **settings, image_size="keep")
        # rows of text tokens attend to the same text tokens with unchanged odds; rows of the image do not
        text = [
            i for i in range(one.tokens[layer].queries) if i not in range(*one.image_queries[layer].indices(10**6))
        ]
        odds_one, odds_two = (torch.log(o[layer][:, text][:, :, text]) for o in (one, two))
        ratio = (odds_one - odds_one[..., :1]) - (odds_two - odds_two[..., :1])
        assert ratio.abs().max() < 1e-2
        assert (one.as_map(layer)[..., 0, 0] - two.as_map(layer)[..., 0, 0]).abs().max() > 1e-5


def test_the_ensemble_is_the_mean_of_its_members():
    denoiser, images = made("sd")
    layers, prompt = LAYERS["sd"], "a cat"
    out = attention_maps(
        denoiser, images, layers, 261, prompt=prompt, ensemble_size=3, batch_size=4, ids=["a", "b"], image_size="keep"
    )
    extractor = FeatureExtractor(denoiser, layers, 261, ensemble_size=3, image_size="keep")
    total = {layer: torch.zeros_like(out[layer]) for layer in layers}
    with torch.no_grad():
        for batch in extractor.batches(images * 2 - 1, prompt, ids=["a", "b"]):
            with capture_attention(denoiser.model, layers) as tape:
                denoiser.predict(batch.x_t, batch.level, batch.condition)
            for layer in layers:
                for row, cell in enumerate(batch.cells):
                    total[layer][cell] += tape[layer][row] / 3
    for layer in layers:
        torch.testing.assert_close(out[layer], total[layer], rtol=1e-5, atol=1e-7)


def test_several_levels_heads_and_the_settings_of_an_extractor():
    denoiser, images = made("ddpm")
    layer = LAYERS["ddpm"][0]
    extractor = FeatureExtractor(denoiser, "mid_block", 100, noise="shared", seed=3, pooling="mean", image_size="keep")
    several = attention_maps(extractor, images, layer, [50, 261], heads=None)
    assert several[layer].shape[:2] == (2, 2)
    assert several.as_map(layer).shape == (2, 2, several.tokens[layer].heads, several.tokens[layer].keys, 8, 12)
    alone = attention_maps(denoiser, images, layer, 261, noise="shared", seed=3, image_size="keep")
    torch.testing.assert_close(several[layer][1].mean(1), alone[layer], rtol=1e-5, atol=1e-7)
    assert [level.timestep for level in several.level] == [50, 261]
    assert attention_maps(extractor, images, layer).level.timestep == 100


@pytest.mark.parametrize(
    ("name", "layer", "keys"),
    [
        ("sd", "mid_block.attentions.0.transformer_blocks.0.attn2", [5]),  # a word of the prompt
        ("sd3", "transformer_blocks.0.attn", [60, 3]),
        ("ddpm", "mid_block.attentions.0", [0, 4, 2]),
    ],
)
def test_chosen_columns_are_those_of_the_whole_maps(name, layer, keys):
    denoiser, images = made(name)
    settings = {"heads": None, "ensemble_size": 2, "image_size": "keep", **CONDITIONS[name]}
    whole = attention_maps(denoiser, images, layer, 261, **settings)
    need = 4 * 4 * whole.tokens[layer].heads * whole.tokens[layer].queries * len(keys)  # two images, two in a batch
    out = attention_maps(denoiser, images, layer, 261, keys=keys, batch_size=2, max_bytes=need, **settings)
    assert out.keys == tuple(keys)
    assert out.image_keys[layer] is None
    torch.testing.assert_close(out[layer], whole[layer][..., keys], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(out.as_map(layer), whole.as_map(layer)[:, :, keys], rtol=1e-6, atol=1e-8)
    with pytest.raises(MemoryError, match=r"less, take fewer or smaller images, or fewer layers, heads='mean'; or"):
        attention_maps(denoiser, images, layer, 261, keys=keys, batch_size=2, max_bytes=need - 1, **settings)
    assert attention_memory(denoiser, layer, SIZES[name], 4, None, keys) == need


def test_columns_that_there_are_none_of():
    denoiser, images = made("ddpm")
    layer = LAYERS["ddpm"][0]
    count = attention_maps(denoiser, images, layer, 261).tokens[layer].keys
    with pytest.raises(ValueError, match=f"has {count} columns"):
        attention_maps(denoiser, images, layer, 261, keys=[count])
    for keys, error in (
        ([], ValueError),
        ([-1], ValueError),
        ([1, 1], ValueError),
        ("cat", TypeError),
        (5, TypeError),
    ):
        with pytest.raises(error, match="keys are columns of the map"):
            attention_maps(denoiser, images, layer, 261, keys=keys)


def test_errors_come_before_the_network_runs():
    denoiser, images = made("ddpm")
    layers = LAYERS["ddpm"]
    need = attention_memory(denoiser, layers, SIZES["ddpm"], batch=4)
    denoiser.model.register_forward_pre_hook(lambda module, args: pytest.fail("the network ran"))
    with pytest.raises(MemoryError, match="Attention maps need .* GiB"):
        attention_maps(denoiser, images, layers, 261, max_bytes=need - 1, image_size="keep")
    with pytest.raises(ValueError, match="no attention. Closest"):
        attention_maps(denoiser, images, "mid_block", 261, image_size="keep")
    with pytest.raises(TypeError, match="timestep is needed"):
        attention_maps(denoiser, images, layers, image_size="keep")
    with pytest.raises(TypeError, match="pooling= says how features are read"):
        attention_maps(denoiser, images, layers, 261, pooling="mean", image_size="keep")


def test_layers_that_were_not_read():
    denoiser, images = made("ddpm")
    out = attention_maps(denoiser, images, LAYERS["ddpm"][0], 261, image_size="keep")
    with pytest.raises(KeyError, match="was not read"):
        out.as_map("mid_block.attentions.0")
