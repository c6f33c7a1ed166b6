"""The training data of a recipe: `digits`, those that scikit-learn ships, or whatever `load_train_data` opens."""

import datasets
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from digits import digits_split

from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.splits import open_split


def load_split(name: str, split: str) -> datasets.Dataset:
    """A split of `digits` (scikit-learn's) or of a path or Hub id that `datasets` loads."""
    return digits_split(split) if name == "digits" else open_split(name, split)


def load_recipe_data(config: DataConfig, channels: int, size: int | tuple[int, int], seed: int = 0, **parts):
    """As `load_train_data`; `parts` are the VAE and encoders that a cache must have been made with."""
    # Without the flag a process of a CPU launch believes that it is alone.
    dataset, state = None, PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if config.dataset_name == "digits":
        dataset = digits_split(config.dataset_split)
    place = {"seed": seed, "rank": state.process_index, "world_size": state.num_processes}
    return load_train_data(config, channels, size, dataset, **place, **parts)
