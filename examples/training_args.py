"""Settings of a training run: the fields of `TrainingArgs` are the keys of a recipe and the flags of the script."""

import argparse
import dataclasses
import difflib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from diffusers import DDPMScheduler, UNet2DModel
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class TrainingArgs:
    """Settings of a run: the keys of a recipe, the flags of the command line."""

    output_dir: str = HfArg(help="pipeline folder to write; the checkpoints lie in it")
    model: dict | str | None = HfArg(default=None, help="arguments of UNet2DModel, a mapping (JSON in a flag)")
    scheduler: dict | str | None = HfArg(default=None, help="arguments of DDPMScheduler, a mapping")
    dataset_name: str = HfArg(default="digits", help="digits, or a path or Hub id for `datasets`")
    dataset_split: str = HfArg(default="train", help="split to train on")
    image_column: str = HfArg(default="image", help="column that holds the images")
    label_column: str = HfArg(default="label", help="ClassLabel column of a class-conditional model")
    label_dropout: float = HfArg(default=0.1, help="share of labels that become the null id, the number of classes")
    cache_images: bool = HfArg(default=False, help="decode every image once and keep it in memory")
    random_flip: bool = HfArg(default=False, help="mirror half of the images")
    random_rotation: float = HfArg(default=0.0, help="turn images by up to so many degrees")
    random_shift: float = HfArg(default=0.0, help="move them by up to this share of their side")
    random_scale: float = HfArg(default=0.0, help="shrink or enlarge them by up to this share")
    train_batch_size: int = HfArg(default=64, help="images of one process and micro-batch")
    gradient_accumulation_steps: int = HfArg(default=1, help="micro-batches in an optimizer step")
    max_train_steps: int = HfArg(default=1000, help="optimizer steps")
    learning_rate: float = HfArg(default=1e-4, help="peak learning rate")
    lr_scheduler: Literal["constant", "cosine"] = HfArg(default="cosine", help="shape after the warm-up")
    lr_warmup_steps: int = HfArg(default=500, help="steps of linear warm-up")
    adam_weight_decay: float = HfArg(default=0.0, help="weight decay of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="clip the gradient's norm to this")
    ema_max_decay: float = HfArg(default=0.9999, help="EMA decay, or (1 + n) / (10 + n) where that is less")
    mixed_precision: str | None = HfArg(default=None, help="no, fp16 or bf16; default: what accelerate is set to")
    seed: int = HfArg(default=0, help="of weights, data order, noise and samples")
    checkpointing_steps: int = HfArg(default=500, help="optimizer steps between checkpoints")
    checkpoints_total_limit: int = HfArg(default=2, help="how many of the newest checkpoints to keep")
    resume_from_checkpoint: Literal["latest", "none"] = HfArg(default="latest", help="none refuses to continue")
    logging_steps: int = HfArg(default=50, help="steps averaged into one line of loss.jsonl")
    dataloader_num_workers: int = HfArg(default=0, help="processes that decode images")
    save_dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="of the saved pipeline")
    eval_batch_size: int = HfArg(default=64, help="images in samples.png, in rows of 8; 0: none")
    ddpm_num_inference_steps: int = HfArg(default=1000, help="sampling steps for samples.png")
    dry_run: bool = HfArg(default=False, help="print the resolved recipe and the parameter count, and stop")

    def __post_init__(self) -> None:
        for name, target in (("model", UNet2DModel), ("scheduler", DDPMScheduler)):
            mapping = getattr(self, name)
            mapping = json.loads(mapping) if isinstance(mapping, str) else mapping or {}
            if not isinstance(mapping, dict):
                raise ValueError(f"`{name}` must be a mapping of {target.__name__}'s arguments, got {mapping!r}.")
            check_keys(f"`{name}`", mapping, inspect.signature(target.__init__).parameters)
            object.__setattr__(self, name, mapping)
        if self.model.get("sample_size") is None:
            raise ValueError("`model` needs `sample_size`, the side of the images.")
        if self.class_conditional and self.model.get("class_embed_type") is not None:
            raise ValueError("`model` has `num_class_embeds`, which only the `class_embed_type` null uses; drop one.")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"`label_dropout` is a probability, got {self.label_dropout}.")
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                     "checkpoints_total_limit", "logging_steps", "learning_rate", "max_grad_norm"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.eval_batch_size < 0 or self.eval_batch_size % 8:
            raise ValueError(f"`eval_batch_size` must be a multiple of 8, or 0, got {self.eval_batch_size}.")

    @property
    def class_conditional(self) -> bool:
        """Whether the model takes labels; without them the settings of labels are no part of a run."""
        return self.model.get("num_class_embeds") is not None

    @property
    def null_label(self) -> int:
        """The id of a dropped label, after those of the classes."""
        return self.model["num_class_embeds"] - 1

    def settings(self) -> dict:
        """The fields that mean something to the model of this run."""
        labels = () if self.class_conditional else ("label_column", "label_dropout")
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in labels}

    def identity(self) -> dict:
        """The settings that decide the weights: a checkpoint of others is refused."""
        free = {"output_dir", "cache_images", "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
                "resume_from_checkpoint", "dataloader_num_workers", "save_dtype", "eval_batch_size",
                "ddpm_num_inference_steps", "dry_run"}  # fmt: skip
        free |= {"max_train_steps"} if self.lr_scheduler == "constant" else set()
        return {key: value for key, value in self.settings().items() if key not in free}

    def to_yaml(self) -> str:
        leave_out = ("output_dir", "resume_from_checkpoint", "dry_run")
        recipe = {key: value for key, value in self.settings().items() if key not in leave_out}
        return yaml.safe_dump(recipe, sort_keys=False, width=119)


def parse_args(argv: list[str], description: str | None = None) -> TrainingArgs:
    return parse_settings(TrainingArgs, argv, description)


def parse_settings(kind: type[Settings], argv: list[str], description: str | None = None) -> Settings:
    """Settings of a dataclass: the recipe of `--config` first, the command line over it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    known, flags = parser.parse_known_args(argv)
    recipe = {}
    if known.config:
        if not Path(known.config).is_file():
            near = sorted(path.name for path in (Path(__file__).parent / "configs").glob("*.yaml"))
            raise FileNotFoundError(f"No recipe {known.config!r}; --config takes a YAML file. In configs/: {near}.")
        recipe = yaml.safe_load(Path(known.config).read_text())
        if not isinstance(recipe, dict):
            raise ValueError(f"{known.config} holds a {type(recipe).__name__}; a recipe is a mapping of key: value.")
        check_keys(known.config, recipe, (setting.name for setting in dataclasses.fields(kind)))
    given = []
    for key, value in recipe.items():
        if value is not None:  # null leaves the default
            given += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    parser = HfArgumentParser(kind, description=description, parents=[parser], allow_abbrev=False)
    return parser.parse_args_into_dataclasses(given + flags, look_for_args_file=False)[0]


def check_keys(place: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    allowed = [name for name in allowed if name != "self"]
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=3) or sorted(allowed)
            raise ValueError(f"Unknown key {key!r} in {place}. Closest allowed: {near}.")
