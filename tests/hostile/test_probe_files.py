"""`probe.json` and the head's `config.json` of others: every field has bounds, and an error names file and field."""

import json
import re

import pytest
import torch

from diffusers_repr.cli import main
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.tasks import Probe, ProbeRecipe
from diffusers_repr.tasks.files import read_head, read_recipe
from diffusers_repr.tasks.formats import PROBE as FORM
from diffusers_repr.tasks.probe_card import probe_card
from tests.hostile.cases import changed, copied, weights, written
from tests.tasks.planted import NAMES, images, pipeline

PROBE, CONFIG = "probe.json", "config.json"
ESCAPE = "cat\x1b[2J\n\u202eevil"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A probe, and its base beside it."""
    root = tmp_path_factory.mktemp("good")
    pipeline().save_pretrained(root / "base")
    denoiser = Denoiser.from_pretrained(root / "base")
    settings = {"layers": ["mid_block"], "timestep": 50, "protocol": "ridge", "label_names": NAMES}
    Probe.fit(denoiser, images(24), **settings).save_pretrained(root / "probe")
    return root / "probe"


RECIPES = {
    "a list": ([], "is no probe's recipe"),
    "another format": (("format", "x" * 10**5), "is no probe's recipe"),
    "a later format": (("format", "diffusers_repr.probe/\x1b[2J9"), r"has the format 'diffusers_repr.probe/\\x1b"),
    "an unknown field": (("code", "import os"), "has 'code', which this version does not know"),
    "no base": (("base", None), "base is null"),
    "base.features": (("base", "features", None), "base.features is null"),
    "base.features of nothing": (("base", "features", {}), "base.features names other layers"),
    "base.features of others": (("base", "features", {"conv_in": 8}), "base.features names other layers"),
    "base.features of a size": (("base", "features", {"mid_block": 10**18}), "features.mid_block is 100000000"),
    "base.config": (("base", "config", "x"), "base.config is 'x'"),
    "base.marks": (("base", "marks", None), "base.marks is null"),
    "a mark": (("base", "marks", {"conv_in.weight": []}), "marks.conv_in.weight is a list of 0"),
    "base.name": (("base", "name", 3), "base.name is 3"),
    "base.name of a server": (("base", "name", "\\\\host\\share"), "allowed is a folder or a Hub id"),
    "base.name that is none": (("base", "local", False), "with local false, allowed is a Hub id"),
    "base.commit": (("base", "commit", "main; rm"), "base.commit is 'main; rm'"),
    "base.revision": (("base", "revision", "a b"), "base.revision is 'a b'"),
    "base.model_class": (("base", "model_class", "os.system()"), "base.model_class is 'os.system"),
    "no layers": (("layers", []), "layers is a list of 0"),
    "layers in text": (("layers", "mid_block"), "layers is 'mid_block'"),
    "layers twice": (("layers", ["mid_block"] * 2), "nothing stands twice"),
    "no levels": (("levels", []), "levels is a list of 0"),
    "many levels": (("levels", [{"requested": {"timestep": 5.0}, "timestep": 5.0, "nsr": 0.1}] * 10**4), "10000"),
    "a level of nothing": (("levels", [{}]), r"levels\[0\] has no 'requested'"),
    "a level of two": (("levels", [{"requested": {"timestep": 5, "nsr": 1}, "timestep": 5, "nsr": 1}]), "exactly one"),
    "a level's code": (("levels", [{"requested": {"schedule": 5}, "timestep": 5, "nsr": 1}]), "has 'schedule'"),
    "a level below": (("levels", [{"requested": {"nsr": 1}, "timestep": 5, "nsr": -1}]), "nsr is -1"),
    "names": (("label_names", 3), "label_names is 3"),
    "equal names": (("label_names", ["a", "a", "b"]), "nothing stands twice"),
    "names of numbers": (("label_names", [1, 2, 3]), r"label_names\[0\] is 1"),
    "where": (("where", "__class__"), "where is '__class__'"),
    "noise": (("noise", ["clean"]), "noise is a list of 1"),
    "seed": (("seed", 10**400), "seed is a whole number of 1329 bits"),
    "ensemble_size": (("ensemble_size", 10**9), "ensemble_size is 1000000000"),
    "ensemble_size of a float": (("ensemble_size", 1e9), "ensemble_size is 1000000000.0"),
    "pooling": (("pooling", "adaptive:999999999"), "pooling is 'adaptive:999999999'"),
    "image_size": (("image_size", [10**6, 10**6]), r"image_size\[0\] is 1000000"),
    "image_size together": (("image_size", [8000, 8000]), "image_size is 8000 x 8000"),
    "image_size of one": (("image_size", [16]), "image_size is a list of 1"),
    "sample_posterior": (("sample_posterior", "no"), "sample_posterior is 'no'"),
    "prompt": (("prompt", "x" * 10**6), "prompt is 'x"),
    "class_labels": (("class_labels", -1), "class_labels is -1"),
    "protocol": (("protocol", {}), "protocol has no 'name'"),
    "protocol's choice": (("protocol", "chosen", {"l2": "x"}), "chosen.l2 is 'x'"),
    "train": (("train", []), "train is a list of 0"),
    "rows": (("train", "rows", -1), "train.rows is -1"),
    "a score": (("scores", [{}]), r"scores\[0\] has no 'name'"),
    "a score of text": (("scores", [{"name": "a", "value": "x", "dataset": "d", "split": "s", "rows": 1}]), "value"),
    "versions": (("versions", {"torch": 2}), "versions.torch is 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_of_others(case, good):
    value, message = RECIPES[case]
    data = json.loads((good / PROBE).read_text())
    if value:
        *path, last, new = value
        place = data
        for key in path:
            place = place[key]
        place[last] = new
    else:
        data = value
    with pytest.raises(ValueError, match=message) as caught:
        ProbeRecipe.from_dict(data, "'folder/probe.json'")
    text = str(caught.value)
    assert text.startswith("'folder/probe.json'")
    assert len(text) < 700
    assert not re.search(r"[\x00-\x1f\x7f\u202e]", text)


def test_what_json_cannot_hold_is_read_and_refused(good, tmp_path):
    """Python's reader takes NaN and endless numbers."""
    text = (good / PROBE).read_text()
    for what, message in (
        ('"seed": NaN', "seed is nan"),
        ('"seed": ' + "9" * 9999, "cannot be read"),
        ('"seed": ' + "[" * 99999, "nested too deeply"),
    ):
        folder = copied(good, tmp_path / message, written(PROBE, text.replace('"seed": 0', what)))
        with pytest.raises(ValueError, match=message):
            read_recipe(FORM, folder)


