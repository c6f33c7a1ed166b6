"""Open-vocabulary segments end to end on a head that is made to know, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_repr import Denoiser
from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads import OdiseHead
from diffusers_repr.heads.odise import Vocabulary
from diffusers_repr.hub.allowed import kind_of
from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.tasks import OpenVocabularySegmenter
from diffusers_repr.tasks.files import push_saved
from diffusers_repr.testing import check_task
from tests.heads.odise_cases import SMALL, WORDS, save_clip, segmenter_of, tiny_head, tiny_towers
from tests.testers.models import build


@pytest.fixture(scope="module")
def parts():
    denoiser, towers = Denoiser.from_pipe(build("sd")), tiny_towers(grow=4)
    return tiny_head(denoiser, towers), denoiser, towers


def picture(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def oracle(monkeypatch, head, masks, logits):
    """A head that says what it is told, at a stride of 4."""
    monkeypatch.setattr(type(head), "levels", lambda *_: [])
    monkeypatch.setattr(head, "forward", lambda *_, return_dict: ([masks[None]], [logits[None]]))


def halves(height=8, width=8):
    left = torch.full((height, width), -9.0)
    left[:, : width // 2] = 9.0
    return torch.stack([left, -left, torch.full_like(left, -9.0)])


def test_a_head_that_knows_is_right_and_measured(parts, monkeypatch):
    segmenter = segmenter_of(*parts, WORDS, weights=(0.0, 0.0))
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 0, 9.0]])
    oracle(monkeypatch, parts[0], halves(), logits)
    output = segmenter(picture(32, 32))
    assert output.maps[0].classes == {1: 0, 2: 1}
    truth = (torch.arange(32) // 16 + 1).expand(32, 32)
    assert torch.equal(output.maps[0].ids, truth)
    assert torch.equal(output.class_maps[0], truth - 1)
    assert output.segments()[0][0] in ("cat", "dog")
    assert output.pictures([picture(32, 32)])[0].size[0] == 320
    true = PanopticMap(truth.contiguous(), {1: 0, 2: 1})
    scores = segmenter.evaluate(([picture(32, 32)], [true]), record=False)
    assert scores == {"pq": 1, "sq": 1, "rq": 1, "mean_iou": 1, "pq_known": 1, "rows": 1}
    half_new = segmenter_of(*parts, Vocabulary.of(["dog"]), weights=(0.0, 0.0))
    scores = half_new.evaluate(([picture(32, 32)], [PanopticMap(true.ids, {1: 2, 2: 1})]), WORDS)
    assert (scores["pq_known"], scores["pq_new"]) == (1.0, 0.0)  # the cat is taken for sky: a miss and a false one


def test_images_of_odd_sizes_are_padded_and_resized(parts, monkeypatch):
    segmenter = segmenter_of(*parts, WORDS, weights=(0.0, 0.0))
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
        "diffusers_repr.tasks.panoptic_predictor.panoptic_inference",
        lambda p, m, *a, **k: seen.append((p, m)) or (None, {}),
    )
    segmenter = segmenter_of(head, denoiser, towers, Vocabulary.of(["kitten"]), weights=(0.3, 0.7))
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
    segmenter = segmenter_of(*parts, WORDS, batch_size=1)
    one, two = picture(32, 48), picture(33, 32, seed=1)
    both, alone = segmenter([one, two], ["a cat", "rain"]), segmenter(two, ["a cat", "rain"])
    assert both.names == ("a cat", "rain")
    assert torch.equal(both.maps[1].ids, alone.maps[0].ids)
    assert [m.shape for m in both.class_maps] == [(32, 48), (33, 32)]


def test_what_is_refused(parts, monkeypatch):
    head, denoiser, towers = parts
    segmenter = segmenter_of(head, denoiser, towers, WORDS)
    for words, message in ((["cat", "Cat"], "too"), ([" "], "needs a name"), ([], "at least one")):
        with pytest.raises(ValueError, match=message):
            segmenter(picture(32, 32), words)
    with pytest.raises(ValueError, match="No images"):
        segmenter([])
    with pytest.raises(ValueError, match="weights are two"):
        segmenter_of(head, denoiser, towers, WORDS, weights=(0.3, 1.7))
    with pytest.raises(ValueError, match="trained on"):
        OpenVocabularySegmenter(head, segmenter.recipe, Denoiser.from_pipe(build("sdxl")), towers)
    known = towers.tokenizer
    monkeypatch.setattr(towers, "tokenizer", lambda text, **how: known("<|endoftext|>" * (text == "dog"), **how))
    monkeypatch.setattr(towers.tokenizer, "unk_token_id", known.eos_token_id, raising=False)
    for words, message in ((["dog"], "no token of 'dog'"), (["cat"], "no token of 'cat'")):
        with pytest.raises(ValueError, match=message):  # and not of the prompt, which has others
            segmenter(picture(32, 32), words)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="2 images and 1 maps"):
        segmenter.evaluate(([picture(32, 32)] * 2, [PanopticMap(torch.ones(32, 32, dtype=int), {1: 0})]))


def numbers(output):
    found = [one.ids.flatten() for one in output.maps] + [one.flatten() for one in output.class_maps]
    return torch.cat([*found, torch.tensor([score for own in output.scores for score in own.values()])])


@pytest.fixture(scope="module")
def place(parts, tmp_path_factory):
    """A base, a CLIP and a segmenter on them, side by side."""
    folder = tmp_path_factory.mktemp("segmenters")
    head, denoiser, towers = parts
    denoiser.pipe.save_pretrained(folder / "base")
    save_clip(towers, folder / "clip")
    base, clip = Denoiser.from_pretrained(folder / "base"), ImageTextEncoder.from_pretrained(folder / "clip")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        segmenter = segmenter_of(OdiseHead.for_base(base, clip, **SMALL), base, clip)
    segmenter.save_pretrained(folder / "mine")
    return folder


def test_a_segmenter_is_a_task(place):
    task = OpenVocabularySegmenter.from_pretrained(place / "mine")
    truth = [PanopticMap((torch.arange(32) // 16 + 1).expand(32, 32), {1: 0, 2: 1})]
    check_task(task, [picture(32, 32), picture(40, 33, seed=1)], ([picture(32, 32)], truth), numbers)
    task.evaluate(([picture(32, 32)], truth), dataset="mine", split="some")
    assert [(s.name, s.dataset, s.split, s.rows) for s in task.recipe.scores] == [
        (name, "mine", "some", 1) for name in ("pq", "pq_known", "mean_iou")
    ]
    assert "| Panoptic quality of names of the training | 0.0000 | mine | some | 1 |" in task.card("t")
    assert 'from_pretrained("path/to/this/folder", base="path/to/the/base/model", clip="path/to/the/clip")' in (
        task.card("t")
    )


def test_the_files_tell_the_way_and_no_place(place, tmp_path):
    files = [path for path in (place / "mine").iterdir() if path.suffix in (".json", ".md")]
    assert not any(str(place) in path.read_text() for path in files)
    recipe = json.loads((place / "mine/panoptic.json").read_text())
    assert [recipe[model]["name"] for model in ("base", "clip")] == ["../base", "../clip"]
    assert recipe["vocabulary"] == [["cat", "kitten"], ["dog"], ["sky"]]
    assert (recipe["stuff"], recipe["template"], recipe["weights"]) == ([2], "a photo of a {}.", [0.3, 0.7])
    task = OpenVocabularySegmenter.from_pretrained(place / "mine", weights=(0, 1), template="{}", batch_size=1)
    assert task.predictor.trained_on == WORDS
    assert (task.predictor.weights, task.predictor.template, task.predictor.batch_size) == ((0, 1), "{}", 1)
    shutil.copytree(place / "mine", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"base model was the folder '../base', which is not here"):
        OpenVocabularySegmenter.from_pretrained(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"CLIP was the folder '../clip', which is not here.*Pass clip="):
        OpenVocabularySegmenter.from_pretrained(tmp_path / "elsewhere", place / "base")
    again = OpenVocabularySegmenter.from_pretrained(tmp_path / "elsewhere", place / "base", place / "clip")
    assert torch.equal(numbers(again(picture(32, 32))), numbers(task.from_pretrained(place / "mine")(picture(32, 32))))


def test_another_clip_is_refused(place, tmp_path):
    other = tiny_towers(grow=5)
    with pytest.raises(ValueError, match=r"is a CLIP of other weights.*'.*clip'.*Pass the CLIP it was trained with"):
        OpenVocabularySegmenter.from_pretrained(place / "mine", clip=other)
    save_clip(tiny_towers(grow=4), tmp_path / "clip", mean=0.25)
    with pytest.raises(ValueError, match=r"is another CLIP \(mean is \[0.25"):
        OpenVocabularySegmenter.from_pretrained(place / "mine", clip=tmp_path / "clip")
    with pytest.raises(TypeError, match="Both towers of CLIP"):
        OpenVocabularySegmenter.from_pretrained(place / "mine", clip=place / "base/text_encoder")


def test_bases_and_folders_that_are_none(place, tmp_path):
    with pytest.raises(ValueError, match="trained on"):
        OpenVocabularySegmenter.from_pretrained(place / "mine", build("sdxl"))
    with pytest.raises(ValueError, match="without text|takes no text|UNet2DConditionModel"):
        OpenVocabularySegmenter.from_pretrained(place / "mine", build("ddpm"))
    with pytest.raises(FileNotFoundError, match="has no panoptic.json; it is a pipeline"):
        OpenVocabularySegmenter.from_pretrained(place / "base")
    shutil.copytree(place / "mine", tmp_path / "damaged")
    recipe = json.loads((tmp_path / "damaged/panoptic.json").read_text())
    (tmp_path / "damaged/panoptic.json").write_text(json.dumps({**recipe, "weights": [0.3, 7]}))
    with pytest.raises(ValueError, match=r"weights\[1\] is 7; allowed is a finite number from 0 to 1"):
        OpenVocabularySegmenter.from_pretrained(tmp_path / "damaged", place / "base")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/loss.jsonl").write_text("")
    (tmp_path / "run/panoptic.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds a training run"):
        OpenVocabularySegmenter.from_pretrained(place / "mine").save_pretrained(tmp_path / "run")


def test_push(place, tmp_path):
    sent = []

    def keep(folder, repo_id, **options):
        sent.append((json.loads((Path(folder) / "panoptic.json").read_text()), options["kind"]))
        return "done"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers_repr.tasks.files.push_folder", keep)
        task = OpenVocabularySegmenter.from_pretrained(place / "mine")
        with pytest.warns(UserWarning, match="segmenter's (base|clip) is .* not on the Hub"):
            task.push_to_hub("user/mine")
        task.push_to_hub("user/mine", base="user/base", clip="user/clip")
        push_saved(place / "mine", "user/mine", "user/base", None, "user/clip")
    names = [(one["base"]["name"], one["clip"]["name"]) for one, _ in sent]
    assert names == [("base", "clip"), ("user/base", "user/clip"), ("user/base", "user/clip")]
    assert {kind for _, kind in sent} == {kind_of(place / "mine")} == {"open-vocabulary segmenter"}
    assert {file.path for file in plan_upload(place / "mine").files} >= {"panoptic.json", "config.json", "README.md"}
