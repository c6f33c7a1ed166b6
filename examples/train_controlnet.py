"""Train a ControlNet on the classes of pixels, such as scribbles, beside a frozen text-to-image model.

    accelerate launch examples/train_controlnet.py --config examples/configs/controlnet_scenes.yaml
    accelerate launch examples/train_controlnet.py --config my_recipe.yaml --hint_dropout 0.2 --output_dir outputs/mine

Images with masks (`mask_column`: class ids of pixels, 255 where there is none) and captions. The folder loads by
diffusers' `ControlNetModel.from_pretrained(folder)`; in `hint_encoder/` lies what makes hints of masks, and the null
hint that was learned with it. `diffusers-repr generate` makes images of it by `method: hint`. With `eval_split` the
denoising errors with the true hint, that of another image, the null hint and none are measured: `evaluation.jsonl`,
the card. What it is for: docs/generated_data.md. The loop, its checkpoints and its settings: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.objectives import ControlNetConfig, ControlNetObjective
from diffusers_repr.tasks import HintErrors
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ControlNetConfig)
    config, data_config, control = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    base_name = control.pretrained_model_name_or_path
    check_made(RECIPES, pretrained_model_name_or_path=base_name, dataset_name=data_config.dataset_name,
               controlnet_name_or_path=control.controlnet_name_or_path)  # fmt: skip
    if data_config.mask_column is None or data_config.mask_names is None:
        raise ValueError("Hints are the classes of pixels; name --mask_column and, for each class, --mask_names.")
    if data_config.caption_column is None and control.caption_dropout < 1:
        raise ValueError("The base is told captions; name --caption_column, or pass --caption_dropout 1.")
    if config.lora_rank:
        raise ValueError("`lora_rank` adapts a trained network, and a ControlNet is new; drop it.")
    config = dataclasses.replace(config, eval_batch_size=0)  # its samples are those of `diffusers-repr generate`
    denoiser = control.load_base()
    torch.manual_seed(config.seed)
    controlnet, hints = control.parts(data_config.mask_names, data_config.ignore_index)
    objective = ControlNetObjective(
        denoiser,
        hints,
        controlnet=controlnet,
        hint_dropout=control.hint_dropout,
        caption_dropout=control.caption_dropout,
        new_lr_scale=control.new_lr_scale,
    )
    sides = (denoiser.image_channels, denoiser.image_size)
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers, "vae": denoiser.vae}
    data, errors = load_train_data(data_config, *sides, **loading), None
    if control.eval_split:
        held_out = load_train_data(data_config.held_out(control.eval_split), *sides)
        errors = HintErrors(objective, held_out, control.eval_images, config.train_batch_size, config.seed)
    train(objective, data, config, recipe=recipe_of(config, data_config, control), evaluate=errors)


if __name__ == "__main__":
    run_script(main)
