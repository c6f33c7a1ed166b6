"""Train DreamTeacher's feature interpreter: classes of pixels from a frozen denoiser's decoder, from a few masks.

    accelerate launch examples/train_interpreter.py --pretrained_model_name_or_path BASE --dataset_name FOLDER \
        --mask_column mask --output_dir outputs/interpreter

The folder is `interpreter` of train_dreamteacher.py, whose layers, timestep and noise must be the same. What it is:
docs/representations.md. The loop and its settings: docs/training.md.
"""

import dataclasses

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import InterpreterConfig, InterpreterObjective
from diffusers_repr.training import TrainingConfig, recipe_of, train


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, InterpreterConfig)
    config, data_config, settings = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    config = dataclasses.replace(config, eval_batch_size=0)  # an interpreter has no samples
    if data_config.mask_column is None or data_config.mask_names is None:
        raise ValueError("Pixels need classes: name the column of masks (--mask_column) and them (--mask_names).")
    denoiser = settings.load_base()
    sides = (denoiser.image_channels, data_config.resolution or denoiser.image_size[0])
    data = load_train_data(data_config, *sides, seed=config.seed, num_workers=config.dataloader_num_workers)
    torch.manual_seed(config.seed)
    objective = InterpreterObjective(denoiser, settings, len(data_config.mask_names), data_config.ignore_index)
    train(objective, data, config, recipe=recipe_of(config, data_config, settings))


if __name__ == "__main__":
    run_script(main)
