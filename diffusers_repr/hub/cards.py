"""Model cards and data set cards with the Hub's metadata: what the Hub shows, filters by and ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from huggingface_hub.repocard_data import CardData

from diffusers_repr.hub.errors import is_repo_id

_BOUNDS = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")  # of the Hub's size categories


@dataclass(frozen=True)
class Metric:
    """One measured number, as it stands in the `model-index` of a model card.

    Args:
        type: Metric id: `"accuracy"`, `"mean_iou"`, `"fid"`.
        value: Its value, finite, in the metric's own unit (an accuracy in 0..1); the card has six digits of it.
        dataset: Name of the data set for people: `"Digits (8x8)"`.
        dataset_type: Id of the data set on the Hub; None makes a plain name out of `dataset`.
        split: The split it was measured on.
        task: Task id of the Hub: `"image-classification"`.
        name: Name of the metric for people; None shows `type`.
        config: Configuration of the data set, if it has several.

    Raises:
        ValueError: If the value is not finite or a text is empty.

    Example:
        >>> Metric("accuracy", 0.94, dataset="Digits (8x8)").dataset_id
        'digits-8x8'
    """

    type: str
    value: float
    dataset: str
    dataset_type: str | None = None
    split: str = "test"
    task: str = "image-classification"
    name: str | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        """Refuse what the Hub would refuse, or show as nothing."""
        for field in ("type", "dataset", "split", "task"):
            if not getattr(self, field):
                raise ValueError(f"Metric.{field} is empty; the Hub needs it. Give a text.")
        if not math.isfinite(self.value):
            raise ValueError(
                f"Metric {self.type!r} has the value {self.value}; a card holds finite numbers. Leave the metric out "
                "if it was not measured."
            )

    @property
    def dataset_id(self) -> str:
        """The data set's id: `dataset_type`, or a plain name made of `dataset`."""
        return self.dataset_type or re.sub(r"[^a-z0-9]+", "-", self.dataset.lower()).strip("-") or "dataset"

    def to_eval_result(self) -> EvalResult:
        """The same in the Hub client's own class."""
        return EvalResult(
            task_type=self.task,
            dataset_type=self.dataset_id,
            dataset_name=self.dataset,
            dataset_config=self.config,
            dataset_split=self.split,
            metric_type=self.type,
            metric_name=self.name,
            metric_value=float(f"{self.value:.6g}"),  # a card is read by people
        )


def model_card(
    *,
    title: str,
    text: str,
    base_model: str | Sequence[str] | None = None,
    tags: Sequence[str] = (),
    metrics: Sequence[Metric] = (),
    datasets: Sequence[str] = (),
    library_name: str = "diffusers-repr",
    license: str = "apache-2.0",
    pipeline_tag: str | None = None,
    **extra: Any,
) -> str:
    """Write the README.md of a model repository.

    Args:
        title: Heading, and the model's name in the `model-index`.
        text: The card's text in Markdown, below the heading.
        base_model: Hub id(s) of what the model was made from; None for a local folder, which the Hub cannot link.
        tags: Words the Hub filters by; the library's name is always among them.
        metrics: Measured numbers; `ModelCard.load(...).data.eval_results` gives them back.
        datasets: Hub ids of the training data.
        library_name: The library that loads the repository.
        license: License id of the Hub.
        pipeline_tag: Task id of the Hub (`"image-classification"`).
        **extra: Further metadata, written as it is.

    Returns:
        The whole file. Save it with `atomic_write(folder / "README.md", ...)`.

    Raises:
        ValueError: If an id has not the form of an id, or two metrics disagree on the name of one data set.

    Example:
        >>> from huggingface_hub import ModelCard
        >>> text = model_card(title="Probe", text="Hello.", metrics=[Metric("accuracy", 0.94, dataset="Digits")])
        >>> ModelCard(text).data.eval_results[0].metric_value
        0.94
    """
    bases = [base_model] if isinstance(base_model, str) else list(base_model or [])
    _check_ids("base_model", bases)
    _check_ids("datasets", datasets)
    _check_datasets_named_once(metrics)
    data = ModelCardData(
        base_model=base_model if isinstance(base_model, str) else (bases or None),
        datasets=list(datasets) or None,
        eval_results=[metric.to_eval_result() for metric in metrics] or None,
        library_name=library_name,
        license=license,
        metrics=list(dict.fromkeys(metric.type for metric in metrics)) or None,
        model_name=title,
        pipeline_tag=pipeline_tag,
        tags=list(dict.fromkeys([library_name, *tags])),
        **extra,
    )
    return _card(data, title, text)


