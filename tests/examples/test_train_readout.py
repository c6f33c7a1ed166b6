"""`train_readout.py`: its data, its losses, what it measures and saves; the loop has tests of its own."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.utils.data import default_collate
from train_readout import main

from diffusers_repr.config import parse_recipe
from diffusers_repr.data.groups import fit_points
from diffusers_repr.data.splits import open_split
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import DepthHead, ReadoutHead, sobel_edges
from diffusers_repr.objectives import ReadoutConfig, ReadoutObjective, ReadoutRows, RowsConfig
from diffusers_repr.training import TrainingConfig
from diffusers_repr.training.seeds import reseed
from tests.examples.scripts import run_script
from tests.testers.models import saved
from tests.training.loop_cases import forget_accelerate

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = EXAMPLES / "models" / "digits-ddpm"
WIDTHS = {"width": 8, "bottleneck": 4, "output_widths": [8, 4], "time_width": 16}
DEPTH = {"hidden": [8], "time_width": 8}
KINDS = (TrainingConfig, RowsConfig, ReadoutConfig)
RECIPE = {
    "pretrained_model_name_or_path": str(DIGITS),
    "head": WIDTHS,
    "dataset_name": "digits",
    "train_batch_size": 4,
    "max_train_steps": 2,
    "learning_rate": 0.01,
    "ema_max_decay": 0.5,
    "logging_steps": 1,
    "seed": 3,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_recipe(folder: Path, **changes) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def run(folder: Path, **changes) -> Path:
    """Train in this process; the folder of the result."""
    try:
        main(["--config", write_recipe(folder, **changes), "--output_dir", str(folder / "out")])
    finally:
        forget_accelerate()
    return folder / "out"


def log_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]


def objective_of(base: str | Path, size: tuple[int, int], **settings) -> ReadoutObjective:
    settings = {"head": DEPTH if settings.get("kind") == "depth" else WIDTHS} | settings
    config = ReadoutConfig(str(base), **settings)
    torch.manual_seed(0)
    return ReadoutObjective(config.load_base(), size, config)


def rows_of(data, size: tuple[int, int], channels: int = 3, config: dict | None = None, **settings) -> ReadoutRows:
    return ReadoutRows(data, RowsConfig(**config or {}), ReadoutConfig("base", **settings), channels, size)


# The digits, whole


@pytest.fixture(scope="module")
def edges(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edges")
    changes = {"max_train_steps": 60, "train_batch_size": 16, "eval_split": "validation", "ema_max_decay": 0.9}
    return run(folder, random_flip=True, cache_images=True, logging_steps=20, **changes)


def test_it_learns(edges):
    log = log_of(edges)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    measured = json.loads((edges / "evaluation.jsonl").read_text())
    assert set(measured) == {"step", "constant", *(f"mse_t{t}" for t in (100, 300, 500, 699, 899))}
    assert measured["mse_t100"] < 0.5 * measured["constant"]
    assert measured["mse_t100"] < measured["mse_t899"]


def test_what_is_saved_is_the_average_with_its_base(edges):
    head = ReadoutHead.from_pretrained(edges)
    head.check_base(Denoiser.from_pretrained(DIGITS))
    assert (head.config.target, head.config.base_model) == ("edges", str(DIGITS))
    assert list(head.config.level_range) == [0, 999]
    (checkpoint,) = edges.glob("checkpoint-*")
    average, weights = (load_file(checkpoint / f"{name}.safetensors") for name in ("ema", "model"))
    trained = load_file(edges / WEIGHTS)
    assert {f"readouts.head.{name}" for name in trained} == set(average)
    assert all(torch.equal(value, average[f"readouts.head.{name}"]) for name, value in trained.items())
    assert not torch.equal(trained["output.bias"], weights["readouts.head.output.bias"])


def test_the_card(edges):
    card = ModelCard((edges / "README.md").read_text())
    measured = json.loads((edges / "evaluation.jsonl").read_text())
    assert "A `ReadoutHead` of" in card.text
    assert "reads edges from the features of `digits-ddpm` at timesteps 0 to 999" in card.text
    assert "`up_blocks.0.resnets.0.conv2`" in card.text
    assert "heads/" not in card.text
    assert f"| mse_t300 | {measured['mse_t300']:.4g} |" in card.text
    assert card.data.tags == ["diffusers-repr", "readout-guidance", "spatial"]
    assert yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])["head"] == WIDTHS


def test_the_measured_errors_are_those_of_the_saved_head(edges):
    """Recomputed with hooks on the network."""
    measured = json.loads((edges / "evaluation.jsonl").read_text())
    denoiser, head, kept = Denoiser.from_pretrained(DIGITS), ReadoutHead.from_pretrained(edges).eval(), {}
    for path in head.config["layers"]:
        denoiser.model.get_submodule(path).register_forward_hook(lambda *a, path=path: kept.update({path: a[2]}))
    pixels = np.stack([np.array(image) for image in open_split("digits", "validation")["image"]])
    images = torch.from_numpy(pixels)[:, None].float() / 127.5 - 1
    share, total = denoiser.scheduler.alphas_cumprod[300], 0.0
    for at, part in enumerate(images.split(64)):
        reseed(3, at, 0)
        with torch.no_grad():
            denoiser.model(share.sqrt() * part + (1 - share).sqrt() * torch.randn_like(part), 300)
            total += float((head(kept, 300) - sobel_edges(part)).square().sum())
    assert measured["mse_t300"] == pytest.approx(total / images.numel(), rel=1e-4)
    assert measured["constant"] == pytest.approx(float(sobel_edges(images).var(correction=0)), rel=1e-4)


def test_flags_over_the_recipe(tmp_path):
    flags = ["--config", write_recipe(tmp_path, max_train_steps=1), "--output_dir", str(tmp_path / "out")]
    flags += ["--layers", "mid_block", "up_blocks.0.resnets.0.conv2", "--level_range", "0", "500"]
    run_script(main, "train_readout", *flags)
    head = ReadoutHead.from_pretrained(tmp_path / "out")
    assert list(head.config.layers) == ["mid_block", "up_blocks.0.resnets.0.conv2"]
    assert list(head.config.level_range) == [0, 500]
    assert log_of(tmp_path / "out")[-1]["step"] == 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`accelerate launch examples/train_readout.py --config recipe.yaml`" in card


def test_the_dry_run_of_the_recipe(capsys):
    try:
        main(["--config", str(EXAMPLES / "configs" / "readout_digits_edges.yaml"), "--dry_run"])
    finally:
        forget_accelerate()
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["dataset_name"] == "digits"
    assert "# trained: 91,941 parameters" in printed


@pytest.mark.parametrize("name", ["readout_digits_edges", "readout_cars_edges", "depth_cars_standin"])
def test_recipes_fit_their_base(name, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    _, rows, readout = parse_recipe(KINDS, ["--config", str(EXAMPLES / "configs" / f"{name}.yaml")])
    assert rows.cache_images
    assert len(ReadoutObjective(readout.load_base(), (32, 32), readout).readouts) == 1 + ("depth" in name)


# The other kinds, whole


def images(count: int, seed: int, size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


POINTS = [[[2.0, 3.0], [9.0, 9.0]], [[1.0, 1.0]], [[30.0, 4.0], [5.0, 5.0], [6.0, 7.0]]]
COLUMNS = {
    "image": images(3, 0),
    "label_image": images(3, 1),
    "positive": images(3, 1),
    "negative": images(3, 2),
    "second_image": images(3, 3),
    "points": POINTS,
    "second_points": POINTS,
}


def table(**columns) -> datasets.Dataset:
    points = datasets.List(datasets.List(datasets.Value("float32")))
    kinds = {k: datasets.Image() if isinstance(v[0], Image.Image) else points for k, v in columns.items()}
    return datasets.Dataset.from_dict(columns, datasets.Features(kinds))


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> str:
    """A folder with a column of each kind."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        table(**COLUMNS).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("ddim", {"kind": "depth", "target": "depth", "head": DEPTH, "eval_split": "test", "random_flip": True}),
        ("flux", {"kind": "appearance", "resolution": 32}),
        ("ddim", {"kind": "correspondence", "max_points": 2}),
    ],
    ids=["depth", "appearance", "correspondence"],
)
def test_from_a_recipe_to_heads(tmp_path, stored, base, changes):
    given = {"pretrained_model_name_or_path": str(saved(base)), "dataset_name": stored, "train_batch_size": 2}
    output, depth = run(tmp_path, **given, **changes), changes["kind"] == "depth"
    denoiser = Denoiser.from_pretrained(saved(base))
    heads = [(DepthHead if depth else ReadoutHead).from_pretrained(output)]
    if depth:
        heads.append(DepthHead.from_pretrained(output / "weak"))
        strong, weak = heads
        assert len(strong.config.layers) > len(weak.config.layers) == 1
        assert list(weak.config.level_range) == pytest.approx([0, 0.8 * 999])
        for line in log_of(output):
            assert line["loss"] == pytest.approx(line["strong_l1"] + line["weak_l1"], rel=1e-5)
        measured = json.loads((output / "evaluation.jsonl").read_text())
        assert set(measured) - {"step", "constant"} == {
            f"{name}_l1_t{t}" for name in ("strong", "weak") for t in (80, 240, 400, 559, 719)
        }
    else:
        assert heads[0].config.kind == changes["kind"]
    for head in heads:
        head.check_base(denoiser)


