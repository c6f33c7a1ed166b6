"""`OpenVocabularySegmentationPipeline`: one call with a saved head, what it equals, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers_repr.pipelines.open_vocabulary_segmentation import OpenVocabularySegmentationPipeline
from PIL import Image

from diffusers_repr import Denoiser
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads.odise import Vocabulary
from diffusers_repr.tasks import OpenVocabularySegmenter
from tests.heads.odise_cases import save_clip, segmenter_of, tiny_head, tiny_towers
from tests.testers.models import build

WORDS = [["cat", "kitten"], ["dog"], ["sky"]]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    save_clip(tiny_towers(grow=4), folder / "clip")
    denoiser, towers = Denoiser.from_pipe(build("sd")), ImageTextEncoder.from_pretrained(folder / "clip")
    words = Vocabulary(tuple(map(tuple, WORDS)), frozenset({2}))
    segmenter_of(tiny_head(denoiser, towers), denoiser, towers, words).save_pretrained(folder / "head")
    tiny_head(denoiser, towers).save_pretrained(folder / "bare")
    return folder


def test_one_call(places):
    pipe = OpenVocabularySegmentationPipeline.from_pipe(build("sd"))
    output = pipe(IMAGE, ["a cat", "rain"], head=places / "head")
    assert output.names == ("a cat", "rain")
    assert output.maps[0].ids.shape == (40, 32)
    trained_on = Vocabulary(tuple(map(tuple, WORDS)), frozenset({2}))
    loaded = pipe.load_head(places / "head", weights=(0.3, 0.7))
    own = OpenVocabularySegmenter(loaded.head, loaded.recipe, pipe.denoiser, loaded.towers)
    assert loaded.recipe.words == trained_on
    for vocabulary in (["a cat", "rain"], None):
        want, got = own(IMAGE, vocabulary), pipe(IMAGE, vocabulary, head=loaded)
        assert torch.equal(got.maps[0].ids, want.maps[0].ids)
        assert torch.equal(got.class_maps[0], want.class_maps[0])
    assert pipe(IMAGE, None, head=loaded).names == ("cat", "dog", "sky")
    pipe.enable_model_cpu_offload(device="cpu")
    offloaded = pipe(IMAGE, head=places / "head")
    assert torch.equal(offloaded.class_maps[0], own(IMAGE).class_maps[0])


def test_what_is_refused(places):
    pipe = OpenVocabularySegmentationPipeline.from_pipe(build("sd"))
    with pytest.raises(ValueError, match="Pass head="):
        pipe(IMAGE, ["cat"])
    with pytest.raises(FileNotFoundError, match="is no open-vocabulary segmenter: it has no panoptic.json"):
        pipe(IMAGE, ["cat"], head=places / "bare")
    with pytest.raises(ValueError, match="another pipeline"):
        OpenVocabularySegmentationPipeline.from_pipe(build("sd"))(IMAGE, head=pipe.load_head(places / "head"))
    with pytest.raises(ValueError, match="trained on"):
        OpenVocabularySegmentationPipeline.from_pipe(build("sdxl"))(IMAGE, ["cat"], head=places / "head")
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        OpenVocabularySegmentationPipeline.from_pipe(build("dit"))(IMAGE, ["cat"], head=places / "head")
