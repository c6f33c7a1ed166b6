"""Words to masks: pooling, synonyms, ensembles, and CLIP's vectors of masks against passes of their own."""

import pytest
import torch

from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads.odise import MaskClassifier, Vocabulary
from diffusers_repr.heads.odise.classification import (
    cosine_logits,
    geometric_ensemble,
    merge_synonyms,
    pool_masks,
    with_background,
)
from tests.heads.odise_cases import tiny_towers


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pooling_by_masks():
    constant = torch.full((1, 3, 4, 4), 2.5)
    masks = drawn(1, 2, 4, 4)
    masks[0, 1] = -1.0
    pooled = pool_masks(constant, masks)
    torch.testing.assert_close(pooled[0, 0], torch.full((3,), 2.5))
    assert pooled[0, 1].tolist() == [0, 0, 0]
    features, masks = drawn(2, 3, 4, 5), drawn(2, 6, 4, 5, seed=1).requires_grad_()
    pooled = pool_masks(features, masks)
    for b in range(2):
        for q in range(6):
            torch.testing.assert_close(pooled[b, q], features[b][:, masks[b, q] > 0].mean(1))
    assert not pooled.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        pooled.sum().backward()


def test_synonyms_count_by_their_best():
    logits = torch.tensor([[1.0, 5.0, 2.0, -1.0, 4.0]])
    assert merge_synonyms(logits, [1, 2, 2]).tolist() == [[1, 5, 4]]
    with pytest.raises(ValueError, match="2 classes have 4 names; there are 5"):
        merge_synonyms(logits, [2, 2])


def test_ensemble():
    first, second = drawn(3, 4, 5).softmax(-1), drawn(3, 4, 5, seed=1).softmax(-1)
    zero, one, half = torch.zeros(5), torch.ones(5), torch.full((5,), 0.3)
    torch.testing.assert_close(geometric_ensemble(first, second, zero), first)
    torch.testing.assert_close(geometric_ensemble(first, second, one), second)
    torch.testing.assert_close(geometric_ensemble(first, first, half), first)
    weights = torch.tensor([0.3, 0.7, 0.3, 0.3, 0.7])
    found = geometric_ensemble(first, second, weights)
    product = first ** (1 - weights) * second**weights
    torch.testing.assert_close(found, product / product.sum(-1, keepdim=True))
    first[..., 2], second[..., 2:4], first[0, 0], second[0, 1] = 0.0, 0.0, 0.0, 0.0
    for w in (zero, one, half, weights, torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5])):
        found = geometric_ensemble(first, second, w)
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(-1), torch.ones(3, 4))
        if bool(((w > 0) & (w < 1))[2]):
            assert not found[1:, :, 2].any()
    whole = with_background(found, torch.full((3, 4), 0.25))
    torch.testing.assert_close(whole.sum(-1), torch.ones(3, 4))
    assert (whole[..., -1] == 0.25).all()


def test_classifier_against_its_formula():
    head, queries = MaskClassifier(8, 4, 6), drawn(2, 5, 8)
    features, masks, texts = drawn(2, 8, 3, 3, seed=1), drawn(2, 5, 3, 3, seed=2), drawn(3, 4, seed=3)
    torch.nn.init.normal_(head.null)
    vectors = head(queries, features, masks)
    p, norm = dict(head.named_parameters()), torch.nn.functional.layer_norm
    for b in range(2):
        for q in range(5):
            pool = features[b][:, masks[b, q] > 0].mean(1)
            x = norm(pool, (8,)) @ p["pooled.1.weight"].T + p["pooled.1.bias"] + queries[b, q]
            x = norm(x, (8,))
            for layer in (1, 3, 5):
                x = (x if layer == 1 else x.relu()) @ p[f"embed.{layer}.weight"].T + p[f"embed.{layer}.bias"]
            torch.testing.assert_close(vectors[b, q], x)
    logits = head.logits(vectors, texts, [2, 1])
    assert float(head.scale) == pytest.approx(1 / 0.07)
    for at, text in enumerate([*texts, head.null[0]]):
        cosine = torch.nn.functional.cosine_similarity(vectors, head.text(text), dim=-1) / 0.07
        if at < 2:
            assert (logits[..., 0] >= cosine - 1e-5).all()
        else:
            torch.testing.assert_close(logits[..., at - 1], cosine)
    head.log_scale.data.fill_(9.0)
    assert float(head.scale) == 100


