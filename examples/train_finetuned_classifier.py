"""Tune a whole diffusion network to classify: its features under a little noise, pooled, and a head on them.

    accelerate launch examples/train_finetuned_classifier.py --config examples/configs/finetuned_digits.yaml
    accelerate launch examples/train_finetuned_classifier.py --config my_recipe.yaml --seed 1 --output_dir outputs/1

Layers and level are DDAE's where it has published some for this architecture; `diffusers-repr select` finds others.
The folder is a pipeline like the base's with the tuned network in it, the head apart; `finetuned_probe(folder)` of
diffusers_repr.tasks is the classifier, and `probe/` in the folder is the same for `Probe.from_pretrained`. With
`eval_split` accuracy is measured while it trains: `evaluation.jsonl`, the card. A head on the frozen network, which is
cheaper, is fitted by `diffusers-repr probe`. The loop, its checkpoints and its settings: docs/training.md.
"""

import dataclasses
import os
from pathlib import Path

import torch

from diffusers_repr import Denoiser
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import FinetuneConfig, FinetuneObjective
from diffusers_repr.tasks import FinetunedAccuracy, finetuned_probe
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, FinetuneConfig)
    config, data_config, tuned = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    base = tuned.pretrained_model_name_or_path
    if base is None:
        raise ValueError("No base; pass --pretrained_model_name_or_path, a pipeline folder or a Hub id.")
    check_made(RECIPES, pretrained_model_name_or_path=base, dataset_name=data_config.dataset_name)
    config = dataclasses.replace(config, eval_batch_size=0)  # the result no longer denoises
    denoiser = Denoiser.from_pretrained(base, revision=tuned.revision, dtype=torch.float32)
    sides = (denoiser.image_channels, data_config.resolution or denoiser.image_size[0])
    workers = {"num_workers": config.dataloader_num_workers}
    data = load_train_data(data_config, *sides, seed=config.seed, vae=denoiser.vae, **workers)
    if not data.class_names:
        raise ValueError("The data have no classes; name a column of them by --label_column.")
    torch.manual_seed(config.seed)
    told = {"dataset": data_config.dataset_name, "split": data_config.dataset_split, "rows": len(data)}
    objective = FinetuneObjective(denoiser, tuned, data.class_names, told)
    accuracy = None
    if tuned.eval_split:
        held_out = load_train_data(data_config.held_out(tuned.eval_split), *sides)
        objective.check_data(held_out)
        accuracy = FinetunedAccuracy(objective, held_out, config.train_batch_size, config.seed)
    result = train(objective, data, config, recipe=recipe_of(config, data_config, tuned), evaluate=accuracy)
    if not config.dry_run and os.environ.get("RANK", "0") == "0":  # the process group has ended with the run
        probe = finetuned_probe(result.output_dir)
        probe.save_pretrained(result.output_dir / "probe")


if __name__ == "__main__":
    run_script(main)
