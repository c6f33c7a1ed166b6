"""Distil a denoiser's decoder into an ordinary backbone by DreamTeacher: its features at several scales.

    accelerate launch examples/train_dreamteacher.py --config examples/configs/dreamteacher_digits.yaml
    accelerate launch examples/train_dreamteacher.py --config my_recipe.yaml --timestep 250

The student is a ResNet, ConvNeXt or Swin of transformers, new (`student`) or trained (`student_name_or_path`), with a
stage of the stride of each teacher layer that is read; the folder is its own, which `AutoModel.from_pretrained` and
`Encoder.from_pretrained(folder)` load. No labels are used. With `interpreter`, a folder of train_interpreter.py,
its classes of pixels are learned too. With `eval_split` 5-shot and linear probes are measured beside the untrained
student, the teacher and raw pixels: `evaluation.jsonl`, the card. Tuning the student on labels: train_student.py. What
it is: docs/representations.md. The loop and its settings: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import DreamTeacherConfig, DreamTeacherObjective, StudentConfig
from diffusers_repr.tasks import StudentAccuracy
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, StudentConfig, DreamTeacherConfig, MeasuredSplit)
    config, data_config, backbone, settings, measured = parse_recipe(
        kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP
    )
    check_made(RECIPES, pretrained_model_name_or_path=settings.pretrained_model_name_or_path,
               dataset_name=data_config.dataset_name)  # fmt: skip
    config = dataclasses.replace(config, eval_batch_size=0)  # a backbone has no samples
    denoiser = settings.load_base()
    sides = (denoiser.image_channels, data_config.resolution or denoiser.image_size[0])
    if not measured.eval_split:
        data_config = dataclasses.replace(data_config, label_column="none")
    data = load_train_data(data_config, *sides, seed=config.seed, num_workers=config.dataloader_num_workers)
    torch.manual_seed(config.seed)
    objective = DreamTeacherObjective(denoiser, backbone.build(sides[0], (sides[1], sides[1])), settings)
    accuracy = None
    if measured.eval_split:
        splits = (data_config.dataset_split, measured.eval_split)
        sets = [load_train_data(data_config.held_out(split), *sides) for split in splits]
        accuracy = StudentAccuracy(objective, *sets, seed=config.seed)
    train(objective, data, config, recipe=recipe_of(config, data_config, backbone, settings, measured),
          evaluate=accuracy)  # fmt: skip


if __name__ == "__main__":
    run_script(main)
