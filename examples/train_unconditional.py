"""Train a diffusion model of images (a U-Net or a U-ViT, `DDPMScheduler`) and save it as a pipeline folder.

    accelerate launch examples/train_unconditional.py --config examples/configs/ddpm_digits.yaml
    accelerate launch examples/train_unconditional.py --config my_recipe.yaml --seed 1 --output_dir outputs/seed1

An unconditional model is saved as a `DDPMPipeline`. A model with `num_class_embeds`, the number of classes and one
more for the null id, is trained on labels, a share of which become the null id, and is saved as a `DDIMPipeline`.
With `network: UViTTransformer2DModel`, whose `num_classes` leaves the null out, either is saved as a `SiTPipeline`.
With `perceptual_base`, the folder of such a pipeline, that model's training goes on by its own middle features alone
(arXiv 2401.00110; `perceptual_digits.yaml`).
The loop, its checkpoints and its settings: docs/training.md.
"""

import dataclasses
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers_repr.pipelines.sit import SiTPipeline

from diffusers_repr import Denoiser
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.models import UViTTransformer2DModel
from diffusers_repr.objectives import DiffusionObjective, PerceptualObjective
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"
NETWORKS = {"UNet2DModel": UNet2DModel, "UViTTransformer2DModel": UViTTransformer2DModel}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network and its noise process."""

    network: str = setting("UNet2DModel", "class of the network, or UViTTransformer2DModel")
    model: dict | str | None = setting(None, "arguments of the network, a mapping (JSON in a flag)")
    scheduler: dict | str | None = setting(None, "arguments of DDPMScheduler, a mapping")
    label_dropout: float = setting(0.1, "share of labels that become the null id, the number of classes")
    perceptual_base: str | None = setting(
        None,
        "folder or Hub id of a trained pipeline to go on with by perceptual loss; no `model` and `scheduler` then",
    )
    perceptual_layer: str | None = setting(
        None, "layer of its features; default: a U-Net's middle block, or a third of the depth"
    )
    denoising_weight: float = setting(0.0, "of the denoising loss beside the perceptual one")

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"`label_dropout` is a probability, got {self.label_dropout}.")
        if self.perceptual_base is not None:
            if self.model is not None or self.scheduler is not None:
                raise ValueError(
                    "`perceptual_base` brings its own network and scheduler; leave out those of a new one."
                )
            return
        if self.perceptual_layer is not None or self.denoising_weight:
            raise ValueError(
                "`perceptual_layer` and `denoising_weight` are of the perceptual loss: `perceptual_base`."
            )
        if self.network not in NETWORKS:
            raise ValueError(f"`network` is one of {', '.join(NETWORKS)}, got {self.network!r}.")
        take_arguments(self, model=NETWORKS[self.network], scheduler=DDPMScheduler)
        if self.model.get("sample_size") is None:
            raise ValueError("`model` needs `sample_size`, the side of the images.")
        if self.class_conditional and self.model.get("class_embed_type") is not None:
            raise ValueError("`model` has `num_class_embeds`, which only the `class_embed_type` null uses; drop one.")

    @property
    def class_conditional(self) -> bool:
        return self.model.get("num_class_embeds") is not None or bool(self.model.get("num_classes"))


def build(config: ModelConfig) -> DiffusionObjective:
    if config.perceptual_base is not None:
        denoiser = Denoiser.from_pretrained(config.perceptual_base)
        settings = {"label_dropout": config.label_dropout, "denoising_weight": config.denoising_weight}
        return PerceptualObjective(denoiser, config.perceptual_layer, **settings)
    model, scheduler = NETWORKS[config.network](**config.model), DDPMScheduler(**config.scheduler)
    of_classes = DDIMPipeline if config.class_conditional else DDPMPipeline
    pipe = (of_classes if config.network == "UNet2DModel" else SiTPipeline)(model, scheduler)
    return DiffusionObjective(Denoiser.from_pipe(pipe), label_dropout=config.label_dropout)


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ModelConfig)
    config, data_config, model_config = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name, perceptual_base=model_config.perceptual_base)
    torch.manual_seed(config.seed)
    objective = build(model_config)
    if not objective.conditioner.conditional:
        data_config = dataclasses.replace(data_config, label_column="none")
    network = objective.network.config
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    data = load_train_data(data_config, network.in_channels, network.sample_size, **loading)
    train(objective, data, config, recipe=recipe_of(config, data_config, model_config))


if __name__ == "__main__":
    run_script(main)
