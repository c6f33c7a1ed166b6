"""The judge of generated scenes reads real ones, and its scores count what they say."""

from collections import Counter

import numpy as np
from scenes_text import Judge, score

from diffusers_repr.data.scenes import scenes


def test_the_judge_reads_real_scenes():
    judge = Judge(400)
    for split in ("test", "held_out"):
        real = list(scenes(split, 40))
        wanted = [Counter((thing.colour, thing.kind) for thing in scene.things) for scene in real]
        found = score([judge(scene.image) for scene in real], wanted)
        assert (found["count"], found["colours"]) == (1.0, 1.0)
        assert found["all"] > 0.75
    assert judge(np.full((32, 32, 3), 40, np.uint8)) == Counter()


def test_scores_by_hand():
    red, blue = ("red", "two"), ("blue", "ring")
    wanted = [Counter([red]), Counter([red, blue]), Counter([red, red])]
    found = [Counter([red]), Counter([("red", "ring"), ("blue", "two")]), Counter([red])]
    assert score(found, wanted) == {"count": 2 / 3, "colours": 2 / 3, "kinds": 2 / 3, "all": 1 / 3}
