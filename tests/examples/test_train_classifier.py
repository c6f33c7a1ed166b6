"""What is this script's own: the classifier, its base's noise and VAE, what is told. The loop: tests/training."""

import dataclasses
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from train_classifier import main

from diffusers_repr import Denoiser, NoiseSchedule
from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.denoiser.vae import encode_moments
from diffusers_repr.models import NoisyClassifier
from diffusers_repr.objectives import ClassifierConfig
from diffusers_repr.objectives.classifier import ClassifierBase, ClassifierObjective, timesteps_at
from diffusers_repr.tasks import ClassifierAccuracy
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import run_script
from tests.testers.models import build, saved
from tests.training.loop_cases import forget_accelerate

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS_RECIPE = EXAMPLES / "configs" / "classifier_digits.yaml"
DIGITS_MODEL = EXAMPLES / "models" / "digits-ddpm"
DIGITS = [str(digit) for digit in range(10)]
TINY = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8}
RECIPE = {
    "pretrained_model_name_or_path": str(DIGITS_MODEL),
    "dataset_name": "digits",
    "eval_split": "validation",
    "random_rotation": 10.0,
    "model": TINY | {"dropout": 0.1},
    "train_batch_size": 8,
    "max_train_steps": 2,
    "learning_rate": 0.003,
    "ema_max_decay": 0.5,
    "noise_bins": 2,
    "checkpointing_steps": 1,
    "logging_steps": 1,
    "seed": 7,
    "save_dtype": "float16",
}
KINDS = (TrainingConfig, DataConfig, ClassifierConfig)


def write_recipe(folder: Path, **changes) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    forget_accelerate()
    yield
    forget_accelerate()


def run_here(folder: Path, **changes) -> Path:
    main(["--config", write_recipe(folder, **changes), "--output_dir", str(folder / "out")])
    return folder / "out"


