"""Tasks as their tester wants them."""

import json

import pytest

from diffusers_repr.tasks import Correspondence, Probe
from diffusers_repr.testing import check_task
from tests.tasks.correspondence_cases import pairs, photo, shifted, task
from tests.tasks.planted import fitted, images


def probabilities(output):
    return output.probabilities


def test_a_probe():
    check_task(fitted(), images(4, seed=5)[0], images(12, seed=2), probabilities)


def test_correspondence_which_has_no_head(tmp_path):
    """By a source with two layers, of which one is compared."""
    made = task(["sharp", "flat"], compared="sharp")
    points = [[9.5, 9.5], [33.5, 25.5]]
    check_task(made, (photo(), shifted(photo(), 8, 4), points), pairs(), lambda found: found.matches)
    measured = made.evaluate(pairs(), alpha=0.1, reference="image", dataset="moved")
    made.save_pretrained(tmp_path / "matcher", title="Matcher")
    recipe = json.loads((tmp_path / "matcher" / "correspondence.json").read_text())
    assert (recipe["layers"], recipe["image_size"], recipe["base"]["features"]) == (["sharp"], "keep", {"sharp": 24})
    scores = {score["name"]: (score["value"], score["rows"]) for score in recipe["scores"]}
    assert scores["pck at 0.1 of the image"] == (measured["pck"], 3)
    card = (tmp_path / "matcher" / "README.md").read_text()
    assert "| pck at 0.1 of the image |" in card
    assert "Fitting" not in card
    assert sorted(path.name for path in (tmp_path / "matcher").iterdir()) == ["README.md", "correspondence.json"]
    with pytest.raises(FileNotFoundError, match="is no probe: it has no probe.json; it is a matcher"):
        Probe.from_pretrained(tmp_path / "matcher")
    again = Correspondence.from_pretrained(tmp_path / "matcher", base=made.denoiser)
    assert again.evaluate(pairs(), alpha=0.1, reference="image") == measured


class Forgetful(Probe):
    """Its answer hangs on what is not saved."""

    scale = 1.0

    def logits(self, images, **kwargs):
        return super().logits(images, **kwargs) * self.scale


class Careless(Probe):
    """Writes over anything."""

    def save_pretrained(self, folder, *, title=None):
        for path in folder.glob("*.txt"):
            path.unlink()
        super().save_pretrained(folder, title=title)


@pytest.mark.parametrize(("make", "message"), [(Forgetful, "otherwise once it was saved"), (Careless, "holds someth")])
def test_what_the_tester_finds(make, message):
    good = fitted()
    task = make(good.head, good.recipe, good.denoiser)
    task.scale = 2.0
    with pytest.raises(AssertionError, match=message):
        check_task(task, images(3, seed=5)[0], images(6, seed=2), probabilities)