# Losses


def read_by_hooks(objective: ReadoutObjective, batch: dict) -> list[np.ndarray]:
    """What each head reads from the noisy images, kind after kind, float64."""
    denoiser, kept, handles = objective.denoiser, {}, []
    for path in objective.layers:
        hook = denoiser.model.get_submodule(path).register_forward_hook
        handles.append(hook(lambda *a, path=path: kept.update({path: a[2]})))
    x, t = batch["images"].flatten(0, 1), batch["time"].repeat(len(batch["images"]))
    share = denoiser.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        denoiser.model(share.sqrt() * x + (1 - share).sqrt() * batch["noise"], t)
        found = [head(kept, t).double().numpy() for head in objective.readouts.values()]
    for handle in handles:
        handle.remove()
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def expected_loss(kind: str, reads: list[np.ndarray], batch: dict) -> float:
    if kind in ("spatial", "depth"):
        label = batch["label"].double().numpy()
        gaps = [read - label for read in reads]
        return sum(np.mean(gap**2 if kind == "spatial" else np.abs(gap)) for gap in gaps)
    (read,) = reads
    parts = read.reshape(-1, 2, *read.shape[1:])
    if kind == "appearance":
        terms = [
            max(0.0, cosine(one[:, i, j], far[:, i, j]) - cosine(one[:, i, j], near[:, i, j]) + 0.5)
            for one, near, far in zip(*parts, strict=True)
            for i, j in np.ndindex(16, 16)
        ]
        return float(np.mean(terms))
    terms = []
    for row in range(2):
        valid = [p for p in range(3) if batch["valid"][row, p]]
        at = batch["points"][:, row].long().tolist()  # whole pixels at the maps' own size
        one, two = ([parts[k][row][:, y, x] for y, x in (at[k][p] for p in valid)] for k in (0, 1))
        logits = np.array([[cosine(a, b) / 0.07 for b in two] for a in one])
        for table_ in (logits, logits.T):
            terms += [np.log(np.exp(line).sum()) - line[p] for p, line in enumerate(table_)]
    return float(np.mean(terms))