def test_vocabulary():
    words = Vocabulary.of(["cat, kitten", ["blue sky", "sky"]], stuff=["sky"])
    assert (words.names, words.counts, words.stuff) == (("cat", "blue sky"), (2, 2), {1})
    assert words.prompts() == [f"a photo of a {n}." for n in ("cat", "kitten", "blue sky", "sky")]
    assert words.known(Vocabulary.of(["kitten", "dog"])) == (True, False)
    for classes, message in (
        ([], "at least one class"),
        (["cat", " "], "Class 1"),
        (["cat,"], "Class 0"),
        (["cat", "dog, Cat"], "'Cat' of class 1 .* of class 0 .*'cat'"),
        (["cat, cat"], "once"),
        ("cat", "got the text 'cat'"),
    ):
        with pytest.raises(ValueError, match=message):
            Vocabulary.of(classes)
    with pytest.raises(ValueError, match="which is no class"):
        Vocabulary.of(["cat"], stuff=["sky"])
    with pytest.raises(ValueError, match="no class 3"):
        Vocabulary((("cat",),), frozenset({3}))
    with pytest.raises(ValueError, match="one {}"):
        words.prompts("a photo")


@pytest.fixture(scope="module")
def towers():
    return tiny_towers(grow=4)


def vectors(features):
    return getattr(features, "pooler_output", features)  # transformers 4 gives the vectors themselves


def test_vectors_of_texts_and_images_are_the_models_own(towers):
    pixels = drawn(2, 3, 40, 40).clamp(-1, 1)
    prepared = towers._prepared(pixels)
    assert prepared.shape == (2, 3, 32, 32)
    expected = vectors(towers.model.get_image_features(pixel_values=prepared))
    torch.testing.assert_close(towers.embed_images(pixels), expected)
    texts = ["a cat", "", "a very blue sky"]
    tokens = towers.tokenizer(texts, padding=True, return_tensors="pt")
    expected = vectors(towers.model.get_text_features(**tokens))
    torch.testing.assert_close(towers.embed_texts(texts), expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(TypeError, match="list of texts"):
        towers.embed_texts("cat")
    with pytest.raises(ValueError, match="no token of ' '"):
        towers.embed_texts(["cat", " "])
    with pytest.raises(TypeError, match="got CLIPText"):
        ImageTextEncoder(towers.model.text_model, towers.tokenizer)


def test_vectors_of_masks_against_attention_written_out(towers):
    """All tokens by the model itself; the copy of the class token layer by layer, over what it may see."""
    pixels, masks = drawn(2, 3, 32, 32).clamp(-1, 1), torch.zeros(2, 3, 32, 32)
    masks[:, 0, :9, :8], masks[0, 1], masks[:, 2, 20, 20] = 0.9, 0.5, 0.49
    found = towers.embed_masks(pixels, masks)
    seen = {(0, 0): [0, 4], (1, 0): [0, 4], (0, 1): list(range(16)), (1, 1): [], (0, 2): [], (1, 2): []}
    tower = towers.model.vision_model
    with torch.no_grad():
        states = tower(pixel_values=towers._prepared(pixels), output_hidden_states=True).hidden_states
        for (b, q), patches in seen.items():
            places = [0, *(1 + n for n in patches)]
            x = states[0][b, 0]
            for layer, state in zip(tower.encoder.layers, states, strict=False):
                attention, heads = layer.self_attn, 2
                keys = layer.layer_norm1(state[b, places])
                query = attention.q_proj(layer.layer_norm1(x)).view(heads, 8)
                key, value = (part(keys).view(-1, heads, 8) for part in (attention.k_proj, attention.v_proj))
                weight = (torch.einsum("hd,nhd->hn", query, key) / 8**0.5).softmax(-1)
                x = x + attention.out_proj(torch.einsum("hn,nhd->hd", weight, value).flatten())
                x = x + layer.mlp(layer.layer_norm2(x))
            expected = towers.model.visual_projection(tower.post_layernorm(x))
            torch.testing.assert_close(found[b, q], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0, 0], found[0, 1], atol=1e-3)
    torch.testing.assert_close(towers.embed_masks(pixels, masks[:, :1]), found[:, :1])  # masks do not see one another
    torch.testing.assert_close(found[0, 1], towers.embed_images(pixels)[0])  # the whole image's is the image's
    texts = towers.embed_texts(["cat", "dog"])
    assert cosine_logits(found, texts, towers.scale).softmax(-1).shape == (2, 3, 2)


def test_no_hook_stays(towers):
    def count():  # transformers leaves some of its own
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in towers.model.modules())

    towers.embed_images(torch.zeros(1, 3, 32, 32))
    before = count()
    towers.embed_masks(torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 4, 4))
    assert count() == before
