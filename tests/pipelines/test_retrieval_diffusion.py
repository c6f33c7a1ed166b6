"""kNN-Diffusion and RDM: the tokens are the query's neighbours, in no order, of whichever index; errors."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers_repr.pipelines.retrieval_diffusion import RetrievalDiffusionPipeline
from torch import nn
from transformers import CLIPModel

from diffusers_repr import PAG, Denoiser, DiffusionObjective
from diffusers_repr.assign import RetrievalIndex
from diffusers_repr.denoiser import StoredPrior
from diffusers_repr.encoders import Encoder
from diffusers_repr.models import NullTokens
from tests.pipelines.retrieval_cases import DIM, ENCODER, index, network, pipeline, vectors


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


@pytest.fixture(scope="module")
def store():
    return index()


QUERIES = vectors(2, 9)


def sample(pipe, *args, **settings):
    seeds = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(*args, **{"generator": seeds, "num_inference_steps": 2, "output_type": "latent", **settings})


@torch.no_grad()
def by_hand(pipe, tokens, null, scale):
    """DDIM with classifier-free guidance, two calls a step."""
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        cond = pipe.unet(x, t, encoder_hidden_states=tokens).sample
        away = pipe.unet(x, t, encoder_hidden_states=null.expand_as(tokens)).sample
        x = scheduler.step(away + scale * (cond - away), t, x).prev_sample
    return x


def nearest(queries, count):
    """By a loop over cosines."""
    every = vectors(30)
    found = []
    for query in queries:
        cosines = [float(torch.dot(query, one) / query.norm() / one.norm()) for one in every]
        found.append(sorted(range(30), key=lambda at: -cosines[at])[:count])
    return torch.tensor(found)


def test_neighbours_of_a_query(pipe, store):
    rows = nearest(QUERIES, 3)
    got = sample(pipe, QUERIES, store, guidance_scale=2.0)
    assert torch.equal(got.rows, rows)
    null = pipe.null_tokens.tokens.detach()
    torch.testing.assert_close(got.images, by_hand(pipe, vectors(30)[rows], null, 2.0), rtol=1e-4, atol=1e-4)
    # kNN-Diffusion: the query is one of the tokens.
    both = torch.cat([QUERIES[:, None], vectors(30)[rows]], 1)
    got = sample(pipe, QUERIES, store, include_query=True, guidance_scale=2.0)
    torch.testing.assert_close(got.images, by_hand(pipe, both, null, 2.0), rtol=1e-4, atol=1e-4)
    got = sample(pipe, QUERIES, store, k=0, include_query=True)
    torch.testing.assert_close(got.images, by_hand(pipe, QUERIES[:, None], null, 1.0), rtol=1e-4, atol=1e-4)
    assert got.rows.shape == (2, 0)


def test_tokens_have_no_order(pipe, store):
    tokens = vectors(8, 3).view(2, 4, DIM)
    one = sample(pipe, tokens=tokens, guidance_scale=2.0).images
    other = sample(pipe, tokens=tokens[:, [2, 0, 3, 1]], guidance_scale=2.0).images
    assert float((one - other).abs().max()) < 1e-5
    assert float((one - sample(pipe, tokens=tokens + 1, guidance_scale=2.0).images).abs().max()) > 1e-3


def test_keys_and_values_made_once_are_the_same(pipe, store):
    calls = []
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    plain = [sample(pipe, QUERIES, store, guidance_scale=scale, cache_key_values=False).images for scale in (1, 3)]
    kept = [sample(pipe, QUERIES, store, guidance_scale=scale).images for scale in (1, 3)]
    handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))
    guided = [
        sample(pipe, QUERIES, store, guidance_scale=2.0, guidance=PAG(1.0, layers="mid_block.*"), cache_key_values=on)
        for on in (False, True)
    ]
    assert torch.equal(guided[0].images, guided[1].images)

    def other_tokens(pipe, step, t, tensors):
        return {"tokens": tensors["tokens"] + 1} if step == 0 else tensors

    change = {"callback_on_step_end": other_tokens, "callback_on_step_end_tensor_inputs": ["tokens"]}
    moved = [sample(pipe, QUERIES, store, guidance_scale=2.0, cache_key_values=on, **change) for on in (False, True)]
    assert torch.equal(moved[0].images, moved[1].images)
    assert not torch.equal(moved[0].images, sample(pipe, QUERIES, store, guidance_scale=2.0).images)
    compiled = pipeline(unet=torch.compile(network()))
    with pytest.raises(RuntimeError, match="compiled"):
        sample(compiled, QUERIES, store, cache_key_values=True)


def test_pseudo_queries(pipe):
    store = index()
    drawn = [
        sample(pipe, index=store, batch_size=2, generator=torch.Generator().manual_seed(s)).rows for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with pytest.raises(ValueError, match="retrieved"):
        sample(pipe, index=store, top=0.1)
    store.count_retrieved([4, 4, 4, 7, 7, 7, 1])
    top = [
        int(row)
        for seed in range(6)
        for row in sample(
            pipe, index=store, batch_size=2, top=2 / 30, num_inference_steps=1,
            generator=torch.Generator().manual_seed(seed),
        ).rows[:, 0]
    ]  # fmt: skip
    assert set(top) == {4, 7}  # a pseudo-query is its own nearest
    own = sample(pipe, index=store, batch_size=2, top=1 / 30, include_query=True).rows  # of row 4, which is a token
    assert torch.equal(own, nearest(vectors(30)[4:5], 4)[:, 1:].expand(2, 3))
    stored = StoredPrior(vectors(6, 4).view(2, 3, DIM), in_order=True)
    drawn = sample(pipe, prior=stored, batch_size=2).images
    assert torch.equal(drawn, sample(pipe, tokens=vectors(6, 4).view(2, 3, DIM)).images)


def test_another_index_moves_the_domain(pipe, store):
    other = index(12, seed=5)
    got = sample(pipe, QUERIES, other)
    assert int(got.rows.max()) < 12
    assert float((got.images - sample(pipe, QUERIES, store).images).abs().max()) > 1e-3


def test_queries_by_an_encoder(pipe):
    net = nn.Conv2d(3, DIM, 4, stride=4)
    encoder = Encoder.from_module(net, patch_size=4, pooling="mean")
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ours = pipeline(index_encoder=encoder.fingerprint())
    store = RetrievalIndex.build(encoder(images).global_features, encoder=encoder.fingerprint())
    assert sample(ours, images[2:], store, encoder=encoder).rows[:, 0].tolist() == [2, 3]
    with pytest.raises(ValueError, match="none for texts"):
        sample(ours, "a cat", store, encoder=encoder)
    net.weight.data += 1
    other = Encoder.from_module(net, patch_size=4, pooling="mean")
    with pytest.raises(ValueError, match="another encoder"):
        sample(ours, images[2:], store, encoder=other)


def test_texts_by_clip(tmp_path):
    from tests.heads.odise_cases import tiny_towers

    towers = tiny_towers()
    unet = network(cross_attention_dim=towers.dim)
    parts = {"unet": unet, "null_tokens": None, "index_encoder": None}
    pipe = pipeline(**parts, clip=towers.model, tokenizer=towers.tokenizer)
    store = RetrievalIndex.build(torch.cat([towers.embed_texts(["a cat", "rain"]), torch.randn(3, towers.dim)]))
    assert isinstance(pipe.clip, CLIPModel)
    got = sample(pipe, ["rain", "a cat"], store)
    assert got.rows[:, 0].tolist() == [1, 0]
    pipe.save_pretrained(tmp_path)
    again = RetrievalDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(sample(again, ["rain", "a cat"], store).images, got.images, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "one of index, tokens and prior"),
        ({"query": QUERIES}, "one of index"),
        ({"query": QUERIES, "tokens": QUERIES}, "pass index"),
        ({"query": "a cat", "index": "own"}, "no encoder was given"),
        ({"query": QUERIES, "index": "own", "k": 31}, "k=31 neighbours"),
        ({"query": QUERIES, "index": "own", "k": 0}, "no condition"),
        ({"query": QUERIES[:, :4], "index": "own"}, r"\(B, 6\)"),
        ({"query": QUERIES, "index": "narrow"}, "5 values"),
        ({"query": QUERIES, "index": "other"}, "trained on vectors of another encoder"),
        ({"query": QUERIES * torch.nan, "index": "own"}, "NaN"),
        ({"query": QUERIES, "index": "own", "top": 0.1}, "pseudo-queries"),
        ({"tokens": torch.zeros(2, 3, 5)}, "tokens are floats"),
        ({"index": "own", "num_images_per_query": 2}, "pass batch_size"),
    ],
)
def test_refused(pipe, call, message):
    indices = {
        "own": index(),
        "narrow": RetrievalIndex.build(torch.randn(9, 5)),
        "other": RetrievalIndex.build(vectors(9), encoder={**ENCODER, "weights": "b"}),
    }
    call = {**call, "index": indices.get(call.get("index"))}
    with pytest.raises(ValueError, match=message):
        pipe(**call, num_inference_steps=1)


def test_null_tokens(store):
    """RDM's fixed buffer has one number of tokens; another is refused, not cut."""
    fixed = NullTokens(DIM, 3, learned=False, seed=4)
    want = torch.randn(3, DIM, generator=torch.Generator().manual_seed(4))
    assert torch.equal(fixed.tokens, want)
    assert list(fixed.parameters()) == []
    pipe = pipeline(null_tokens=fixed)
    got = sample(pipe, QUERIES, store, guidance_scale=2.0).images
    torch.testing.assert_close(got, by_hand(pipe, vectors(30)[nearest(QUERIES, 3)], want, 2.0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="null condition has 3 tokens"):
        sample(pipe, QUERIES, store, k=2, guidance_scale=2.0)


def test_null_is_learned_with_the_network(tmp_path):
    """Its gradient is that of the dropped samples alone; what is saved is what was trained."""
    pipe = pipeline()
    objective = DiffusionObjective(Denoiser.from_pipe(pipe), label_dropout=0.5)
    batch = {"pixel_values": torch.rand(8, 1, 8, 8) * 2 - 1, "condition": vectors(24).view(8, 3, DIM)}
    batch["generator"] = torch.Generator().manual_seed(0)
    objective.check_batch(batch)
    objective(batch)["loss"].backward()
    assert float(pipe.null_tokens.tokens.grad.abs().max()) > 0
    assert objective.unsaved() == {}
    pipe.null_tokens.zero_grad()
    never = DiffusionObjective(Denoiser.from_pipe(pipe), label_dropout=0.0)
    never(batch)["loss"].backward()
    assert pipe.null_tokens.tokens.grad is None or not pipe.null_tokens.tokens.grad.any()
    state = {name: tensor + 1 for name, tensor in objective.state_dict().items()}
    objective.save_pretrained(tmp_path, state, torch.float32)
    again = RetrievalDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.null_tokens.tokens, pipe.null_tokens.tokens + 1)
    assert (again.config.k, again.config.include_query) == (3, False)


def test_other_schedulers(pipe, store):
    euler = pipeline(scheduler=EulerDiscreteScheduler())
    assert bool(sample(euler, QUERIES, store, guidance_scale=2.0).images.isfinite().all())
    with pytest.raises(ValueError, match="eta"):
        sample(euler, QUERIES, store, eta=0.5)
