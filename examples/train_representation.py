"""Train a diffusion model of an encoder's vectors: the first half of RCG (arXiv 2312.03701), and the prior of others.

    accelerate launch examples/train_representation.py --config examples/configs/rcg_representation_digits.yaml

The images are encoded once: by a vision transformer, or by a layer of a diffusion model. `--features_dir` reads the
vectors that `diffusers-repr cache --cache_features` wrote instead. The folder is an `RCGPipeline` without its images:
`pipe.sample_representations(1000)`; its `assigner/` standardises other vectors as these. With `eval_split` the Fréchet
distance of sampled and held-out vectors is measured, beside that of the training vectors: `evaluation.jsonl`.
"""

import dataclasses
import inspect
from pathlib import Path
from typing import Literal

import torch
from diffusers import DDIMScheduler

from diffusers_repr import Denoiser, frechet_distance
from diffusers_repr.assign import IdentityAssigner
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.vectors import VectorData
from diffusers_repr.encoders import Encoder
from diffusers_repr.encoders.global_vectors import encode_rows
from diffusers_repr.models import RepresentationMLPModel
from diffusers_repr.models.convert_representation import SCHEDULER
from diffusers_repr.objectives import RepresentationObjective
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What encodes the images, the network, and its noise process."""

    encoder: str | None = setting(None, "folder or Hub id of a vision transformer, or of a diffusion pipeline")
    encoder_layer: str | None = setting(None, "of a pipeline: path of the layer whose mean over places is the vector")
    encoder_timestep: int | None = setting(None, "of a pipeline: the noise level that the layer is read at")
    which_features: Literal["global", "tokens"] = setting("global", "the encoder's vector, or the mean of its tokens")
    standardize: Literal["vector", "column", "none"] = setting(
        "vector", "vectors by themselves, as RCG, by columns over the images, or not"
    )
    model: dict | str | None = setting(None, "arguments of RepresentationMLPModel, a mapping (JSON in a flag)")
    scheduler: dict | str | None = setting(None, "arguments of DDIMScheduler, a mapping; default: those of RCG")
    class_conditional: bool = setting(False, "tell the network the classes of the data")
    label_dropout: float = setting(0.1, "share of classes that become the null class")
    eval_split: str | None = setting(None, "split whose vectors measure the result; none: no measurement")

    def __post_init__(self) -> None:
        for name, target in (("model", RepresentationMLPModel), ("scheduler", DDIMScheduler)):
            arguments = json_mapping(name, getattr(self, name)) if getattr(self, name) is not None else {}
            check_keys(f"`{name}`", arguments, inspect.signature(target.__init__).parameters)
            object.__setattr__(self, name, arguments)
        own = sorted({"in_channels", "num_classes", "null_class"} & self.model.keys())
        if own:
            raise ValueError(f"`model` takes {', '.join(own)} from the encoder and the data; leave them out.")
        if self.encoder is None:
            raise ValueError("`encoder` is needed: a folder or Hub id of what makes the vectors.")
        if (self.encoder_layer is None) != (self.encoder_timestep is None):
            raise ValueError("`encoder_layer` and `encoder_timestep` are of a diffusion pipeline; give both, or none.")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"`label_dropout` is a probability, got {self.label_dropout}.")

    def load_encoder(self) -> Encoder:
        if self.encoder_layer is None:
            return Encoder.from_pretrained(self.encoder)
        return Encoder.from_denoiser(Denoiser.from_pretrained(self.encoder), self.encoder_layer, self.encoder_timestep)


def load_vectors(config: ModelConfig, data_config: DataConfig, encoder: Encoder, batch_size: int) -> VectorData:
    """Vectors of every image, from a cache of features or by the encoder."""
    images = load_train_data(dataclasses.replace(data_config, features_dir=None), encoder.channels)
    vectors = encode_rows(encoder, images, config.which_features, data_config.features_dir, batch_size)
    labels = None if images.labels is None else torch.as_tensor(images.labels)
    record = {"encoder": encoder.fingerprint(), "features": config.which_features}
    return VectorData(vectors, labels, images.class_names, name=images.name, record=record)


def build(config: ModelConfig, data: VectorData) -> RepresentationObjective:
    width, classes = data.vectors.shape[1], data.num_classes if config.class_conditional else 0
    network = RepresentationMLPModel(width, **{**config.model, "num_classes": classes})
    denoiser = Denoiser(network, DDIMScheduler(**{**SCHEDULER, **config.scheduler}))
    assigner = None
    if config.standardize != "none":
        assigner = IdentityAssigner(width, over=config.standardize).fit(data.vectors)
    names = dict(enumerate(data.class_names)) if classes else None
    return RepresentationObjective(denoiser, assigner=assigner, label_dropout=config.label_dropout, id2label=names)


class Distance:
    """Fréchet distance of as many sampled vectors, or training vectors, as there are held out."""

    def __init__(self, objective: RepresentationObjective, train: VectorData, held: VectorData, steps: int) -> None:
        self.held, self.labels, self.steps = objective.clean({"condition": held.vectors}), held.labels, steps
        rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(held)]
        self.train = objective.clean({"condition": train.vectors[rows]})

    def __call__(self, pipe, step: int) -> dict[str, float]:
        labels = self.labels if pipe.prior.config.num_classes else None
        generator, count = torch.Generator().manual_seed(0), len(self.held)
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe.sample_representations(count, labels, num_inference_steps=self.steps, generator=generator)
        found = {"frechet_vectors": drawn.cpu(), "frechet_train_vectors": self.train}
        return {name: frechet_distance(self.held, vectors) for name, vectors in found.items()}


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ModelConfig)
    config, data_config, model_config = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name, encoder=model_config.encoder)
    config = dataclasses.replace(config, eval_batch_size=0)  # vectors are no images to show
    if not model_config.class_conditional and model_config.eval_split is None:
        data_config = dataclasses.replace(data_config, label_column="none")
    encoder = model_config.load_encoder()
    data = load_vectors(model_config, data_config, encoder, config.train_batch_size)
    if model_config.class_conditional and not data.num_classes:
        raise ValueError("`class_conditional` is set, and the data have no classes; name --label_column.")
    torch.manual_seed(config.seed)
    objective = build(model_config, data)
    distance = None
    if model_config.eval_split:
        held_config = dataclasses.replace(data_config.held_out(model_config.eval_split), features_dir=None)
        held = load_vectors(model_config, held_config, encoder, config.train_batch_size)
        distance = Distance(objective, data, held, config.num_inference_steps)
    train(objective, data, config, recipe=recipe_of(config, data_config, model_config), evaluate=distance)


if __name__ == "__main__":
    run_script(main)
