"""Train ADDP's student (arXiv 2306.05423): a vision transformer that reads pixels and tells visual tokens.

    accelerate launch examples/train_addp.py --config examples/configs/addp_digits.yaml

The folder is a `TokenGenerationPipeline`, and `load_encoder(folder)` reads its encoder of images. The predictor that
it learns from is a run of `train_mage.py` without vectors, whose tokenizer it shares.
"""

import dataclasses
from pathlib import Path

import torch
from diffusers_repr.pipelines.token_generation import TokenGenerationPipeline

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import REQUIRED, setting
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.tokens import TokenData
from diffusers_repr.models import PixelTokenModel
from diffusers_repr.models.vq_tokens import token_stride, vocabulary_size
from diffusers_repr.objectives import ADDPConfig, ADDPObjective
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class PredictorConfig:
    """What the student learns from."""

    predictor: str = setting(REQUIRED, "folder or Hub id that train_mage.py wrote: predictor and tokenizer")
    cache_tokens: bool = setting(False, "encode each image once, without augmentation, and keep the tokens in memory")


def build(teacher: TokenGenerationPipeline, addp: ADDPConfig) -> ADDPObjective:
    """A new student for the tokens of its teacher."""
    vqvae, stride = teacher.vqvae, token_stride(teacher.vqvae)
    own = {
        "vocab_size": vocabulary_size(vqvae),
        "sample_size": [stride * side for side in teacher.transformer.grid],
        "patch_size": stride,
        "in_channels": vqvae.config.in_channels,
    }
    return ADDPObjective(PixelTokenModel(**own, **addp.model), vqvae, teacher.transformer, addp)


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, PredictorConfig, ADDPConfig)
    config, data_config, made, addp = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name, predictor=made.predictor)
    torch.manual_seed(config.seed)
    objective = build(TokenGenerationPipeline.from_pretrained(made.predictor), addp)
    channels, size = objective.network.config.in_channels, tuple(objective.network.config.sample_size)
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    data = load_train_data(data_config, channels, size, **loading)
    if made.cache_tokens:
        data = TokenData(data, objective.frozen["tokenizer"])
    train(objective, data, config, recipe=recipe_of(config, data_config, made, addp))


if __name__ == "__main__":
    run_script(main)
