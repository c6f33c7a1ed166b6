"""Train the head of Diffusion Hyperfeatures on a frozen denoiser: many layers and levels to one map of descriptors.

    accelerate launch examples/train_hyperfeatures.py --config examples/configs/hyperfeatures_cars.yaml
    accelerate launch examples/train_hyperfeatures.py --config my_recipe.yaml --steps 50 --output_dir outputs/fifty

Pairs of images with key points that correspond: `image`, `second_image`, and lists of [x, y] in pixels `points`,
`second_points`, of which equal places belong together (`--second_column second_image`); or single images, each with a
moved copy of itself. The loss is symmetric InfoNCE of the points against all places of the other image.

The folder loads by `Hyperfeatures.from_pretrained(folder)`, a source of features for every task on pixels;
`mixing_weights.png` in it shows the share of each layer at each level. With `eval_split` PCK is measured beside that
of the untrained head: `evaluation.jsonl`, the card. What it is: docs/dense_features.md. The loop: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data.pairs import PairConfig, load_pairs
from diffusers_repr.objectives import HyperfeaturesConfig, HyperfeaturesObjective
from diffusers_repr.tasks import PairAccuracy
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, PairConfig, HyperfeaturesConfig)
    config, pairs, hyper = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    base_name = hyper.pretrained_model_name_or_path
    check_made(RECIPES, pretrained_model_name_or_path=base_name, dataset_name=pairs.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # a head has no samples
    denoiser = hyper.load_base()
    data, accuracy = load_pairs(pairs, denoiser.image_channels, denoiser.image_size), None
    torch.manual_seed(config.seed)
    objective = HyperfeaturesObjective(denoiser, data.size, hyper)
    if hyper.eval_split:
        held_out = dataclasses.replace(pairs, dataset_split=hyper.eval_split)
        held = load_pairs(held_out, denoiser.image_channels, data.size)
        accuracy = PairAccuracy(objective, held, hyper.eval_pairs, config.seed)
    train(objective, data, config, recipe=recipe_of(config, pairs, hyper), evaluate=accuracy)


if __name__ == "__main__":
    run_script(main)
