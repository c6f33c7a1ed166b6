"""Train a classifier p(class | x_t, t) on the noise process of a diffusion pipeline, for classifier guidance.

    accelerate launch examples/train_classifier.py --config examples/configs/classifier_digits.yaml
    accelerate launch examples/train_classifier.py --config my_recipe.yaml --seed 1 --output_dir outputs/seed1

The folder loads by `NoisyClassifier.from_pretrained(folder)`; it has the moving average of the weights, with
`ema_max_decay: 0` the weights of the last step. The pipeline gives its noise process and, if it is latent, its VAE;
its network is not used. Loss and accuracy are told over all noise levels and for equal parts of them, `_0` being the
least noisy: in `loss.jsonl` those of training; with `eval_split` those of that split too, in `evaluation.jsonl` and on
the card. The loop, its checkpoints and its settings: docs/training.md.
"""

import dataclasses
import inspect
import sys
from itertools import pairwise
from typing import Any

import torch
from recipe_data import load_recipe_data
from torch import Tensor
from torch.utils.data import DataLoader

from diffusers_repr.config import parse_recipe
from diffusers_repr.config.recipe import check_keys, mapping, setting
from diffusers_repr.data import DataConfig, TrainData
from diffusers_repr.hub.places import public_name
from diffusers_repr.models import NoisyClassifier
from diffusers_repr.objectives import ClassifierObjective
from diffusers_repr.objectives.classifier import ClassifierBase
from diffusers_repr.training import TrainingConfig, recipe_of, train
from diffusers_repr.training.seeds import reseed

# Arguments of NoisyClassifier that base and data decide.
GIVEN = ("in_channels", "num_classes", "sample_size", "num_train_timesteps", "noise_schedule", "base_model",
         "latent_scale", "id2label")  # fmt: skip
