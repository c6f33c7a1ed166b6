"""Train one network that denoises and classifies: a U-Net (JDM) or a vision transformer (HybViT).

    accelerate launch examples/train_joint.py --config examples/configs/jdm_digits.yaml
    accelerate launch examples/train_joint.py --config examples/configs/hybvit_digits.yaml --output_dir out

The result is a folder of `JointDiffusionPipeline`, which classifies images, samples them under its own guidance, and
turns one class into another. Rows whose label is -1 (`--missing_labels keep`) only denoise. The loop, its checkpoints
and its settings: docs/training.md.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline

from diffusers_repr import Denoiser
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.heads import JointHead
from diffusers_repr.models import JointViTModel
from diffusers_repr.objectives.joint import JointConfig, build_joint
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


def build_pipeline(config: JointConfig, size: int, names: Sequence[str] | None) -> JointDiffusionPipeline:
    """A new model of images of this size and these classes."""
    if not names:
        raise ValueError("The data have no classes; name a column of them by --label_column.")
    shape = {"sample_size": size, "in_channels": config.image_channels}
    scheduler = DDPMScheduler(**config.scheduler)
    if config.method == "hybvit":
        classes = {"num_classes": len(names), "id2label": list(names)}
        return JointDiffusionPipeline(JointViTModel(**{**shape, **classes, **config.model}), scheduler)
    unet = UNet2DModel(**{**shape, "out_channels": config.image_channels, **config.model})
    head = JointHead.for_unet(unet, len(names), **{"id2label": list(names), **config.head})
    return JointDiffusionPipeline(unet, scheduler, head)


def main(argv: list[str], evaluate=None) -> None:
    kinds = (TrainingConfig, DataConfig, JointConfig)
    config, data_config, joint = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name)
    if config.lora_rank:
        raise ValueError("`lora_rank` adapts a trained network, and this one is new; drop it.")
    torch.manual_seed(config.seed)
    size, loading = data_config.resolution or 32, {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    data = load_train_data(data_config, joint.image_channels, size, **loading)
    pipe = build_pipeline(joint, size, data.class_names)
    objective = build_joint(Denoiser.from_pipe(pipe), pipe.classifier, joint)
    train(objective, data, config, recipe=recipe_of(config, data_config, joint), evaluate=evaluate)


if __name__ == "__main__":
    run_script(main)