def image_folder(place: Path, names: list[str], labels: list[int | None]) -> str:
    """A data set of RGB photos, wider than high; its columns are `photo` and `kind`."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 12, 20, 3), dtype=np.uint8)
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=names)})
    columns = {"photo": [Image.fromarray(image) for image in pixels], "kind": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(place / "train.parquet")
    return str(place)


# --- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """Two steps, and what they printed."""
    folder = tmp_path_factory.mktemp("run")
    flags = ("--config", write_recipe(folder), "--output_dir", str(folder / "out"))
    return folder / "out", run_script(main, "train_classifier", *flags)


def test_saved_folder_is_a_classifier_of_its_base(finished):
    output, printed = finished
    assert "8 of 997 images a step, steps 0 to 2" in printed
    model = NoisyClassifier.from_pretrained(output)
    assert model.labels == DIGITS
    assert (model.config.in_channels, model.config.sample_size, model.config.base_model) == (1, 8, "digits-ddpm")
    model.check_base(Denoiser.from_pretrained(DIGITS_MODEL).schedule, 1)
    with pytest.raises(ValueError, match="the noise process flow .* trained on vp .*'digits-ddpm'"):
        model.check_base(NoiseSchedule("flow", "velocity"), 1)
    weights = load_file(output / "diffusion_pytorch_model.safetensors")
    averaged = load_file(output / "checkpoint-00000002" / "ema.safetensors")
    trained = load_file(output / "checkpoint-00000002" / "model.safetensors")
    assert {f"classifier.{name}" for name in weights} == set(averaged)
    assert all(torch.equal(tensor, averaged[f"classifier.{name}"].half()) for name, tensor in weights.items())
    assert any(not torch.equal(tensor, trained[f"classifier.{name}"].half()) for name, tensor in weights.items())


def test_log_evaluation_and_card(finished):
    output, _ = finished
    lines = read_lines(output / "loss.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert all(math.isfinite(line[name]) for name in ("loss", "loss_0", "loss_1"))
        assert min(line["loss_0"], line["loss_1"]) <= line["loss"] <= max(line["loss_0"], line["loss_1"])
    (scores,) = read_lines(output / "evaluation.jsonl")
    assert scores["step"] == 2
    for name in ("eval_loss", "eval_accuracy"):
        assert scores[name] == pytest.approx((scores[f"{name}_0"] + scores[f"{name}_1"]) / 2)
    card = ModelCard((output / "README.md").read_text())
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(scores["eval_accuracy"], rel=1e-5)
    assert (result.dataset_name, result.dataset_split) == ("digits", "validation")
    assert {"classifier-guidance", "image-classification"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.base_model is None  # a local folder cannot be linked
    for expected in (
        "A `NoisyClassifier` of", "The weights are\nthe moving average, saved in float16.", "`digits-ddpm`",
        "`_1` | 500 to 999", "of split `validation`", "Classes: 10", "997 images of `digits`, split `train`",
        'NoisyClassifier.from_pretrained("out")', f"| eval_accuracy_1 | {scores['eval_accuracy_1']:.4g} |",
        "`accelerate launch examples/train_classifier.py --config recipe.yaml`",
        "pretrained_model_name_or_path: digits-ddpm",
    ):  # fmt: skip
        assert expected in card.text, expected
    assert str(EXAMPLES) not in card.text
    assert "samples.png" not in card.text


# --- runs in this process


def test_it_learns(tmp_path, capsys):
    """80 steps of the shipped recipe with a network of a quarter of its width."""
    flags = {"max_train_steps": 80, "lr_warmup_steps": 5, "learning_rate": 0.004, "logging_steps": 20}
    flags |= {"model": json.dumps(TINY | {"block_out_channels": [16, 32]}), "output_dir": tmp_path / "out"}
    flags |= {"pretrained_model_name_or_path": DIGITS_MODEL, "checkpointing_steps": 80}
    main(
        ["--config", str(DIGITS_RECIPE), *(str(part) for key, value in flags.items() for part in (f"--{key}", value))]
    )
    (scores,) = read_lines(tmp_path / "out" / "evaluation.jsonl")
    assert scores["eval_accuracy_0"] > 0.6  # chance is 0.1
    assert scores["eval_accuracy_4"] < scores["eval_accuracy_0"] - 0.2  # little is left to see
    lines = read_lines(tmp_path / "out" / "loss.jsonl")
    assert lines[-1]["loss_0"] < 0.7 * lines[0]["loss_0"]
    assert lines[-1]["accuracy_0"] > lines[0]["accuracy_0"]
    checkpoint = load_file(tmp_path / "out" / "checkpoint-00000080" / "model.safetensors")
    saved_weights = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    for name, tensor in saved_weights.items():  # the recipe switches the moving average off
        assert torch.equal(tensor, checkpoint[f"classifier.{name}"].half()), name
    assert "The weights are\nthose of the last step" in (tmp_path / "out" / "README.md").read_text()
    assert "'eval_accuracy': " in capsys.readouterr().out


@pytest.mark.parametrize(("family", "kind"), [("sd", "vp"), ("sd3", "flow")])
def test_latents_and_images_of_a_folder(tmp_path, family, kind):
    folder = saved(family)
    output = run_here(
        tmp_path,
        pretrained_model_name_or_path=str(folder),
        dataset_name=image_folder(tmp_path / "data", ["cat", "dog"], [0, 1, 0, 1, 1]),
        eval_split="none",
        image_column="photo",
        label_column="kind",
        random_flip=True,
        max_train_steps=1,
        mixed_precision="bf16",
    )
    model, base = NoisyClassifier.from_pretrained(output), Denoiser.from_pretrained(folder)
    assert model.labels == ["cat", "dog"]
    assert model.config.noise_schedule["kind"] == kind
    assert model.config.sample_size == base.image_size[0] // base.stride
    assert not any(name.startswith("vae") for name in load_file(output / "checkpoint-00000001" / "model.safetensors"))
    model.check_base(base.schedule, 4, base.vae.config.scaling_factor)
    with pytest.raises(ValueError, match="latents"):
        model.check_base(base.schedule, 4, 1.5 * base.vae.config.scaling_factor)
    assert not (output / "evaluation.jsonl").exists()
    assert "It was not measured." in (output / "README.md").read_text()


def test_dry_run_prints_the_recipe(capsys):
    base = ["--pretrained_model_name_or_path", str(DIGITS_MODEL)]
    main(["--config", str(DIGITS_RECIPE), "--dry_run", "--seed", "5", *base])
    printed = capsys.readouterr().out
    assert "# classifier: 363,626 parameters (NoisyClassifier)" in printed
    recipe = yaml.safe_load(printed)
    shipped = parse_recipe(KINDS, ["--config", str(DIGITS_RECIPE), *base])
    assert recipe["seed"] == 5
    assert all(recipe[name] == getattr(part, name) for part, name in zip(
        shipped, ("learning_rate", "random_scale", "model"), strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learning_rat": 1}, ValueError, "Unknown key 'learning_rat' in .*Closest allowed: .'learning_rate'"),
        ({"pretrained_model_name_or_path": None}, ValueError, "`pretrained_model_name_or_path` is missing"),
        ({"model": {"poling": "mean"}}, ValueError, "Unknown key 'poling' in `model`.*'pooling'"),
        ({"model": {"num_classes": 10}}, ValueError, r"`model` sets \['num_classes'\], which the pipeline and"),
        ({"model": [8]}, ValueError, "model is a list of 1; allowed is an object"),
        ({"model": {"norm_num_groups": 5}}, ValueError, "multiple of norm_num_groups=5"),
        ({"noise_bins": 0}, ValueError, "`noise_bins` must be 1 or more"),
        ({"lora_rank": 2}, ValueError, "`lora_rank` adapts a trained network"),
        ({"missing_labels": "keep"}, ValueError, "missing_labels: a classifier learns from images and their classes"),
        ({"caption_column": "text"}, ValueError, "caption_column: a classifier learns"),
        ({"pretrained_model_name_or_path": "./nowhere"}, FileNotFoundError, "there is no './nowhere' here"),
        ({"resolution": 7}, ValueError, "takes multiples of 2"),
        ({"dataset_split": "trian"}, ValueError, "no split 'trian'"),
        ({"eval_split": "trian"}, ValueError, "no split 'trian'"),
        ({"label_column": "none"}, ValueError, "have no classes; name a column of them by --label_column"),
        ({"label_column": "image"}, ValueError, "'image' of digits holds Image.*, not class ids"),
    ],
)
def test_bad_settings_leave_no_folder(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        run_here(tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_splits_of_other_classes(tmp_path):
    """The ids are whole numbers, so a split's classes reach to its largest."""
    for split, labels in (("train", [0, 1, 2, 1]), ("test", [0, 1, 1, 0])):
        columns = {"image": [Image.new("L", (8, 8))] * 4, "label": labels}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / f"{split}.parquet")
    changes = {"dataset_name": str(tmp_path / "data"), "label_column": "label"}
    with pytest.raises(ValueError, match=r"`eval_split` 'test' has the classes .*'1'\], 'train' has .*'2'\]"):
        run_here(tmp_path, **changes, eval_split="test")


