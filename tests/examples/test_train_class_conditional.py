import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from image_batches import ImagePixels, LabelledImages, drop_labels, load_split
from PIL import Image
from safetensors.torch import load_file
from train_unconditional import DDPMScheduler, diffusion_loss, main, parse_args, sample_classes

from tests.examples.test_train_unconditional import EXAMPLES, as_flags, assert_same_tensors, fresh_accelerate, launch
from tests.examples.test_train_unconditional import RECIPE as UNCONDITIONAL

__all__ = ["fresh_accelerate"]
CLASS_RECIPE = EXAMPLES / "configs" / "ddim_digits_class.yaml"
CLASS_MODEL = EXAMPLES / "models" / "digits-class-ddim"
NULL = 10
RECIPE = UNCONDITIONAL | {
    "model": UNCONDITIONAL["model"] | {"num_class_embeds": NULL + 1},
    "label_dropout": 0.25,
    "max_train_steps": 4,
    "logging_steps": 2,
    "eval_batch_size": 16,
}


def write_recipe(folder: Path, **changes) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def run_here(folder: Path, **changes) -> Path:
    main(["--config", write_recipe(folder, **changes), "--output_dir", str(folder / "out")])
    return folder / "out"


def digits(*, labels: str = "label", embeddings: int = NULL + 1) -> LabelledImages:
    pixels = ImagePixels(load_split("digits", "train"), "image", channels=1, size=8, cache=False)
    return LabelledImages(pixels, labels, embeddings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A run of four steps with a checkpoint after each, and its recipe."""
    folder = tmp_path_factory.mktemp("run")
    config = write_recipe(folder)
    launch(config, folder / "whole")
    return folder / "whole", config


# --- launched runs


def test_saved_folder_is_a_ddim_pipeline_of_classes(finished):
    output, _ = finished
    pipeline = DDIMPipeline.from_pretrained(output)
    assert type(pipeline.scheduler) is DDIMScheduler
    assert json.loads((output / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    assert pipeline.scheduler.config.num_train_timesteps == RECIPE["scheduler"]["num_train_timesteps"]
    assert pipeline.unet.config.num_class_embeds == NULL + 1
    averaged = load_file(output / "checkpoint-00000004" / "ema.safetensors")
    for name, tensor in load_file(output / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(tensor, averaged[name].half()), name
    assert Image.open(output / "samples.png").size == (8 * 32, 2 * 32)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="class_labels"):
        pipeline(num_inference_steps=1)  # what the card says of the stock call


def test_card_tells_labels(finished):
    card = (finished[0] / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert "class-conditional-image-generation" in front["tags"]
    for expected in ("A `DDIMPipeline`", "ids 0 to 9", "null id is 10", "probability 0.25", "label_dropout: 0.25"):
        assert expected in card


def test_resume_is_bit_exact(finished, tmp_path):
    output, config = finished
    resumed = tmp_path / "whole"
    shutil.copytree(output / "checkpoint-00000001", resumed / "checkpoint-00000001")
    assert "steps 1 to 4" in launch(config, resumed)
    for name in ("model", "ema"):
        assert_same_tensors(*(run / "checkpoint-00000004" / f"{name}.safetensors" for run in (output, resumed)))
    assert (output / "README.md").read_text() == (resumed / "README.md").read_text()
    assert (output / "samples.png").read_bytes() == (resumed / "samples.png").read_bytes()


def test_two_processes_draw_their_own_labels(tmp_path):
    flags = ["--max_train_steps", "1", "--eval_batch_size", "0"]
    launch(write_recipe(tmp_path), tmp_path / "two", *flags, processes=2)
    state = json.loads((tmp_path / "two" / "checkpoint-00000001" / "state.json").read_text())
    assert state["identity"]["num_processes"] == 2
    assert state["identity"]["label_dropout"] == 0.25


# --- runs in this process


@pytest.mark.usefixtures("fresh_accelerate")
class TestRun:
    def seen(self, monkeypatch, folder: Path, **changes) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Images and labels as the loss gets them."""
        batches = []

        def loss(model, scheduler, images, class_labels):
            batches.append((images, class_labels))
            return diffusion_loss(model, scheduler, images, class_labels)

        monkeypatch.setattr("train_unconditional.diffusion_loss", loss)
        run_here(folder, eval_batch_size=0, **changes)
        return batches

    def test_every_image_has_its_label(self, tmp_path, monkeypatch):
        still = {"random_rotation": 0.0, "random_shift": 0.0, "label_dropout": 0.0}
        data = digits()
        known = {data[index][0].numpy().tobytes(): data[index][1] for index in range(len(data))}
        for images, labels in self.seen(monkeypatch, tmp_path, **still):
            pixels = ((images + 1) * 127.5).round().to(torch.uint8)
            assert labels.tolist() == [known[image.numpy().tobytes()] for image in pixels]

    def test_dropped_labels_differ_between_steps(self, tmp_path, monkeypatch):
        given = self.seen(monkeypatch, tmp_path, train_batch_size=64, label_dropout=0.5)
        dropped = torch.stack([labels == NULL for _, labels in given])
        assert len(dropped) == 8  # four steps of two micro-batches
        assert len({tuple(row.tolist()) for row in dropped}) == 8
        assert abs(dropped.float().mean() - 0.5) < 4 * (0.25 / dropped.numel()) ** 0.5

    @pytest.mark.parametrize(("dropout", "trained"), [(0.0, range(NULL)), (1.0, [NULL])])
    def test_only_given_ids_are_trained(self, tmp_path, dropout, trained):
        output = run_here(tmp_path, label_dropout=dropout, train_batch_size=64, eval_batch_size=0)
        torch.manual_seed(RECIPE["seed"])
        before = UNet2DModel(**RECIPE["model"]).class_embedding.weight
        after = load_file(output / "checkpoint-00000004" / "model.safetensors")["class_embedding.weight"]
        changed = (before != after).any(dim=1).nonzero().flatten().tolist()
        assert changed == list(trained)

    def test_labels_that_do_not_fit_leave_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match="num_class_embeds=10; the 10 classes of 'label' and the null id need 11"):
            run_here(tmp_path, model=RECIPE["model"] | {"num_class_embeds": 10})
        assert not (tmp_path / "out").exists()


