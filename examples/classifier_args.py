"""Settings of a classifier's training: the keys of a recipe, the flags of `train_classifier.py`."""

import dataclasses
import inspect
import json
from typing import Literal

import yaml
from transformers.hf_argparser import HfArg

from diffusers_repr.hub import is_repo_id
from diffusers_repr.models import NoisyClassifier
from diffusers_repr.training.recipe import check_keys, parse_recipe

# Arguments of NoisyClassifier that base and data decide.
GIVEN = ("in_channels", "num_classes", "sample_size", "num_train_timesteps", "noise_schedule", "base_model",
         "latent_scale", "id2label")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClassifierArgs:
    """Settings of a run: the keys of a recipe, the flags of the command line."""

    output_dir: str = HfArg(help="model folder to write; the checkpoints lie in it")
    pretrained_model_name_or_path: str = HfArg(help="pipeline folder or Hub id: its noise process, its VAE")
    revision: str | None = HfArg(default=None, help="branch, tag or commit of the pipeline on the Hub")
    model: dict | str | None = HfArg(default=None, help="arguments of NoisyClassifier, a mapping (JSON in a flag)")
    dataset_name: str = HfArg(default="digits", help="digits, or a path or Hub id for `datasets`")
    dataset_split: str = HfArg(default="train", help="split to train on")
    eval_split: str = HfArg(default="test", help="split to measure the finished model on, or none")
    image_column: str = HfArg(default="image", help="column that holds the images")
    label_column: str = HfArg(default="label", help="ClassLabel column that holds the classes")
    resolution: int | None = HfArg(default=None, help="side of the images; default: that of the pipeline")
    cache_images: bool = HfArg(default=False, help="decode every image once and keep it in memory")
    random_flip: bool = HfArg(default=False, help="mirror half of the images")
    random_rotation: float = HfArg(default=0.0, help="turn images by up to so many degrees")
    random_shift: float = HfArg(default=0.0, help="move them by up to this share of their side")
    random_scale: float = HfArg(default=0.0, help="shrink or enlarge them by up to this share")
    train_batch_size: int = HfArg(default=64, help="images of one process and step")
    max_train_steps: int = HfArg(default=1000, help="optimizer steps")
    learning_rate: float = HfArg(default=3e-4, help="peak learning rate")
    lr_scheduler: Literal["constant", "cosine"] = HfArg(default="cosine", help="shape after the warm-up")
    lr_warmup_steps: int = HfArg(default=100, help="steps of linear warm-up")
    adam_weight_decay: float = HfArg(default=0.05, help="weight decay of AdamW")
    max_grad_norm: float = HfArg(default=1.0, help="clip the gradient's norm to this")
    noise_bins: int = HfArg(default=5, help="equal parts of the range of noise levels, for the log and the card")
    mixed_precision: str | None = HfArg(default=None, help="no, fp16 or bf16; default: what accelerate is set to")
    seed: int = HfArg(default=0, help="of weights, data order, timesteps and noise")
    checkpointing_steps: int = HfArg(default=500, help="optimizer steps between checkpoints")
    checkpoints_total_limit: int = HfArg(default=2, help="how many of the newest checkpoints to keep")
    resume_from_checkpoint: Literal["latest", "none"] = HfArg(default="latest", help="none refuses to continue")
    logging_steps: int = HfArg(default=50, help="steps averaged into one line of loss.jsonl")
    dataloader_num_workers: int = HfArg(default=0, help="processes that decode images")
    save_dtype: Literal["float32", "float16", "bfloat16"] = HfArg(default="float32", help="of the saved model")
    push_to_hub: bool = HfArg(default=False, help="upload the model folder when done")
    hub_model_id: str | None = HfArg(default=None, help="user/name to upload to")
    hub_private: bool = HfArg(default=False, help="make a repository that only you see")
    dry_run: bool = HfArg(default=False, help="print the resolved recipe and stop")

    def __post_init__(self) -> None:
        mapping = json.loads(self.model) if isinstance(self.model, str) else self.model or {}
        if not isinstance(mapping, dict):
            raise ValueError(f"`model` must be a mapping of NoisyClassifier's arguments, got {mapping!r}.")
        if taken := [name for name in GIVEN if name in mapping]:
            raise ValueError(f"`model` sets {taken}, which the pipeline and the data set decide; leave them out.")
        check_keys("`model`", mapping, [n for n in inspect.signature(NoisyClassifier).parameters if n not in GIVEN])
        object.__setattr__(self, "model", mapping)
        for name in ("train_batch_size", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit",
                     "logging_steps", "learning_rate", "max_grad_norm", "noise_bins"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.resolution is not None and self.resolution <= 0:
            raise ValueError(f"`resolution` must be positive, got {self.resolution}.")
        if self.push_to_hub and not (is_repo_id(self.hub_model_id or "") and "/" in self.hub_model_id):
            raise ValueError(f"`push_to_hub` needs `hub_model_id`, user/name; got {self.hub_model_id!r}.")

    def identity(self) -> dict:
        """The settings that decide the weights: a checkpoint of others is refused."""
        free = {"output_dir", "eval_split", "cache_images", "checkpointing_steps", "checkpoints_total_limit",
                "logging_steps", "resume_from_checkpoint", "dataloader_num_workers", "save_dtype", "push_to_hub",
                "hub_model_id", "hub_private", "dry_run", "pretrained_model_name_or_path", "revision"}  # fmt: skip
        free |= {"max_train_steps"} if self.lr_scheduler == "constant" else set()
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in free}

    def to_yaml(self) -> str:
        leave_out = ("output_dir", "resume_from_checkpoint", "dry_run", "push_to_hub", "hub_model_id", "hub_private")
        recipe = {key: value for key, value in dataclasses.asdict(self).items() if key not in leave_out}
        return yaml.safe_dump(recipe, sort_keys=False, width=119)


def parse_args(argv: list[str], description: str | None = None) -> ClassifierArgs:
    return parse_recipe([ClassifierArgs], argv, description)[0]
