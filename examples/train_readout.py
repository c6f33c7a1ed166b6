"""Train a readout head or a pair of depth heads on the features of a frozen denoiser.

    accelerate launch examples/train_readout.py --config examples/configs/readout_digits_edges.yaml
    accelerate launch examples/train_readout.py --config my_recipe.yaml --seed 1 --output_dir outputs/seed1

Every sample has a noise level of its own and the empty prompt or the null class. Columns of the data set by `kind`:

- `spatial` (edges, pose, ...): `image`; with a `target` other than `edges` also `label_image`. Mean squared error.
- `depth`: the same, least absolute error; a strong head and a weak one, saved in the folder `weak` inside.
- `appearance`: `image`, `positive`, `negative`. Triplet loss of cosines, margin 0.5.
- `correspondence`: `image`, `second_image`, and lists of [y, x] in pixels `points`, `second_points`, of which equal
  places correspond; points outside an image are left out. Symmetric cross-entropy of cosines.

The folder loads by `ReadoutHead.from_pretrained(folder)` or `DepthHead.from_pretrained(folder)`. With `eval_split`
spatial and depth heads are measured by noise level: `evaluation.jsonl`, the card. The loop, its checkpoints and its
settings: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.objectives import ReadoutConfig, ReadoutObjective, ReadoutRows, RowsConfig
from diffusers_repr.tasks import ReadoutErrors
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, RowsConfig, ReadoutConfig)
    config, rows_config, readout = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    base_name = readout.pretrained_model_name_or_path
    check_made(RECIPES, pretrained_model_name_or_path=base_name, dataset_name=rows_config.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # a head has no samples
    denoiser = readout.load_base()
    rows, errors = ReadoutRows.load(rows_config, readout, denoiser), None
    torch.manual_seed(config.seed)
    objective = ReadoutObjective(denoiser, rows.size, readout)
    if readout.eval_split:
        held_out = dataclasses.replace(rows_config, dataset_split=readout.eval_split, random_flip=False)
        errors = ReadoutErrors(objective, ReadoutRows.load(held_out, readout, denoiser), config.seed)
    train(objective, rows, config, recipe=recipe_of(config, rows_config, readout), evaluate=errors)


if __name__ == "__main__":
    run_script(main)
