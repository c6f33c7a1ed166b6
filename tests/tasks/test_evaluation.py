"""`diffusers-repr evaluate`: recipes checked whole, numbers those of the tasks, one table; resumed after a kill."""

import functools
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.cli import main
from diffusers_repr.data.image_data import load_images
from diffusers_repr.denoiser.untrained import untrained
from diffusers_repr.features.pixel_source import PixelSource
from diffusers_repr.sweep.splits import draw_rows
from diffusers_repr.tasks import Correspondence, Probe, Segmenter, Task
from diffusers_repr.tasks.evaluation import (
    evaluate_recipe,
    list_sources,
    read_evaluation,
    register_source,
    register_task,
    unregister_source,
    unregister_task,
)
from diffusers_repr.tasks.evaluation.bases import Bases
from diffusers_repr.tasks.evaluation.plan import Plan, make_plan
from diffusers_repr.tasks.evaluation.sources import Reading
from diffusers_repr.tasks.sift import SiftCorrespondence
from tests.data.test_image_pairs import spair
from tests.tasks.correspondence_cases import photo, shifted
from tests.tasks.planted import NAMES, images, pipeline

RECIPES = Path(__file__).parents[2] / "examples" / "configs" / "evaluate"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models, labelled images of two splits, pairs; the working directory of the tests."""
    folder = tmp_path_factory.mktemp("evaluate")
    pipeline().save_pretrained(folder / "model")
    pipeline(in_channels=3, out_channels=3).save_pretrained(folder / "colour")
    for split, rows, seed in (("train", 36, 0), ("test", 15, 1)):
        for at, (picture, label) in enumerate(zip(*images(rows, seed), strict=True)):
            (folder / "data" / split / NAMES[label]).mkdir(parents=True, exist_ok=True)
            picture.save(folder / "data" / split / NAMES[label] / f"{at}.png")
    spair(folder / "SPair-71k")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


PROBE = {
    "task": "classification",
    "base": "model",
    "source": {"name": "plain", "layers": ["mid_block"], "timesteps": [50], "image_size": 16},
    "fit": {"protocol": "ridge", "pooling": "adaptive:2"},
    "data": {"path": "data", "train_limit": 24},
    "seeds": [0, 3],
}


def write(name, recipe):
    Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return f"{name}.yaml"


def changed(**sections):
    """The recipe of a probe with other keys; of sections, with these keys over its own."""
    return {**PROBE, **{k: {**PROBE.get(k, {}), **v} if isinstance(v, dict) else v for k, v in sections.items()}}


def loaded(seed, fresh=False):
    denoiser = Denoiser.from_pretrained("model")
    return untrained(denoiser, seed) if fresh else denoiser


@functools.cache
def by_hand(seed, fresh):
    train, test = load_images("data", "train"), load_images("data", "test")
    extractor = FeatureExtractor(loaded(seed, fresh), "mid_block", 50, pooling="adaptive:2", seed=seed, image_size=16)
    probe = Probe.fit(extractor, draw_rows(train, 24, seed), protocol="ridge")
    return probe.evaluate(test)["accuracy"]


def test_two_recipes_one_table(capsys):
    """Numbers are those of Python; what is saved loads; the same again does nothing, another recipe is refused."""
    recipes = [write("probe", PROBE), write("random", {"like": "probe.yaml", "base": "random:model"})]
    assert main(["evaluate", *recipes, "--out", "both", "--quiet"]) == 0
    told = capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(Path("both/table.json").read_text())}
    for name, fresh in (("probe", False), ("random", True)):
        found = json.loads(Path(f"both/{name}/metrics.json").read_text())
        want = [by_hand(seed, fresh) for seed in (0, 3)]
        assert found["measured"]["test"]["accuracy"]["seeds"] == want
        assert rows[name]["mean"] == pytest.approx(sum(want) / 2)
        assert rows[name]["std"] == pytest.approx(abs(want[0] - want[1]) / 2**0.5)
        assert (found["seeds"], found["recipe"]["data"]["train_limit"]) == ([0, 3], 24)
        assert f"| {name} | classification |" in told
        assert f"| {name} | classification |" in Path("both/table.md").read_text()
        card = Path(f"both/{name}/README.md").read_text()
        assert "| accuracy | " in card
        assert "seed-0/pictures/confusion.png" in card
        with Image.open(f"both/{name}/seed-0/pictures/confusion.png") as picture:
            assert picture.width > 100
        assert not Path(f"both/{name}/seed-3/pictures").exists()
    probe = Probe.from_pretrained("both/probe/seed-3/task")
    assert probe.recipe.base.name == "model"
    assert probe.evaluate(load_images("data", "test"), record=False)["accuracy"] == by_hand(3, False)
    saved = {"task": "classification", "load": "both/probe/seed-3/task", "data": {"path": "data"}}
    again = evaluate_recipe(read_evaluation(write("saved", saved)), "saved")
    assert again["measured"]["test"]["accuracy"]["seeds"] == [by_hand(3, False)]
    with pytest.raises(ValueError, match="has no name"):  # nothing that could be loaded has such weights
        Probe.from_pretrained("both/random/seed-0/task")
    before = {path: path.stat().st_mtime_ns for path in Path("both").rglob("seed-*/**/*")}
    assert main(["evaluate", *recipes, "--out", "both", "--quiet", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == list(rows.values())
    assert {path: path.stat().st_mtime_ns for path in Path("both").rglob("seed-*/**/*")} == before
    write("probe", changed(fit={"pooling": "mean"}))
    assert main(["evaluate", *recipes, "--out", "both", "--quiet"]) == 2
    assert "fit.pooling: 'adaptive:2' -> 'mean'" in capsys.readouterr().err
    assert main(["evaluate", recipes[0], "--out", "both/probe", "--quiet", "--overwrite", "--seeds", "1"]) == 0
    assert sorted(path.name for path in Path("both/probe").glob("seed-*")) == ["seed-1"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"tsk": "x"}, "Unknown key 'tsk' in bad.yaml. Closest allowed: ['task'"),
        (
            changed(task="clasification"),
            "bad.yaml: task: Unknown task 'clasification'; expected one of classification,",
        ),
        (changed(base="./models"), "bad.yaml: base: './models' is not here. Give a pipeline's folder or Hub id."),
        (changed(base="./data"), "bad.yaml: base: './data' has no model_index.json, so it is no pipeline."),
        (changed(seeds=[]), "bad.yaml: seeds is a list of 0; allowed is a list of 1 to 1000 items."),
        (changed(seeds=[1, 1]), "bad.yaml: seeds"),
        (
            changed(source={"name": "plane"}),
            "bad.yaml: source.name: Unknown source 'plane'; expected one of",
        ),
        (changed(source={"layer": "x"}), "Unknown key 'layer' in bad.yaml: source. Closest allowed: ['layers'"),
        (changed(source={"timesteps": "late"}), "bad.yaml: source.timesteps"),
        (changed(source={"layers": ["mid_blok"]}), "bad.yaml: source.layers: "),
        (changed(source={"timesteps": [5000]}), "bad.yaml: source.timesteps: "),
        (changed(source={"name": "hyperfeatures"}), "Unknown key 'layers' in bad.yaml: source. Closest"),
        ({**PROBE, "source": {"name": "hyperfeatures"}}, "bad.yaml: source has no 'head', which it needs."),
        (changed(fit={"head": "liner"}), "bad.yaml: fit: Unknown head 'liner'"),
        (changed(fit={"protocol": "lbfg"}), "bad.yaml: fit: "),
        (changed(fit={"heads": "linear"}), "Unknown key 'heads' in bad.yaml: fit. Closest allowed: ['head'"),
        (changed(data={"path": "no/such/data/at/all"}), "bad.yaml: data.train: No file or folder"),
        (changed(data={"measure": ["tests"]}), "bad.yaml: data.measure: "),
        (changed(data={"measure": ["train"]}), "bad.yaml: data: 'train' is learned from and measured on"),
        (changed(data={"train_limit": 0}), "bad.yaml: data: train_limit is a number of rows, at least 1; got 0."),
        (changed(measure={"alpha": 0.1}), "Unknown key 'alpha' in bad.yaml: measure."),
        ({key: PROBE[key] for key in PROBE if key != "data"}, "bad.yaml has no 'data', which an evaluation needs."),
        ({**PROBE, "load": "x"}, "bad.yaml: fit: a saved task (load) is not fitted again"),
        ({"task": "classification", "load": "./x", "data": {"path": "data"}}, "bad.yaml: load: './x' is not here"),
        ({"like": "none.yaml"}, "There is no recipe 'none.yaml'; beside it: ["),
        ({"like": "bad.yaml"}, "bad.yaml is like itself"),
    ],
)
def test_what_is_wrong_is_told_before_any_work(recipe, message, capsys, monkeypatch):
    def fit(*given, **settings):
        raise AssertionError("work was begun")

    monkeypatch.setattr(Plan, "fitted", fit)
    if not message.startswith(("bad.yaml: source.layers", "bad.yaml: source.timesteps: ")):
        monkeypatch.setattr(Denoiser, "from_pretrained", fit)
    good = write("good", PROBE)
    assert main(["evaluate", good, write("bad", recipe), "--out", "never", "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("never").exists()


class Counting(Task):
    """Counts nothing, and is saved as one file; the numbers are its seed's."""

    def __init__(self, seed):
        self.seed, self.head = seed, None

    @classmethod
    def fit(cls, source, train, validation=None, *, seed=0, step: float = 1.0):
        return cls(seed * step + len(train))

    def __call__(self, images):
        return self.seed

    def evaluate(self, data, *, record=True):
        return {"count": self.seed, "rows": len(data)}

    def card(self, title):
        return title

    def save_pretrained(self, folder, *, title=None):
        folder.mkdir()
        (folder / "count.txt").write_text(str(self.seed))
        if KILLED:
            os.kill(os.getpid(), KILLED.pop()) if self.seed > 36 else None
        (folder / "done.txt").write_text("")

    @classmethod
    def from_pretrained(cls, id_or_folder, base=None):
        return cls(float((Path(id_or_folder) / "count.txt").read_text()))


