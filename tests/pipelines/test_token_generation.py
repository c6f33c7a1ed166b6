"""`TokenGenerationPipeline`: counts, choice and guidance against loops; by pixels; RCG's vectors; encoders; errors."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers_repr.pipelines.rcg import RCGPipeline
from diffusers_repr.pipelines.token_generation import TokenGenerationPipeline

from diffusers_repr import StoredPrior
from diffusers_repr.denoiser.parallel_decoding import masked_counts, sample_tokens
from diffusers_repr.encoders import load_encoder
from diffusers_repr.models.vq_tokens import encode_tokens, token_embeddings
from tests.objectives.token_cases import images, masked_model, pixel_model, tokenizer
from tests.pipelines import rcg_cases
from tests.testers.hosts import in_dtype

KINDS = {"mage": masked_model, "vectors": lambda: masked_model(condition_dim=6), "addp": pixel_model}


def seed(value=0):
    return torch.Generator().manual_seed(value)


def make(kind):
    return rcg_cases.quiet(TokenGenerationPipeline(tokenizer(), KINDS[kind]()))


def given(kind, count=2):
    return {"condition": torch.randn(count, 6, generator=seed(5))} if kind == "vectors" else {"batch_size": count}


# How many, and which


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_counts_fall_to_none(schedule):
    """The fifth of ADDP's checks: every step fixes tokens, and the last all."""
    for tokens in (1, 2, 4, 16, 256):
        for steps in {1, 2, 3, 8, 20, tokens} & set(range(1, tokens + 1)):
            counts = masked_counts(tokens, steps, schedule)
            assert counts[-1] == 0
            assert len(counts) == steps
            assert all(later < earlier for earlier, later in zip([tokens, *counts], counts, strict=False)), counts
    want = [math.floor(256 * math.cos(math.pi * (k + 1) / 40)) for k in range(19)]
    assert masked_counts(256, 20) == [*want, 0]
    assert masked_counts(256, 256, "linear") == list(range(255, -1, -1))
    with pytest.raises(ValueError, match="num_inference_steps is 17, and there are 16 tokens"):
        masked_counts(16, 17)
    with pytest.raises(ValueError, match="'cosine' or 'linear'"):
        masked_counts(16, 4, "sine")


def test_the_most_certain_stay_and_known_ones_always():
    logits, ids = torch.randn(2, 6, 4, generator=seed()), torch.randint(4, (2, 6), generator=seed(1))
    mask = torch.tensor([[True, True, True, True, False, False]] * 2)
    drawn, left = sample_tokens(logits, ids, mask, 2, 0.0, seed(3))
    assert torch.equal(drawn[:, 4:], ids[:, 4:])
    assert left.sum(1).tolist() == [2, 2]
    assert not left[:, 4:].any()
    for b in range(2):
        logs = [float(logits[b, n].log_softmax(0)[drawn[b, n]]) for n in range(4)]
        assert set(left[b].nonzero()[:, 0].tolist()) == set(np.argsort(logs)[:2].tolist())


def test_tokens_are_drawn_by_their_chances_and_the_noise_is_gumbels():
    logits = torch.tensor([1.0, 0.0, -1.0]).expand(20000, 1, 3)
    drawn, _ = sample_tokens(
        logits, torch.zeros(20000, 1, dtype=torch.int64), torch.ones(20000, 1).bool(), 0, 0.0, seed()
    )
    shares = torch.bincount(drawn[:, 0], minlength=3) / 20000
    torch.testing.assert_close(shares, logits[0, 0].softmax(0), atol=0.012, rtol=0)
    # Of two tokens with the scores a and b and Gumbel noise of scale t, a is the larger with chance sigmoid((a-b)/t).
    two = torch.tensor([[30.0, 0.0], [1.0, 0.0]])  # p of the drawn ids: 1, and nearly sigmoid(1) or 1 - sigmoid(1)
    ids, left = sample_tokens(two.expand(20000, 2, 2), torch.zeros(20000, 2, dtype=torch.int64),
                              torch.ones(20000, 2).bool(), 1, 2.0, seed(2))  # fmt: skip
    usual = ids[:, 1] == 0
    gap = -torch.tensor(1.0).sigmoid().log()
    assert float(left[usual, 0].float().mean()) == pytest.approx(float(1 - (gap / 2).sigmoid()), abs=0.015)