# --- functions


def test_loss_gives_the_model_its_labels():
    torch.manual_seed(0)
    model, scheduler = UNet2DModel(**RECIPE["model"]).eval(), DDPMScheduler(**RECIPE["scheduler"])
    images, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.tensor([0, 3, 3, 9, NULL, 1])
    torch.manual_seed(1)
    got = diffusion_loss(model, scheduler, images, labels)
    torch.manual_seed(1)
    noise, t = torch.randn_like(images), torch.randint(100, (6,))
    kept = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * images + (1 - kept).sqrt() * noise
    one_by_one = [model(noisy[i : i + 1], t[i], class_labels=labels[i : i + 1]).sample for i in range(6)]
    torch.testing.assert_close(got, (torch.cat(one_by_one) - noise).square().mean())


def test_label_dropout_is_as_often_as_said():
    labels = torch.arange(100_000) % NULL
    torch.manual_seed(0)
    dropped = drop_labels(labels, NULL, 0.1)
    gone = dropped == NULL
    assert torch.equal(dropped[~gone], labels[~gone])
    assert abs(gone.float().mean() - 0.1) < 4 * (0.1 * 0.9 / len(labels)) ** 0.5
    for label in range(NULL):  # no class more than another
        assert abs(gone[labels == label].float().mean() - 0.1) < 4 * (0.1 * 0.9 / 10_000) ** 0.5
    pairs = (gone[:-1] & gone[1:]).float().mean()  # neighbours are independent
    assert abs(pairs - 0.01) < 5 * (0.01 / len(labels)) ** 0.5
    assert dropped.dtype == labels.dtype
    assert torch.equal(drop_labels(labels, NULL, 0.0), labels)
    assert (drop_labels(labels, NULL, 1.0) == NULL).all()


def test_samples_equal_a_float64_loop():
    """Deterministic DDIM (Song et al. 2021, eq. 12 with sigma = 0) with x0 clipped to [-1, 1]."""
    torch.manual_seed(0)
    pipeline = DDIMPipeline(UNet2DModel(**RECIPE["model"]).eval(), DDPMScheduler(**RECIPE["scheduler"]))
    labels = [0, 4, 9]
    got = sample_classes(pipeline, labels, torch.Generator().manual_seed(3), steps=5)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    unet, kept = pipeline.unet.double(), torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64), 0)
    for t in (80, 60, 40, 20, 0):
        with torch.no_grad():
            eps = unet(x, t, class_labels=torch.tensor(labels)).sample
        a, b = kept[t], kept[t - 20] if t else torch.tensor(1.0)
        x0 = ((x - (1 - a).sqrt() * eps) / a.sqrt()).clamp(-1, 1)
        x = b.sqrt() * x0 + (1 - b).sqrt() * eps
    expected = ((x / 2 + 0.5).clamp(0, 1)[:, 0] * 255).round()
    assert np.abs(np.stack([np.array(image, dtype=float) for image in got]) - expected.numpy()).max() <= 1


