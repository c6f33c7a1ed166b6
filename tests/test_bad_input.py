"""What a user may get wrong, through Python and through the command: what came, what is allowed, what to try.

Kept elsewhere, beside what it tests: a kill and a full disk while features are written and damaged shards
(`features/test_store.py`, `features/test_cli_extract.py`), a Hub that does not answer (`hub/test_round_trip.py`,
`tasks/test_probe_hub.py`), another base for a probe (`tasks/test_probe.py`), code without consent
(`pipelines/test_custom_pipeline.py`, `hub/test_diffusers.py`).
"""

import re
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_repr import Denoiser, FeatureExtractor, FeatureStore, Probe, list_layers, match_layers, select_features
from diffusers_repr.cli import main
from tests.testers.cases import rotating
from tests.testers.models import build, saved


def pictures(count, size=(32, 32)):
    pixels = np.random.default_rng(0).integers(0, 255, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def rows(images):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    labels = [i % 2 for i in range(len(images))]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Good and bad models and data."""
    root = tmp_path_factory.mktemp("place")
    rows(pictures(12)).to_parquet(root / "good.parquet")
    rows([*pictures(6), *pictures(6, (32, 48))]).to_parquet(root / "mixed.parquet")
    rows(pictures(12)).remove_columns("image").to_parquet(root / "no_image.parquet")
    (root / "empty").mkdir()
    for name in ("index", "weights", "component"):
        shutil.copytree(saved("ddpm"), root / f"broken_{name}")
    (root / "broken_index" / "model_index.json").write_text("{oops")
    weights = root / "broken_weights" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.rmtree(root / "broken_component" / "unet")
    return root


TASKS = {
    "extract": ["--timesteps", "10", "--layers", "mid_block"],
    "select": ["--timesteps", "10", "--layers", "mid_block", "--seeds", "0", "--no_heatmap", "--quiet"],
    "probe": ["--timesteps", "10", "--layers", "mid_block", "--quiet"],
}
CASES = {
    "unknown layer": ({"--layers": "midblock"}, r"No layer 'midblock' in UNet2DModel\. Closest: \['mid_block'"),
    "index": ({"--layers": "3"}, "No layer '3' .* full module path, such as '.*', never by an index"),
    "negative index": ({"--layers=-1": None}, "No layer '-1' .* never by an index"),
    "timestep too large": ({"--timesteps": "1000"}, r"timestep 1000 is outside \[0, 999\]"),
    "timestep not finite": ({"--timesteps": "nan"}, "timestep must be finite; got nan"),
    "no such column": ({"--image_column": "photo"}, r"no column 'photo'; columns are \['image', 'label'\]"),
    "no column of images": ({"data": "no_image.parquet"}, r"no column of images; its columns are \['label'\].*cast"),
    "mixed sizes": ({"data": "mixed.parquet", "--image_size": "keep"}, "32 x 48|mixed sizes.*image_size"),
    "no data": ({"data": "nowhere.parquet"}, "No file or folder .*nowhere.*Pass a folder"),
    "data not in reach": ({"data": "user/nothing"}, "Could not open 'user/nothing' as a data set.*Pass a folder"),
    "no pipeline": ({"model": "empty"}, "is no pipeline folder: it has no model_index.json.*save_pretrained"),
    "no folder": ({"model": "nowhere"}, "No folder .*nowhere.*Pass a pipeline folder or a Hub id"),
    "a file": ({"model": "good.parquet"}, "good.parquet' is a file; a folder or a Hub id"),
    "no network": ({"model": "user/nothing"}, "'user/nothing'.*HF_HUB_OFFLINE is set.*or pass a local folder"),
    "damaged index": ({"model": "broken_index"}, "model_index.json' is not valid JSON.*line 1, column 2"),
    "damaged weights": ({"model": "broken_weights"}, "Could not load .*missing or damaged.*anew"),
    "missing component": ({"model": "broken_component"}, "Could not load .*missing or damaged.*anew"),
}


# The commands read models and data by the same code: each case once, each command with several.
@pytest.mark.parametrize(("case", "command"), rotating(CASES, TASKS))
def test_commands_tell_in_one_line_and_write_nothing(place, tmp_path, capfd, command, case):
    change, message = CASES[case]
    model, data = str(saved("ddpm")), str(place / "good.parquet")
    arguments = list(TASKS[command])
    for name, value in change.items():
        there = value if value and value.startswith("user/") else str(place / str(value))
        if name == "model":
            model = there
        elif name == "data":
            data = there
        elif value is None:
            at = arguments.index("--layers")
            arguments[at : at + 2] = [name]
        else:
            arguments += [name, value]
    assert main([command, model, data, "--out", str(tmp_path / "out"), *arguments]) == 2
    told = capfd.readouterr().err.splitlines()
    assert told[-1].startswith(f"diffusers-repr {command}: "), told
    assert re.search(message, told[-1]), told[-1]
    assert not any(re.search("Traceback|Error", line) for line in told[:-1]), told
    assert not list(tmp_path.rglob("*.parquet"))
    assert {path.name for path in tmp_path.rglob("*.json")} <= {"manifest.json"}


def test_a_run_without_a_shard_binds_nobody(place, tmp_path, capfd):
    """Mixed sizes are found after the store was begun; the remedy that the message names works in the same folder."""
    command = ["extract", str(saved("ddpm")), str(place / "mixed.parquet"), "--out", str(tmp_path), *TASKS["extract"]]
    assert main([*command, "--image_size", "keep"]) == 2
    assert "--image_size" in capfd.readouterr().err
    assert main([*command, "--image_size", "16"]) == 0
    assert FeatureStore.open(tmp_path).recipe["features"]["image_size"] == [16, 16]
    assert main([*command, "--image_size", "32"]) == 2
    assert "image_size" in capfd.readouterr().err
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert main([*command, "--image_size", "32"]) == 2  # finished once: not ours to begin anew


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("empty", "is no pipeline folder"),
        ("nowhere", "There is no folder"),
        ("broken_index", "is not valid JSON"),
        ("broken_component", "config.json"),
    ],
)
def test_layers_of_what_is_no_model(place, capfd, model, message):
    assert main(["layers", str(place / model)]) == 2
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith("diffusers-repr layers: ")
    assert message in told


@pytest.mark.parametrize("command", TASKS)
def test_a_timestep_that_is_no_number_is_a_wrong_use(place, capsys, command):
    flag = "--timesteps"
    with pytest.raises(SystemExit) as stopped:
        main([command, "model", "data", "--out", "out", *TASKS[command], flag, "late"])
    assert stopped.value.code == 2
    assert f"argument {flag}: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "use",
    [
        lambda it: FeatureExtractor(it, "mid_block", 10),
        lambda it: list_layers(it),
        lambda it: select_features(it, rows(pictures(4)), rows(pictures(4)), [10]),
    ],
)
@pytest.mark.parametrize("it", ["ddpm", "user/model"])
def test_what_is_no_denoiser(use, it):
    given = build(it) if it == "ddpm" else it
    with pytest.raises(TypeError, match=f"A Denoiser is needed; got {type(given).__name__}.*from_pipe.*pretrained"):
        use(given)


def test_patterns_are_matched_in_the_network():
    with pytest.raises(TypeError, match="takes the network, such as `denoiser.model`; got Denoiser"):
        match_layers(Denoiser.from_pipe(build("ddpm")), "up_blocks.*")


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("7", ValueError, "No layer '7' in UNet2DModel: .* never by an index.*list_layers"),
        ([-1], TypeError, "Layer -1 is int; a layer is named by its full module path"),
        (2, TypeError, "full module paths such as 'mid_block'; got 2"),
    ],
)
def test_an_index_is_no_layer(layers, error, message):
    with pytest.raises(error, match=message):
        FeatureExtractor(Denoiser.from_pipe(build("ddpm")), layers, 10)


def test_no_timestep():
    with pytest.raises(TypeError, match="timestep must be a number, such as 261, or a NoiseLevel; got None"):
        FeatureExtractor(Denoiser.from_pipe(build("ddpm")), "mid_block", None)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "No images: the list is empty. Pass at least one"),
        (torch.full((2, 1, 32, 32), torch.nan), ValueError, "Image 0 has NaN or infinite values"),
        (["cat.png"], TypeError, r"images from str.*PIL.Image.open\(path\)"),
        ({"image": []}, TypeError, "images from dict.*its column of images"),
        (None, TypeError, "images from NoneType; pass PIL images"),
    ],
)
def test_images_that_are_none(images, error, message):
    denoiser = Denoiser.from_pipe(build("ddpm"))
    probe = Probe.fit(denoiser, rows(pictures(8)), layers="mid_block", timestep=10)
    for use in (FeatureExtractor(denoiser, "mid_block", 10), probe):
        with pytest.raises(error, match=message):
            use(images)


def test_mixed_sizes():
    extractor = FeatureExtractor(Denoiser.from_pipe(build("ddpm")), "mid_block", 10, image_size="keep")
    with pytest.raises(ValueError, match=r"mixed sizes.*\(32, 32\), \(32, 48\).*image_size"):
        extractor([torch.rand(1, 32, 32), torch.rand(1, 32, 48)])


def test_a_choice_among_selections_needs_a_selection(place, tmp_path, capsys):
    data, out = str(place / "good.parquet"), str(tmp_path / "out")
    assert main(["probe", str(saved("ddpm")), data, *TASKS["probe"], "--use", "levels", "--out", out]) == 2
    assert "--use levels says what of a selection to take; give --selection" in capsys.readouterr().err