HEADS = {
    "a list": ([written(CONFIG, [])], "is of class null"),
    "another class": ([changed(CONFIG, "_class_name", to="Popen")], "is of class 'Popen'"),
    "a class in a list": ([changed(CONFIG, "_class_name", to=["evil", "Net"])], "is of class a list of 2"),
    "in_features": ([changed(CONFIG, "in_features", to=10**18)], "in_features is 1000000000000000000"),
    "in_features of a float": ([changed(CONFIG, "in_features", to=1e18)], "in_features must be a whole number"),
    "in_features of memory": ([changed(CONFIG, "in_features", to=10**7)], "'linear.weight' is"),
    "null": ([changed(CONFIG, "num_classes", to=None)], "num_classes must be a whole number"),
    "a bank": ([changed(CONFIG, to={"_class_name": "KNNHead", "in_features": 10**7, "num_classes": 3,
                                    "bank_size": 10**7, "k": 1})], "is none of KNNHead"),
    "a depth": ([changed(CONFIG, to={"_class_name": "MLPHead", "in_features": 16, "num_classes": 3,
                                     "hidden_features": [1] * 20_000})], "hidden_features is a list of 20000"),
    "NaN": ([weights(lambda w: {**w, "linear.weight": w["linear.weight"] * torch.nan})],
            "'linear.weight' has 48 of 48 values that are not finite"),
    "infinite": ([weights(lambda w: {**w, "mean": w["mean"] + torch.inf})], "'mean' has 16 of 16 values"),
    "whole numbers": ([weights(lambda w: {**w, "linear.weight": w["linear.weight"].int()})], "holds torch.int32"),
    "no spread": ([weights(lambda w: {**w, "std": w["std"] * 0})], "std of this LinearHead has values that are not"),
    "another shape": ([weights(lambda w: {**w, "mean": torch.zeros(3)})], r"'mean' is \(3,\)"),
    "a weight more": ([weights(lambda w: {**w, "x\x1b": torch.zeros(3)})], r"'x\\x1b' is none of LinearHead"),
    "a weight less": ([weights(lambda w: {k: v for k, v in w.items() if k != "mean"})], "among them .'mean'"),
    "a huge header": ([written("diffusion_pytorch_model.safetensors", (1 << 62).to_bytes(8, "little") + b"{}")],
                      "is no safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_a_head_of_others(case, good, tmp_path):
    edits, message = HEADS[case]
    folder = copied(good, tmp_path / "probe", *edits)
    with pytest.raises(ValueError, match=message) as caught:
        read_head(FORM, folder)
    assert str(folder) in str(caught.value)


def test_the_good_probe_loads_and_predicts(good, tmp_path, capsys):
    images(1)[0][0].save(tmp_path / "a.png")
    assert main(["predict", str(good), str(tmp_path / "a.png"), "--json"]) == 0
    line = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert sum(row["probability"] for row in line["top"]) == pytest.approx(1, abs=1e-5)
    recipe = json.loads((good / PROBE).read_text())
    recipe["base"]["name"] = str(good.parent / "base")  # as it is found from the probe's folder
    assert Probe.from_pretrained(good).recipe.to_dict() == recipe


def test_a_base_with_broken_weights_gives_no_number(good, tmp_path, capsys):
    """Nobody checks the weights of a base of diffusers; the probe sees that its features are none."""
    broken = copied(good.parent / "base", tmp_path / "base",
                    weights(lambda w: {k: v * torch.nan for k, v in w.items()},
                            "unet/diffusion_pytorch_model.safetensors"))  # fmt: skip
    images(1)[0][0].save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="other weights"):
        code = main(["predict", str(good), str(tmp_path / "a.png"), "--json", "--base", str(broken)])
    told = capsys.readouterr()
    assert code == 2
    assert "gave NaN or infinite features" in told.err
    assert not told.out


def test_names_of_others_are_printed_without_control_characters(good, tmp_path, capsys):
    folder = copied(good, tmp_path / "probe", changed(PROBE, "label_names", to=[ESCAPE, "left", "right"]),
                    changed(PROBE, "train", "dataset", to=ESCAPE), changed(PROBE, "protocol", "source", to=ESCAPE),
                    changed(PROBE, "base", "name", to=str(good.parent / "base")))  # fmt: skip
    images(1)[0][0].save(tmp_path / "a.png")
    assert main(["predict", str(folder), str(tmp_path / "a.png")]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert r"cat\x1b[2J\n\u{202e}evil" in line
    recipe = read_recipe(FORM, folder)
    assert recipe.label_names[0] == ESCAPE, "what is computed with stays as it is"
    card = probe_card(recipe, "LinearHead", "mine\x1b")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", card)
    assert card.count(r"cat\x1b[2J\n\u{202e}evil") >= 3
