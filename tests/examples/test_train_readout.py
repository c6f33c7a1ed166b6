import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train_readout
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image, ImageOps
from readout_args import parse_args
from readout_data import ReadoutRows, fit_points, labels_of
from readout_report import evaluate
from safetensors.torch import load_file
from torch.nn import functional
from train_readout import Objective, draw_levels, load_base, main

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import DepthHead, ReadoutHead, sobel_edges
from tests.testers.hub_server import hub_env, hub_server, run_python
from tests.testers.models import saved

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = EXAMPLES / "models" / "digits-ddpm"
WIDTHS = {"width": 8, "bottleneck": 4, "output_widths": [8, 4], "time_width": 16}
RECIPE = {
    "pretrained_model_name_or_path": str(DIGITS),
    "kind": "spatial",
    "head": WIDTHS,
    "dataset_name": "digits",
    "random_flip": True,
    "train_batch_size": 4,
    "max_train_steps": 4,
    "learning_rate": 0.01,
    "checkpointing_steps": 1,
    "logging_steps": 3,
    "seed": 3,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_recipe(folder: Path, **changes) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def run(recipe: str, output: Path, *flags: str) -> None:
    for state in (AcceleratorState, GradientState, PartialState):  # a test session keeps those of earlier runs
        state._reset_state()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    main(["--config", recipe, "--output_dir", str(output), *flags])


ENDS = """
import gc, sys
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from train_readout import main
end = Accelerator.end_training
def checked(accelerator):
    assert not [x for x in gc.get_objects() if isinstance(x, DistributedDataParallel)]
    end(accelerator)
    print("ended")
Accelerator.end_training = checked
main(sys.argv[1:])
"""


def launch(recipe: str, output: Path, processes: int, *flags: str) -> None:
    """The script; a model that outlives its process group may hang as it goes, so none may be left at the end."""
    wrapped = output.parent / "ends.py"
    wrapped.write_text(ENDS)
    options = ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    script = [str(wrapped), "--config", recipe, "--output_dir", str(output), *flags]
    places = os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ended") == processes


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_resumed_equals_run_through(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path)
    run(recipe, tmp_path / "whole")
    save, count = train_readout.save_checkpoint, 0

    def interrupted(*args) -> None:
        nonlocal count
        save(*args)
        count += 1
        if count == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_readout, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "parts")
    assert not (tmp_path / "parts" / WEIGHTS).exists()
    monkeypatch.undo()
    run(recipe, tmp_path / "parts")
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    logs = [
        [json.loads(s) for s in (tmp_path / n / "loss.jsonl").read_text().splitlines()] for n in ("whole", "parts")
    ]
    assert [(s["step"], s["loss"]) for s in logs[0]] == [(s["step"], s["loss"]) for s in logs[1]]
    assert [s["step"] for s in logs[0]] == [3, 4]
    with pytest.raises(ValueError, match="'learning_rate': 0.01"):
        run(recipe, tmp_path / "parts", "--learning_rate", "0.1")
    with pytest.raises(ValueError, match="past --max_train_steps 2"):
        run(recipe, tmp_path / "parts", "--max_train_steps", "2")


def test_two_processes_equal_one_of_twice_the_batch(tmp_path):
    """One step of two processes is the mean of the gradients each of them has alone."""
    recipe = write_recipe(tmp_path, max_train_steps=1, logging_steps=1)
    launch(recipe, tmp_path / "two", 2)
    loss = json.loads((tmp_path / "two" / "loss.jsonl").read_text())["loss"]

    args = parse_args(["--config", recipe, "--output_dir", str(tmp_path)])
    denoiser = load_base(args, torch.device("cpu"))
    rows = ReadoutRows(train_readout.load_split("digits", "train"), args, 1, (8, 8))
    torch.manual_seed(3)
    objective = Objective(args, denoiser, (8, 8))
    optimizer = torch.optim.AdamW(objective.heads.parameters(), 0.01, weight_decay=0.0)
    losses = []
    for rank in range(2):
        at = next(train_readout.batch_indices(len(rows), 3, 4 * rank, 4, stride=8))
        batch = {"image": torch.stack([rows[i]["image"] for i in at])}
        train_readout.reseed(3, 0, rank)
        mirror = torch.rand(4)[:, None, None, None] < 0.5
        batch["image"] = torch.where(mirror, batch["image"].flip(3), batch["image"])
        level = draw_levels(denoiser, objective.heads["head"], 4)
        features, timestep = train_readout.noisy_features(denoiser, args, batch, level, objective.layers)
        losses.append(objective(features, timestep, batch))
    torch.stack(losses).mean().backward()
    optimizer.step()
    assert loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    trained = load_file(tmp_path / "two" / WEIGHTS)
    for name, value in objective.heads["head"].state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=2e-5, rtol=1e-4)


