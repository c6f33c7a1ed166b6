"""Train a classifier p(class | x_t, t) on the noise process of a diffusion pipeline, for classifier guidance.

    accelerate launch examples/train_classifier.py --config examples/configs/classifier_digits.yaml
    accelerate launch examples/train_classifier.py --config my_recipe.yaml --seed 1 --output_dir outputs/seed1

The folder loads by `NoisyClassifier.from_pretrained(folder)`; it has the moving average of the weights, with
`ema_max_decay: 0` the weights of the last step. The pipeline gives its noise process and, if it is latent, its VAE;
its network is not used. Loss and accuracy are told over all noise levels and for equal parts of them, `_0` being the
least noisy: in `loss.jsonl` those of training; with `eval_split` those of that split too, in `evaluation.jsonl` and on
the card. The loop, its checkpoints and its settings: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import ClassifierBase, ClassifierConfig, ClassifierObjective
from diffusers_repr.tasks import ClassifierAccuracy
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def open_data(config: TrainingConfig, data_config: DataConfig, base: ClassifierBase, split: str | None):
    """Training data, and those that measure or None."""
    unused = [name for name in ("caption_column", "features_dir") if getattr(data_config, name)]
    unused += ["missing_labels"] if data_config.missing_labels == "keep" else []
    if unused:
        raise ValueError(f"{', '.join(unused)}: a classifier learns from images and their classes alone; drop it.")
    size, workers = base.image_size, {"num_workers": config.dataloader_num_workers}
    data = load_train_data(data_config, base.image_channels, size, seed=config.seed, vae=base.vae, **workers)
    if not data.class_names:
        raise ValueError("The data have no classes; name a column of them by --label_column.")
    if split is None:
        return data, None
    held_out = load_train_data(data_config.held_out(split), base.image_channels, size)
    if held_out.class_names != data.class_names:
        raise ValueError(
            f"`eval_split` {split!r} has the classes {held_out.class_names}, {data_config.dataset_split!r} has "
            f"{data.class_names}; measure on data of the same classes."
        )
    return data, held_out


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ClassifierConfig)
    config, data_config, classifier = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    base_name = classifier.pretrained_model_name_or_path
    check_made(RECIPES, pretrained_model_name_or_path=base_name, dataset_name=data_config.dataset_name)
    if config.lora_rank:
        raise ValueError("`lora_rank` adapts a trained network, and this one is new; drop it.")
    config = dataclasses.replace(config, eval_batch_size=0)  # a classifier has no samples
    base = ClassifierBase.load(classifier.pretrained_model_name_or_path, classifier.revision, data_config.resolution)
    data, held_out = open_data(config, data_config, base, classifier.eval_split)
    torch.manual_seed(config.seed)
    objective = ClassifierObjective(base, data.class_names, classifier.model, noise_bins=classifier.noise_bins)
    objective.card = objective.about(data_config.dataset_name, classifier.eval_split)
    accuracy = None
    if held_out is not None:
        accuracy = ClassifierAccuracy(objective, held_out, config.train_batch_size, config.seed)
    train(objective, data, config, recipe=recipe_of(config, data_config, classifier), evaluate=accuracy)


if __name__ == "__main__":
    run_script(main)