@pytest.mark.parametrize("kind", ["spatial", "depth", "appearance", "correspondence"])
def test_the_loss_equals_a_plain_loop(kind):
    objective = objective_of(saved("ddim"), (16, 16), kind=kind)
    count = {"appearance": 3, "correspondence": 2}.get(kind, 1)
    torch.manual_seed(1)
    batch = {
        "images": torch.rand(count, 2, 3, 16, 16) * 2 - 1,
        "label": torch.rand(2, 1, 16, 16) * 2 - 1,
        "points": torch.randint(16, (2, 2, 3, 2)).float(),
        "valid": torch.tensor([[True, True, False], [True, True, True]]),
        "time": torch.tensor([10, 700]),
        "noise": torch.randn(2 * count, 3, 16, 16),
    }
    reads = read_by_hooks(objective, batch)
    assert reads[0].shape[2:] == (16, 16)
    assert float(objective(batch)["loss"].detach()) == pytest.approx(expected_loss(kind, reads, batch), rel=1e-4)


def test_the_base_stays_as_it_is():
    objective = objective_of(DIGITS, (8, 8))
    network, objective = objective.denoiser.model, objective.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    objective({"images": torch.rand(1, 2, 1, 8, 8), "label": torch.rand(2, 1, 8, 8)})["loss"].backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in objective.parameters())
    assert not network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(name.startswith("readouts.head.") for name in objective.trained_state())


def test_levels_are_whole_and_within_the_range():
    drawn = objective_of(DIGITS, (8, 8), level_range=[2.5, 5]).draw_timesteps(500)
    assert drawn.unique().tolist() == [3, 4, 5]
    drawn = objective_of(saved("flux"), (32, 32), level_range=[100, 200]).draw_timesteps(500)
    assert 100 <= drawn.min() < 105
    assert 195 < drawn.max() <= 200


# Data