def test_it_learns_and_what_is_saved_is_right(tmp_path):
    recipe = write_recipe(
        tmp_path, max_train_steps=80, train_batch_size=16, checkpointing_steps=1000, eval_split="validation"
    )
    run(recipe, tmp_path / "edges")
    head = ReadoutHead.from_pretrained(tmp_path / "edges")
    denoiser = Denoiser.from_pretrained(DIGITS)
    head.check_base(denoiser)
    assert (head.config.target, head.config.base_model) == ("edges", str(DIGITS))
    assert list(head.config.level_range) == [0, 999]
    card = (tmp_path / "edges" / "README.md").read_text()
    table = [line.split("|")[1:3] for line in card.splitlines() if line.startswith("| ") and "timestep" not in line]
    errors = {float(timestep): float(error) for timestep, error in table}
    constant = float(card.split("constant has ")[1].split(".\n")[0])
    assert len(errors) == 5
    assert errors[100.0] < 0.5 * constant
    assert errors[100.0] < errors[899.0]


def test_the_measured_error_is_that_of_the_labels(tmp_path):
    recipe = write_recipe(tmp_path, eval_split="validation", train_batch_size=64, random_flip=False)
    args = parse_args(["--config", recipe, "--output_dir", str(tmp_path)])
    denoiser = load_base(args, torch.device("cpu"))
    objective = Objective(args, denoiser, (8, 8))
    with torch.no_grad():
        objective.heads["head"].output.weight.zero_()
        objective.heads["head"].output.bias.fill_(0.3)
    errors = evaluate(denoiser, args, objective.heads, objective.layers, (8, 8))
    rows = ReadoutRows(train_readout.load_split("digits", "validation"), args, 1, (8, 8))
    label = sobel_edges(torch.stack([rows[i]["image"] for i in range(len(rows))]).float() / 127.5 - 1)
    expected = float((label - np.tanh(0.3)).square().mean())
    assert [row["head"] for row in errors["by_timestep"].values()] == pytest.approx([expected] * 5, rel=1e-5)
    assert errors["constant"] == pytest.approx(float(label.var(correction=0)), rel=1e-5)


# Data sets of the other kinds.


