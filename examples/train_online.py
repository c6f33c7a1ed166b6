"""Train a diffusion model that finds clusters in its own features, and can be asked for each (online guidance).

    accelerate launch examples/train_online.py --config examples/configs/online_digits.yaml

No labels, and no encoder. For the first half of the steps the network learns without a condition, and beside it a head
and prototypes on its middle block; then what its moving average assigns to an image is the condition of the network
(arXiv 2312.08825). The folder is a pipeline (`SiTPipeline`, of a U-Net a `GuidedUnconditionalPipeline`) that draws
its conditions as often as they were in training, `pipe(batch_size=8)`, with the `assigner` beside it.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from diffusers_repr import Denoiser, list_layers
from diffusers_repr.assign import SinkhornAssigner
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.denoiser import MapConditioner
from diffusers_repr.models import SiTTransformer2DModel, UViTTransformer2DModel
from diffusers_repr.objectives import OnlineGuidanceObjective
from diffusers_repr.objectives.online import middle_layer
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"
NETWORKS = {kind.__name__: kind for kind in (UViTTransformer2DModel, SiTTransformer2DModel, UNet2DModel)}
OWN = ("num_classes", "num_class_embeds", "condition_dim", "class_embed_type", "out_channels")


@dataclasses.dataclass(frozen=True)
class OnlineConfig:
    """The network, its noise process, its prototypes and its stages."""

    network: str = setting("UViTTransformer2DModel", "class of the network; SiTTransformer2DModel, UNet2DModel")
    model: dict | str | None = setting(None, "arguments of the network, a mapping, but for its condition")
    scheduler: dict | str | None = setting(None, "arguments of a DDPMScheduler, a mapping; default: flow matching")
    num_prototypes: int = setting(10, "clusters")
    condition: Literal["id", "vector", "patch"] = setting(
        "vector", "what the network is told: the id, the prototype, or that of every patch"
    )
    embed_dim: int | None = setting(None, "channels of a prototype; default: those of the layer")
    head_norm: str = setting("batch", "of the head: batch, layer or none")
    layer: str | None = setting(None, "that the head reads; default: the middle block")
    switch: float = setting(0.5, "share of the steps after which the second stage begins")
    clustering_weight: float = setting(1.0, "of the clustering loss")
    detach: bool = setting(True, "whether the clustering loss leaves the network alone")
    label_dropout: float = setting(0.15, "share of conditions that become null in the second stage")

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"`network` is one of {', '.join(NETWORKS)}, got {self.network!r}.")
        take_arguments(self, model=NETWORKS[self.network], scheduler=DDPMScheduler)
        own = [name for name in OWN if name in self.model]
        if own:
            raise ValueError(f"`num_prototypes` and `condition` decide on `{'`, `'.join(own)}`; drop it from `model`.")
        if self.model.get("sample_size") is None:
            raise ValueError("`model` needs `sample_size`, the side of the images.")
        if not 0 < self.switch < 1:
            raise ValueError(f"`switch` is a share of the steps between 0 and 1, got {self.switch}.")
        if self.network == "UNet2DModel" and self.condition != "id":
            raise ValueError("A UNet2DModel is told the id (`condition: id`); the others are for transformers.")


def build(config: OnlineConfig, steps: int) -> OnlineGuidanceObjective:
    """The objective of a new network."""
    kind, width = NETWORKS[config.network], config.embed_dim
    if width is None:
        width = config.model.get("hidden_size", inspect.signature(kind).parameters.get("hidden_size"))
        width = getattr(width, "default", width)
    channels = config.model.get("in_channels", 4)
    own = {
        "id": {"num_classes": config.num_prototypes},
        "vector": {"num_classes": 0, "condition_dim": width},
        "patch": {"num_classes": 0, "in_channels": channels + (width or 0), "out_channels": channels},
    }[config.condition]
    if kind is UNet2DModel:
        own = {"num_class_embeds": config.num_prototypes + 1, "out_channels": config.model.get("in_channels", 3)}
    model = kind(**{**config.model, **own})
    scheduler = DDPMScheduler(**config.scheduler) if config.scheduler else FlowMatchODEScheduler()
    pipe = (GuidedUnconditionalPipeline if kind is UNet2DModel else SiTPipeline)(model, scheduler)
    conditioner = MapConditioner(width) if config.condition == "patch" else None
    denoiser = Denoiser(model, scheduler, pipe=pipe, conditioner=conditioner)
    layer = config.layer or middle_layer(denoiser)
    widths = {found.path: found.channels for found in list_layers(denoiser, detail="all")}
    if layer not in widths:
        raise ValueError(f"`layer` {layer!r} is none of an image; `diffusers-repr layers` shows those that are.")
    output = "class" if config.condition == "id" else "vector"
    sizes = {"num_prototypes": config.num_prototypes, "embed_dim": width}
    assigner = SinkhornAssigner(widths[layer], **sizes, norm=config.head_norm, output=output)
    return OnlineGuidanceObjective(
        denoiser,
        assigner,
        max(1, round(config.switch * steps)),
        layer,
        weight=config.clustering_weight,
        detach=config.detach,
        label_dropout=config.label_dropout,
    )


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, OnlineConfig)
    config, data_config, online = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name)
    torch.manual_seed(config.seed)
    objective = build(online, config.max_train_steps)
    data_config = dataclasses.replace(data_config, label_column="none")
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers}
    channels, side = objective.denoiser.image_channels, objective.network.config.sample_size
    data = load_train_data(data_config, channels, side, **loading)
    train(objective, data, config, recipe=recipe_of(config, data_config, online))


if __name__ == "__main__":
    run_script(main)
