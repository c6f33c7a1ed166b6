"""Settings of a readout head's training: the keys of a recipe, the flags of `train_readout.py`."""

import dataclasses
import inspect
import json
from typing import Literal

import yaml
from transformers.hf_argparser import HfArg

from diffusers_repr.heads import DepthHead, MapHead, ReadoutHead
from diffusers_repr.hub import is_repo_id
from diffusers_repr.training.recipe import check_keys, parse_recipe

HEADS: dict[str, type[MapHead]] = {
    "spatial": ReadoutHead,
    "depth": DepthHead,
    "appearance": ReadoutHead,
    "correspondence": ReadoutHead,
}
# Arguments of a head that base and data decide.
GIVEN = ("layers", "channels", "kind", "target", "level_range", "label_range", "timestep_range", "base_model",
         "base_class", "base_config", "base_fingerprint", "noise_kind", "noise_fingerprint")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReadoutArgs:
    """Settings of a run: the keys of a recipe, the flags of the command line."""

    output_dir: str = HfArg(help="folder of the head to write; the checkpoint lies in it")
    pretrained_model_name_or_path: str = HfArg(help="pipeline folder or Hub id of the frozen base")
    revision: str | None = HfArg(default=None, help="branch, tag or commit of the base on the Hub")
    base_dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="of the frozen base")
    kind: Literal["spatial", "depth", "appearance", "correspondence"] = HfArg(default="spatial", help="what is read")
    target: str = HfArg(default="edges", help="edges (computed from the images), or what --label_column shows")
    head: dict | str | None = HfArg(default=None, help="widths: arguments of ReadoutHead or DepthHead, a mapping")
    layers: str | None = HfArg(default=None, help="list of full module paths; default: the paper's")
    weak_layers: str | None = HfArg(default=None, help="of the weak depth head, which is trained beside it")
    label_range: str = HfArg(default="[-1, 1]", help="black and white of the label column, as numbers")
    level_range: str | None = HfArg(default=None, help="timesteps to train at; depth: the lower 80 %%")
    dataset_name: str = HfArg(default="digits", help="digits, or a path or Hub id for `datasets`")
    dataset_split: str = HfArg(default="train", help="split to train on")
    eval_split: str | None = HfArg(default=None, help="split to measure spatial and depth heads on")
    image_column: str = HfArg(default="image", help="images; for correspondence the first of each pair")
    label_column: str = HfArg(default="label_image", help="images that show the label; grey where the head has one")
    positive_column: str = HfArg(default="positive", help="appearance: another view of the same subject")
    negative_column: str = HfArg(default="negative", help="appearance: the image with another look")
    second_column: str = HfArg(default="second_image", help="correspondence: the second image of each pair")
    points_column: str = HfArg(default="points", help="correspondence: [y, x] points of the first image, in pixels")
    second_points_column: str = HfArg(default="second_points", help="the same points in the second image")
    max_points: int = HfArg(default=64, help="points of a pair that are used")
    resolution: int | None = HfArg(default=None, help="side of the images; default: that of the base")
    cache_images: bool = HfArg(default=False, help="decode every image once and keep it in memory")
    random_flip: bool = HfArg(default=False, help="mirror half of the images with their labels")
    class_label: int | None = HfArg(default=None, help="null class of a base whose config tells none")
    train_batch_size: int = HfArg(default=8, help="rows of the data set for one process")
    max_train_steps: int = HfArg(default=5000, help="optimizer steps")
    learning_rate: float = HfArg(default=1e-3, help="of AdamW, constant")
    adam_weight_decay: float = HfArg(default=0.0, help="weight decay of AdamW")
    seed: int = HfArg(default=0, help="of weights, data order, levels and noise")
    checkpointing_steps: int = HfArg(default=500, help="optimizer steps between checkpoints; only the last is kept")
    logging_steps: int = HfArg(default=50, help="steps averaged into one line of loss.jsonl")
    dataloader_num_workers: int = HfArg(default=0, help="processes that decode images")
    push_to_hub: bool = HfArg(default=False, help="upload the finished head to --hub_model_id")
    hub_model_id: str | None = HfArg(default=None, help="user/name")
    dry_run: bool = HfArg(default=False, help="print the resolved recipe, and stop")

    def __post_init__(self) -> None:
        for name in ("head", "layers", "weak_layers", "label_range", "level_range"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, json.loads(value) if isinstance(value, str) else value)
            except json.JSONDecodeError as error:
                like = '{"width": 48}' if name == "head" else '["mid_block"]' if "layers" in name else "[0, 600]"
                raise ValueError(f"`{name}` is JSON, such as --{name} '{like}'; got {value!r}.") from error
        object.__setattr__(self, "head", self.head or {})
        allowed = [name for name in inspect.signature(HEADS[self.kind].__init__).parameters if name not in GIVEN]
        check_keys("`head`", self.head, allowed)
        for name in ("label_range", "level_range"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or not value[0] < value[1]):
                raise ValueError(f"`{name}` must be [low, high] with low < high, got {value}.")
        for name in ("train_batch_size", "max_train_steps", "checkpointing_steps", "logging_steps", "learning_rate",
                     "max_points"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.weak_layers is not None and self.kind != "depth":
            raise ValueError(f"`weak_layers` is for kind: depth, got kind: {self.kind}.")
        if self.random_flip and self.kind == "correspondence":
            raise ValueError("`random_flip` would move images off their points; drop it for kind: correspondence.")
        if self.push_to_hub and (self.hub_model_id is None or not is_repo_id(self.hub_model_id)):
            raise ValueError(f"`push_to_hub` needs `hub_model_id`: user/name, got {self.hub_model_id!r}.")

    def identity(self) -> dict:
        """The settings that decide the weights: a checkpoint of others is refused."""
        free = {"output_dir", "cache_images", "checkpointing_steps", "logging_steps", "dataloader_num_workers",
                "max_train_steps", "eval_split", "push_to_hub", "hub_model_id", "dry_run"}  # fmt: skip
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in free}

    def to_yaml(self) -> str:
        leave_out = ("output_dir", "push_to_hub", "hub_model_id", "dry_run")
        recipe = {key: value for key, value in dataclasses.asdict(self).items() if key not in leave_out}
        return yaml.safe_dump(recipe, sort_keys=False, width=119)


def parse_args(argv: list[str], description: str | None = None) -> ReadoutArgs:
    return parse_recipe([ReadoutArgs], argv, description)[0]
