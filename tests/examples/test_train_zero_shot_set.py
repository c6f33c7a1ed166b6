"""A classifier of generated images: its step is chosen by held-out ones of these, real images are read at the end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from train_zero_shot_set import main
from transformers import AutoModelForImageClassification

from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.scenes import DIGIT_NAMES
from diffusers_repr.store.image_store import ImageKey, write_images
from tests.examples.scripts import run_script

# with batch norms, which the reference leaves in training mode
STUDENT = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
           "layer_type": "basic"}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """What stands for a generated set: real digits of classes that keys tell."""
    rows = load_digits_splits()["train"][:200]
    order = sorted(range(200), key=lambda row: rows["label"][row])
    keys = [ImageKey("m", 8, 8, 1, row, condition=str(rows["label"][row])) for row in order]
    folder = tmp_path_factory.mktemp("made") / "store"
    write_images(folder, keys, lambda asked: [rows["image"][key.seed] for key in asked], progress=False)
    return folder


def folder_of(place: Path, images: list, labels: list[int], names: list[str]) -> Path:
    """Real images with names of their classes."""
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    (place / "data").mkdir(parents=True)
    data = Dataset.from_dict({"image": images, "label": labels}, features=features)
    data.to_parquet(place / "data" / "test-00000-of-00001.parquet")
    return place


def flags(store: Path, output: Path, **changes) -> list[str]:
    given = {"dataset_name": store, "output_dir": output, "image_channels": 1, "resolution": 8, "cache_images": True,
             "test_dataset_name": "digits", "student": json.dumps(STUDENT), "max_train_steps": 24,
             "validation_steps": 6, "train_batch_size": 32, "learning_rate": 0.02, "ema_max_decay": 0.5,
             "logging_steps": 6, "held_out_share": 0.2}  # fmt: skip
    return [word for name, value in (given | changes).items() for word in (f"--{name}", str(value))]


def test_the_step_is_chosen_by_generated_images_and_tested_on_real_ones(store, tmp_path):
    output, test = tmp_path / "out", load_digits_splits()["test"]
    named = folder_of(tmp_path / "named", test["image"], test["label"], list(DIGIT_NAMES))
    run_script(main, "train_zero_shot_set", *flags(store, output, test_dataset_name=named))
    lines = [json.loads(line) for line in (output / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12, 18, 24]
    assert [("test_accuracy" in line) for line in lines] == [False, False, False, True]
    accuracies = [line["held_out_accuracy"] for line in lines]
    best = accuracies.index(max(accuracies))
    assert lines[-1]["selected_step"] == lines[best]["step"]
    pixels = torch.stack([torch.from_numpy(np.array(image)) for image in test["image"]])[:, None] / 127.5 - 1
    chosen = AutoModelForImageClassification.from_pretrained(output / "selected").eval()
    assert list(chosen.config.id2label.values()) == list(DIGIT_NAMES)  # the store knows ids alone
    with torch.no_grad():
        logits = chosen(pixels).logits
        alone = torch.cat([chosen(row[None]).logits for row in pixels[:20]])
    torch.testing.assert_close(alone, logits[:20], atol=1e-4, rtol=1e-4)
    right = float((logits.argmax(1) == torch.tensor(test["label"])).float().mean())
    assert lines[-1]["test_accuracy"] == pytest.approx(right, abs=1e-6)
    assert right > 0.2
    assert "| test_accuracy |" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_steps": 0}, "one is chosen; set it"),
        ({"held_out_share": 1.0}, "between 0 and 1"),
        ({"eval_split": "test"}, "does nothing here"),
        ({"label_column": "none"}, "learns classes"),
    ],
)
def test_bad_settings(store, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(flags(store, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_other_classes_are_refused(store, tmp_path):
    rows = load_digits_splits()["test"][:4]
    other = folder_of(tmp_path / "real", rows["image"], [0, 1, 0, 1], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"classes \['cat', 'dog'\]"):
        main(flags(store, tmp_path / "out", test_dataset_name=other))
