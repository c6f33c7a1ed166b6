"""A probe whose head the training loop trains: what the loop is given, and how its result becomes a `Probe`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from diffusers_repr.data import DataConfig, TrainData, load_train_data
from diffusers_repr.data.image_data import from_dataset
from diffusers_repr.data.splits import open_split
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.features import FeatureExtractor, FeatureOutput
from diffusers_repr.features.extraction import extract_to_store
from diffusers_repr.features.pooling import leaves_maps, pooled_size
from diffusers_repr.features.stored_data import StoredFeatures
from diffusers_repr.heads import FeedbackHead, MapClassifier
from diffusers_repr.heads.fitting.loop_settings import loop_settings
from diffusers_repr.heads.fitting.protocols import Classifier, classifier_class
from diffusers_repr.hub import write_json
from diffusers_repr.hub.places import public_name, without_places
from diffusers_repr.objectives import FixedArtifact, ProbeConfig, ProbeObjective
from diffusers_repr.store.processes import process_state
from diffusers_repr.tasks.base import written_base
from diffusers_repr.tasks.images import class_accuracies, head_inputs
from diffusers_repr.tasks.probe import Probe
from diffusers_repr.tasks.reading import reading_fields
from diffusers_repr.tasks.recipe import ProbeRecipe, Score
from diffusers_repr.training.config import TrainingConfig

_UNUSED = ("caption_column", "mask_column", "points_column", "latents_dir", "features_dir", "streaming")


class ProbeFile:
    """`probe.json` of a run's result: written with the head, and again when a score is known.

    Args:
        recipe: Everything between an image and the head.
    """

    def __init__(self, recipe: ProbeRecipe) -> None:
        self.recipe, self._folder = recipe, None

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write it."""
        self._folder = Path(folder)
        self._write()

    def keep(self, scores: Sequence[Score]) -> None:
        """Have scores in it; where it is written already, it is written again."""
        self.recipe = self.recipe.with_scores(scores)
        if self._folder is not None:
            self._write()

    _folder: Path | None

    def _write(self) -> None:
        assert self._folder is not None
        recipe = replace(self.recipe, base=written_base(self.recipe.base, self._folder))
        write_json(self._folder / recipe.FILE, recipe.to_dict())


@dataclass(frozen=True)
class ProbeArtifact(FixedArtifact):
    """The recipe that makes a `Probe` of the folder with the head.

    Attributes:
        thing: The `ProbeFile`.
    """

    @property
    def kind(self) -> str:
        """What it is."""
        return "recipe of a probe"


class ProbeAccuracy:
    """Accuracy of a probe on every image of a split: for the argument `evaluate` of `train`.

    Args:
        file: Its recipe, which keeps the scores.
        extractor: Of the features.
        data: The split, its images as they are.
        split: Its name.
        batch_size: Images of a forward.
    """

    def __init__(
        self, file: ProbeFile, extractor: FeatureExtractor, data: TrainData, split: str, batch_size: int
    ) -> None:
        self.file, self.extractor, self.data, self.split, self.batch_size = file, extractor, data, split, batch_size

    @torch.no_grad()
    def __call__(self, head: Classifier, step: int) -> dict[str, float]:
        """`eval_accuracy` and its mean over classes, `eval_balanced_accuracy`."""
        probe = Probe(head, self.file.recipe, self.extractor.denoiser, self.batch_size)
        guesses, labels = [], []
        for batch in DataLoader(self.data, self.batch_size):
            moved = self.data.on_device(batch)
            guesses.append(probe.logits(moved["pixel_values"] / 2 + 0.5).argmax(1).cpu())
            labels.append(batch["class_labels"])
        found = torch.cat(labels)
        result = class_accuracies(torch.cat(guesses), found)
        name = public_name(str(getattr(self.data, "name", None) or "dataset"))
        self.file.keep([Score(key, value, name, self.split, len(found)) for key, value in result.items()])
        told = {f"eval_{key}": value for key, value in result.items()}
        print({key: round(value, 4) for key, value in told.items()}, flush=True)
        return told


