"""Train a classifier on generated images alone (MA-ZSC, arXiv 2302.03298), and measure it on real ones.

    diffusers-repr generate examples/configs/generate/digits_classes.yaml --out outputs/digits-classes
    accelerate launch examples/train_zero_shot_set.py --config examples/configs/zero_shot_set_digits.yaml

`dataset_name` is what `diffusers-repr generate` made. A share of it is held out, and chooses by its accuracy the step
that is taken: `selected/` is the classifier of that step, the folder itself that of the last one. Real images are read
once, at the end, and choose nothing: `test_accuracy` in `evaluation.jsonl` and on the card is the chosen classifier's.
Of images that were made by class ids, the classes get the names that the real images have for those ids.
Both load by `AutoModelForImageClassification.from_pretrained`.
"""

import dataclasses
from pathlib import Path

import torch
from datasets import ClassLabel

from diffusers_repr.cli.guard import SCRIPT_HELP, run_script
from diffusers_repr.config import parse_recipe
from diffusers_repr.config.made import check_made
from diffusers_repr.config.recipe import setting
from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.image_data import ImageData, load_images
from diffusers_repr.objectives import FinetuneStudentConfig, FinetuneStudentObjective, StudentConfig
from diffusers_repr.sweep import hold_out
from diffusers_repr.tasks import SelectedStep
from diffusers_repr.training import TrainingConfig, recipe_of, train

RECIPES = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class ZeroShotSetConfig:
    """What is held out, and what is tested on.

    Raises:
        ValueError: For a share outside of (0, 1).
    """

    image_channels: int = setting(3, "1 for grey images, 3 for colours")
    held_out_share: float = setting(0.1, "share of the generated images that chooses the step")
    test_dataset_name: str | None = setting(None, "real images of the same classes; default: no test")
    test_split: str = setting("test", "of these")
    test_label_column: str | None = setting(None, "of these; default: a ClassLabel")

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"`held_out_share` lies between 0 and 1; got {self.held_out_share}.")


def generated(data_config: DataConfig, own: ZeroShotSetConfig, side: int, names: list[str] | None):
    """The images to learn from, and those that choose the step, as they are; `names` are of the real ones' classes."""
    if data_config.label_column == "none":
        raise ValueError("A classifier learns classes, and `label_column` is none; drop it.")
    columns = {name: getattr(data_config, name) for name in ("image_column", "label_column")}
    columns["revision"] = data_config.dataset_revision
    images = load_images(data_config.dataset_name, data_config.dataset_split, **columns)
    if not images.label_names:
        raise ValueError("The generated images have no classes; make images of classes, or name --label_column.")
    train_part, held_out = hold_out(named(images, names), own.held_out_share)
    still = data_config.held_out(data_config.dataset_split)
    return (
        load_train_data(data_config, own.image_channels, side, train_part.dataset),
        load_train_data(still, own.image_channels, side, held_out.dataset),
    )


def named(images: ImageData, names: list[str] | None) -> ImageData:
    """The images, whose classes have these names if all that is known of them is their ids."""
    if names is None or images.label_names != [str(number) for number in range(len(names))]:
        return images
    assert images.label_column is not None
    renamed = images.dataset.cast_column(images.label_column, ClassLabel(names=names))
    return dataclasses.replace(images, dataset=renamed, label_names=names)


def real(data_config: DataConfig, own: ZeroShotSetConfig, side: int):
    """The images to test on, or None."""
    if own.test_dataset_name is None:
        return None
    where = {"dataset_name": own.test_dataset_name, "label_column": own.test_label_column, "dataset_revision": None}
    config = dataclasses.replace(data_config.held_out(own.test_split), image_column=None, **where)
    return load_train_data(config, own.image_channels, side)


def main(argv: list[str]) -> None:
    kinds = (TrainingConfig, DataConfig, StudentConfig, FinetuneStudentConfig, ZeroShotSetConfig)
    config, data_config, backbone, tuned, own = parse_recipe(kinds, argv, __doc__.split("\n")[0], **SCRIPT_HELP)
    check_made(RECIPES, dataset_name=data_config.dataset_name)
    if tuned.eval_split:
        raise ValueError("`eval_split` does nothing here: real images are named by `test_dataset_name`; drop it.")
    if not config.validation_steps:
        raise ValueError("`validation_steps` is 0, and among the steps at which it measures one is chosen; set it.")
    config = dataclasses.replace(config, eval_batch_size=0)  # a classifier has no samples
    side = data_config.size()[0]
    test = real(data_config, own, side)
    data, held_out = generated(data_config, own, side, None if test is None else test.class_names)
    torch.manual_seed(config.seed)
    objective = FinetuneStudentObjective(backbone.build(own.image_channels, (side, side)), data.class_names, tuned)
    if test is not None:
        objective.check_data(test)
    measured = (config.output_dir, config.train_batch_size, config.max_train_steps, test)
    recipe = recipe_of(config, data_config, backbone, tuned, own)
    train(objective, data, config, recipe=recipe, evaluate=SelectedStep(objective, held_out, *measured))


if __name__ == "__main__":
    run_script(main)
