"""Train a segmentation network on scribbles, with or without generated variants of the images (ScribbleGen).

    accelerate launch examples/train_scribble.py --config examples/configs/scribble_scenes.yaml
    accelerate launch examples/train_scribble.py --config examples/configs/scribble_scenes.yaml \\
        --mixing replace --synthetic_dirs outputs/scenes-hints --output_dir outputs/scenes-scribble-mixed

Images with masks most of whose pixels have no class (255). `synthetic_dirs` are variants of each image, as
`diffusers-repr generate` makes them by `method: hint`; a variant has the scribbles of its image. The folder loads by
transformers' `AutoModelForSemanticSegmentation.from_pretrained`. With `eval_split` its mean IoU is measured on images
whose every pixel has a class (`eval_mask_column`): `evaluation.jsonl`, the card. What helps: docs/generated_data.md.
The loop, its checkpoints and its settings: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.mixing import MixedTrainData, MixingConfig
from diffusers_repr.objectives import ScribbleConfig, ScribbleObjective, SegmenterConfig
from diffusers_repr.tasks import PixelIoU
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, MixingConfig, SegmenterConfig, ScribbleConfig)
    config, data_config, mixing, network, scribble = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name, synthetic_dirs=mixing.synthetic_dirs,
               segmenter_name_or_path=network.segmenter_name_or_path)  # fmt: skip
    if data_config.mask_column is None or data_config.mask_names is None:
        raise ValueError("Scribbles are classes of pixels; name --mask_column and, for each class, --mask_names.")
    if config.lora_rank:
        raise ValueError("`lora_rank` is of denoisers; drop it.")
    config = dataclasses.replace(config, eval_batch_size=0)  # a segmenter has no samples
    side = data_config.size()[0]
    images = load_train_data(data_config, 3, side, seed=config.seed, num_workers=config.dataloader_num_workers)
    data, measure = MixedTrainData(images, mixing, config.seed), None
    torch.manual_seed(config.seed)
    names = data_config.mask_names
    objective = ScribbleObjective(network.build(names), names, scribble, data_config.ignore_index)
    if scribble.eval_split:
        # The true masks are of ids, also where scribbles are of colours.
        whole = dataclasses.replace(data_config, mask_column=scribble.eval_mask_column, mask_colours=None)
        held_out = load_train_data(whole.held_out(scribble.eval_split), 3, side)
        measure = PixelIoU(objective.segmenter.predict, len(names), held_out, data_config.ignore_index)
    recipe = recipe_of(config, data_config, mixing, network, scribble)
    train(objective, data, config, recipe=recipe, evaluate=measure)


if __name__ == "__main__":
    run_script(main)