def images(count: int, seed: int, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def save_rows(folder: Path, **columns) -> str:
    (folder / "data").mkdir()
    features = {
        name: datasets.Image()
        if isinstance(values[0], Image.Image)
        else datasets.List(datasets.List(datasets.Value("float32")))
        for name, values in columns.items()
    }
    datasets.Dataset.from_dict(columns, datasets.Features(features)).to_parquet(folder / "data" / "train.parquet")
    return str(folder / "data")


def test_depth_trains_a_strong_and_a_weak_head(tmp_path):
    data = save_rows(tmp_path, image=images(6, 0), label_image=images(6, 1))
    changes = {"kind": "depth", "target": "depth", "head": {"hidden": [8], "time_width": 8}, "dataset_name": data}
    recipe = write_recipe(tmp_path, pretrained_model_name_or_path=str(saved("ddim")), **changes)
    run(recipe, tmp_path / "depth")
    strong, weak = (DepthHead.from_pretrained(tmp_path / "depth" / name) for name in ("", "weak"))
    assert len(strong.config.layers) > len(weak.config.layers) == 1
    assert list(strong.config.level_range) == pytest.approx([0, 0.8 * 999])
    denoiser = Denoiser.from_pretrained(saved("ddim"))
    strong.check_base(denoiser)
    weak.check_base(denoiser)


def test_labels_are_read_in_their_range(tmp_path):
    grey = [Image.fromarray(np.full((16, 16), value, dtype=np.uint8)) for value in (0, 255, 51)]
    data = save_rows(tmp_path, image=images(3, 0), label_image=grey)
    changes = {"target": "pose", "label_range": [-0.5, 0.5], "dataset_name": data}
    args = parse_args(["--config", write_recipe(tmp_path, **changes), "--output_dir", str(tmp_path)])
    rows = ReadoutRows(train_readout.load_split(data, "train"), args, 3, (16, 16))
    batch = {name: torch.stack([rows[i][name] for i in range(3)]) for name in ("image", "label")}
    label = labels_of(batch, args, (8, 8))
    assert label.shape == (3, 1, 8, 8)
    torch.testing.assert_close(label[:, 0, 0, 0], torch.tensor([-0.5, 0.5, -0.3]))


@pytest.mark.parametrize("base", ["sd", "flux"])
def test_appearance(tmp_path, base):
    data = save_rows(tmp_path, image=images(3, 0), positive=images(3, 1), negative=images(3, 2))
    changes = {
        "kind": "appearance",
        "dataset_name": data,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "resolution": 32,
    }
    recipe = write_recipe(tmp_path, pretrained_model_name_or_path=str(saved(base)), **changes)
    run(recipe, tmp_path / "appearance")
    head = ReadoutHead.from_pretrained(tmp_path / "appearance")
    assert head.config.kind == "appearance"
    head.check_base(Denoiser.from_pretrained(saved(base)))


def test_correspondence(tmp_path):
    points = [[[2.0, 3.0], [9.0, 9.0]], [[1.0, 1.0]], [[30.0, 4.0], [5.0, 5.0], [6.0, 7.0]]]
    data = save_rows(tmp_path, image=images(3, 0), second_image=images(3, 1), points=points, second_points=points)
    changes = {"kind": "correspondence", "dataset_name": data, "max_points": 2, "random_flip": False}
    recipe = write_recipe(tmp_path, pretrained_model_name_or_path=str(saved("ddim")), **changes)
    args = parse_args(["--config", recipe, "--output_dir", str(tmp_path)])
    rows = ReadoutRows(train_readout.load_split(data, "train"), args, 3, (16, 16))
    assert [rows[i]["valid"].tolist() for i in range(3)] == [[True, True], [True, False], [False, True]]
    assert torch.equal(rows[0]["image_points"], torch.tensor(points[0]))
    run(recipe, tmp_path / "matching")
    assert ReadoutHead.from_pretrained(tmp_path / "matching").config.kind == "correspondence"


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (8, 8)])
def test_points_move_with_the_image(size):
    """A bright spot is found where its point went, after the crop and the scaling that images go through."""
    height, width = size
    point = torch.tensor([[height * 0.45, width * 0.6]])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    spot = torch.exp(-((y - point[0, 0]) ** 2 + (x - point[0, 1]) ** 2) / (0.02 * min(size) ** 2))
    picture = Image.fromarray((255 * spot).to(torch.uint8).numpy())
    fitted = np.asarray(ImageOps.fit(picture, (24, 16), Image.Resampling.LANCZOS), dtype=np.float64)
    share = fitted / fitted.sum()
    centre = [float((share * np.arange(n).reshape(shape)).sum()) for n, shape in ((16, (-1, 1)), (24, (1, -1)))]
    moved, inside = fit_points(point, size, (16, 24), 3)
    assert moved[0].tolist() == pytest.approx(centre, abs=0.15)
    assert inside.tolist() == [True, False, False]


def test_levels_are_whole_and_within_the_range():
    denoiser = Denoiser.from_pretrained(DIGITS)
    head = ReadoutHead(["a"], [1], **WIDTHS, level_range=(2.5, 5))
    drawn = draw_levels(denoiser, head, 500).timestep
    assert drawn.unique().tolist() == [3.0, 4.0, 5.0]
    flow = Denoiser.from_pretrained(saved("flux"))
    drawn = draw_levels(flow, ReadoutHead(["a"], [1], **WIDTHS, level_range=(100, 200)), 500).timestep
    assert 100 <= drawn.min() < 105
    assert 195 < drawn.max() <= 200


