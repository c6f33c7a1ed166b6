"""Train a SiT, or tune any denoiser, with representation alignment (REPA and its relatives).

    accelerate launch examples/train_repa.py --config examples/configs/repa_digits.yaml
    accelerate launch examples/train_repa.py --config my_recipe.yaml --encoder facebook/dinov2-base --output_dir out

The result is a plain diffusers folder (`SiTPipeline.from_pretrained(output_dir)`), with the projectors apart in
`heads/`. `--pretrained_model` tunes another pipeline of any family instead, all of it or by `--lora_rank`. With
`--encoder none` the same run is the baseline. The loop, its checkpoints and its settings: docs/training.md.
"""

import dataclasses
import inspect
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

from diffusers_repr import Denoiser
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.denoiser import LabelConditioner
from diffusers_repr.denoiser.loading import load_autoencoder
from diffusers_repr.denoiser.vae import vae_stride
from diffusers_repr.encoders import load_encoders
from diffusers_repr.models import SiTTransformer2DModel
from diffusers_repr.objectives import REPAConfig, build_repa, load_heads
from diffusers_repr.training import TrainingConfig, recipe_of, train
from diffusers_repr.training.assumed import AssumedData, assumed_encoder, assumed_vae, is_here

RECIPES = Path(__file__).parent / "configs"
SCHEDULERS = {"ode": FlowMatchODEScheduler, "sde": FlowMatchSDEScheduler}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    pretrained_model: str | None = setting(None, "pipeline folder or Hub id to tune; default: a new SiT")
    model_size: str = setting("S/2", "of a new SiT: S, B, L or XL at patch 2, 4 or 8")
    model: dict | str | None = setting(None, "arguments of SiTTransformer2DModel over those of the size, a mapping")
    vae: str | None = setting(None, "folder or Hub id of an AutoencoderKL: train on its latents")
    vae_model: dict | str | None = setting(None, "arguments of a new AutoencoderKL for `repa_e`, a mapping; no `vae`")
    image_channels: int = setting(3, "1 (grey) or 3 (RGB), of models without a VAE")
    path: str = setting("linear", "of a new SiT: linear or cosine")
    sampler: str = setting("ode", "scheduler that is saved with a new SiT: ode or sde")

    def __post_init__(self) -> None:
        arguments = json_mapping("model", self.model)
        check_keys("`model`", arguments, inspect.signature(SiTTransformer2DModel.__init__).parameters)
        object.__setattr__(self, "model", arguments)
        vae_arguments = json_mapping("vae_model", self.vae_model)
        check_keys("`vae_model`", vae_arguments, inspect.signature(AutoencoderKL.__init__).parameters)
        object.__setattr__(self, "vae_model", vae_arguments)
        if self.vae and self.vae_model:
            raise ValueError("`vae` names a VAE, `vae_model` makes a new one; give one of them.")
        others = [field for field in dataclasses.fields(self) if field.name != "pretrained_model"]
        unused = [field.name for field in others if (getattr(self, field.name) or None) != (field.default or None)]
        if self.pretrained_model and unused:
            raise ValueError(f"`{'`, `'.join(unused)}` would not act: `pretrained_model` brings its own; drop them.")
        if self.sampler not in SCHEDULERS:
            raise ValueError(f"`sampler` is one of {', '.join(SCHEDULERS)}, got {self.sampler!r}.")