def test_labels_are_read_in_their_range():
    grey = [Image.fromarray(np.full((16, 16), value, dtype=np.uint8)) for value in (0, 255, 51)]
    data = table(image=images(3, 0), label_image=grey)
    rows = rows_of(data, (16, 16), target="pose", label_range=[-0.5, 0.5])
    label = rows.on_device(default_collate([rows[i] for i in range(3)]))["label"]
    assert label.shape == (3, 1, 16, 16)
    torch.testing.assert_close(label[:, 0, 0, 0], torch.tensor([-0.5, 0.5, -0.3]))


@pytest.mark.parametrize("target", ["edges", "depth"])
def test_images_are_mirrored_with_their_labels(target):
    rows = rows_of(table(**COLUMNS), (16, 16), config={"random_flip": True}, target=target)
    plain = rows_of(table(**COLUMNS), (16, 16), target=target)
    batch = default_collate([rows[i] for i in (0, 1, 2, 0)])
    torch.manual_seed(4)
    mirror = torch.rand(4) < 0.5
    assert 0 < mirror.sum() < 4
    torch.manual_seed(4)
    found, given = rows.on_device(batch), plain.on_device(batch)
    assert found["images"].shape == (1, 4, 3, 16, 16)
    for row in range(4):
        turned = [value.flip(-1) if mirror[row] else value for value in (given["images"][0, row], given["label"][row])]
        torch.testing.assert_close(found["images"][0, row], turned[0], rtol=0, atol=0)
        torch.testing.assert_close(found["label"][row], turned[1], rtol=0, atol=1e-5)
    if target == "edges":
        torch.testing.assert_close(given["label"], sobel_edges(given["images"][0]))


def test_columns_of_triplets_and_pairs():
    triplets = rows_of(table(**COLUMNS), (16, 16), kind="appearance")
    pixels = triplets[1]["images"]
    for place, column in enumerate(("image", "positive", "negative")):
        assert torch.equal(pixels[place], torch.from_numpy(np.array(COLUMNS[column][1])).permute(2, 0, 1))
    pairs = rows_of(table(**COLUMNS), (16, 16), config={"max_points": 2}, kind="correspondence")
    assert [pairs[i]["valid"].tolist() for i in range(3)] == [[True, True], [True, False], [False, True]]
    batch = pairs.on_device(default_collate([pairs[i] for i in range(3)]))
    assert (batch["images"].shape, batch["points"].shape) == ((2, 3, 3, 16, 16), (2, 3, 2, 2))
    assert torch.equal(batch["points"][1, 0], torch.tensor(POINTS[0]))


def test_other_data_have_another_fingerprint():
    def mark(**changes):
        return rows_of(table(**COLUMNS | changes), (16, 16), kind="correspondence").fingerprint()

    assert mark() == mark() == json.loads(json.dumps(mark()))
    others = {"image": images(3, 8)}, {"second_image": images(3, 8)}, {"points": [*POINTS[:2], [[0.0, 0.0]]]}
    assert all(mark(**other) != mark() for other in others)
    edges, shown = (rows_of(table(**COLUMNS), (16, 16), target=name).fingerprint() for name in ("edges", "pose"))
    assert edges != shown


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


# Bad input


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pretrained_model_name_or_path": None}, "No base; pass --pretrained_model_name_or_path"),
        ({"kind": "depth"}, "Unknown key 'bottleneck'"),
        ({"head": {"wdith": 8}}, "Closest allowed: .'width'"),
        ({"head": "wide"}, "`head` is no JSON"),
        ({"level_range": [9, 2]}, "low < high"),
        ({"label_range": [0.0]}, "low < high"),
        ({"weak_layers": ["mid_block"]}, "is for kind: depth"),
        ({"kind": "appearance", "eval_split": "test"}, "kind: appearance has none"),
        ({"steps": 3}, "Unknown key 'steps'"),
        ({"max_points": 0}, "`max_points` must be positive"),
    ],
)
def test_bad_settings(tmp_path, changes, what):
    with pytest.raises(ValueError, match=what):
        parse_recipe(KINDS, ["--config", write_recipe(tmp_path, **changes)])


@pytest.mark.parametrize(
    ("config", "settings", "what"),
    [
        ({"random_flip": True}, {"kind": "correspondence"}, "off their points"),
        ({"second_points_column": "seconds"}, {"kind": "correspondence"}, "No column 'seconds' of points"),
        ({"positive_column": "points"}, {"kind": "appearance"}, "No column 'points' of type Image"),
        ({"label_column": "pose"}, {"target": "pose"}, "No column 'pose' of type Image"),
    ],
)
def test_data_that_do_not_fit(config, settings, what):
    with pytest.raises(ValueError, match=what):
        rows_of(table(**COLUMNS), (16, 16), config=config, **settings)
