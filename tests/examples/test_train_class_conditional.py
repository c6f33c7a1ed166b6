"""train_unconditional.py with labels: what reaches the network, what is saved, what is sampled."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file
from train_unconditional import main

from diffusers_repr.data.image_column import ImagePixels
from diffusers_repr.data.splits import open_split
from diffusers_repr.objectives import DiffusionObjective
from tests.examples.scripts import picture
from tests.examples.test_train_unconditional import EXAMPLES, assert_recipe_of, fresh_accelerate
from tests.examples.test_train_unconditional import RECIPE as UNCONDITIONAL

__all__ = ["fresh_accelerate"]
CLASS_RECIPE = EXAMPLES / "configs" / "ddim_digits_class.yaml"
CLASS_MODEL = EXAMPLES / "models" / "digits-class-ddim"
NULL = 10
RECIPE = UNCONDITIONAL | {
    "model": UNCONDITIONAL["model"] | {"num_class_embeds": NULL + 1},
    "label_dropout": 0.25,
    "max_train_steps": 4,
    "eval_batch_size": 0,
}


def run_here(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    main(["--config", str(path), "--output_dir", str(folder / "out")])
    return folder / "out"


@pytest.mark.usefixtures("fresh_accelerate")
class TestRun:
    def test_saved_folder_is_a_ddim_pipeline_of_classes(self, tmp_path):
        output = run_here(tmp_path, eval_batch_size=16)
        pipeline = DDIMPipeline.from_pretrained(output)
        assert type(pipeline.scheduler) is DDIMScheduler
        assert json.loads((output / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
        assert pipeline.scheduler.config.num_train_timesteps == RECIPE["scheduler"]["num_train_timesteps"]
        assert pipeline.unet.config.num_class_embeds == NULL + 1
        assert picture(output / "samples.png").width > 2 * 6 + 8 * 64 + 7 * 4  # names of classes in front
        card = (output / "README.md").read_text()
        assert "Classes: 10" in card
        assert "label_dropout: 0.25" in card

    def seen(self, monkeypatch, folder: Path, **changes) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Clean images and labels as the network gets them."""
        batches = []
        noised = DiffusionObjective.noised

        def look(objective, batch, *given, **named):
            noisy = noised(objective, batch, *given, **named)
            batches.append((noisy.x0, noisy.condition["class_labels"]))
            return noisy

        monkeypatch.setattr(DiffusionObjective, "noised", look)
        run_here(folder, **changes)
        return batches

    def test_every_image_has_its_label(self, tmp_path, monkeypatch):
        still = {"random_rotation": 0.0, "random_shift": 0.0, "label_dropout": 0.0, "max_train_steps": 2}
        data = open_split("digits", "train")
        pixels = ImagePixels(data, "image", channels=1, size=8, cache=False)
        known = {pixels[index].numpy().tobytes(): label for index, label in enumerate(data["label"])}
        for images, labels in self.seen(monkeypatch, tmp_path, **still):
            rounded = ((images + 1) * 127.5).round().to(torch.uint8)
            assert labels.tolist() == [known[image.numpy().tobytes()] for image in rounded]

    def test_dropped_labels_differ_between_steps(self, tmp_path, monkeypatch):
        given = self.seen(monkeypatch, tmp_path, train_batch_size=64, label_dropout=0.5)
        dropped = torch.stack([labels == NULL for _, labels in given])
        assert len(dropped) == 8  # four steps of two micro-batches
        assert len({tuple(row.tolist()) for row in dropped}) == 8
        assert abs(dropped.float().mean() - 0.5) < 4 * (0.25 / dropped.numel()) ** 0.5

    @pytest.mark.parametrize(("dropout", "trained"), [(0.0, range(NULL)), (1.0, [NULL])])
    def test_only_given_ids_are_trained(self, tmp_path, dropout, trained):
        output = run_here(tmp_path, label_dropout=dropout, train_batch_size=64, max_train_steps=1)
        torch.manual_seed(RECIPE["seed"])
        before = UNet2DModel(**RECIPE["model"]).class_embedding.weight
        after = load_file(output / "checkpoint-00000001" / "model.safetensors")["network.class_embedding.weight"]
        changed = (before != after).any(dim=1).nonzero().flatten().tolist()
        assert changed == list(trained)

    def test_labels_that_do_not_fit_leave_no_folder(self, tmp_path):
        with pytest.raises(ValueError, match="The data have 10 classes, UNet2DModel has 9 and the null class"):
            run_here(tmp_path, model=RECIPE["model"] | {"num_class_embeds": 10})
        with pytest.raises(ValueError, match="The data have 0 classes, UNet2DModel has 10"):
            run_here(tmp_path, label_column="none")
        assert not (tmp_path / "out").exists()


# --- the committed model


def test_committed_model_is_what_its_card_says():
    weights = CLASS_MODEL / "unet" / "diffusion_pytorch_model.safetensors"
    assert sum(path.stat().st_size for path in CLASS_MODEL.rglob("*")) < 3_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float16}
    assert_recipe_of(CLASS_MODEL, CLASS_RECIPE)


def test_committed_model_knows_the_classes_of_unseen_digits():
    """The label that predicts the noise best is the digit's own far more often than by chance."""
    pipeline = DDIMPipeline.from_pretrained(CLASS_MODEL)
    data = open_split("digits", "test").select(range(50))
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
