"""Tune a copy of a denoiser by CleanDIFT: its features of clean images become those of noisy ones at all levels.

    accelerate launch examples/train_cleandift.py --config examples/configs/cleandift_cars.yaml
    accelerate launch examples/train_cleandift.py --config my_recipe.yaml --levels 5 --output_dir outputs/five

The frozen base reads K noisy images of each image, the copy the image itself, once for all K; small adapters, not
needed afterwards, turn its features into those at each level. The folder is a pipeline like the base's, and
`cleandift_extractor(folder)` reads its features without noise and without a level to choose. With `eval_split` these
are compared with the mean of the base's features over noise, beside one noisy draw: `evaluation.jsonl`, the card.
What it is: docs/dense_features.md. The loop, its checkpoints and its settings: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr import Denoiser
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.config.recipe import setting
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import CleanDIFTConfig, CleanDIFTObjective
from diffusers_repr.tasks import FeatureRobustness
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(MeasuredSplit):
    """What is measured."""

    eval_images: int = setting(64, "images of it, the first")


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, CleanDIFTConfig, EvaluationConfig)
    config, data_config, clean, measured = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    if clean.pretrained_model_name_or_path is None:
        raise ValueError("No base; pass --pretrained_model_name_or_path, a pipeline folder or a Hub id.")
    base = clean.pretrained_model_name_or_path
    check_made(RECIPES, pretrained_model_name_or_path=base, dataset_name=data_config.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # the result no longer denoises
    denoiser = Denoiser.from_pretrained(base, revision=clean.revision, dtype=torch.float32)
    torch.manual_seed(config.seed)
    objective = CleanDIFTObjective(denoiser, clean)
    if not objective.conditioner.conditional or clean.condition_dropout == 1:
        data_config = dataclasses.replace(data_config, label_column="none")
    sides = (denoiser.image_channels, data_config.resolution or denoiser.image_size[0])
    data = load_train_data(data_config, *sides, seed=config.seed, num_workers=config.dataloader_num_workers)
    robustness = None
    if measured.eval_split:
        held_out = load_train_data(data_config.held_out(measured.eval_split), *sides)
        robustness = FeatureRobustness(objective, held_out, measured.eval_images, config.seed)
    train(objective, data, config, recipe=recipe_of(config, data_config, clean, measured), evaluate=robustness)


if __name__ == "__main__":
    run_script(main)