# The pipeline


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_fixed_step_by_step(kind):
    pipe, seen = make(kind), []

    def told(pipe, step, timestep, tensors):
        seen.append({"left": int(timestep), **{name: value.clone() for name, value in tensors.items()}})
        return {}

    names = ("tokens", "mask", "embeddings")
    call = {"num_inference_steps": 6, "output_type": "pt", "callback_on_step_end": told}
    out = pipe(**given(kind), **call, callback_on_step_end_tensor_inputs=names, generator=seed())
    assert [one["left"] for one in seen] == masked_counts(16, 6)
    for before, after in zip(seen, seen[1:], strict=False):
        assert (after["mask"] <= before["mask"]).all()  # what is fixed stays fixed
        assert torch.equal(after["tokens"][~before["mask"]], before["tokens"][~before["mask"]])
    assert not seen[-1]["mask"].any()
    assert torch.equal(out.tokens.flatten(1), seen[-1]["tokens"])
    with torch.no_grad():
        want = pipe.vqvae.decode(token_embeddings(pipe.vqvae, out.tokens).permute(0, 3, 1, 2), force_not_quantize=True)
    torch.testing.assert_close(out.images, (want.sample / 2 + 0.5).clamp(0, 1))
    codes = pipe(**given(kind), num_inference_steps=6, output_type="latent", generator=seed()).images
    assert torch.equal(codes.permute(0, 2, 3, 1), token_embeddings(pipe.vqvae, out.tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_by_its_own_seed(kind):
    pipe, call = make(kind), {"num_inference_steps": 4, "output_type": "np"}
    both = pipe(**given(kind), generator=[seed(1), seed(2)], **call).images
    alone = given(kind)
    alone = {"condition": alone["condition"][1:]} if kind == "vectors" else {"batch_size": 1}
    assert np.abs(pipe(**alone, generator=[seed(2)], **call).images[0] - both[1]).max() < 1e-5


def test_mage_by_the_reference_loop():
    """Three steps of parallel decoding with guidance as RCG's code has it, in our draws."""
    pipe = make("vectors")
    vectors = given("vectors")["condition"]
    out = pipe(condition=vectors, guidance_scale=3.0, num_inference_steps=3, temperature=2.0, generator=seed(4))
    network, draws = pipe.transformer, seed(4)
    ids = torch.full((2, 16), network.mask_token_id)
    for k in range(3):
        with torch.no_grad():
            cond = network(ids, vectors).sample
            null = network(ids, network.condition_embed.null[None].expand(2, -1)).sample
        scores = cond - 2.0 * (k + 1) / 3 * (null - cond)
        unknown = ids == network.mask_token_id
        sampled = (scores - torch.empty(scores.shape).exponential_(generator=draws).log()).argmax(-1)
        sampled = torch.where(unknown, sampled, ids)
        sure = scores.softmax(-1).gather(-1, sampled[..., None])[..., 0].log()
        heat = 2.0 * (1 - (k + 1) / 3)
        if heat:
            sure = sure - heat * torch.empty(sure.shape).exponential_(generator=draws).log()
        sure = torch.where(unknown, sure, torch.inf)
        count = int(16 * math.cos(math.pi * (k + 1) / 6)) if k < 2 else 0
        ids = sampled.clone()
        for b in range(2):
            ids[b, sure[b].argsort()[:count]] = network.mask_token_id
    assert torch.equal(out.tokens.flatten(1), ids)


def test_addp_reads_what_it_told():
    """The canvas of a step is what the next one sees: codes of fixed tokens, expected codes of the others."""
    pipe, seen, read = make("addp"), [], []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: read.append(args[0].clone()))
    scores = pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    kept = []

    def told(pipe, step, timestep, tensors):
        kept.append((tensors["tokens"].clone(), tensors["mask"].clone()))

    pipe(batch_size=2, num_inference_steps=4, generator=seed(), callback_on_step_end=told)
    hook.remove()
    scores.remove()
    codes = pipe.vqvae.quantize.embedding.weight
    for step in range(3):
        tokens, mask = kept[step]
        canvas = torch.where(mask[..., None], seen[step].softmax(-1) @ codes, codes[tokens])
        with torch.no_grad():
            pixels = pipe.decode(canvas).clamp(-1, 1)
        torch.testing.assert_close(read[step + 1], pixels)


def test_guidance_of_one_is_none():
    pipe, call = make("vectors"), {**given("vectors"), "num_inference_steps": 4, "output_type": "np"}
    plain = pipe(**call, generator=seed()).images
    rows = []
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    assert np.array_equal(pipe(**call, guidance_scale=1.0, generator=seed()).images, plain)
    assert rows == [2] * 4
    pipe(**call, guidance_scale=5.0, generator=seed())
    assert rows[4:] == [4] * 4
    hook.remove()


def test_vectors_from_a_prior():
    pipe = make("vectors")
    stored = torch.randn(5, 6, generator=seed(1))
    pipe.stored_prior = StoredPrior(stored, in_order=True)
    out = pipe(batch_size=3, num_inference_steps=2)
    assert torch.equal(out.condition, stored[:3])
    asked = pipe(batch_size=2, num_inference_steps=2, prior=StoredPrior(stored[4:]))
    assert torch.equal(asked.condition, stored[[4, 4]])
    twice = pipe(condition=stored[:2], num_inference_steps=2, num_images_per_label=2)
    assert torch.equal(twice.condition, stored[[0, 0, 1, 1]])


# As RCG's generator


def test_rcg_with_tokens(tmp_path):
    network, scheduler = rcg_cases.prior()
    pipe = rcg_cases.quiet(RCGPipeline(network, scheduler, transformer=masked_model(condition_dim=6), vae=tokenizer()))
    call = {"num_inference_steps": 4, "prior_num_inference_steps": 3, "output_type": "np"}
    out = pipe(batch_size=2, guidance_scale=2.0, temperature=3.0, generator=seed(), **call)
    draws = seed()
    vectors = pipe.sample_representations(2, num_inference_steps=3, generator=draws)
    assert torch.equal(out.condition, vectors)
    own = make("vectors")
    own.transformer = pipe.transformer
    want = own(condition=vectors, guidance_scale=2.0, temperature=3.0, num_inference_steps=4, output_type="np",
               generator=draws).images  # fmt: skip
    assert np.array_equal(out.images, want)
    pipe.save_pretrained(tmp_path)
    again = rcg_cases.quiet(RCGPipeline.from_pretrained(tmp_path))
    assert np.array_equal(
        again(batch_size=2, guidance_scale=2.0, temperature=3.0, generator=seed(), **call).images, want
    )
    prior = again.as_prior(num_inference_steps=3)
    assert own(batch_size=2, prior=prior, num_inference_steps=2).condition.shape == (2, 6)
    with pytest.raises(ValueError, match="starts from masks, not from noise"):
        pipe(latents=torch.zeros(1, 1, 8, 8), **call)
    with pytest.raises(ValueError, match="temperature is of a network of tokens"):
        rcg_cases.make("sit")(temperature=1.0)
    with pytest.raises(ValueError, match="takes no vectors"):
        RCGPipeline(network, scheduler, transformer=masked_model(), vae=tokenizer())
    with pytest.raises(TypeError, match="VQModel or a MaskGITVQModel; got NoneType"):
        RCGPipeline(network, scheduler, transformer=masked_model(condition_dim=6))
    with pytest.raises(ValueError, match="draws vectors of 6 channels, and MaskedTokenModel takes 5"):
        RCGPipeline(network, scheduler, transformer=masked_model(condition_dim=5), vae=tokenizer())


# Files and encoders


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_generates_and_recognises(kind, tmp_path):
    pipe = make(kind)
    pipe.save_pretrained(tmp_path)
    again = rcg_cases.quiet(TokenGenerationPipeline.from_pretrained(tmp_path))
    call = {**given(kind), "num_inference_steps": 3, "output_type": "np"}
    assert np.array_equal(again(**call, generator=seed()).images, pipe(**call, generator=seed()).images)
    encoder = load_encoder(tmp_path)
    found = encoder.encode_pixels(images())
    with torch.no_grad():
        if kind == "addp":
            want = pipe.transformer.encode(images())
        else:
            want = pipe.transformer.encode(encode_tokens(pipe.vqvae, images()))
    torch.testing.assert_close(found["tokens"], want[:, 1:])
    torch.testing.assert_close(found["global"], want[:, 1:].mean(1))
    torch.testing.assert_close(load_encoder(tmp_path, pooling="cls").encode_pixels(images())["global"], want[:, 0])
    assert encoder.grid_for((20, 20)) == (4, 4)
    assert encoder.fingerprint()["weights"]
    tuned = encoder.copy()  # fine-tuning: the encoder half learns, the tokenizer cannot
    tuned.module.requires_grad_(True)
    tuned.encode_with_gradient(images())["tokens"].square().sum().backward()
    learns = {name.removeprefix("transformer.") for name, p in tuned.module.named_parameters() if p.grad is not None}
    assert {"positions", "norm_in.weight", "blocks.0.attn.to_q.weight", "norm.weight"} <= learns
    assert not any(name.startswith(("vqvae", "decoder")) for name in learns)
    torch.testing.assert_close(encoder.encode_pixels(images())["tokens"], found["tokens"])
    with pytest.raises(ValueError, match="has no layer; leave it out"):
        load_encoder(tmp_path, layer=0)
    with pytest.raises(ValueError, match="images of 8 x 8 alone"):
        load_encoder(tmp_path, image_size=16)


@pytest.mark.parametrize("kind", ["vectors", "addp"])
def test_as_diffusers_wants_a_pipeline(kind, tmp_path, capfd):
    """Casts, offloading, `from_pipe`, an interrupt, and the last step by `num_timesteps`."""
    pipe, call = make(kind), {**given(kind), "num_inference_steps": 3, "output_type": "np"}
    want = pipe(**call, generator=seed()).images
    pipe.save_pretrained(tmp_path, variant="fp16")
    half = TokenGenerationPipeline.from_pretrained(tmp_path, variant="fp16", **in_dtype(torch.bfloat16))
    assert half.transformer.dtype == torch.bfloat16
    half.set_progress_bar_config(desc="tokens")
    images = half(**call, generator=seed()).images
    assert images.dtype == np.float32
    assert np.isfinite(images).all()
    assert "tokens: 100%" in capfd.readouterr().err
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = True

    other = rcg_cases.quiet(TokenGenerationPipeline.from_pipe(pipe))
    other(**call, generator=seed(), callback_on_step_end=stop)
    assert (steps, other.num_timesteps) == ([0], 3)
    other.enable_model_cpu_offload(device="cpu")
    assert np.abs(other(**call, generator=seed()).images - want).max() < 1e-4


def test_an_encoder_of_another_tokenizer(tmp_path):
    make("mage").save_pretrained(tmp_path)
    tokenizer(num_vq_embeddings=5).save_pretrained(tmp_path / "vqvae")
    for load in (load_encoder, TokenGenerationPipeline.from_pretrained):
        with pytest.raises(ValueError, match="knows 7 tokens and the tokenizer gives 5"):
            load(tmp_path)


def test_a_folder_of_other_parts(tmp_path):
    make("mage").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer": ["diffusers", "UNet2DModel"]}))
    with pytest.raises(ValueError, match="has UNet2DModel as transformer; the encoder is of a MaskedTokenModel or"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("mage", {"num_inference_steps": 17}, "there are 16 tokens"),
        ("mage", {"condition": torch.zeros(1, 6)}, "trained without vectors"),
        ("mage", {"guidance_scale": 2.0}, "this model takes none"),
        ("mage", {"temperature": -1.0}, "temperature lies from 0"),
        ("mage", {"output_type": "png"}, "output_type is"),
        ("vectors", {}, r"from vectors \(B, 6\): give condition= or prior="),
        ("vectors", {"condition": torch.zeros(1, 5)}, r"condition is \(B, 6\)"),
        ("vectors", {"condition": torch.full((1, 6), torch.nan)}, "NaN"),
        ("addp", {"batch_size": 2, "generator": [seed()]}, "How many samples"),
        ("addp", {"schedule": "sine"}, "'cosine' or 'linear'"),
        ("addp", {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latents"]}, "Callbacks get"),
    ],
)
def test_bad_calls(kind, call, message):
    with pytest.raises(ValueError, match=message):
        make(kind)(**call)
