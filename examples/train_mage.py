"""Train MAGE (arXiv 2211.09117): a transformer that tells masked visual tokens; it recognises images and makes them.

    accelerate launch examples/train_mage.py --config examples/configs/mage_digits.yaml

The folder is a `TokenGenerationPipeline`, and `load_encoder(folder)` reads its encoder. With `assignments_dir`, a
folder of `diffusers-repr assign --method identity` or of `train_representation.py`, it makes images from vectors, as
RCG's generator does, and `RCGPipeline` takes it. `train_addp.py` learns from one without vectors.
"""

import dataclasses
from pathlib import Path

import torch
from diffusers import VQModel

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import REQUIRED, setting
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.tokens import TokenData
from diffusers_repr.denoiser.prior import StoredPrior
from diffusers_repr.models import MaskedTokenModel
from diffusers_repr.models.vq_tokens import token_stride, vocabulary_size
from diffusers_repr.objectives import MAGEConfig, MAGEObjective
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"
STORED = 1000  # vectors that are saved to draw from


@dataclasses.dataclass(frozen=True)
class TokenConfig:
    """The tokenizer."""

    tokenizer: str = setting(REQUIRED, "folder or Hub id of the VQModel")
    cache_tokens: bool = setting(False, "encode each image once, without augmentation, and keep the tokens in memory")


def load_tokens(config: TrainingConfig, data_config: DataConfig, tokens: TokenConfig):
    """The tokenizer, and images or their tokens."""
    vqvae = VQModel.from_pretrained(tokens.tokenizer)
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    data = load_train_data(data_config, vqvae.config.in_channels, vqvae.config.sample_size, **loading)
    return vqvae, TokenData(data, vqvae) if tokens.cache_tokens else data


def build(vqvae, data, mage: MAGEConfig, seed: int) -> MAGEObjective:
    """A new network for the tokenizer, and for the vectors of the data where there are any."""
    assigned = getattr(data.images if isinstance(data, TokenData) else data, "assigned", None)  # a stream has none
    vectors = None if assigned is None or not assigned.has_values else assigned.values(torch.arange(1))
    if vectors is not None and vectors.ndim != 2:
        raise ValueError("MAGE is conditioned on one vector an image; the assignments are sets of neighbours.")
    width = 0 if vectors is None else vectors.shape[1]
    sizes = {"sample_size": vqvae.config.sample_size // token_stride(vqvae), **mage.model}
    network = MaskedTokenModel(vocabulary_size(vqvae), condition_dim=width, **sizes)
    prior = None
    if width:
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:STORED]
        prior = StoredPrior(assigned.values(rows.sort().values))
    return MAGEObjective(network, vqvae, mage, prior)


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, TokenConfig, MAGEConfig)
    config, data_config, tokens, mage = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    made = {"tokenizer": tokens.tokenizer, "assignments_dir": data_config.assignments_dir}
    check_made(RECIPES, dataset_name=data_config.dataset_name, **made)
    torch.manual_seed(config.seed)
    vqvae, data = load_tokens(config, data_config, tokens)
    objective = build(vqvae, data, mage, config.seed)
    train(objective, data, config, recipe=recipe_of(config, data_config, tokens, mage))


if __name__ == "__main__":
    run_script(main)