def test_labelled_images():
    data, source = digits(), load_split("digits", "train")
    assert len(data) == len(source) == 997
    for index in (0, 500, 996):
        image, label = data[index]
        assert label == source[index]["label"]
        assert np.array_equal(image[0].numpy(), np.array(source[index]["image"]))


# --- bad input


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (10, "label", "num_class_embeds=10; the 10 classes of 'label' and the null id need 11"),
        (1001, "label", "num_class_embeds=1001"),
        (11, "digit", "No column 'digit' of type ClassLabel in .*'label': 'ClassLabel'.*--label_column"),
        (11, "image", "No column 'image' of type ClassLabel"),
    ],
)
def test_columns_that_do_not_fit(embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        digits(labels=labels, embeddings=embeddings)


def test_images_without_a_class():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    grey = Image.new("L", (8, 8))
    data = datasets.Dataset.from_dict({"image": [grey] * 4, "label": [0, -1, 1, None]}, features=features)
    pixels = ImagePixels(data, "image", channels=1, size=8, cache=False)
    with pytest.raises(ValueError, match="2 of 4 images have no class in 'label'"):
        LabelledImages(pixels, "label", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_dropout": 1.5}, "`label_dropout` is a probability, got 1.5"),
        ({"label_dropout": -0.1}, "`label_dropout` is a probability"),
        ({"model": RECIPE["model"] | {"class_embed_type": "timestep"}}, "class_embed_type"),
    ],
)
def test_bad_recipes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_args(["--config", write_recipe(tmp_path, **changes), "--output_dir", "out"])


def test_labels_are_no_setting_of_an_unconditional_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(UNCONDITIONAL))
    args = parse_args(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "out"])
    assert not args.class_conditional
    assert not {"label_column", "label_dropout"} & (args.identity().keys() | yaml.safe_load(args.to_yaml()).keys())
    args = parse_args(["--config", write_recipe(tmp_path), "--output_dir", "out"])
    assert args.class_conditional
    assert args.null_label == NULL
    assert {"label_column", "label_dropout"} <= args.identity().keys() & yaml.safe_load(args.to_yaml()).keys()


# --- the committed model


def test_committed_model_is_what_its_card_says():
    weights = CLASS_MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    assert sum(path.stat().st_size for path in CLASS_MODEL.rglob("*")) < 3_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    card = (CLASS_MODEL / "README.md").read_text()
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    output = ["--output_dir", "outputs/digits-class-ddim"]
    assert parse_args([*output, *as_flags(recipe)]) == parse_args(["--config", str(CLASS_RECIPE)])
    assert f"Steps: {recipe['max_train_steps']:,} with seed {recipe['seed']}" in card


def test_committed_model_knows_the_classes_of_unseen_digits():
    """The label that predicts the noise best is the digit's own far more often than by chance."""
    pipeline = DDIMPipeline.from_pretrained(CLASS_MODEL)
    data = load_split("digits", "test").select(range(50))
    pixels = ImagePixels(data, "image", channels=1, size=8, cache=False)
    images = torch.stack([pixels[index] for index in range(50)]).float() / 127.5 - 1
    errors = torch.zeros(50, NULL + 1)
    for t in (200, 400, 600):
        timesteps = torch.full((50,), t)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(t))
        noisy = pipeline.scheduler.add_noise(images, noise, timesteps)
        for label in range(NULL + 1):
            with torch.no_grad():
                predicted = pipeline.unet(noisy, timesteps, class_labels=torch.full((50,), label)).sample
            errors[:, label] += (predicted - noise).square().mean(dim=(1, 2, 3)) / 3
    own = torch.tensor(data["label"])
    assert (errors[:, :NULL].argmin(1) == own).float().mean() > 0.8
    assert errors[:, NULL].mean() > errors[torch.arange(50), own].mean()  # the null id knows less
    assert errors[:, NULL].mean() < 0.5
