"""`train` on real data sets: streams that resume, unreadable images, labels that do not fit; accelerate's settings."""

import dataclasses
import os

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import ClassLabel

from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.image_files import UnreadableImage
from diffusers_repr.training import make_accelerator, train
from diffusers_repr.training.sharding import check_sharding
from tests.data.data_cases import NAMES, rows, with_broken
from tests.testers.cases import slow
from tests.training.loop_cases import (
    Numbers,
    assert_same_checkpoint,
    read_lines,
    run_here,
    settings,
    tiny_objective,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CONFIG = DataConfig(label_column="none", center_crop="adm", random_flip=True)


def stream(data=None, threads=0, **changes):
    dataset = (rows(23) if data is None else data).to_iterable_dataset(num_shards=3)
    config = dataclasses.replace(CONFIG, streaming=True, shuffle_buffer=5, **changes)
    return load_train_data(config, 1, 8, dataset, seed=3, num_workers=threads)


def run_on(folder, data, **changes):
    return run_here(folder, data=data, lr_scheduler="constant", **changes)


@pytest.mark.parametrize("threads", [slow(0), 2])
def test_a_stream_goes_on_at_the_very_next_sample(tmp_path, threads):
    """Eleven steps of four of 23 images: epochs, blocks and shards end inside."""
    run_on(tmp_path / "whole", stream(), max_train_steps=11)
    for steps in (3, 7, 11):
        run_on(tmp_path / "parts", stream(threads=threads), max_train_steps=steps)
    assert_same_checkpoint(*(tmp_path / name / "checkpoint-00000011" for name in ("parts", "whole")))
    losses = [line["loss"] for line in read_lines(tmp_path / "whole")]
    assert [line["loss"] for line in read_lines(tmp_path / "parts") if line["step"] in (3, 6)] == losses[:2]


def test_a_stream_of_other_data_is_refused(tmp_path):
    run_on(tmp_path, stream(), max_train_steps=2)
    with pytest.raises(ValueError, match=r"is of a run with .*'data'"):
        run_on(tmp_path, stream(rows(24, sizes=((16, 12),))), max_train_steps=4)


def test_a_dry_run_on_a_stream(tmp_path, capsys):
    train(tiny_objective(), stream(), settings(tmp_path, dry_run=True))
    printed = capsys.readouterr().out
    assert "# trained: " in printed
    assert "activations" not in printed


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_images_that_cannot_be_read(tmp_path, kind):
    broken = with_broken(rows(11), [4])

    def data(**changes):
        if kind == "stream":
            return stream(broken, **changes)
        return load_train_data(dataclasses.replace(CONFIG, **changes), 1, 8, broken)

    with pytest.raises(UnreadableImage, match=r"4\b.*--bad_images skip"):
        run_on(tmp_path / "fatal", data())
    run_on(tmp_path / "skipped", data(bad_images="skip"))
    assert [line["step"] for line in read_lines(tmp_path / "skipped")] == [3, 6]


def test_labels_reach_a_class_conditional_model(tmp_path):
    labelled = load_train_data(dataclasses.replace(CONFIG, label_column=None), 1, 8, rows(11))
    run_here(tmp_path, tiny_objective(classes=3), labelled)
    assert read_lines(tmp_path)[-1]["loss"] > 0
    assert "Classes: 3" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("classes", "message"), [
    (4, "The data have 3 classes, UNet2DModel has 4 and the null class; set the model's number of classes to 3"),
    (2, "The data have 3 classes, UNet2DModel has 2"),
])  # fmt: skip
def test_data_of_another_number_of_classes(tmp_path, classes, message):
    data = load_train_data(dataclasses.replace(CONFIG, label_column=None), 1, 8, rows(11))
    assert data.class_names == NAMES
    assert isinstance(rows(11).features["label"], ClassLabel)
    with pytest.raises(ValueError, match=message):
        run_here(tmp_path / "out", tiny_objective(classes=classes), data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [-1, 3])
def test_labels_out_of_range(tmp_path, bad):
    data = Numbers(classes=3)
    data.columns["class_labels"][5] = bad
    with pytest.raises(ValueError, match=r"class_labels from .*; the model's classes are 0 to 2 \(null: 3\)"):
        run_here(tmp_path, tiny_objective(classes=3), data, max_train_steps=4)


def test_a_class_conditional_model_without_labels(tmp_path):
    with pytest.raises(ValueError, match=r"The data have 0 classes|the data have no class_labels"):
        run_here(tmp_path, tiny_objective(classes=3), Numbers())


# accelerate


def test_fsdp_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    accelerator = Accelerator()
    if accelerator.distributed_type == DistributedType.FSDP:
        pytest.skip("it is there")
    with pytest.raises(RuntimeError, match="FSDP was asked for, and accelerate gave NO on .*Drop --use_fsdp"):
        train(tiny_objective(), Numbers(), settings(tmp_path), accelerator=accelerator)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check_sharding(accelerator)


def test_accelerate_may_not_accumulate_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="accelerate has gradient_accumulation_steps=4; leave it at 1 there"):
        run_here(tmp_path)


def test_an_accelerator_of_the_callers_own(tmp_path):
    config = settings(tmp_path, max_train_steps=1)
    accelerator = make_accelerator(config)
    result = train(tiny_objective(), Numbers(), config, accelerator=accelerator)
    assert result.step == 1
    assert result.skipped == 0
    assert result.output_dir == tmp_path
    assert [line["step"] for line in result.log] == [1]
    assert os.path.samefile(result.output_dir / "checkpoint-00000001", tmp_path / "checkpoint-00000001")
    assert torch.is_grad_enabled()
