"""Dual pseudo training (You et al. 2023, arXiv 2302.10586): a classifier and a model of classes from very few labels.

    accelerate launch examples/train_dpt.py --config examples/configs/dpt_digits.yaml
    accelerate launch examples/train_dpt.py --config examples/configs/dpt_digits.yaml --labels_per_class 5 \
        --output_dir outputs/digits-dpt-5

1. A logistic regression on features of `encoder` learns from `labels_per_class` labels, drawn by the seed, and gives
   every image a pseudo-label: `OUTPUT_DIR-assigned`, or `assignments_dir`.
2. A model of classes is trained on the pseudo-labels, as by `train_conditional.py`: `OUTPUT_DIR`, a pipeline.
3. It makes `images_per_class` images of each class, `OUTPUT_DIR/generated`; the classifier is fitted anew on these and
   the labelled images, `OUTPUT_DIR/classifier`. `OUTPUT_DIR/dpt.json` has the accuracy of both on `eval_split`.

The same command goes on where it was stopped, in each stage, and does nothing twice. No stage sees a label that was
not drawn, and the pseudo-labels are fixed before the second begins.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from sample_for_fid import Sampler
from sample_for_fid import Settings as Sampling
from torch import Tensor
from train_conditional import ConditionConfig, assigned, prepare

from diffusers_repr.assign import ClassifierAssigner
from diffusers_repr.assign.few_labels import few_labels, refit_classifier
from diffusers_repr.assign.images import AssignSettings, encode_images
from diffusers_repr.cli.encoders import open_encoder
from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import setting
from diffusers_repr.data import DataConfig
from diffusers_repr.data.assigned import ASSIGNER, VECTORS
from diffusers_repr.data.splits import open_split
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.hub.files import atomic_folder, write_json
from diffusers_repr.store.image_store import ImageStore, write_images
from diffusers_repr.store.processes import process_state
from diffusers_repr.store.vector_store import VectorTable
from diffusers_repr.training import TrainingConfig, make_accelerator, recipe_of, train
from diffusers_repr.training.run import end_processes

RECIPES = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What the second stage's model makes for the third, and what is measured."""

    images_per_class: int = setting(128, "generated images of each class")
    sample_guidance_scale: float = setting(1.4, "classifier-free guidance, null + scale (cond - null); the paper's")
    sample_steps: int = setting(50, "steps of the sampler")
    sampler: str | None = setting(None, "its class; default: DPMSolverMultistepScheduler, of flows as saved")
    sample_batch_size: int = setting(64, "images of one process and call")
    eval_split: str = setting("test", "labelled split that both classifiers are measured on")

    def __post_init__(self) -> None:
        for name in ("images_per_class", "sample_steps", "sample_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def check(condition: ConditionConfig, data_config: DataConfig, generation: GenerationConfig) -> None:
    """What these three settings have to be for this method."""
    if condition.assigner != "classifier" or condition.encoder is None or condition.level != "image":
        raise ValueError("Dual pseudo training takes `assigner: classifier`, an `encoder`, and `level: image`.")
    if condition.labels_per_class is None:
        raise ValueError("`labels_per_class` is not set: how many labels of each class may be seen?")
    if data_config.label_column == "none":
        raise ValueError("`label_column: none` leaves no label to learn from.")
    if generation.eval_split == data_config.dataset_split:
        raise ValueError(f"`eval_split` {generation.eval_split!r} is trained on; measure on another.")


def images_of(data_config: DataConfig, dataset: Any, channels: int) -> ImageTrainData:
    """Images as the first stage encodes them: the largest crop, at the first one's shorter side."""
    same = {
        name: getattr(data_config, name) for name in ("dataset_name", "image_column", "label_column", "bad_images")
    }
    config = DataConfig(**same, center_crop="fit", missing_labels="keep")
    side = min(dataset[0][config.columns(dataset.features, str(data_config.dataset_name)).image].size)
    return ImageTrainData(dataset, config, channels, (side, side), str(data_config.dataset_name))


def generate(output: Path, generation: GenerationConfig, seed: int, classes: int, flows: bool) -> ImageStore:
    """As many images of each class, those of an earlier run among them."""
    name = generation.sampler or (None if flows else "DPMSolverMultistepScheduler")
    settings = Sampling(
        model=str(output), num_samples=classes * generation.images_per_class, classes="balanced", scheduler=name,
        guidance_scale=generation.sample_guidance_scale, num_inference_steps=generation.sample_steps, seed=seed,
    )  # fmt: skip
    sampler = Sampler(settings, process_state().device)
    return write_images(output / "generated", sampler.keys(), sampler, batch_size=generation.sample_batch_size)


def vectors(encoder: Any, data: ImageTrainData, folder: Path) -> Tensor:
    """`(N, D)` of all images, kept in a folder."""
    encode_images(encoder, data, folder, AssignSettings(progress=False))
    table = VectorTable.open(folder)
    return table[torch.arange(len(data))].float()


def accuracy(assigner: ClassifierAssigner, found: Tensor, labels: Tensor) -> float:
    """Share of the labelled images that are told right."""
    known = labels >= 0
    return float((assigner.assign(found[known]) == labels[known]).double().mean())


def last_stage(
    config: TrainingConfig, data_config: DataConfig, condition: ConditionConfig, generation: GenerationConfig
) -> dict[str, Any]:
    """Generate, fit the classifier anew, and measure both."""
    output, assigned_dir = Path(config.output_dir), Path(str(data_config.assignments_dir))
    how = {"revision": None, "dtype": "float32", "positions": "transformers", "text_space": condition.text_space}
    encoder = open_encoder(str(condition.encoder), seed=config.seed, **how)
    train_images, test_images = (
        images_of(data_config, open_split(str(data_config.dataset_name), split, data_config.dataset_revision, False),
                  encoder.channels)
        for split in (data_config.dataset_split, generation.eval_split)
    )  # fmt: skip
    first = ClassifierAssigner.from_pretrained(assigned_dir / ASSIGNER)
    known = few_labels(train_images, condition.labels_per_class, config.seed)
    store = generate(output, generation, config.seed, first.num_classes, condition.network.startswith(("SiT", "UViT")))
    made_of = torch.tensor([int(str(key.condition)) for key in store.image_keys()])
    plain = DataConfig("generated", image_column="image", label_column="none", center_crop="fit")
    side = train_images.images[0].shape[-1]
    pictures = ImageTrainData(store.load(), plain, encoder.channels, (side, side), "generated")
    table = VectorTable.open(assigned_dir / VECTORS)
    real = table[torch.arange(len(train_images))].float()
    made = vectors(encoder, pictures, output / "generated-vectors")
    second = refit_classifier(real, known, made, made_of, first.num_classes)
    held = vectors(encoder, test_images, output / f"{generation.eval_split}-vectors")
    truth = torch.from_numpy(test_images.labels)
    told = {
        "labels": int((known >= 0).sum()),
        "generated": len(made),
        "pseudo_label_accuracy": accuracy(first, real, torch.from_numpy(train_images.labels)),
        "accuracy_first": accuracy(first, held, truth),
        "accuracy_last": accuracy(second, held, truth),
        "eval_split": generation.eval_split,
        "eval_images": int((truth >= 0).sum()),
    }
    if process_state().is_main_process:
        if not (output / "classifier").is_dir():
            with atomic_folder(output / "classifier") as place:
                second.save_pretrained(place)
        write_json(output / "dpt.json", told)
        print(told, flush=True)
    return told


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, ConditionConfig, GenerationConfig)
    config, data_config, condition, generation = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check(condition, data_config, generation)
    encoder = str(condition.encoder).partition(":")[0]
    check_made(RECIPES, dataset_name=data_config.dataset_name, encoder=encoder, vae=condition.vae)
    accelerator = make_accelerator(config)  # the third stage needs the processes, too
    data_config = assigned(config, data_config, condition)
    objective, data = prepare(config, data_config, condition)
    recipe = recipe_of(config, data_config, condition, generation)
    train(objective, data, config, recipe=recipe, accelerator=accelerator)
    last_stage(config, data_config, condition, generation)
    end_processes(accelerator)


if __name__ == "__main__":
    run_script(main)
