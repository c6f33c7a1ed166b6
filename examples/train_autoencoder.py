"""Train a diffusion autoencoder: an encoder of images to codes, and a denoiser that is told them.

    accelerate launch examples/train_autoencoder.py --config examples/configs/diffae_digits.yaml   # DiffAE
    accelerate launch examples/train_autoencoder.py --config examples/configs/infodiffusion_digits.yaml
    accelerate launch examples/train_autoencoder.py --config examples/configs/pdae_digits.yaml   # beside a frozen base

The folder loads by `DiffusionAutoencoderPipeline.from_pretrained(folder)`, which encodes, decodes, interpolates and
edits; `load_encoder(folder)` reads its encoder alone, as every other encoder. With `eval_split` reconstructions of
held-out images are measured, from inferred and from drawn noise, the denoising error with the own and with another
image's code, and, of data with labels, a probe of five codes a class beside pixels: `evaluation.jsonl`, the card.
Codes to sample from come of `train_representation.py` by `examples/configs/codes_digits.yaml`, with `encoder:` this
folder; see docs/representations.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.config.recipe import setting
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import DiffusionAutoencoderConfig, DiffusionAutoencoderObjective
from diffusers_repr.tasks import AutoencoderErrors
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(MeasuredSplit):
    """What is measured."""

    eval_images: int = setting(64, "images of it that are reconstructed, the first")


def build(config: DiffusionAutoencoderConfig, side: int | None) -> DiffusionAutoencoderObjective:
    denoiser = config.load_denoiser()
    size = denoiser.image_size if side is None else (side, side)
    encoder = config.new_encoder(denoiser.image_channels, size)
    settings = {"frozen_base": config.frozen_base, "modulation": config.modulation}
    return DiffusionAutoencoderObjective(denoiser, encoder, config, **settings)


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, DiffusionAutoencoderConfig, EvaluationConfig)
    config, data_config, autoencoder, measured = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    base = autoencoder.pretrained_model_name_or_path
    check_made(RECIPES, pretrained_model_name_or_path=base, dataset_name=data_config.dataset_name)
    if autoencoder.penalty == "none":
        config = dataclasses.replace(config, eval_batch_size=0)  # codes cannot be drawn yet
    torch.manual_seed(config.seed)
    objective = build(autoencoder, data_config.resolution)
    denoiser = objective.denoiser
    sides = (denoiser.image_channels, data_config.resolution or denoiser.image_size[0])
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    errors = None
    if measured.eval_split:
        held_out = load_train_data(data_config.held_out(measured.eval_split), *sides)
        plain = load_train_data(data_config.held_out(data_config.dataset_split), *sides)
        errors = AutoencoderErrors(objective, plain, held_out, measured.eval_images, config.num_inference_steps)
    data = load_train_data(dataclasses.replace(data_config, label_column="none"), *sides, **loading)
    train(objective, data, config, recipe=recipe_of(config, data_config, autoencoder, measured), evaluate=errors)


if __name__ == "__main__":
    run_script(main)