KILLED = []


def test_a_task_of_ones_own_and_a_kill_between_seeds(monkeypatch, place):
    """What a kill in the middle of the second seed leaves is the first; the same again goes on from there."""
    register_task("counting")(Counting)
    monkeypatch.setattr(Bases, "get", lambda self, *recipe: "a base")
    try:
        recipe = read_evaluation(write("own", {
            "task": "counting", "base": "model", "fit": {"step": "2e0"}, "data": {"path": "data"}, "seeds": [0, 1, 2]
        }))  # fmt: skip
        child = os.fork()
        if child == 0:
            try:
                KILLED.append(signal.SIGKILL)
                evaluate_recipe(recipe, place / "killed")
            finally:  # whatever happens, this process runs none of the other tests
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert [path.name for path in sorted(Path("killed").glob("seed-*"))] == ["seed-0"]
        assert not Path("killed/metrics.json").exists()
        assert list(Path("killed").glob(".seed-1*"))
        lines = []
        found = evaluate_recipe(recipe, "killed", tell=lines.append)
        assert lines[0] == "own, seed 0: is there"
        assert found["measured"]["test"]["count"]["seeds"] == [36.0, 38.0, 40.0]
        assert not list(Path("killed").glob(".seed-*"))
        assert (found["headline"], found["measured"]["test"]["count"]["std"]) == ("count", 2.0)
        with pytest.raises(ValueError, match=r"register_task.'counting'.: there is one of this name"):
            register_task("counting")(Counting)
    finally:
        unregister_task("counting")
    with pytest.raises(ValueError, match="Unknown task 'counting'"):
        make_plan(recipe)
    with pytest.raises(TypeError, match="takes a subclass of Task"):
        register_task("other")(Path)


