"""One `FeatureExtractor` in many threads gives each image the features that it has alone, bit by bit."""

import threading

import pytest
import torch

from diffusers_repr import Denoiser, FeatureExtractor, attention_maps
from diffusers_repr.denoiser.vae import decode_latents, encode_latents
from tests.testers.models import build
from tests.testers.threads import at_once, equal, in_thread

ROUNDS = 4


def images(count, channels=3, size=32):
    return [torch.rand(channels, size, size, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def test_one_extractor_in_threads():
    """Of a network in training mode with dropout, which every call of the extractor switches off and on again."""
    denoiser = Denoiser.from_pipe(build("ddpm"))
    for module in denoiser.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    denoiser.model.train()
    one = FeatureExtractor(
        denoiser, ["mid_block", "up_blocks.0"], [100, 400], ensemble_size=2, batch_size=3, image_size="keep"
    )
    other = one.replace(layers=["up_blocks.1"], pooling="mean", timestep=200)
    given = images(4, 1, 16)

    def work(extractor, image):
        return lambda: [extractor([image]).features for _ in range(ROUNDS)]

    works = [work(one if i % 2 else other, image) for i, image in enumerate(given)]
    expected = [w() for w in works]
    assert equal(at_once(*works), expected)
    assert denoiser.model.training


def test_prompts_and_attention_maps_in_threads():
    """Tokenizers, text encoders and the cache of prompts are shared too; so is the global random state."""
    pipe = build("sd")
    denoiser = Denoiser.from_pipe(pipe)
    extractor = FeatureExtractor(denoiser, ["mid_block"], 261, pooling="mean", image_size="keep")
    given, prompts = images(4), ["a cat", "a dog", "a cat", "a house with a garden"]
    before = torch.get_rng_state()

    def features(i):
        return lambda: [extractor([given[i]], prompt=prompts[i]).features for _ in range(2)]

    def attention():
        return attention_maps(
            denoiser, given[:1], ["mid_block.attentions.0.transformer_blocks.0.attn1"], 261, image_size="keep"
        ).maps

    expected = [[extractor.replace()([given[i]], prompt=prompts[i]).features] * 2 for i in range(4)] + [attention()]
    extractor._prompts.clear()
    assert equal(at_once(*map(features, range(4)), attention), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_prompts_than_are_kept_in_threads(monkeypatch):
    monkeypatch.setattr("diffusers_repr.denoiser.conditioner.captions._PROMPTS_KEPT", 1)
    denoiser = Denoiser.from_pipe(build("sd"))
    cache = {}

    def encode(texts):
        return lambda: [denoiser.condition(text, cache=cache).inputs["encoder_hidden_states"] for text in texts]

    works = [encode(texts) for texts in (["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"])]
    assert equal(at_once(*works), [work() for work in works])


def test_fresh_noise_is_one_stream_for_one_thread():
    extractor = FeatureExtractor(
        Denoiser.from_pipe(build("ddpm")), ["mid_block"], 200, noise="fresh", batch_size=1, image_size="keep"
    )
    inside, leave = threading.Event(), threading.Event()

    class Bar:
        def __init__(self, total):
            inside.set()
            leave.wait()

        def update(self, n):
            pass

        def close(self):
            pass

    given = images(1, 1, 16)
    extractor.progress_bar = Bar
    first = threading.Thread(target=extractor, args=(given,))
    first.start()
    inside.wait()
    with pytest.raises(RuntimeError, match=r"noise='fresh' is one stream.*replace\(\)"):
        extractor(given)
    leave.set()
    first.join()
    extractor(given)
    in_thread(lambda: extractor(given))


def test_an_autoencoder_that_is_cast_while_it_works():
    vae = build("sd").vae.half()
    vae.register_to_config(force_upcast=True)
    pixels = images(1)[0][None] * 2 - 1

    def work():
        latents = [encode_latents(vae, pixels) for _ in range(ROUNDS)]
        return latents, decode_latents(vae, latents[0])

    expected = work()
    assert equal(at_once(work, work, work), [expected] * 3)
    assert vae.dtype == torch.float16


def test_a_network_compiled_or_cached_after_the_extractor_was_made():
    from diffusers import FirstBlockCacheConfig

    denoiser = Denoiser.from_pipe(build("ddpm"))
    extractor, given = FeatureExtractor(denoiser, ["up_blocks.0"], 200, image_size="keep"), images(1, 1, 16)
    expected = extractor(given).features
    denoiser.model.mid_block.compile(backend="eager")
    with pytest.raises(RuntimeError, match="mid_block .* is compiled"):
        extractor(given)
    denoiser.model.mid_block._compiled_call_impl = None
    assert equal(extractor(given).features, expected)
    flux = Denoiser.from_pipe(build("flux"))
    layer = "single_transformer_blocks.0"
    extractor = FeatureExtractor(flux, [layer], 200, image_size="keep")
    flux.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"caches activations between steps, .* features of other calls"):
        extractor(images(1))
    with pytest.raises(ValueError, match=r"caches activations between steps, .* features of other calls"):
        attention_maps(flux, images(1), ["transformer_blocks.0.attn"], 200, image_size="keep")
    flux.model.disable_cache()
    extractor(images(1))
