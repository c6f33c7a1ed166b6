"""Train DreamTeacher's feature interpreter: classes of pixels from a frozen denoiser's decoder, from a few masks.

    python examples/make_digit_masks.py --out data/digit-masks
    accelerate launch examples/train_interpreter.py --config examples/configs/interpreter_digits.yaml

The folder is `interpreter` of train_dreamteacher.py, whose layers, timestep and noise must be the same. With
`eval_split` mean IoU and accuracy of the pixels of held-out images are measured: `evaluation.jsonl`, the card. What it
is: docs/representations.md. The loop and its settings: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import InterpreterConfig, InterpreterObjective
from diffusers_repr.tasks import PixelIoU
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, InterpreterConfig, MeasuredSplit)
    config, data_config, settings, measured = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, pretrained_model_name_or_path=settings.pretrained_model_name_or_path,
               dataset_name=data_config.dataset_name)  # fmt: skip
    config = dataclasses.replace(config, eval_batch_size=0)  # an interpreter has no samples
    if data_config.mask_column is None or data_config.mask_names is None:
        raise ValueError("Pixels need classes: name the column of masks (--mask_column) and them (--mask_names).")
    denoiser = settings.load_base()
    sides = (denoiser.image_channels, data_config.resolution or denoiser.image_size[0])
    data = load_train_data(data_config, *sides, seed=config.seed, num_workers=config.dataloader_num_workers)
    torch.manual_seed(config.seed)
    classes, ignored = len(data_config.mask_names), data_config.ignore_index
    objective, score = InterpreterObjective(denoiser, settings, classes, ignored), None
    if measured.eval_split:
        held_out = load_train_data(data_config.held_out(measured.eval_split), *sides)
        score = PixelIoU(objective.predict, classes, held_out, ignored)
    train(objective, data, config, recipe=recipe_of(config, data_config, settings, measured), evaluate=score)


if __name__ == "__main__":
    run_script(main)
