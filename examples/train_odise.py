"""Train open-vocabulary panoptic segmentation on a frozen text-to-image model and a frozen CLIP (ODISE).

    accelerate launch examples/train_odise.py --config examples/configs/odise_scenes.yaml
    accelerate launch examples/train_odise.py --config my_recipe.yaml --clip my/clip --output_dir outputs/mine

Images with panoptic masks: a column `image`; one of images with the id of every pixel's segment; and one with the
`id` and class of each segment. The folder loads by `OpenVocabularySegmenter.from_pretrained(folder)` of
`diffusers_repr.tasks`, which names segments by any words. With `eval_splits` panoptic quality is measured at the end:
`evaluation.jsonl`, the card. The loop: docs/training.md.
"""

import dataclasses
from pathlib import Path

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data.panoptic_data import PanopticConfig, load_panoptic
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.objectives.odise import OdiseConfig
from diffusers_repr.tasks.panoptic_training import train_segmenter
from diffusers_repr.training import TrainingConfig, recipe_of

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, PanopticConfig, OdiseConfig)
    config, panoptic, odise = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    base_name = odise.pretrained_model_name_or_path
    check_made(RECIPES, pretrained_model_name_or_path=base_name, dataset_name=panoptic.dataset_name, clip=odise.clip)
    config = dataclasses.replace(config, eval_batch_size=0)  # a head has no samples
    denoiser, towers = odise.load_base(), ImageTextEncoder.from_pretrained(odise.clip)
    data = load_panoptic(panoptic, denoiser.image_channels, denoiser.image_size)
    whole = {
        split: dataclasses.replace(panoptic, dataset_split=split, exclude=None) for split in odise.eval_splits or ()
    }
    held = {name: load_panoptic(how, denoiser.image_channels, data.size) for name, how in whole.items()}
    train_segmenter(denoiser, towers, data, odise, config, held, recipe_of(config, panoptic, odise))


if __name__ == "__main__":
    run_script(main)
