"""What train_repfusion.py and train_dreamteacher.py share: a student of a frozen denoiser, trained and measured."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from diffusers_repr import Denoiser
from diffusers_repr.cli.guard import SCRIPT_HELP
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.data import DataConfig, TrainData, load_train_data
from diffusers_repr.objectives import (
    DreamTeacherConfig,
    DreamTeacherObjective,
    RepFusionConfig,
    RepFusionObjective,
    Student,
    StudentConfig,
)
from diffusers_repr.tasks import StudentAccuracy
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"

Settings = RepFusionConfig | DreamTeacherConfig
Distillation = RepFusionObjective | DreamTeacherObjective


def distil(
    argv: list[str],
    title: str,
    kind: type[Settings],
    build: Callable[[Denoiser, Student, Settings, TrainData], Distillation],
) -> Distillation:
    """Run a recipe of one of the two; the objective, trained.

    Args:
        argv: Of the command line.
        title: Of its help.
        kind: Of the distillation's own settings.
        build: The objective, of the teacher, the student, these settings and the data.
    """
    kinds = (TrainingConfig, DataConfig, StudentConfig, kind, MeasuredSplit)
    config, data_config, backbone, settings, measured = parse_recipe(kinds, argv, title, **SCRIPT_HELP)
    made = {"interpreter": getattr(settings, "interpreter", None), "dataset_name": data_config.dataset_name}
    check_made(RECIPES, pretrained_model_name_or_path=settings.pretrained_model_name_or_path, **made)
    config = dataclasses.replace(config, eval_batch_size=0)  # a backbone has no samples
    denoiser = settings.load_base()
    sides = (denoiser.image_channels, data_config.resolution or denoiser.image_size[0])
    if getattr(settings, "level", None) != "policy" and not measured.eval_split:
        data_config = dataclasses.replace(data_config, label_column="none")
    data = load_train_data(data_config, *sides, seed=config.seed, num_workers=config.dataloader_num_workers)
    torch.manual_seed(config.seed)
    objective = build(denoiser, backbone.build(sides[0], (sides[1], sides[1])), settings, data)
    accuracy = None
    if measured.eval_split:
        splits = (data_config.dataset_split, measured.eval_split)
        sets = [load_train_data(data_config.held_out(split), *sides) for split in splits]
        accuracy = StudentAccuracy(objective, *sets, seed=config.seed)
    recipe = recipe_of(config, data_config, backbone, settings, measured)
    train(objective, data, config, recipe=recipe, evaluate=accuracy)
    return objective