def test_images_without_a_class(tmp_path):
    data = image_folder(tmp_path / "data", ["cat", "dog"], [0, None, -1, 1, 0])
    with pytest.raises(ValueError, match="2 of 5 images have no class in 'kind'"):
        run_here(tmp_path, dataset_name=data)


# --- what is told


def tiny_objective(bins: int = 3) -> ClassifierObjective:
    torch.manual_seed(0)
    return ClassifierObjective(ClassifierBase.load(str(DIGITS_MODEL)), DIGITS, TINY, noise_bins=bins)


def plain_scores(objective: ClassifierObjective, image, label: int, place: float, noise) -> tuple[float, float]:
    """Cross-entropy and correctness of one image in float64, by the base's own scheduler and by hand."""
    timestep = math.floor(place * 1000)
    alpha_bar = float(Denoiser.from_pretrained(DIGITS_MODEL).pipe.scheduler.alphas_cumprod[timestep])
    x_t = alpha_bar**0.5 * image.double() + (1 - alpha_bar) ** 0.5 * noise.double()
    with torch.no_grad():
        logits = objective.classifier(x_t[None].float(), timestep)[0].double()
    return -float(logits[label] - logits.exp().sum().log()), float(int(logits.argmax()) == label)


def test_the_terms_of_a_step_are_those_of_a_plain_loop():
    objective = tiny_objective().eval()
    images, labels = torch.rand(7, 1, 8, 8) * 2 - 1, torch.arange(7)
    torch.manual_seed(3)
    out = objective({"pixel_values": images, "class_labels": labels})
    assert [name for name, value in out.items() if value.requires_grad] == ["loss"]
    out = {name: value.item() for name, value in out.items()}
    torch.manual_seed(3)
    places, noise = torch.rand(7), torch.randn(7, 1, 8, 8)
    rows = [plain_scores(objective, images[i], i, float(places[i]), noise[i]) for i in range(7)]
    parts = [int(3 * float(place)) for place in places]
    assert len(set(parts)) > 1
    for column, name in enumerate(("loss", "accuracy")):
        assert out[name] == pytest.approx(sum(row[column] for row in rows) / 7, abs=1e-5)
        for part in range(3):
            own = [row[column] for row, at in zip(rows, parts, strict=True) if at == part]
            told = out[f"{name}_{part}"]
            assert told == pytest.approx(sum(own) / len(own), abs=1e-5) if own else math.isnan(told)


