"""Train one network that denoises and classifies: a U-Net (JDM) or a vision transformer (HybViT).

    accelerate launch examples/train_joint.py --config examples/configs/jdm_digits.yaml
    accelerate launch examples/train_joint.py --config examples/configs/hybvit_digits.yaml --output_dir out

The result is a folder of `JointDiffusionPipeline`, which classifies images, samples them under its own guidance, and
turns one class into another. Rows whose label is -1 (`--missing_labels keep`) only denoise. The loop, its checkpoints
and its settings: docs/training.md.
"""

import dataclasses
import inspect
import sys
from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers_repr.pipelines.joint_diffusion import JointDiffusionPipeline
from recipe_data import load_recipe_data

from diffusers_repr import Denoiser
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.recipe import check_keys, mapping, setting
from diffusers_repr.data import DataConfig
from diffusers_repr.heads import JointHead
from diffusers_repr.models import JointViTModel
from diffusers_repr.objectives.joint.hybvit import HybViTObjective
from diffusers_repr.objectives.joint.jdm import JDMObjective
from diffusers_repr.training import TrainingConfig, recipe_of, train

METHODS = {"jdm": (UNet2DModel, JDMObjective), "hybvit": (JointViTModel, HybViTObjective)}
DEFAULTS = ("classification_weight", "generation_weight", "loss", "label_smoothing")


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """What is trained, and how both losses come together."""

    method: Literal["jdm", "hybvit"] = setting("jdm", "a UNet2DModel with a head, or a JointViTModel")
    model: dict | str | None = setting(None, "arguments of the network, a mapping")
    head: dict | str | None = setting(None, "jdm: arguments of JointHead, a mapping")
    scheduler: dict | str | None = setting(None, "arguments of the DDPMScheduler, a mapping")
    image_channels: int = setting(3, "1 (grey) or 3 (RGB)")
    classification_weight: float | None = setting(None, "of the cross-entropy; default: jdm 0.001, hybvit 1")
    generation_weight: float | None = setting(None, "of the denoising loss; default: jdm 1, hybvit 100")
    loss: str | None = setting(None, "of denoising, l1 or l2; default: jdm l2, hybvit l1")
    label_smoothing: float | None = setting(None, "of the targets; default: jdm 0, hybvit 0.1")
    classify: Literal["clean", "noised", "both"] = setting("clean", "what the classifier learns from")
    mixup: float = setting(0.0, "Beta(a, a) mixing of the images to be classified; 0: none")
    view_flip: bool = setting(False, "mirror half of the images to be classified, on top of the data's augmentation")
    view_rotation: float = setting(0.0, "turn them by up to so many degrees")
    view_shift: float = setting(0.0, "move them by up to this share of their side")
    view_scale: float = setting(0.0, "shrink or enlarge them by up to this share")

    def __post_init__(self) -> None:
        kinds = {"model": METHODS[self.method][0], "head": JointHead, "scheduler": DDPMScheduler}
        for name, kind in kinds.items():
            arguments = mapping(name, getattr(self, name))
            check_keys(f"`{name}`", arguments, inspect.signature(kind.__init__).parameters)
            object.__setattr__(self, name, arguments)
        if self.head and self.method != "jdm":
            raise ValueError("`head` is of jdm; a JointViTModel brings its own.")
        named = sorted({"num_classes", "id2label"} & {*self.model, *self.head})
        if named:
            raise ValueError(f"The data decide on {' and '.join(named)} of the network; drop it from the recipe.")

    def settings(self) -> dict:
        """Arguments of the objective; those left out are the method's own."""
        given = {name: getattr(self, name) for name in DEFAULTS if getattr(self, name) is not None}
        views = {name: getattr(self, f"view_{name}") for name in ("flip", "rotation", "shift", "scale")}
        return {**given, **views, "classify": self.classify, "mixup": self.mixup}


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


def build_objective(config: JointConfig, pipe: JointDiffusionPipeline) -> JDMObjective | HybViTObjective:
    parts = () if pipe.classifier is None else (pipe.classifier,)
    return METHODS[config.method][1](Denoiser.from_pipe(pipe), *parts, **config.settings())


def main(argv: list[str], evaluate=None) -> None:
    kinds = (TrainingConfig, DataConfig, JointConfig)
    config, data_config, joint = parse_recipe(kinds, argv, __doc__.split("\n")[0])
    if config.lora_rank:
        raise ValueError("`lora_rank` adapts a trained network, and this one is new; drop it.")
    torch.manual_seed(config.seed)
    size = data_config.resolution or 32
    data = load_recipe_data(
        data_config, joint.image_channels, size, config.seed, num_workers=config.dataloader_num_workers
    )
    objective = build_objective(joint, build_pipeline(joint, size, data.class_names))
    recipe = recipe_of(config, data_config, joint)
    train(objective, data, config, recipe=recipe, evaluate=evaluate)


if __name__ == "__main__":
    main(sys.argv[1:])
