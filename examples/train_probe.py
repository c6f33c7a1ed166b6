"""Train a probe's head on the features of a frozen denoiser: GDC, DifFormer, DifFeed.

    accelerate launch examples/train_probe.py --config examples/configs/probe_digits_attention.yaml
    accelerate launch examples/train_probe.py --config my_recipe.yaml --seed 1 --output_dir outputs/seed1

Heads: `linear` and `mlp` on pooled features, `convolution` and `attention` on maps (`attention` over several layers
and timesteps is DifFormer), `feedback` (DifFeed) on those of a second forward. In every step images are augmented and
get new noise; with `feature_cache` features are computed once, `cache_draws` times an image. `protocol` sets
optimizer, rates, batch and epochs as a paper has them, over the settings of the loop.

The folder loads by `Probe.from_pretrained(folder)`. With `eval_split` its accuracy is measured: `evaluation.jsonl`,
`probe.json`, the card. Which head for which purpose: docs/classification.md. The loop: docs/training.md.
"""

import dataclasses
from pathlib import Path

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig
from diffusers_repr.objectives import ProbeConfig
from diffusers_repr.tasks import prepare_probe
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ProbeConfig)
    config, data_config, probe = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    base_name = probe.pretrained_model_name_or_path
    check_made(RECIPES, pretrained_model_name_or_path=base_name, dataset_name=data_config.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # a head has no samples
    run = prepare_probe(config, data_config, probe)
    train(run.objective, run.data, run.config, recipe=recipe_of(run.config, data_config, probe), evaluate=run.evaluate)


if __name__ == "__main__":
    run_script(main)
