"""Train a small CLIP: two towers that tell which caption belongs to which image.

    accelerate launch examples/train_clip.py --config examples/configs/clip_scenes.yaml

The folder loads by `CLIPModel.from_pretrained(folder)` and `CLIPTokenizer.from_pretrained(folder)` of transformers,
its image half by `Encoder.from_pretrained(folder)`. The tokenizer is trained on the captions first. With `eval_splits`
retrieval is measured at the end: `evaluation.jsonl`, the card.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.objectives import ContrastiveConfig, ContrastiveObjective
from diffusers_repr.objectives.contrastive import caption_tokenizer, clip_model
from diffusers_repr.tasks import RetrievalAccuracy
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def all_captions(data: ImageTrainData) -> list[str]:
    return [data.annotations(row)["caption"] for row in range(len(data))]


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ContrastiveConfig)
    config, data_config, towers = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name)
    if data_config.caption_column is None:
        raise ValueError("Contrastive training wants captions; name their column by --caption_column.")
    config = dataclasses.replace(config, eval_batch_size=0)  # two towers have no samples
    channels, side = towers.vision.get("num_channels", 3), towers.vision["image_size"]
    data = load_train_data(data_config, channels, side, seed=config.seed)
    tokenizer = caption_tokenizer(
        all_captions(data), towers.vocabulary, towers.text.get("max_position_embeddings", 16)
    )
    torch.manual_seed(config.seed)
    half = [0.5] * channels
    objective = ContrastiveObjective(clip_model(towers, tokenizer), tokenizer, half, half)
    splits = {
        split: load_train_data(dataclasses.replace(data_config.held_out(split), cache_images=True), channels, side)
        for split in towers.eval_splits or ()
    }
    evaluate = RetrievalAccuracy(objective, splits) if splits else None
    train(objective, data, config, recipe=recipe_of(config, data_config, towers), evaluate=evaluate)


if __name__ == "__main__":
    run_script(main)
