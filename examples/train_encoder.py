"""Train a small vision transformer without labels (SimCLR), as a teacher for alignment and an encoder for metrics.

    accelerate launch examples/train_encoder.py --config examples/configs/encoder_digits.yaml

The folder loads by `Encoder.from_pretrained(folder)`, and by `ViTModel.from_pretrained(folder)` of transformers.
Two random views of an image shall be more alike than views of different images, both in the class token and in the
mean of the patch tokens (Chen et al. 2020, arXiv 2002.05709). With `eval_split` labels are used at the end, to measure
k-NN and linear-probe accuracy next to those of the untrained network and of raw pixels: `evaluation.jsonl`, the card.
"""

import dataclasses
import sys

import torch
from recipe_data import load_recipe_data
from torch import Tensor
from transformers import ViTConfig, ViTModel

from diffusers_repr.config import parse_recipe
from diffusers_repr.config.recipe import check_keys, mapping, setting
from diffusers_repr.data import DataConfig
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.data.views import ViewConfig, ViewData
from diffusers_repr.objectives import SimCLRObjective
from diffusers_repr.sweep import knn_probe, linear_probe
from diffusers_repr.training import TrainingConfig, recipe_of, train


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The network and its loss."""

    model: dict | str | None = setting(None, "arguments of ViTConfig, a mapping (JSON in a flag)")
    projection_dim: int = setting(128, "width of the vectors that the loss compares")
    temperature: float = setting(0.2, "of the softmax over similarities")
    eval_split: str | None = setting(None, "split whose labels measure the result; none: no measurement")

    def __post_init__(self) -> None:
        arguments = mapping("model", self.model)
        check_keys("`model`", arguments, ViTConfig().to_dict())
        missing = [key for key in ("image_size", "patch_size", "num_channels") if key not in arguments]
        if missing:
            raise ValueError(f"`model` needs {', '.join(missing)}, as whole numbers.")
        if arguments["image_size"] % arguments["patch_size"]:
            raise ValueError(f"`model` has image_size={arguments['image_size']}, no multiple of its patch_size.")
        if self.temperature <= 0 or self.projection_dim < 1:
            raise ValueError("`temperature` and `projection_dim` must be positive.")
        object.__setattr__(self, "model", arguments)


class Accuracy:
    """k-NN and linear-probe accuracy on the test set of the encoder, the untrained one and the pixels."""

    def __init__(self, objective: SimCLRObjective, train_set: tuple[Tensor, Tensor], test_set: tuple[Tensor, Tensor]):
        self.objective, self.sets = objective, (train_set, test_set)  # uint8 images and labels
        self.untrained = objective.result({k: v.clone() for k, v in objective.state_dict().items()})

    @torch.no_grad()
    def features(self, encoder: ViTModel | None, images: Tensor) -> dict[str, Tensor]:
        if encoder is None:
            return {"": to_unit(images).flatten(1)}
        tokens = torch.cat([self.objective.tokens(encoder, to_unit(part)) for part in images.split(512)])
        return {"_class_token": tokens[:, 0], "_patch_mean": tokens[:, 1:].mean(1)}

    def __call__(self, encoder: ViTModel, step: int) -> dict[str, float]:
        (images, labels), (test_images, test_labels) = ([x.to(encoder.device) for x in part] for part in self.sets)
        found = {}
        named = {"trained": encoder, "untrained": self.untrained.to(encoder.device), "pixels": None}
        for name, one in named.items():
            bank, test = (self.features(one, part) for part in (images, test_images))
            for key in bank:
                for kind, probe in (("knn", knn_probe), ("linear", linear_probe)):
                    found[f"{name}{key}_{kind}"] = probe(bank[key], labels, test[key], test_labels).accuracy
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ViewConfig, EncoderConfig)
    config, data_config, views, encoder_config = parse_recipe(kinds, argv, __doc__.split("\n")[0])
    config = dataclasses.replace(config, eval_batch_size=0)  # an encoder has no samples
    channels, side = encoder_config.model["num_channels"], encoder_config.model["image_size"]
    test = None
    if encoder_config.eval_split:
        test_config = dataclasses.replace(data_config, dataset_split=encoder_config.eval_split)
        test = load_recipe_data(test_config, channels, side)
    else:
        data_config = dataclasses.replace(data_config, label_column="none")
    data = ViewData(load_recipe_data(data_config, channels, side, config.seed), views)
    if test is not None and not (test.num_classes and data.data.num_classes):
        raise ValueError("`eval_split` measures by labels, and the data have none; name --label_column or drop it.")
    torch.manual_seed(config.seed)
    objective = SimCLRObjective(
        encoder_config.model,
        *data.statistics(),
        projection_dim=encoder_config.projection_dim,
        temperature=encoder_config.temperature,
    )
    accuracy = None if test is None else Accuracy(objective, data.labelled(), ViewData(test, views).labelled())
    train(objective, data, config, recipe=recipe_of(config, data_config, views, encoder_config), evaluate=accuracy)


if __name__ == "__main__":
    main(sys.argv[1:])