def dataset_card(
    *,
    title: str,
    text: str,
    license: str | None = None,
    tags: Sequence[str] = (),
    task_categories: Sequence[str] = (),
    source_datasets: Sequence[str] = (),
    num_rows: int | None = None,
    data_files: Mapping[str, str] | None = None,
    **extra: Any,
) -> str:
    """Write the README.md of a data set repository.

    Args:
        title: Heading and `pretty_name`.
        text: The card's text in Markdown, below the heading.
        license: License id of the Hub. It has no default: features of a data set are under that data set's license.
        tags: Words the Hub filters by; the library's name is always among them.
        task_categories: Task ids of the Hub (`"image-classification"`).
        source_datasets: Hub ids of the data sets this one was made from.
        num_rows: Number of rows; gives the size category.
        data_files: Split name -> file pattern in the repository (`{"train": "data/train-*.parquet"}`), which is
            what `load_dataset` reads; None leaves it to the file names.
        **extra: Further metadata, written as it is.

    Returns:
        The whole file. Save it with `atomic_write(folder / "README.md", ...)`.

    Raises:
        ValueError: If an id has not the form of an id, or `num_rows` is negative.

    Example:
        >>> from huggingface_hub import DatasetCard
        >>> card = DatasetCard(dataset_card(title="Features", text="Hello.", num_rows=1797))
        >>> card.data.size_categories, card.data.tags
        (['1K<n<10K'], ['diffusers-repr'])
    """
    _check_ids("source_datasets", source_datasets)
    if data_files is not None:
        files = [{"split": split, "path": pattern} for split, pattern in data_files.items()]
        extra["configs"] = [{"config_name": "default", "data_files": files}]
    data = DatasetCardData(
        license=license,
        pretty_name=title,
        size_categories=None if num_rows is None else [_size_category(num_rows)],
        source_datasets=list(source_datasets) or None,
        task_categories=list(task_categories) or None,
        tags=list(dict.fromkeys(["diffusers-repr", *tags])),
        **extra,
    )
    return _card(data, title, text)


def _card(data: CardData, title: str, text: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text.strip()}\n"


def _check_ids(field: str, ids: Sequence[str]) -> None:
    for value in ids:
        if not is_repo_id(value):
            raise ValueError(
                f"{field}={value!r} is no Hub id ('name' or 'user/name'), so the Hub cannot link it. Leave it out of "
                "the metadata and name it in the text."
            )


def _check_datasets_named_once(metrics: Sequence[Metric]) -> None:
    """The model-index keeps one name for each (task, id, config, split)."""
    names: dict[tuple[str | None, ...], str] = {}
    for metric in metrics:
        key = (metric.task, metric.dataset_id, metric.config, metric.split)
        if names.setdefault(key, metric.dataset) != metric.dataset:
            raise ValueError(
                f"The data set {metric.dataset_id!r} has two names, {names[key]!r} and {metric.dataset!r}; a card "
                "keeps one. Use one name, or give `config=` or `split=` where they differ."
            )


def _size_category(num_rows: int) -> str:
    if num_rows < 0:
        raise ValueError(f"num_rows={num_rows}; a number of rows is 0 or more.")
    above = max(len(str(num_rows)) - 3, 0)  # how many of the bounds it reaches
    if above == 0:
        return f"n<{_BOUNDS[0]}"
    if above >= len(_BOUNDS):
        return f"n>{_BOUNDS[-1]}"
    return f"{_BOUNDS[above - 1]}<n<{_BOUNDS[above]}"
