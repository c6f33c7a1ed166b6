"""Train a diffusion model of an encoder's vectors: the first half of RCG (arXiv 2312.03701), and the prior of others.

    accelerate launch examples/train_representation.py --config examples/configs/rcg_representation_digits.yaml

The images are encoded once, into `assignments_dir` (default: beside `output_dir`), as `diffusers-repr assign` does it
by `--method identity`, and `train_conditional.py` reads it: both halves of RCG learn from the same vectors. The folder
is an `RCGPipeline` without its images, `pipe.sample_representations(1000)`; its `assigner/` standardises other vectors
as these. With `eval_split` the Fréchet distance of sampled and held-out vectors is measured, beside that of as many
training vectors: `evaluation.jsonl`.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import torch
from diffusers import DDIMScheduler

from diffusers_repr import Denoiser, frechet_distance
from diffusers_repr.assign import IdentityAssigner
from diffusers_repr.cli.assign import write_from_recipe
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.measured import take_back
from diffusers_repr.config.recipe import setting, take_arguments
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.assigned import ASSIGNER, VECTORS
from diffusers_repr.data.vectors import VectorData
from diffusers_repr.models import RepresentationMLPModel
from diffusers_repr.models.convert_representation import SCHEDULER
from diffusers_repr.objectives import RepresentationObjective
from diffusers_repr.store.vector_store import VectorTable
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What encodes the images, the network, and its noise process."""

    assigner: ClassVar[str] = "identity"  # what `write_from_recipe` asks for

    encoder: str | None = setting(None, "of the images: a vision transformer, or MODEL:layer@timestep")
    text_space: bool = setting(False, "the encoder is a CLIP: vectors that texts have too")
    over: Literal["column", "vector"] = setting(
        "vector", "what is standardised: each vector by itself, as RCG has it, or each column over the images"
    )
    model: dict | str | None = setting(None, "arguments of RepresentationMLPModel, a mapping (JSON in a flag)")
    scheduler: dict | str | None = setting(None, "arguments of DDIMScheduler, a mapping; default: those of RCG")
    class_conditional: bool = setting(False, "tell the network the classes of the data")
    label_dropout: float = setting(0.1, "share of classes that become the null class")
    eval_split: str | None = setting(None, "split whose vectors measure the result; none: no measurement")

    def __post_init__(self) -> None:
        take_back(self, "eval_split")
        take_arguments(self, model=RepresentationMLPModel, scheduler=DDIMScheduler)
        own = sorted({"in_channels", "num_classes", "null_class"} & self.model.keys())
        if own:
            raise ValueError(f"`model` takes {', '.join(own)} from the encoder and the data; leave them out.")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"`label_dropout` is a probability, got {self.label_dropout}.")
        if self.eval_split and self.encoder is None:
            raise ValueError("`eval_split` measures by vectors of its images; name the `encoder`.")


def load_vectors(folder: Path, config: ModelConfig, data_config: DataConfig, seed: int) -> VectorData:
    """The vectors of the images, before they are standardised; they are made where they are not there yet."""
    if config.encoder is not None:
        write_from_recipe(data_config, config, str(folder), seed)
    elif not (folder / VECTORS).is_dir():
        raise ValueError(f"There are no vectors in {str(folder)!r}; name the `encoder` that is to make them.")
    table = VectorTable.open(folder / VECTORS)
    label_column = data_config.label_column if config.class_conditional else "none"
    plain = dataclasses.replace(data_config, assignments_dir=None, label_column=label_column)
    images = load_train_data(plain, 1, plain.resolution or 1)  # for the labels alone
    labels = None if images.labels is None else torch.as_tensor(images.labels)
    return VectorData(table[torch.arange(len(table))], labels, images.class_names, name=images.name)


def build(config: ModelConfig, data: VectorData, assigner: IdentityAssigner) -> RepresentationObjective:
    classes = data.num_classes if config.class_conditional else 0
    network = RepresentationMLPModel(data.vectors.shape[1], **{**config.model, "num_classes": classes})
    denoiser = Denoiser(network, DDIMScheduler(**{**SCHEDULER, **config.scheduler}))
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
    encoder = (model_config.encoder or "").partition(":")[0] or None
    check_made(RECIPES, dataset_name=data_config.dataset_name, encoder=encoder)
    config = dataclasses.replace(config, eval_batch_size=0)  # vectors are no images to show
    folder = Path(data_config.assignments_dir or f"{config.output_dir.rstrip('/')}-assigned")
    data = load_vectors(folder, model_config, data_config, config.seed)
    if model_config.class_conditional and not data.num_classes:
        raise ValueError("`class_conditional` is set, and the data have no classes; name --label_column.")
    torch.manual_seed(config.seed)
    objective = build(model_config, data, IdentityAssigner.from_pretrained(folder / ASSIGNER))
    distance = None
    if model_config.eval_split:
        split = data_config.held_out(model_config.eval_split)
        held = load_vectors(Path(f"{folder}-{model_config.eval_split}"), model_config, split, config.seed)
        distance = Distance(objective, data, held, config.num_inference_steps)
    train(objective, data, config, recipe=recipe_of(config, data_config, model_config), evaluate=distance)


if __name__ == "__main__":
    run_script(main)
