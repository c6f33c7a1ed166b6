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
import sys

import torch
from readout_data import ReadoutRows, RowsConfig
from recipe_data import load_split
from torch import nn
from torch.utils.data import DataLoader

from diffusers_repr import Denoiser
from diffusers_repr.config import parse_recipe
from diffusers_repr.objectives import ReadoutConfig, ReadoutObjective
from diffusers_repr.training import TrainingConfig, recipe_of, train
from diffusers_repr.training.batches import to_device
from diffusers_repr.training.seeds import reseed

PLACES = (0.1, 0.3, 0.5, 0.7, 0.9)  # in the level range, where heads are measured


class ReadoutErrors:
    """Mean error by timestep over the rows of an evaluation split, and that of the best constant."""

    def __init__(self, objective: ReadoutObjective, rows: ReadoutRows, seed: int) -> None:
        self.objective, self.rows, self.seed = objective, rows, seed

    @torch.no_grad()
    def __call__(self, heads: nn.ModuleDict, step: int) -> dict[str, float]:
        objective, (low, high) = self.objective, self.objective.level_range
        depth = objective.config.kind == "depth"
        error = torch.nn.L1Loss(reduction="sum") if depth else torch.nn.MSELoss(reduction="sum")
        found, labels = {}, []
        for place in PLACES:
            timestep, sums, count = round(low + place * (high - low), 4 if high < 10 else 0), {}, 0
            for at, batch in enumerate(DataLoader(self.rows, 64)):
                reseed(self.seed, at, 0)
                batch = self.rows.on_device(to_device(batch, objective.denoiser.device))
                features, timesteps = objective.features(batch["images"], torch.tensor(timestep))
                for name, head in heads.items():
                    read = head(features, timesteps)
                    label = objective.label(batch, read)
                    sums[name] = sums.get(name, 0.0) + error(read, label).item()
                count += label.numel()
                labels += [label.cpu()] if place == PLACES[0] else []
            found |= {f"{objective.term(name)}_t{timestep:g}": value / count for name, value in sums.items()}
        every = torch.cat(labels)
        constant = every.median() if depth else every.mean()
        found["constant"] = error(every, constant.expand_as(every)).item() / every.numel()
        print({name: round(value, 4) for name, value in found.items()}, flush=True)
        return found


def load_base(config: ReadoutConfig) -> Denoiser:
    name, dtype = config.pretrained_model_name_or_path, getattr(torch, config.base_dtype)
    return Denoiser.from_pretrained(name, revision=config.revision, dtype=dtype)


def load_rows(config: RowsConfig, readout: ReadoutConfig, denoiser: Denoiser) -> ReadoutRows:
    size = denoiser.image_size if config.resolution is None else (config.resolution, config.resolution)
    data = load_split(config.dataset_name, config.dataset_split)
    return ReadoutRows(data, config, readout, denoiser.image_channels, size)


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, RowsConfig, ReadoutConfig)
    config, rows_config, readout = parse_recipe(kinds, argv, __doc__.split("\n")[0])
    config = dataclasses.replace(config, eval_batch_size=0)  # a head has no samples
    denoiser = load_base(readout)
    rows, errors = load_rows(rows_config, readout, denoiser), None
    torch.manual_seed(config.seed)
    objective = ReadoutObjective(denoiser, rows.size, readout)
    if readout.eval_split:
        held_out = dataclasses.replace(rows_config, dataset_split=readout.eval_split, random_flip=False)
        errors = ReadoutErrors(objective, load_rows(held_out, readout, denoiser), config.seed)
    train(objective, rows, config, recipe=recipe_of(config, rows_config, readout), evaluate=errors)


if __name__ == "__main__":
    main(sys.argv[1:])
