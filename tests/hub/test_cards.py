import pytest
from huggingface_hub import DatasetCard, ModelCard

from diffusers_repr.hub import Metric, atomic_write, dataset_card, model_card


def test_model_card_round_trip(tmp_path):
    metrics = [
        Metric("accuracy", 0.9444444, dataset="Digits (8x8)", name="Accuracy, all labels"),
        Metric("f1", 1, dataset="Digits (8x8)"),
        Metric("accuracy", 0.5, dataset="CIFAR-10", dataset_type="uoft-cs/cifar10", split="train", config="plain"),
    ]
    text = model_card(
        title="Probe: digits #1",
        text="\nReads one layer.\n",
        base_model="user/base",
        tags=["probe", "diffusers-repr", "probe"],
        metrics=metrics,
        datasets=["user/digits"],
        pipeline_tag="image-classification",
        inference=False,
    )
    path = atomic_write(tmp_path / "README.md", text)
    card = ModelCard.load(path)
    assert card.data.eval_results == [metric.to_eval_result() for metric in metrics]
    assert [result.metric_value for result in card.data.eval_results] == [0.944444, 1.0, 0.5]  # six digits
    assert card.data.model_name == "Probe: digits #1"
    assert card.data.base_model == "user/base"
    assert card.data.tags == ["diffusers-repr", "probe"]
    assert card.data.metrics == ["accuracy", "f1"]
    assert card.data.datasets == ["user/digits"]
    assert card.data.library_name == "diffusers-repr"
    assert card.data.license == "apache-2.0"
    assert card.data.inference is False
    assert card.text.strip() == "# Probe: digits #1\n\nReads one layer."


def test_model_card_without_metrics_has_no_model_index():
    card = ModelCard(model_card(title="A", text="b"))
    assert card.data.eval_results is None
    assert "model-index" not in str(card)
    assert ModelCard(model_card(title="A", text="b", base_model=["a/b", "c"])).data.base_model == ["a/b", "c"]


def test_model_card_refuses():
    with pytest.raises(ValueError, match="base_model='./base' is no Hub id"):
        model_card(title="A", text="b", base_model="./base")
    metrics = [Metric("f1", 1.0, dataset="A", dataset_type="x"), Metric("f1", 1.0, dataset="B", dataset_type="x")]
    with pytest.raises(ValueError, match="two names, 'A' and 'B'"):
        model_card(title="A", text="b", metrics=metrics)
    with pytest.raises(ValueError, match="finite"):
        Metric("accuracy", float("nan"), dataset="A")
    with pytest.raises(ValueError, match=r"Metric\.dataset is empty"):
        Metric("accuracy", 1.0, dataset="")


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (1797, "1K<n<10K"), (10**6, "1M<n<10M"), (10**15, "n>1T")],
)
def test_dataset_card_round_trip(rows, category):
    text = dataset_card(
        title="Features of digits",
        text="What is in it.",
        tags=["features"],
        task_categories=["image-classification"],
        source_datasets=["user/digits"],
        num_rows=rows,
        data_files={"train": "train-*.parquet", "test": "test-*.parquet"},
    )
    data = DatasetCard(text).data
    assert data.size_categories == [category]
    assert data.pretty_name == "Features of digits"
    assert data.license is None
    assert data.tags == ["diffusers-repr", "features"]
    assert data.configs[0]["data_files"][1] == {"split": "test", "path": "test-*.parquet"}


def test_dataset_card_refuses():
    with pytest.raises(ValueError, match="num_rows=-1"):
        dataset_card(title="A", text="b", num_rows=-1)
    with pytest.raises(ValueError, match="source_datasets='./features'"):
        dataset_card(title="A", text="b", source_datasets=["./features"])