def test_a_part_that_no_sample_fell_into_has_no_value_in_the_log(tmp_path):
    line, *_ = read_lines(run_here(tmp_path, train_batch_size=1, eval_split="none") / "loss.jsonl")
    (there,) = {"loss_0", "loss_1"} & set(line)
    assert line[there] == pytest.approx(line["loss"])


def test_the_evaluation_is_that_of_a_plain_loop(tmp_path):
    """Every image once in each part; the numbers do not depend on how the last batch is filled."""
    objective = tiny_objective(bins=2).eval()
    names, labels = DIGITS, [3, 1, 4, 1, 5]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pixels = np.random.default_rng(1).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    data = load_train_data(DataConfig(dataset_name=str(tmp_path / "data")), 1, 8)
    seen = []

    def watched(model, batch, places):
        state = torch.get_rng_state()
        noise = torch.randn_like(batch["pixel_values"])
        torch.set_rng_state(state)
        seen.extend(zip(batch["index"].tolist(), places.tolist(), noise, strict=True))
        return type(objective).classify(objective, model, batch, places)

    objective.classify = watched
    scores = ClassifierAccuracy(objective, data, batch_size=3, seed=0)(objective.classifier, 0)
    assert sorted((index, int(2 * place)) for index, place, _ in seen) == [
        (i, part) for i in range(5) for part in (0, 1)
    ]
    images = torch.from_numpy(pixels).double()[:, None] / 127.5 - 1
    rows = [(int(2 * p), *plain_scores(objective, images[i], labels[i], p, noise)) for i, p, noise in seen]
    for column, name in ((1, "eval_loss"), (2, "eval_accuracy")):
        assert scores[name] == pytest.approx(sum(row[column] for row in rows) / 10, abs=1e-5)
        for part in (0, 1):
            own = [row[column] for row in rows if row[0] == part]
            assert scores[f"{name}_{part}"] == pytest.approx(sum(own) / 5, abs=1e-5)


def test_cached_moments_give_the_latents_of_the_images():
    pipe = build("sd3")
    denoiser = Denoiser.from_pipe(pipe)
    base = ClassifierBase("sd3", None, denoiser.schedule, 4, 3, (16, 16), denoiser.stride, pipe.vae)
    objective = ClassifierObjective(base, ["cat", "dog"], TINY)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    cached = objective.clean({"moments": encode_moments(pipe.vae, pixels)})
    with torch.autocast("cpu", torch.bfloat16):  # mixed precision is the classifier's, not the VAE's
        torch.testing.assert_close(cached, objective.clean({"pixel_values": pixels}))
    config = pipe.vae.config
    expected = (pipe.vae.encode(pixels).latent_dist.mean - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(cached, expected)


def test_a_run_on_another_base_is_another_run():
    objective = tiny_objective()
    first = objective.identity()
    assert json.loads(json.dumps(first)) == first
    objective.base = dataclasses.replace(objective.base, schedule=NoiseSchedule("flow", "velocity"))
    assert objective.identity() != first


# --- noise levels


def test_timesteps_of_each_process():
    places = torch.tensor([0.0, 0.0004, 0.5, 0.9999999])
    table = torch.linspace(-1e-4, -10, 1000, dtype=torch.float64)
    assert timesteps_at(NoiseSchedule("vp", "epsilon", 1000, table), places).tolist() == [0, 0, 500, 999]
    flow = timesteps_at(NoiseSchedule("flow", "velocity", 100), places)
    assert flow.tolist() == pytest.approx([0, 0.04, 50, 100])
    sigmas = {"sigma_min": 0.01, "sigma_max": 100.0}
    assert timesteps_at(NoiseSchedule("ve", "score", **sigmas), places)[2].item() == pytest.approx(1.0)
    edm = timesteps_at(NoiseSchedule("edm", "edm", **sigmas), places)
    assert (edm[2] * 4).exp().item() == pytest.approx(1.0, abs=1e-5)
    for kind, output in (("ve", "score"), ("edm", "edm"), ("flow", "velocity")):
        schedule = NoiseSchedule(kind, output, **sigmas)
        levels = schedule.resolve(timesteps_at(schedule, places))
        assert bool((levels.nsr.diff() > 0).all())  # least noise first, all within the range


def test_whole_timesteps_are_equally_likely():
    schedule = NoiseSchedule("vp", "epsilon", 4, torch.linspace(-0.1, -3, 4))
    drawn = timesteps_at(schedule, torch.rand(40000, generator=torch.Generator().manual_seed(0)))
    assert torch.bincount(drawn.long()).tolist() == pytest.approx([10000] * 4, rel=0.05)