@dataclass(frozen=True)
class ProbeTraining:
    """What `train` is given.

    Attributes:
        objective: The head, its base and what is saved.
        data: Images, or their features.
        config: Of the loop, with what the protocol says.
        evaluate: What is measured, or None.
    """

    objective: ProbeObjective
    data: TrainData
    config: TrainingConfig
    evaluate: ProbeAccuracy | None


def prepare_probe(config: TrainingConfig, data_config: DataConfig, probe: ProbeConfig) -> ProbeTraining:
    """Open base and data, and make a head for what is read.

    Features that are to be computed once are computed here, by all processes together; a folder that has them already
    is taken as it is.

    Args:
        config: Of the loop; what the protocol speaks of is replaced.
        data_config: Of the images.
        probe: All else.

    Raises:
        ValueError: For settings, layers, levels or data that do not fit each other.
        FileExistsError: If the folder of features holds others.
    """
    _check_unused(config, data_config, probe)
    denoiser = probe.load_base()
    require_images(denoiser, "Probes")
    size = (data_config.resolution,) * 2 if data_config.resolution else denoiser.image_size
    extractor = FeatureExtractor(denoiser, **probe.reading(denoiser), seed=config.seed, image_size=size)
    condition = (probe.prompt, probe.class_label)
    images = load_train_data(data_config, denoiser.image_channels, size, num_workers=config.dataloader_num_workers)
    assert isinstance(images, TrainData)
    if not images.class_names:
        raise ValueError("The data have no classes; name a column of them by --label_column.")
    grey = torch.zeros(2, denoiser.image_channels, *size)
    output = extractor.replace(batch_size=None).from_pixels(grey, prompt=condition[0], class_labels=condition[1])
    torch.manual_seed(config.seed)
    head = new_head(probe, extractor, output, len(images.class_names))
    rows, steps = len(images), probe.steps_of()
    if steps is not None:
        parts = process_state().num_processes * config.gradient_accumulation_steps
        config = dataclasses.replace(config, **loop_settings(steps, rows, parts))
    described = {"name": "training-loop", "version": 1} if steps is None else steps.describe()
    if steps is None:
        named = ("optimizer", "learning_rate", "lr_scheduler", "train_batch_size", "max_train_steps")
        described |= {name: getattr(config, name) for name in named}
    axis = -3 if leaves_maps(extractor.pooling) else -1
    sizes = {layer: feature.shape[axis] for layer, feature in output.features.items()}
    crop = f"center crop ({data_config.center_crop}) in training and measuring; a call stretches what is not of it"
    told = reading_fields(extractor, output, size, sizes, condition, requested=probe.timesteps, seed=config.seed,
                          resize=crop)  # fmt: skip
    name = public_name(str(data_config.dataset_name))
    recipe = ProbeRecipe(
        **told,
        label_names=tuple(images.class_names),
        pooling=str(extractor.pooling),
        protocol={**described, "chosen": {}},
        train={"dataset": name, "split": data_config.dataset_split, "rows": rows},
    )
    file = ProbeFile(recipe)
    mark = {} if steps is None else {"protocol_version": steps.version}
    objective = ProbeObjective(extractor, head, condition, extra=[ProbeArtifact(file)], mark=mark)
    objective.card = about(recipe, head, probe, name)
    data = images if probe.feature_cache is None else cached_features(extractor, data_config, probe)
    accuracy = None
    if probe.eval_split:
        held = load_train_data(data_config.held_out(probe.eval_split), denoiser.image_channels, size)
        assert isinstance(held, TrainData)
        if held.class_names != images.class_names:
            raise ValueError(
                f"`eval_split` {probe.eval_split!r} has the classes {held.class_names}, "
                f"{data_config.dataset_split!r} has {images.class_names}; measure on data of the same classes."
            )
        accuracy = ProbeAccuracy(file, extractor, held, probe.eval_split, config.train_batch_size)
    return ProbeTraining(objective, data, config, accuracy)


