"""Train a denoising autoencoder whose noise lives in a PCA of patches (l-DAE), and save its encoder.

    accelerate launch examples/train_ldae.py --config examples/configs/ldae_digits.yaml

The PCA is fitted first, on images as they are trained on (arXiv 2401.14404). The folder is the encoder half as a plain
vision transformer, which `Encoder.from_pretrained(folder)` loads; the whole network and the PCA lie beside it, in
`denoiser/` and `pca/`.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig, TrainData, load_train_data
from diffusers_repr.objectives import LDAEConfig, LDAEObjective
from diffusers_repr.training import TrainingConfig, recipe_of, train
from diffusers_repr.training.seeds import reseed

RECIPES = Path(__file__).parent / "configs"


def images(data: TrainData, count: int, seed: int) -> Iterator[Tensor]:
    """Batches of at most `count` images, cropped and turned as in training; of every process the same."""
    reseed(seed, 0, 0)
    rows = torch.randperm(len(data))[:count].tolist()
    for batch in DataLoader(Subset(data, rows), 256):
        yield data.on_device(batch)["pixel_values"]


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, LDAEConfig)
    config, data_config, ldae = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # an encoder has no samples
    torch.manual_seed(config.seed)
    network = ldae.build()
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    data_config = dataclasses.replace(data_config, label_column="none")
    data = load_train_data(data_config, network.config.in_channels, network.config.sample_size, **loading)
    objective = LDAEObjective(network, ldae.fit(images(data, ldae.pca_images, config.seed)), ldae)
    train(objective, data, config, recipe=recipe_of(config, data_config, ldae))


if __name__ == "__main__":
    run_script(main)
