"""Train a small vision transformer without labels, as a teacher for alignment and an encoder for metrics.

    accelerate launch examples/train_encoder.py --config examples/configs/encoder_digits.yaml
    accelerate launch examples/train_encoder.py --config my_recipe.yaml --method byol --variants_dir outputs/variants

The folder loads by `Encoder.from_pretrained(folder)`, and by `ViTModel.from_pretrained(folder)` of transformers.
Two random views of an image shall be alike, both in the class token and in the mean of the patch tokens; how, `method`
tells: simclr, simsiam, byol, barlow_twins. A view may be a generated variant of the image (`variants_dir`). With
`eval_split` labels are used at the end, to measure k-NN and linear-probe accuracy next to those of the untrained
network and of raw pixels: `evaluation.jsonl`, the card.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.views import ViewConfig, ViewData
from diffusers_repr.objectives import SelfSupervisedConfig
from diffusers_repr.tasks import EncoderAccuracy
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ViewConfig, SelfSupervisedConfig)
    config, data_config, views, method = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # an encoder has no samples
    channels, side = method.model["num_channels"], method.model["image_size"]
    test = None
    if method.eval_split:
        test = load_train_data(data_config.held_out(method.eval_split), channels, side)
    else:
        data_config = dataclasses.replace(data_config, label_column="none")
    data = ViewData(load_train_data(data_config, channels, side, seed=config.seed), views)
    if test is not None and not (test.num_classes and data.data.num_classes):
        raise ValueError("`eval_split` measures by labels, and the data have none; name --label_column or drop it.")
    torch.manual_seed(config.seed)
    objective = method.build(*data.statistics(), config.max_train_steps)
    accuracy = None
    if test is not None:
        measured = ViewData(test, dataclasses.replace(views, variants_dir=None))  # variants are of training images
        accuracy = EncoderAccuracy(objective, data.labelled(), measured.labelled())
    train(objective, data, config, recipe=recipe_of(config, data_config, views, method), evaluate=accuracy)


if __name__ == "__main__":
    run_script(main)