def test_segmentation_of_coins_by_pixels_and_of_a_source_of_ones_own():
    @register_source("corner")
    def corner(base, *, side: int = 3):
        return Reading(PixelSource(base, side, places=True, image_size="keep"), {})

    data = {"path": "coins", "train_limit": 4, "measure": ["test"]}
    fit = {"members": 1, "max_epochs": 1, "hidden_features": [8, 8]}
    recipe = {"task": "segmentation", "base": "colour", "fit": fit, "data": data, "seeds": [0]}
    try:
        assert "corner" in list_sources()
        found = evaluate_recipe(read_evaluation(write("coins", {**recipe, "source": {"name": "corner"}})), "coins")
    finally:
        unregister_source("corner")
    scores = found["measured"]["test"]
    assert scores["mean_iou"]["mean"] > 0.5
    assert scores["rows"]["mean"] == 28
    with Image.open("coins/seed-0/pictures/masks.png") as picture:
        assert picture.width > 6 * 96
    again = Segmenter.from_pretrained("coins/seed-0/task")  # pixels are a source that a task keeps
    assert (again.source.patch, again.source.places, again.source.centred) == (3, True, False)
    assert {score.name: score.value for score in again.recipe.scores}["mean_iou"] == scores["mean_iou"]["mean"]


def test_correspondence_on_pairs():
    source = {"name": "ensemble", "ensemble_size": 2, "layers": ["up_blocks.0"], "timesteps": 20}
    recipe = {
        "task": "correspondence", "base": "colour", "source": source, "data": {"path": "SPair-71k"},
        "measure": {"alpha": 0.3, "reference": "image"}, "seeds": [0],
    }  # fmt: skip
    found = evaluate_recipe(read_evaluation(write("pairs", recipe)), "pairs")["measured"]["test"]
    task = Correspondence.from_pretrained("pairs/seed-0/task")
    assert (task.layer, task.source.ensemble_size, task.recipe.seed) == ("up_blocks.0", 2, 0)
    assert found["pck"]["mean"] == task.recipe.scores[0].value
    assert task.recipe.scores[0].name == "pck at 0.3 of the image"
    assert set(found) >= {"pck: cat", "pck: dog", "points"}
    for name in ("matches", "similarity"):
        with Image.open(f"pairs/seed-0/pictures/{name}.png") as picture:
            assert picture.height > 200