# Of DataConfig: how training images are moved, and from where; the images that measure are read as they are.
AS_THEY_ARE = {
    "random_flip": False, "random_rotation": 0.0, "random_shift": 0.0, "random_scale": 0.0, "streaming": False,
    "latents_dir": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """The network, the pipeline whose noise it reads, and how it is measured."""

    pretrained_model_name_or_path: str | None = setting(None, "pipeline folder or Hub id: its noise process, its VAE")
    revision: str | None = setting(None, "branch, tag or commit of the pipeline on the Hub")
    model: dict | str | None = setting(None, "arguments of NoisyClassifier, a mapping (JSON in a flag)")
    eval_split: str | None = setting(None, "split to measure on; default, or none: no measurement")
    noise_bins: int = setting(5, "equal parts of the range of noise levels that log and evaluation tell apart")

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise ValueError("`pretrained_model_name_or_path` is missing: the pipeline that is to be guided.")
        arguments = mapping("model", self.model)
        if taken := [name for name in GIVEN if name in arguments]:
            raise ValueError(f"`model` sets {taken}, which the pipeline and the data set decide; leave them out.")
        known = inspect.signature(NoisyClassifier.__init__).parameters
        check_keys("`model`", arguments, [name for name in known if name not in GIVEN])
        if self.noise_bins < 1:
            raise ValueError(f"`noise_bins` must be 1 or more, got {self.noise_bins}.")
        object.__setattr__(self, "model", arguments)
        object.__setattr__(self, "eval_split", None if self.eval_split == "none" else self.eval_split)


class Accuracy:
    """Loss and accuracy of a classifier on every image of a split, once in each part of the noise levels."""

    def __init__(self, objective: ClassifierObjective, data: TrainData, batch_size: int, seed: int) -> None:
        self.objective, self.data, self.batch_size, self.seed = objective, data, batch_size, seed

    @torch.no_grad()
    def __call__(self, model: NoisyClassifier, step: int) -> dict[str, float]:
        reseed(self.seed, step, 0)
        bins, device = self.objective.bins, model.device
        sums = torch.zeros(2, bins, dtype=torch.float64)
        for batch in DataLoader(self.data, self.batch_size):
            moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
            moved = self.data.on_device(moved)
            for part in range(bins):
                places = (part + torch.rand(len(moved["class_labels"]), device=device)) / bins
                values = self.objective.classify(model, moved, places)
                sums[:, part] += torch.stack(values).double().sum(1).cpu()
        means = dict(zip(("eval_loss", "eval_accuracy"), sums / len(self.data), strict=True))
        found = {name: value.mean().item() for name, value in means.items()}
        found |= {f"{name}_{part}": value.item() for name, row in means.items() for part, value in enumerate(row)}
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found


def open_data(
    config: TrainingConfig, data_config: DataConfig, base: ClassifierBase, split: str | None
) -> tuple[Any, Any]:
    """Training data, and those that measure or None."""
    unused = [name for name in ("caption_column", "features_dir") if getattr(data_config, name)]
    unused += ["missing_labels"] if data_config.missing_labels == "keep" else []
    if unused:
        raise ValueError(f"{', '.join(unused)}: a classifier learns from images and their classes alone; drop it.")
    size, workers = base.image_size, {"num_workers": config.dataloader_num_workers}
    data = load_recipe_data(data_config, base.image_channels, size, config.seed, vae=base.vae, **workers)
    if not data.class_names:
        raise ValueError("The data have no classes; name a column of them by --label_column.")
    if split is None:
        return data, None
    held_out = load_recipe_data(
        dataclasses.replace(data_config, dataset_split=split, **AS_THEY_ARE), base.image_channels, size
    )
    if held_out.class_names != data.class_names:
        raise ValueError(
            f"`eval_split` {split!r} has the classes {held_out.class_names}, {data_config.dataset_split!r} has "
            f"{data.class_names}; measure on data of the same classes."
        )
    return data, held_out


def card_of(objective: ClassifierObjective, dataset: str, split: str | None) -> dict[str, Any]:
    """What the result's card tells besides what every card tells."""
    base, edges = objective.base, objective.edges()
    parts = "\n".join(f"| `_{i}` | {low:.4g} to {high:.4g} |" for i, (low, high) in enumerate(pairwise(edges)))
    measured = (
        f"The `eval_` numbers are of split `{split}`, each image once in every part. "
        if split
        else "It was not measured. "
    )
    text = f"""It is p(class | x_t, t) on the {base.schedule.kind} noise process of `{base.name}`, for classifier
guidance (Dhariwal and Nichol 2021).

```python
from diffusers_repr.models import NoisyClassifier

classifier = NoisyClassifier.from_pretrained("{{folder}}")
log_p = classifier(x_t, timestep).log_softmax(1)  # x_t: (B, {base.channels}, H, W) as the network takes it
```

{measured}Loss (nats) and accuracy
are those over all noise levels, and of parts of them:

| part | timesteps |
|---|---|
{parts}"""
    accuracy = {"type": "accuracy", "name": "accuracy over all noise levels", "dataset": public_name(dataset),
                "split": split}  # fmt: skip
    return {
        "kind": "`NoisyClassifier`", "tags": ["diffusers", "classifier-guidance", "image-classification"],
        "base_model": base.hub_id, "text": text, "metrics": {"eval_accuracy": accuracy},
    }  # fmt: skip


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ClassifierConfig)
    config, data_config, classifier = parse_recipe(kinds, argv, __doc__.split("\n")[0])
    if config.lora_rank:
        raise ValueError("`lora_rank` adapts a trained network, and this one is new; drop it.")
    config = dataclasses.replace(config, eval_batch_size=0)  # a classifier has no samples
    base = ClassifierBase.load(classifier.pretrained_model_name_or_path, classifier.revision, data_config.resolution)
    data, held_out = open_data(config, data_config, base, classifier.eval_split)
    torch.manual_seed(config.seed)
    objective = ClassifierObjective(base, data.class_names, classifier.model, noise_bins=classifier.noise_bins)
    objective.card = card_of(objective, data_config.dataset_name, classifier.eval_split)
    accuracy = None if held_out is None else Accuracy(objective, held_out, config.train_batch_size, config.seed)
    train(objective, data, config, recipe=recipe_of(config, data_config, classifier), evaluate=accuracy)


if __name__ == "__main__":
    main(sys.argv[1:])