def new_head(probe: ProbeConfig, extractor: FeatureExtractor, output: FeatureOutput, num_classes: int) -> Classifier:
    """A head of the kind that is asked for, for features like these."""
    cls: Any = classifier_class(probe.head)
    options: dict[str, Any] = dict(probe.head_options or {})  # type: ignore[arg-type]
    if not issubclass(cls, MapClassifier):
        pooled_size(extractor.pooling)  # refuses maps
        inputs = head_inputs(output, extractor.layers)
        assert isinstance(inputs, Tensor)
        return cls(inputs.shape[1], num_classes, **options)
    if not leaves_maps(extractor.pooling):
        raise ValueError(f"pooling: {extractor.pooling} leaves vectors, and {probe.head!r} reads maps; take map:P.")
    if issubclass(cls, FeedbackHead) and "sources" not in options:
        options |= FeedbackHead.options_for(extractor.denoiser, output.image_size)
    maps = head_inputs(output, extractor.layers)
    assert isinstance(maps, dict)
    return cls.for_maps(maps, num_classes, len(extractor.levels), **options)


def cached_features(extractor: FeatureExtractor, data_config: DataConfig, probe: ProbeConfig) -> StoredFeatures:
    """Features of the training images in `probe.feature_cache`, one store a draw; what is there is not made again."""
    name, split = str(data_config.dataset_name), data_config.dataset_split
    dataset = open_split(name, split, data_config.dataset_revision, False)
    images = from_dataset(dataset, data_config.image_column, data_config.label_column, public_name(name), split)
    stores = []
    for draw in range(probe.cache_draws):
        out = Path(str(probe.feature_cache)) / f"draw-{draw}"
        one = extractor.replace(seed=extractor.seed + draw, batch_size=extractor.batch_size or 64)
        stores.append(
            extract_to_store(one, images, out, prompt=probe.prompt, class_label=probe.class_label,
                             dtype=probe.cache_dtype)
        )  # fmt: skip
    return StoredFeatures(stores)


def about(recipe: ProbeRecipe, head: Classifier, probe: ProbeConfig, dataset: str) -> dict[str, Any]:
    """What the card of a run tells."""
    base = str(probe.pretrained_model_name_or_path)
    levels = ", ".join(f"{level.timestep:g}" for level in recipe.levels)
    text = f"""It tells {len(recipe.label_names)} classes apart by features of `{without_places(base)}`, frozen, in
{", ".join(f"`{layer}`" for layer in recipe.layers)} at timesteps {levels} (pooling `{recipe.pooling}`).

```python
from diffusers_repr.tasks import Probe

probe = Probe.from_pretrained("{{folder}}")
print(probe(images).labels)  # PIL images, numpy arrays or tensors
```

It was fitted under the protocol `{recipe.protocol["name"]}`, version {recipe.protocol["version"]}."""
    accuracy = {"type": "accuracy", "name": "accuracy", "dataset": dataset, "split": probe.eval_split}
    return {
        "kind": f"`{type(head).__name__}`", "pipeline_tag": "image-classification",
        "tags": ["diffusion", "probe", "image-classification"], "text": text,
        "base_model": probe.public_base, "metrics": {"eval_accuracy": accuracy} if probe.eval_split else {},
    }  # fmt: skip


def _check_unused(config: TrainingConfig, data: DataConfig, probe: ProbeConfig) -> None:
    settings: Mapping[str, Any] = {name: getattr(data, name) for name in _UNUSED}
    unused = [name for name, value in settings.items() if value]
    unused += ["missing_labels"] if data.missing_labels == "keep" else []
    unused += ["lora_rank"] if config.lora_rank else []
    if unused:
        raise ValueError(f"{', '.join(unused)}: a probe learns from images and their classes alone; drop it.")
    moved = [
        name for name in ("random_flip", "random_rotation", "random_shift", "random_scale") if getattr(data, name)
    ]
    if probe.feature_cache and moved:
        raise ValueError(f"`feature_cache` knows an image as it is; {', '.join(moved)} cannot act. Drop it, or them.")


__all__ = ["ProbeAccuracy", "ProbeFile", "ProbeTraining", "new_head", "prepare_probe"]
