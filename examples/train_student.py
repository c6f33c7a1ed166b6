"""Tune a distilled backbone on labels (stage 2 of RepFusion), or train one from scratch to compare with.

    accelerate launch examples/train_student.py --config examples/configs/student_digits.yaml
    accelerate launch examples/train_student.py --config my_recipe.yaml --backbone_lr_scale 0   # the last layer alone

`student_name_or_path` is what train_repfusion.py or train_dreamteacher.py wrote, or any ResNet, ConvNeXt or Swin of
transformers; `student` is a new one. The folder loads by `AutoModelForImageClassification.from_pretrained`, and its
backbone by `Encoder.from_pretrained(folder)`. With `eval_split` its accuracy is measured: `evaluation.jsonl`, the
card. The loop, its checkpoints and its settings: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import setting
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import FinetuneStudentConfig, FinetuneStudentObjective, StudentConfig
from diffusers_repr.tasks import TunedAccuracy
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Of which kind the images are."""

    image_channels: int = setting(3, "1 for grey images, 3 for colours")


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, StudentConfig, FinetuneStudentConfig, ImagesConfig)
    config, data_config, backbone, tuned, images = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, student_name_or_path=backbone.student_name_or_path, dataset_name=data_config.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # a classifier has no samples
    side = data_config.size()[0]
    data = load_train_data(data_config, images.image_channels, side, seed=config.seed,
                           num_workers=config.dataloader_num_workers)  # fmt: skip
    if not data.class_names:
        raise ValueError("The data have no classes; name a column of them by --label_column.")
    torch.manual_seed(config.seed)
    student = backbone.build(images.image_channels, (side, side))
    objective = FinetuneStudentObjective(student, data.class_names, tuned)
    accuracy = None
    if tuned.eval_split:
        held_out = load_train_data(data_config.held_out(tuned.eval_split), images.image_channels, side)
        objective.check_data(held_out)
        accuracy = TunedAccuracy(objective, held_out, config.train_batch_size)
    train(objective, data, config, recipe=recipe_of(config, data_config, backbone, tuned, images), evaluate=accuracy)


if __name__ == "__main__":
    run_script(main)
