"""Open-vocabulary segments end to end on a head that is made to know, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_repr import Denoiser
from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.heads.odise import Vocabulary
from diffusers_repr.tasks import OpenVocabularySegmenter
from tests.heads.odise_cases import tiny_head, tiny_towers
from tests.testers.models import build

WORDS = Vocabulary.of(["cat, kitten", "dog", "sky"], stuff=["sky"])


@pytest.fixture(scope="module")
def parts():
    denoiser, towers = Denoiser.from_pipe(build("sd")), tiny_towers(grow=4)
    return tiny_head(denoiser, towers), denoiser, towers


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def oracle(monkeypatch, head, masks, logits):
    """A head that says what it is told, at a stride of 4."""
    monkeypatch.setattr(type(head), "levels", lambda *_: [])
    monkeypatch.setattr(
        head, "forward", lambda *_: type("Out", (), {"masks": [masks[None]], "logits": [logits[None]]})
    )


def halves(height=8, width=8):
    left = torch.full((height, width), -9.0)
    left[:, : width // 2] = 9.0
    return torch.stack([left, -left, torch.full_like(left, -9.0)])


def test_a_head_that_knows_is_right_and_measured(parts, monkeypatch):
    segmenter = OpenVocabularySegmenter(*parts, WORDS, weights=(0.0, 0.0))
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 0, 9.0]])
    oracle(monkeypatch, parts[0], halves(), logits)
    output = segmenter(picture(32, 32))
    assert output.maps[0].classes == {1: 0, 2: 1}
    truth = (torch.arange(32) // 16 + 1).expand(32, 32)
    assert torch.equal(output.maps[0].ids, truth)
    assert torch.equal(output.class_maps[0], truth - 1)
    assert output.segments()[0][0] in ("cat", "dog")
    assert output.pictures([picture(32, 32)])[0].size == (32, 32)
    true = PanopticMap(truth.contiguous(), {1: 0, 2: 1})
    scores = segmenter.evaluate([picture(32, 32)], [true])
    assert scores == {"pq": 1, "sq": 1, "rq": 1, "mean_iou": 1, "pq_known": 1, "rows": 1}
    half_new = OpenVocabularySegmenter(*parts, Vocabulary.of(["dog"]), weights=(0.0, 0.0))
    scores = half_new.evaluate([picture(32, 32)], [PanopticMap(true.ids, {1: 2, 2: 1})], WORDS)
    assert (scores["pq_known"], scores["pq_new"]) == (1.0, 0.0)  # the cat is taken for sky: a miss and a false one


def test_images_of_odd_sizes_are_padded_and_resized(parts, monkeypatch):
    segmenter = OpenVocabularySegmenter(*parts, WORDS, weights=(0.0, 0.0))
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 0, 9.0]])
    oracle(monkeypatch, parts[0], halves(8, 12), logits)  # 20 x 40 is padded to 32 x 48
    found = segmenter(picture(20, 40)).maps[0]
    assert found.ids.shape == (20, 40)
    assert (found.ids[:, :23] == 1).all()
    assert (found.ids[:, 25:] == 2).all()
    oracle(monkeypatch, parts[0], halves(), logits)
    assert segmenter(picture(64, 60), short_side=30).maps[0].ids.shape == (64, 60)


def test_ensemble_with_clip(parts, monkeypatch):
    head, denoiser, towers = parts
    logits, image = torch.tensor([[1.0, 0.5, 0, 0.2], [0, 1.0, 0, 0.1], [0, 0, 0, 2.0]]), picture(32, 32)
    oracle(monkeypatch, head, halves(), logits)
    seen = []
    monkeypatch.setattr(
        "diffusers_repr.tasks.panoptic.panoptic_inference", lambda p, m, *a, **k: seen.append((p, m)) or (None, {})
    )
    segmenter = OpenVocabularySegmenter(head, denoiser, towers, Vocabulary.of(["kitten"]), weights=(0.3, 0.7))
    segmenter(image, WORDS)
    found, masks = seen[0]
    vectors = towers.embed_masks(denoiser.pixels(image, "keep"), masks[None])[0]
    texts = towers.embed_texts([f"a photo of a {name}." for name in ("cat", "kitten", "dog", "sky")])
    for q in range(3):
        cosine = towers.scale * torch.nn.functional.cosine_similarity(vectors[q], texts)
        clip = torch.stack([cosine[:2].max(), cosine[2], cosine[3]]).softmax(0)
        weight, own = torch.tensor([0.3, 0.7, 0.7]), logits[q, :3].softmax(0)
        joined = own ** (1 - weight) * clip**weight
        background = logits[q].softmax(0)[3]
        expected = torch.cat([joined / joined.sum() * (1 - background), background[None]])
        torch.testing.assert_close(found[q], expected)


def test_an_untrained_head_runs_whole(parts):
    segmenter = OpenVocabularySegmenter(*parts, WORDS, batch_size=1)
    one, two = picture(32, 48), picture(33, 32, seed=1)
    both, alone = segmenter([one, two], ["a cat", "rain"]), segmenter(two, ["a cat", "rain"])
    assert both.names == ("a cat", "rain")
    assert torch.equal(both.maps[1].ids, alone.maps[0].ids)
    assert [m.shape for m in both.class_maps] == [(32, 48), (33, 32)]


def test_what_is_refused(parts):
    head, denoiser, towers = parts
    segmenter = OpenVocabularySegmenter(head, denoiser, towers, WORDS)
    for words, message in ((["cat", "Cat"], "too"), ([" "], "needs a name"), ([], "at least one")):
        with pytest.raises(ValueError, match=message):
            segmenter(picture(32, 32), words)
    with pytest.raises(ValueError, match="No images"):
        segmenter([])
    with pytest.raises(ValueError, match="weights are two"):
        OpenVocabularySegmenter(head, denoiser, towers, WORDS, weights=(0.3, 1.7))
    with pytest.raises(ValueError, match="trained on"):
        OpenVocabularySegmenter(head, Denoiser.from_pipe(build("sdxl")), towers, WORDS)
