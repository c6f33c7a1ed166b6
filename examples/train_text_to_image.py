"""Train a text-to-image model: a `UNet2DConditionModel` on the latents of a VAE, with the text tower of a CLIP.

    accelerate launch examples/train_text_to_image.py --config examples/configs/text_to_image_scenes.yaml

The result is a `StableDiffusionPipeline` that `DiffusionPipeline.from_pretrained(folder)` loads. VAE and text tower
are taken as they are; the whole CLIP and its tokenizer are copied to `clip/`. A share of the captions
(`label_dropout`) becomes the empty one, from which classifier-free guidance leads away. The loop: docs/training.md.
"""

import copy
import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel, CLIPTokenizerFast

from diffusers_repr import Denoiser
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.denoiser.vae import vae_stride
from diffusers_repr.hub.files import read_json, write_json
from diffusers_repr.objectives import DiffusionObjective, FixedArtifact, PipelineArtifact
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"
CLIP = "clip"  # folder of both towers in that of the result


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network, what it stands on, and its noise process."""

    vae: str = setting("outputs/scenes-vae", "folder or Hub id of an AutoencoderKL, as train_vae.py writes it")
    clip: str = setting("outputs/scenes-clip", "folder or Hub id of a CLIPModel, as train_clip.py writes it")
    model: dict | str | None = setting(None, "arguments of UNet2DConditionModel, a mapping (JSON in a flag)")
    scheduler: dict | str | None = setting(None, "arguments of DDIMScheduler, a mapping")
    label_dropout: float = setting(0.1, "share of captions that become the empty one")
    eval_prompts: list[str] | None = setting(None, "captions of the rows of samples.png, eight images each")

    def __post_init__(self) -> None:
        take_arguments(self, model=UNet2DConditionModel, scheduler=DDIMScheduler)
        own = sorted({"sample_size", "in_channels", "out_channels", "cross_attention_dim"} & self.model.keys())
        if own:
            raise ValueError(f"`model` takes {', '.join(own)} from the VAE and the text tower; leave them out.")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"`label_dropout` is a probability, got {self.label_dropout}.")


def load_as_float32(folder: Path) -> None:
    """Let a model of transformers load as one of diffusers does, in float32 whatever the dtype of its file."""
    path = folder / "config.json"
    write_json(path, {**read_json(path), "dtype": "float32"})


class Together:
    """Both towers, their tokenizer and their preprocessing, saved in one folder."""

    def __init__(self, *parts) -> None:
        self.parts = parts

    def save_pretrained(self, folder) -> None:
        for part in self.parts:
            part.save_pretrained(folder)
        load_as_float32(folder)


class WholeArtifact(PipelineArtifact):
    """A pipeline whose frozen parts are saved in the dtype of the trained one."""

    def save(self, root, state, dtype) -> None:
        frozen = {name: copy.deepcopy(getattr(self.pipeline, name)).to(dtype) for name in ("vae", "text_encoder")}
        PipelineArtifact(self.pipeline, {**self.components, **frozen}, folder=self.folder).save(root, state, dtype)
        load_as_float32(root / self.folder / "text_encoder")


class TextToImageObjective(DiffusionObjective):
    """`DiffusionObjective` whose previews have captions, and whose result holds the CLIP that its text tower is of."""

    def __init__(self, denoiser: Denoiser, clip: Together, prompts: list[str], label_dropout: float) -> None:
        super().__init__(denoiser, label_dropout=label_dropout)
        self.clip, self.prompts = clip, prompts or [""]

    def artifacts(self) -> list:
        first, *others = super().artifacts()
        whole = WholeArtifact(first.pipeline, first.components, folder=first.folder)
        return [whole, *others, FixedArtifact(self.clip, folder=CLIP)]

    def preview(self, pipe, count, generator, steps):
        prompts = [self.prompts[at // 8 % len(self.prompts)] for at in range(count)]
        return pipe(prompts, generator=generator, num_inference_steps=steps, guidance_scale=3.0).images


def build(config: ModelConfig) -> TextToImageObjective:
    vae = AutoencoderKL.from_pretrained(config.vae, torch_dtype=torch.float32)
    towers = CLIPModel.from_pretrained(config.clip, dtype=torch.float32)
    tokenizer = CLIPTokenizerFast.from_pretrained(config.clip)
    text_encoder = CLIPTextModel(towers.config.text_config)
    tower = getattr(text_encoder, "text_model", text_encoder)  # transformers 4 holds it in a model around it
    tower.load_state_dict(towers.text_model.state_dict())
    shape = {
        "sample_size": vae.config.sample_size // vae_stride(vae),
        "in_channels": vae.config.latent_channels,
        "out_channels": vae.config.latent_channels,
        "cross_attention_dim": text_encoder.config.hidden_size,
    }
    scheduler = DDIMScheduler(**{"clip_sample": False, "steps_offset": 1, **config.scheduler})
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, UNet2DConditionModel(**shape, **config.model), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    processor = CLIPImageProcessor.from_pretrained(config.clip)
    clip = Together(CLIPModel.from_pretrained(config.clip, dtype="auto"), tokenizer, processor)
    return TextToImageObjective(Denoiser.from_pipe(pipe), clip, config.eval_prompts, config.label_dropout)


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ModelConfig)
    config, data_config, model_config = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name, vae=model_config.vae, clip=model_config.clip)
    if data_config.caption_column is None:
        raise ValueError("A text-to-image model is trained on captions; name their column by --caption_column.")
    torch.manual_seed(config.seed)
    objective = build(model_config)
    denoiser = objective.denoiser
    loading = {"seed": config.seed, "num_workers": config.dataloader_num_workers, "vae": denoiser.vae}
    data = load_train_data(data_config, denoiser.image_channels, denoiser.image_size, **loading)
    train(objective, data, config, recipe=recipe_of(config, data_config, model_config))


if __name__ == "__main__":
    run_script(main)
