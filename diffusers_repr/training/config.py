"""`TrainingConfig`: the settings of the loop, the same for every method."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from diffusers_repr.config.recipe import setting
from diffusers_repr.hub import is_repo_id

# What changes neither weights nor data order: a run may go on with other values.
_FREE = (
    "output_dir", "checkpointing_steps", "checkpoints_total_limit", "logging_steps", "resume_from_checkpoint",
    "save_dtype", "eval_batch_size", "num_inference_steps", "validation_steps", "report_to", "dataloader_num_workers",
    "push_to_hub", "hub_model_id", "hub_private", "dry_run",
)  # fmt: skip
# Settings that runs of earlier versions did not have: at these values a checkpoint of one is of the same run.
_LATER = {"optimizer": "adamw", "sgd_momentum": 0.0, "lr_step_rules": None}
_NUMBER = r"\d*\.?\d+(e-?\d+)?"
_RULES = re.compile(rf"({_NUMBER}:\d+,)+{_NUMBER}")
_NOT_A_RECIPE = ("output_dir", "resume_from_checkpoint", "dry_run", "push_to_hub", "hub_model_id", "hub_private")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of `train`: keys of a recipe, flags of the scripts; names are those of diffusers' own scripts.

    Raises:
        ValueError: For a value out of its range, naming the setting.
    """

    output_dir: str = setting("outputs/run", "pipeline folder to write; the checkpoints lie in it")
    train_batch_size: int = setting(64, "samples of one process and micro-batch")
    gradient_accumulation_steps: int = setting(1, "micro-batches in an optimizer step")
    max_train_steps: int = setting(1000, "optimizer steps")
    learning_rate: float = setting(1e-4, "peak learning rate")
    lr_scheduler: Literal["constant", "linear", "cosine", "piecewise_constant"] = setting(
        "constant", "shape after the warm-up"
    )
    lr_step_rules: str | None = setting(
        None, "of piecewise_constant, as in diffusers: factor:step, ..., last factor (1:700,0.1:1400,0.01)"
    )
    lr_warmup_steps: int = setting(0, "steps of linear warm-up")
    optimizer: Literal["adamw", "sgd"] = setting("adamw", "which optimizer")
    sgd_momentum: float = setting(0.0, "momentum of sgd")
    adam_beta1: float = setting(0.9, "AdamW's beta1")
    adam_beta2: float = setting(0.999, "AdamW's beta2")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon")
    adam_weight_decay: float = setting(0.0, "weight decay of AdamW")
    max_grad_norm: float = setting(1.0, "clip the gradient's norm to this; 0: do not")
    ema_max_decay: float = setting(0.9999, "decay of the moving average, which is what is saved")
    ema_warmup: bool = setting(True, "(1 + n) / (10 + n) as the decay where that is less")
    mixed_precision: str | None = setting(None, "no, fp16 or bf16; default: what accelerate is set to")
    allow_tf32: bool = setting(False, "TF32 matrix products in float32 parts, on GPUs that have it")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    torch_compile: bool = setting(False, "compile the networks with torch.compile")
    lora_rank: int = setting(0, "train low-rank adapters of the attention only (peft); 0: all weights")
    seed: int = setting(0, "of weights, data order, noise and samples")
    checkpointing_steps: int = setting(500, "optimizer steps between checkpoints")
    checkpoints_total_limit: int = setting(2, "how many of the newest checkpoints to keep")
    resume_from_checkpoint: str = setting(
        "latest", "latest, the name of one (checkpoint-00000500), or none, which refuses to continue"
    )
    logging_steps: int = setting(50, "steps averaged into one line of loss.jsonl")
    dataloader_num_workers: int = setting(0, "processes that prepare micro-batches; of a stream: threads")
    report_to: str = setting("none", "trackers of accelerate: tensorboard, wandb, all or none")
    validation_steps: int = setting(0, "steps between grids of samples in samples/; 0: only at the end")
    save_dtype: Literal["float32", "float16", "bfloat16"] = setting("float32", "of the saved pipeline")
    eval_batch_size: int = setting(64, "images in samples.png, in rows of 8; 0: none")
    num_inference_steps: int = setting(50, "sampling steps for the grids of samples")
    push_to_hub: bool = setting(False, "push the result, without its checkpoints")
    hub_model_id: str | None = setting(None, "user/name to push to")
    hub_private: bool = setting(False, "make the repository private")
    dry_run: bool = setting(False, "print the resolved recipe, parameter counts and memory, and stop")

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                     "checkpoints_total_limit", "logging_steps", "learning_rate",
                     "num_inference_steps"):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        for name in (
            "lora_rank",
            "lr_warmup_steps",
            "max_grad_norm",
            "sgd_momentum",
            "validation_steps",
            "dataloader_num_workers",
            "seed",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        if self.mixed_precision not in (None, "no", "fp16", "bf16"):
            raise ValueError(f"`mixed_precision` is no, fp16 or bf16, got {self.mixed_precision!r}.")
        if (self.lr_scheduler == "piecewise_constant") != (self.lr_step_rules is not None):
            raise ValueError("`lr_step_rules` goes with `lr_scheduler: piecewise_constant`, and with no other.")
        if self.lr_step_rules is not None and _RULES.fullmatch(self.lr_step_rules) is None:
            raise ValueError(f"`lr_step_rules` is like 1:700,0.1:1400,0.01; got {self.lr_step_rules!r}.")
        other = {"sgd": "adam_weight_decay", "adamw": "sgd_momentum"}[self.optimizer]
        if getattr(self, other):
            raise ValueError(f"`{other}` is of another optimizer than `optimizer: {self.optimizer}`; leave it at 0.")
        if self.eval_batch_size < 0 or self.eval_batch_size % 8:
            raise ValueError(f"`eval_batch_size` must be a multiple of 8, or 0, got {self.eval_batch_size}.")
        if not 0 <= self.ema_max_decay <= 1:
            raise ValueError(f"`ema_max_decay` lies in [0, 1], got {self.ema_max_decay}.")
        if self.push_to_hub and not (is_repo_id(self.hub_model_id or "") and "/" in str(self.hub_model_id)):
            raise ValueError(f"`push_to_hub` needs `hub_model_id`, user/name; got {self.hub_model_id!r}.")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights: a checkpoint of others is refused."""
        free = {*_FREE, *({"max_train_steps"} if self.lr_scheduler in ("constant", "piecewise_constant") else ())}
        kept = {key: value for key, value in dataclasses.asdict(self).items() if key not in free}
        return {k: v for k, v in kept.items() if k not in _LATER or v != _LATER[k]}


def recipe_of(*settings: Any) -> dict[str, Any]:
    """The keys of a recipe that gives these settings again, without places and modes of a run."""
    merged = {k: v for part in settings for k, v in dataclasses.asdict(part).items()}
    return {key: value for key, value in merged.items() if key not in _NOT_A_RECIPE}
