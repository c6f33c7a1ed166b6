"""Tasks as their tester wants them."""

import pytest

from diffusers_repr.tasks import Probe
from diffusers_repr.testing import check_task
from tests.tasks.planted import fitted, images


def probabilities(output):
    return output.probabilities


def test_a_probe():
    check_task(fitted(), images(4, seed=5)[0], images(12, seed=2), probabilities)


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
