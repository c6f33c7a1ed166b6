"""The study of zero-shot classification: its questions, and a small run that is gone on with."""

import json
from pathlib import Path

import pytest
import torch
import zero_shot
from PIL import Image
from zero_shot_questions import prompts_of, single_things

from diffusers_repr.data.scenes import COLOURS, KINDS, scenes
from diffusers_repr.tasks.denoising_errors.network import NetworkErrors

MODEL = Path(__file__).parents[3] / "examples" / "models" / "digits-class-ddim"


def test_prompts_are_captions_of_one_thing():
    classes, prompts, of = prompts_of("kind", False)
    assert (classes, prompts[8], prompts[10], of) == (KINDS, "an eight", "a circle", list(range(15)))
    classes, prompts, of = prompts_of("kind", True)
    assert (len(prompts), prompts[6], of[6]) == (90, "a red one", 1)
    classes, prompts, of = prompts_of("colour", False)
    assert (classes, prompts[15], of[15], of.count(5)) == (tuple(COLOURS), "a green zero", 1, 15)
    told = {scene.caption for scene in scenes("test", 60) if len(scene.things) == 1}
    assert told <= {*prompts, *prompts_of("kind", False)[1]}


def test_images_are_those_of_one_thing():
    alone = [scene for scene in scenes("test", 60) if len(scene.things) == 1][:6]
    for ask, names in (("kind", KINDS), ("colour", list(COLOURS))):
        pixels, labels = single_things("test", 6, ask)
        assert [names[label] for label in labels] == [getattr(scene.things[0], ask) for scene in alone]
    shown = ((pixels[3] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
    assert torch.equal(shown, torch.from_numpy(alone[3].image))


@pytest.mark.slow
def test_a_run_that_is_gone_on_with_evaluates_nothing_again(tmp_path, monkeypatch):
    rows, forward = [], NetworkErrors._forward

    def counted(self, asked):
        rows.append(len(asked))
        return forward(self, asked)

    monkeypatch.setattr(NetworkErrors, "_forward", counted)
    sizes = {"images": 3, "calibration_images": 6, "levels": 4, "seeds": 3}
    places = {"model": MODEL, "output_dir": tmp_path / "kept", "results": tmp_path / "results"}
    flags = [str(part) for name, value in {**sizes, **places}.items() for part in (f"--{name}", value)]
    zero_shot.main(flags)
    assert sum(rows) == 6 * 10 * 4 * 2 + 3 * 10 * 4
    table = (tmp_path / "results" / "table.md").read_text()
    found = {row["rule"]: row for row in json.loads((tmp_path / "results" / "rows.json").read_text())}
    assert found["average 4"]["evaluations"] == 40
    assert 20 < found["schedule"]["evaluations"] < 40
    assert found["average 4"]["accuracy"] == 1
    assert "3 as written" not in table
    for name in ("accuracy", "levels", "images"):
        with Image.open(tmp_path / "results" / f"{name}.png") as picture:
            assert picture.width > 300
    rows.clear()
    zero_shot.main(flags)
    assert not rows
    assert (tmp_path / "results" / "table.md").read_text() == table