def build_sit(
    config: ModelConfig, vae: AutoencoderKL | None, image_size: tuple[int, int], classes: int
) -> SiTPipeline:
    """A new SiT for images of this size, latent if there is a VAE."""
    stride, channels = (1, config.image_channels) if vae is None else (vae_stride(vae), vae.config.latent_channels)
    shape = {"sample_size": [side // stride for side in image_size], "in_channels": channels, "num_classes": classes}
    model = SiTTransformer2DModel.from_size(config.model_size, **{**shape, **config.model})
    return SiTPipeline(transformer=model, scheduler=SCHEDULERS[config.sampler](path=config.path), vae=vae)


def load(config: TrainingConfig, data_config: DataConfig, model_config: ModelConfig, repa_config: REPAConfig):
    """What is trained, the data and the encoders."""
    encoders = load_encoders(repa_config.teachers, repa_config.encoder_positions)
    if model_config.pretrained_model:
        denoiser = Denoiser.from_pretrained(model_config.pretrained_model)
        vae, channels, own = denoiser.vae, denoiser.image_channels, denoiser.image_size
        size = data_config.resolution or own
        if data_config.resolution and own != (size, size):
            warnings.warn(
                f"Images of {size} px train a model of {own[1]} x {own[0]} px, which it will sample.", stacklevel=2
            )
    else:
        vae = load_autoencoder(model_config.vae) if model_config.vae else None
        if model_config.vae_model:
            vae = AutoencoderKL(**model_config.vae_model)
        channels = model_config.image_channels if vae is None else vae.config.get("in_channels", 3)
        size = data_config.resolution or 256
    parts = {"vae": vae, "encoders": encoders, "num_workers": config.dataloader_num_workers}
    images = not data_config.features_dir or repa_config.haste_weight > 0 or repa_config.repa_e
    needs_pixels = bool(encoders) and images
    data = load_train_data(data_config, channels, size, seed=config.seed, needs_pixels=needs_pixels, **parts)
    if not model_config.pretrained_model:
        image_size = (size, size) if isinstance(size, int) else size
        denoiser = Denoiser.from_pipe(build_sit(model_config, vae, image_size, data.num_classes))
    return denoiser, data, encoders


def assume(config: TrainingConfig, data_config: DataConfig, model_config: ModelConfig, repa_config: REPAConfig):
    """As `load`, for a dry run: what is not on this disk is taken for granted, and a new network has no weights."""
    names, vae, told = repa_config.teachers, None, []
    size = (data_config.resolution or 256,) * 2
    classes = 0 if data_config.label_column == "none" else model_config.model.get("num_classes", 1000)
    if not is_here(data_config.dataset_name):
        told.append(f"images of {size[0]} px in {classes} classes; {data_config.dataset_name!r} was not read")
    if model_config.pretrained_model:
        denoiser = Denoiser.from_pretrained(model_config.pretrained_model)
        conditioner = denoiser.conditioner
        if not isinstance(conditioner, LabelConditioner):
            raise ValueError(
                f"A dry run takes images and classes for granted, and {model_config.pretrained_model!r} is trained "
                f"with {conditioner.kind}: give it data and encoders that are on this disk."
            )
        size, vae, classes = denoiser.image_size, denoiser.vae, conditioner.num_classes
    else:
        if model_config.vae:
            vae = load_autoencoder(model_config.vae) if is_here(model_config.vae) else assumed_vae()
        if not is_here(model_config.vae):
            told.append(f"latents of 4 channels, 8 pixels each; {model_config.vae!r} was not read")
        with torch.device("meta"):
            vae = AutoencoderKL(**model_config.vae_model) if model_config.vae_model else vae
            denoiser = Denoiser.from_pipe(build_sit(model_config, vae, size, classes))
    if all(map(is_here, names)):
        encoders = load_encoders(names, repa_config.encoder_positions)
    else:
        encoders = [assumed_encoder(name, size) for name in names]
        told += [
            f"{one.dim} channels on {one.grid[0]} x {one.grid[1]} tokens; {name!r} was not read"
            for name, one in zip(names, encoders, strict=True)
        ]
    latent = vae is not None and not repa_config.repa_e
    channels, stride = (denoiser.family.channels(), denoiser.stride) if latent else (denoiser.image_channels, 1)
    shape = (channels, *(side // stride for side in size))
    parts = {"latent": latent, "image_size": size, "assumed": told}
    return denoiser, AssumedData(shape, classes, encoders, **parts), encoders


def main(argv: list[str], evaluate=None) -> None:
    kinds = (TrainingConfig, DataConfig, ModelConfig, REPAConfig)
    config, data_config, model_config, repa_config = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    if config.lora_rank and not model_config.pretrained_model:
        raise ValueError("`lora_rank` adapts a trained network, and a new SiT is none; name a `pretrained_model`.")
    if model_config.vae_model and not repa_config.repa_e:
        raise ValueError("`vae_model` makes a new VAE, which only `repa_e` trains; name a trained one by `vae`.")
    needed = {
        "dataset_name": data_config.dataset_name,
        "vae": model_config.vae,
        "encoder": repa_config.teachers,
        "pretrained_model": model_config.pretrained_model,
    }
    torch.manual_seed(config.seed)
    files = [data_config.dataset_name, data_config.latents_dir, data_config.features_dir, model_config.vae]
    if config.dry_run and not all(map(is_here, [*files, *repa_config.teachers])):
        get = assume
    else:
        check_made(RECIPES, **needed)
        get = load
    denoiser, data, encoders = get(config, data_config, model_config, repa_config)
    objective = build_repa(denoiser, encoders, repa_config)
    if model_config.pretrained_model and repa_config.projectors == "load":
        load_heads(objective, model_config.pretrained_model)
    train(objective, data, config, recipe=recipe_of(config, data_config, model_config, repa_config), evaluate=evaluate)


if __name__ == "__main__":
    run_script(main)
