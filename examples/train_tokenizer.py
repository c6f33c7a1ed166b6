"""Train a tokenizer (`VQModel`): images to a grid of ids and back, for models of visual tokens.

    accelerate launch examples/train_tokenizer.py --config examples/configs/tokenizer_digits.yaml

The folder loads by `VQModel.from_pretrained(folder)`; `tokenizer:` of the recipes of `train_mage.py` and
`train_addp.py` takes it. With `eval_split` its reconstructions of held-out images are measured: `evaluation.jsonl`.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.measured import MeasuredSplit
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.models.vq_tokens import decode_embeddings, encode_tokens, token_embeddings
from diffusers_repr.objectives import TokenizerConfig, TokenizerObjective
from diffusers_repr.objectives.vq import new_tokenizer
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


class Reconstruction:
    """Errors of reconstructions in [-1, 1], that of the mean image, and how many codes are used."""

    def __init__(self, data) -> None:
        self.images = to_unit(torch.stack([data[row]["pixel_values"] for row in range(len(data))]))

    @torch.no_grad()
    def __call__(self, vqvae, step: int) -> dict[str, float]:
        images = self.images.to(vqvae.device)
        ids = torch.cat([encode_tokens(vqvae, part) for part in images.split(256)])
        codes = token_embeddings(vqvae, ids.flatten(1))
        grid = (ids.shape[1], ids.shape[2])
        made = torch.cat([decode_embeddings(vqvae, part, grid) for part in codes.split(256)]).clamp(-1, 1)
        return {
            "mse": float((made - images).square().mean()),
            "l1": float((made - images).abs().mean()),
            "mse_mean_image": float((images - images.mean(0)).square().mean()),
            "codes_used": float(len(ids.unique())),
        }


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, TokenizerConfig, MeasuredSplit)
    config, data_config, tokenizer, held = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # a tokenizer has no samples
    torch.manual_seed(config.seed)
    vqvae = new_tokenizer(tokenizer)
    shape = (vqvae.config.in_channels, vqvae.config.sample_size)
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    data = load_train_data(data_config, *shape, **loading)
    errors = None
    if held.eval_split:
        errors = Reconstruction(load_train_data(data_config.held_out(held.eval_split), *shape))
    objective = TokenizerObjective(vqvae, tokenizer)
    train(objective, data, config, recipe=recipe_of(config, data_config, tokenizer, held), evaluate=errors)


if __name__ == "__main__":
    run_script(main)