def test_sift_on_its_own_key_points(tmp_path):
    """A shifted image has the same key points, moved; other points have no answer."""
    image, moved = photo(96, 96), shifted(photo(96, 96), 5, 3)
    rows = SiftCorrespondence()(image, moved)
    inside = ((rows[:, :2] > 20) & (rows[:, :2] < 70)).all(1)
    key = rows[inside, :2]
    assert len(key) > 3
    data = [(image, moved, key, key + torch.tensor([5.0, 3.0]))]
    task = SiftCorrespondence.fit()
    found = task.evaluate(data, alpha=0.02, reference="image")
    assert found["pck"] > 0.9
    task.save_pretrained(tmp_path / "sift")
    again = SiftCorrespondence.from_pretrained(tmp_path / "sift")
    assert again.recipe == {
        "pck at 0.02 of the image": found["pck"],
        "pck_per_image at 0.02 of the image": found["pck"],
    }
    assert again.evaluate(data, alpha=0.02, reference="image", record=False) == found
    with pytest.raises(ValueError, match="pair 0 asks about points that are no key points of SIFT"):
        task.evaluate([(image, moved, [[1, 1]], [[1, 1]])], reference="image")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_recipes_of_the_repository_are_right(path, monkeypatch):
    """All but their pairs, which take seconds to make, and the bases, which need not be loaded for it."""
    monkeypatch.chdir(RECIPES.parents[2])
    monkeypatch.setattr("diffusers_repr.tasks.evaluation.data.load_known_pairs", lambda split, points: [split])
    plan = make_plan(read_evaluation(path))
    assert plan.recipe.name != path.stem
    assert list(plan.splits) == ["test"]
    assert f"evaluate/{path.parent.name}/*.yaml" in path.read_text() or "like: " in path.read_text()


def test_an_untrained_network():
    """The initial weights of its class, drawn by the seed alone; all around it is shared, nothing is changed."""
    denoiser, state = Denoiser.from_pipe(pipeline()), torch.get_rng_state()
    kept = denoiser.pipe.unet
    fresh, again, other = untrained(denoiser, 4), untrained(denoiser, 4), untrained(denoiser, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert denoiser.pipe.unet is kept is denoiser.model
    assert fresh.pipe.unet is fresh.model
    assert (fresh.name, fresh.pipe.scheduler) == (None, denoiser.pipe.scheduler)
    weights = [one.model.conv_in.weight for one in (fresh, again, other, denoiser)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    want = pipeline(seed=4).unet.conv_in.weight
    assert torch.equal(weights[0], want)


def test_pixels_as_features():
    """A patch is a plain loop's; its place and its mean are what they are called."""
    image = torch.rand(1, 1, 6, 5)
    source = PixelSource(Denoiser.from_pipe(pipeline()), 3, places=True, centred=True, image_size="keep")
    found = source(image)["pixels"]
    assert found.shape == (1, 11, 6, 5)
    pixels = image[0, 0] * 2 - 1
    want = torch.stack([pixels[2 + dy, 3 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    torch.testing.assert_close(found[0, :9, 2, 3], want - want.mean())
    edge = torch.stack([pixels[abs(dy), abs(dx)] for dy in (-1, 0, 1) for dx in (-1, 0, 1)])  # mirrored
    torch.testing.assert_close(found[0, :9, 0, 0], edge - edge.mean())
    assert found[0, 9:, 0, 0].tolist() == [-1, -1]
    assert found[0, 9:, 5, 0].tolist() == [1, -1]
    with pytest.raises(ValueError, match="odd side of a square"):
        PixelSource(source.denoiser, 2)
    with pytest.raises(ValueError, match="centred=True of a single pixel"):
        PixelSource(source.denoiser, centred=True)
