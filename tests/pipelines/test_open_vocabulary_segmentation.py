"""`OpenVocabularySegmentationPipeline`: one call with a saved head, what it equals, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers_repr.pipelines.open_vocabulary_segmentation import OpenVocabularySegmentationPipeline
from PIL import Image

from diffusers_repr import Denoiser
from diffusers_repr.heads.odise import Vocabulary
from diffusers_repr.tasks import OpenVocabularySegmenter
from tests.heads.odise_cases import tiny_head, tiny_towers
from tests.testers.models import build

WORDS = [["cat", "kitten"], ["dog"], ["sky"]]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), np.uint8))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder, towers = tmp_path_factory.mktemp("heads"), tiny_towers(grow=4)
    denoiser = Denoiser.from_pipe(build("sd"))
    for name, vocabulary in (("head", WORDS), ("bare", None)):
        tiny_head(denoiser, towers, vocabulary=vocabulary, stuff=[2], clip_model=str(folder / "clip")).save_pretrained(
            folder / name
        )
    towers.model.save_pretrained(folder / "clip")
    towers.tokenizer.save_pretrained(folder / "clip")
    (folder / "clip/preprocessor_config.json").write_text("{}")
    return folder


def test_one_call(places):
    pipe = OpenVocabularySegmentationPipeline.from_pipe(build("sd"))
    output = pipe(IMAGE, ["a cat", "rain"], head=places / "head")
    assert output.names == ("a cat", "rain")
    assert output.maps[0].ids.shape == (40, 32)
    trained_on = Vocabulary(tuple(map(tuple, WORDS)), frozenset({2}))
    loaded = pipe.load_head(places / "head", weights=(0.3, 0.7))
    own = OpenVocabularySegmenter(loaded.head, pipe.denoiser, loaded.towers, trained_on)
    assert loaded.trained_on == trained_on
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
    with pytest.raises(ValueError, match="does not record its vocabulary"):
        pipe(IMAGE, ["cat"], head=places / "bare")
    with pytest.raises(ValueError, match="another pipeline"):
        OpenVocabularySegmentationPipeline.from_pipe(build("sd"))(IMAGE, head=pipe.load_head(places / "head"))
    with pytest.raises(ValueError, match="trained on"):
        OpenVocabularySegmentationPipeline.from_pipe(build("sdxl"))(IMAGE, ["cat"], head=places / "head")
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        OpenVocabularySegmentationPipeline.from_pipe(build("dit"))(IMAGE, ["cat"], head=places / "head")
