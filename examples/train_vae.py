"""Train a small VAE (`AutoencoderKL`) whose latents have mean 0 and standard deviation 1.

    accelerate launch examples/train_vae.py --config examples/configs/vae_scenes.yaml

The folder loads by `AutoencoderKL.from_pretrained(folder)`; `vae:` of other recipes takes it.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import AutoencoderConfig, AutoencoderObjective
from diffusers_repr.objectives.autoencoder import new_autoencoder
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, AutoencoderConfig)
    config, data_config, vae_config = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # a VAE has no samples
    torch.manual_seed(config.seed)
    vae = new_autoencoder(vae_config)
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    data = load_train_data(data_config, vae.config.in_channels, vae.config.sample_size, **loading)
    objective = AutoencoderObjective(vae, vae_config.kl_weight)
    train(objective, data, config, recipe=recipe_of(config, data_config, vae_config))


if __name__ == "__main__":
    run_script(main)