def test_base_stays_as_it_is(tmp_path):
    args = parse_args(["--config", write_recipe(tmp_path), "--output_dir", str(tmp_path)])
    denoiser = load_base(args, torch.device("cpu"))
    before = {name: value.clone() for name, value in denoiser.model.state_dict().items()}
    objective = Objective(args, denoiser, (8, 8))
    batch = {"image": torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)}
    level = denoiser.level(torch.tensor([10, 700]))
    features, timestep = train_readout.noisy_features(denoiser, args, batch, level, objective.layers)
    objective(features, timestep, batch).backward()
    assert timestep.tolist() == [10, 700]
    assert all(p.grad is None for p in denoiser.model.parameters())
    assert all(p.grad is not None for p in objective.parameters())
    assert all(torch.equal(before[name], value) for name, value in denoiser.model.state_dict().items())
    features = {name: x.float() for name, x in features.items()}
    with torch.no_grad():
        read = objective.heads["head"](features, timestep)
    label = sobel_edges(batch["image"].float() / 127.5 - 1)
    expected = functional.mse_loss(read, functional.interpolate(label, read.shape[2:], mode="area"))
    assert float(objective(features, timestep, batch)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"kind": "depth"}, "Unknown key 'bottleneck'"),
        ({"head": {"wdith": 8}}, "Closest allowed: .'width'"),
        ({"level_range": [9, 2]}, "low < high"),
        ({"weak_layers": ["mid_block"]}, "is for kind: depth"),
        ({"kind": "correspondence"}, "off their points"),
        ({"push_to_hub": True}, "needs `hub_model_id`"),
        ({"steps": 3}, "Unknown key 'steps'"),
        ({"layers": "mid_block"}, "`layers` is JSON, such as --layers .*got 'mid_block'"),
    ],
)
def test_bad_recipes(tmp_path, changes, what):
    with pytest.raises(ValueError, match=what):
        parse_args(["--config", write_recipe(tmp_path, **changes), "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("configs/readout_*.yaml")), ids=lambda path: path.stem)
def test_recipes_parse(path, capsys):
    main(["--config", str(path), "--dry_run"])
    assert yaml.safe_load(capsys.readouterr().out)["kind"] == "spatial"


PUSH = """
import json, os, sys
sys.path.insert(0, os.environ["EXAMPLES"])
from huggingface_hub import HfApi, ModelCard
from diffusers_repr.hub import push_folder
from diffusers_repr.heads import ReadoutHead
from train_readout import main
push_folder(os.environ["BASE"], "user/base")
main(["--config", os.environ["RECIPE"], "--output_dir", os.environ["OUT"], "--max_train_steps", "1",
      "--pretrained_model_name_or_path", "user/base", "--push_to_hub", "true", "--hub_model_id", "user/edges"])
files = sorted(HfApi().list_repo_files("user/edges"))
head = ReadoutHead.from_pretrained("user/edges")
card = ModelCard.load("user/edges")
print(json.dumps([files, head.config.base_model, card.data.base_model, card.content]))
"""


def test_push_to_hub(tmp_path):
    with hub_server() as server:
        places = {"EXAMPLES": EXAMPLES, "BASE": DIGITS, "RECIPE": write_recipe(tmp_path), "OUT": tmp_path / "out"}
        environment = hub_env(server, tmp_path, **places, OMP_NUM_THREADS=1, ACCELERATE_USE_CPU="true")
        done = run_python(PUSH, environment, timeout=240)
    assert done.returncode == 0, done.stderr
    files, recorded, base, content = json.loads(done.stdout.splitlines()[-1])
    assert files == [".gitattributes", "README.md", "config.json", WEIGHTS]
    assert (recorded, base) == ("user/base", "user/base")
    assert 'ReadoutHead.from_pretrained("user/edges")' in content
